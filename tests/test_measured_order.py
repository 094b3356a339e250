"""The order of backends on a GPU is made from rows, and read by the dispatch. The rows here are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from benchmarks.order import run, table, winners
from benchmarks.rows import Results, Row
from fastattn import dispatch, measured
from fastattn.backends.reference import ReferenceBackend
from tests.test_dispatch import spec
from tests.tolerance import assert_rounded_alike


def rows(keys: int, cuda: float | str, triton: float | str, direction: str = "forward", **labels: Any) -> list[Row]:
    kind = {"seqlen": keys, "head_dim": 128, "causal": True, "plain": True, **labels}
    found = []
    for name, ms in {"fastattn cuda": cuda, "fastattn triton": triton, "torch cudnn": 0.1}.items():
        row = Row("cuda", str(kind), direction, "bfloat16", name, kind)
        row.median_ms, row.blank = (None, {"median_ms": ms}) if isinstance(ms, str) else (ms, {})
        found.append(row)
    return found


MACHINE = {"device_type": "cuda", "capability": "9.0"}
ROWS = [
    *rows(1024, 2.0, 1.0),
    *rows(2048, 2.0, 1.5),
    *rows(4096, 2.0, 3.0),
    *rows(8192, "wrong: output error 0.1", 9.0),
    *rows(1024, 1.0, 2.0, "backward"),
    *rows(1024, 1.0, 2.0, head_dim=64),
    *rows(1024, 1.0, "unavailable: no triton", head_dim=256),
    *rows(1024, 1.0, 2.0, head_dim=96, plain=False),
    *rows(1024, 1.0, 2.0, "backward", head_dim=96, deterministic=True),
    *rows(512, 1.0, 2.0, causal=False, plain=False, decode=True),
]
MADE = {
    "sm_90": {
        ("backward", "causal"): {128: ((1024, "cuda"),)},
        ("forward", "causal"): {64: ((1024, "cuda"),), 128: ((1024, "triton"), (4096, "cuda"), (8192, "triton"))},
        ("forward", "decode"): {128: ((512, "cuda"),)},
    }
}


def test_rows_become_a_table() -> None:
    assert table(winners([Results(MACHINE, ROWS)])) == MADE
    assert table(winners([Results({"device_type": "cpu"}, ROWS)])) == {}
    later = Results(MACHINE, rows(1024, 0.5, 1.0))
    assert winners([Results(MACHINE, ROWS), later])["sm_90", "forward", "causal", 128, 1024] == "cuda"


def test_the_table_becomes_a_module(tmp_path: Path) -> None:
    path, target = tmp_path / "cuda.json", tmp_path / "measured.py"
    Results(MACHINE, []).save(path)
    assert run([path], target) == 1 and not target.exists()
    Results(MACHINE, ROWS).save(path)
    assert run([path], target) == 0
    module: dict[str, Any] = {}
    exec(target.read_text(), module)
    assert module["FASTEST"] == MADE and module["SOURCES"] == (str(path),)


def test_without_results_the_stated_order_decides() -> None:
    if not measured.FASTEST:
        call = spec(device="cuda", dtype=torch.bfloat16)
        assert dispatch.order(call) == dispatch.order(call, "backward") == dispatch.ORDER["cuda"]


@pytest.mark.parametrize(
    ("first", "direction", "call"),
    [
        ("triton", "forward", {"seqlen_k": 100}),  # shorter than all that was measured
        ("triton", "forward", {"seqlen_k": 4095}),
        ("cuda", "forward", {"seqlen_k": 4096}),
        ("triton", "forward", {"seqlen_k": 9999}),
        ("cuda", "backward", {"seqlen_k": 100}),
        ("cuda", "forward", {"seqlen_k": 2048, "head_dim_qk": 40}),  # as at 64
        ("triton", "forward", {"seqlen_k": 2048, "head_dim_qk": 256}),  # as at 128, the largest
        ("cuda", "forward", {"seqlen_q": 1}),
        (None, "forward", {"window": (None, None)}),  # nothing was measured
        (None, "forward", {"seqlen_q": 1, "softcap": 3.0}),
        (None, "forward", {"seqlen_q": 1, "dtype": torch.float32}),
        (None, "backward", {"seqlen_q": 1}),
    ],
)
def test_the_dispatch_reads_it(
    monkeypatch: pytest.MonkeyPatch, first: str | None, direction: str, call: dict[str, Any]
) -> None:
    monkeypatch.setattr(measured, "FASTEST", MADE)
    monkeypatch.setattr(dispatch, "_architecture", lambda: "sm_90")
    sizes = {"seqlen_q": 2048, "seqlen_k": 2048, "head_dim_qk": 128, "head_dim_v": 32, "window": (None, 0)}
    asked = dispatch.order(spec(**{"device": "cuda", "dtype": torch.float16, **sizes, **call}), direction)
    assert sorted(asked) == sorted(dispatch.ORDER["cuda"])
    assert asked[0] == (first or dispatch.ORDER["cuda"][0])
    monkeypatch.setattr(dispatch, "_architecture", lambda: "sm_80")
    assert dispatch.order(spec(device="cuda", dtype=torch.float16, **sizes), direction) == dispatch.ORDER["cuda"]


class Other(ReferenceBackend):
    name = "triton"
    called: list[str] = []  # noqa: RUF012

    def forward(self, *arguments: Any) -> Any:
        self.called.append("forward")
        return super().forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self.called.append("backward")
        return super().backward(*arguments)


def test_forward_and_backward_may_run_on_two_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Other()
    real = dispatch.get_backend
    monkeypatch.setattr(dispatch, "get_backend", lambda name: other if name == "triton" else real(name))
    monkeypatch.setattr(dispatch, "_fastest", lambda spec, direction: "triton" if direction == "backward" else None)
    q, k, v = (torch.randn(1, 1, 9, 23, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v).sum().backward()
    assert other.called == ["backward"]
    want = torch.autograd.grad(fastattn.attention(q, k, v, backend="reference").sum(), q)[0]
    assert_rounded_alike(q.grad, want)
    fastattn.explain(q, k, v)
    said = capsys.readouterr().out
    assert "RUNS the forward: " in said.split("cpu ")[1] and "RUNS the backward: " in said.split("triton ")[1]
