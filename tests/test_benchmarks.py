"""The benchmark program: it finds a wrong backend, says so by its exit status, and its tables come from rows alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import suites
from benchmarks.__main__ import main
from benchmarks.check import compare
from benchmarks.report import ratio_table, write_report
from benchmarks.rows import Results, Row
from benchmarks.targets import target_table
from benchmarks.textcheck import PADDING, tokenise
from benchmarks.timing import time_calls
from fastattn import dispatch
from fastattn.backends.reference import ReferenceBackend

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is in the extra 'bench'")


class RightBackend(ReferenceBackend):
    name = "right"


class WrongForward(ReferenceBackend):
    name = "wrong"

    def forward(self, *arguments: object) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*arguments)  # type: ignore[arg-type]
        return out * 1.01, lse


class WrongGradient(ReferenceBackend):
    name = "wrong"

    def backward(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dq, dk, dv, dbias = super().backward(*arguments)  # type: ignore[arg-type]
        return dq, dk * 1.01, dv, dbias


class Raising(ReferenceBackend):
    name = "wrong"

    def forward(self, *arguments: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("illegal memory access")


def install(monkeypatch: pytest.MonkeyPatch, cls: type[ReferenceBackend]) -> None:
    """Leave only ``cls`` and the reference as backends, with nothing remembered of the others."""
    classes = {cls.name: (cls.__module__, cls.__qualname__), "reference": dispatch._CLASSES["reference"]}
    monkeypatch.setattr(dispatch, "_CLASSES", classes)
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": (cls.name, "reference")})
    dispatch._make.cache_clear()
    # The operators remember plans by a call's description, so every test of a wrong backend needs fresh ones.
    monkeypatch.setattr("fastattn.ops._plans", {})


@pytest.fixture(autouse=True)
def forget_backends() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes so small that threads only get in each other's way
    yield
    torch.set_num_threads(threads)
    dispatch._make.cache_clear()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Attention is a weighted mean; the weights are a softmax of scores. äöü\n" * 3)
    return path


@needs_rich
@pytest.mark.parametrize(("cls", "status"), [(RightBackend, 0), (WrongForward, 1), (WrongGradient, 1), (Raising, 1)])
def test_check_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, cls: type[ReferenceBackend], status: int
) -> None:
    install(monkeypatch, cls)
    assert main(["check", "--quick", "--device", "cpu", "--text", str(text), "--out", str(tmp_path)]) == status
    results = Results.load(tmp_path / "results.json")
    verdicts = {check["verdict"].split(":")[0] for check in results.checks if check["backend"] == cls.name}
    assert ("FAILED" in verdicts) == (status == 1)
    assert {check["model"] for check in results.checks} == {"CausalLM", "Seq2SeqTransformer"}


@needs_rich
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, WrongGradient)
    assert main(["attention", "module", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = Results.load(tmp_path / "results.json").rows
    wrong = [row for row in rows if row.contender == "fastattn wrong"]
    assert {row.suite for row in wrong} == {"attention", "module"}
    assert all(row.median_ms is None and row.blank["median_ms"].startswith("wrong: ") for row in wrong)
    assert all(row.median_ms is not None for row in rows if row.contender in ("torch sdpa", "naive"))


@needs_rich
def test_suites_run_and_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, RightBackend)
    suites = ["attention", "module", "transformer", "calls"]
    assert main([*suites, "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = Results.load(tmp_path / "results.json")
    assert {row.suite for row in results.rows} == set(suites)
    for row in results.rows:
        assert row.median_ms is not None and row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.peak_memory_mib is not None or row.blank["peak_memory_mib"]
    for key in ("device", "torch", "python", "commit", "command", "ceilings"):
        assert key in results.machine
    (tmp_path / "report.md").unlink()
    assert main(["report", str(tmp_path / "results.json")]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "fastattn right" in page and "% of matmul" in page
    pytest.importorskip("matplotlib")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@needs_rich
def test_what_was_timed_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(bench: suites.Bench) -> Iterator[Row]:
        raise KeyboardInterrupt

    jobs = [*list(suites.SUITES["calls"](torch.device("cpu"), True))[:1], suites.Job("the second", stop)]
    monkeypatch.setitem(suites.SUITES, "calls", lambda device, quick: jobs)
    assert main(["calls", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "interrupted in the second: 1 of 2 jobs are in the results" in capsys.readouterr().out
    assert Results.load(tmp_path / "results.json").rows


def row(contender: str, median: float | None, blank: str = "", case: str = "S1") -> Row:
    reasons = {"median_ms": blank} if blank else {}
    return Row("attention", case, "forward", "float32", contender, median_ms=median, blank=reasons)


@needs_rich
def test_ratio_table() -> None:
    rows = [
        row("fastattn cpu", 2.0),
        row("fastattn triton", None, "interpreted: not timed"),
        row("torch sdpa", 3.0),
        row("naive", 12.0),
        row("fastattn cpu", None, "unsupported: head_dim 80", case="S2"),
        row("fastattn triton", None, "interpreted: not timed", case="S2"),
        row("torch sdpa", 1.0, case="S2"),
    ]
    table = ratio_table("attention", rows)
    assert table.headers == ["case", "dtype", "direction", "fastattn cpu", "torch sdpa", "naive"]
    assert table.rows[0][3:] == ["2.00 (1.50×)", "3.00 (1.00×)", "12.0 (0.25×)"]
    assert table.rows[1][3:] == ["unsupported: head_dim 80", "1.00 (1.00×)", "–"]
    assert "fastattn triton: interpreted: not timed" in table.notes
    assert table.markdown().count("\n|") == 4


def test_decoding_is_held_to_reading_only_beyond_the_cache() -> None:
    rows = []
    for case, beyond, percent in (("short", False, 10), ("long", True, 90)):
        labels = {"seqlen": 4096, "work": "decode float32", "beyond_cache": beyond}
        for name, rate in (("fastattn cpu", percent), ("torch sdpa", 1), ("peak read", 100)):
            rows.append(Row("cpu", case, "forward", "float32", name, labels, 100 / rate, gbytes=rate))
    (line,) = target_table(rows).rows
    assert line[-2:] == ["read 90 to 90 (target 85)", "1 of 1 cells"]


@needs_rich
def test_report_without_rows(tmp_path: Path) -> None:
    machine = {"device": "d", "device_type": "cpu", "threads": 1, "cpu_capability": "c", "command": "x"}
    assert [path.name for path in write_report(Results(machine, []), tmp_path)] == ["report.md"]


def test_tolerance_rule() -> None:
    oracle = {"output": torch.tensor([1.0, -4.0], dtype=torch.float64)}
    naive = {"output": torch.tensor([1.0, -4.001])}
    eps = torch.finfo(torch.float32).eps
    limit = (2 * (torch.tensor(-4.001).double() - -4.0).abs().item() + 8 * eps * 4) / 4
    for value, passed in ((-4.0, True), (-4.0019, True), (-4.01, False), (float("nan"), False)):
        (found,) = compare({"output": torch.tensor([1.0, value])}, oracle, naive, torch.float32)
        assert found.passed is passed and found.limit == pytest.approx(limit)
    (found,) = compare({"output": torch.ones(1, 2)}, oracle, naive, torch.float32)
    assert not found.passed  # a wrong shape does not broadcast its way through


def test_tokenise() -> None:
    tokens = tokenise(b"abc", batch=3, length=8)
    assert tokens.shape == (3, 8)
    assert (tokens != PADDING).sum(1).tolist() == [8, 6, 4]
    assert tokens[0, :4].tolist() == [ord(c) + 1 for c in "abca"]


def test_time_calls_keeps_order_of_speed() -> None:
    small, large = torch.ones(8, 8), torch.ones(512, 512)
    samples = time_calls({"large": lambda: large @ large, "small": lambda: small @ small}, torch.device("cpu"), 0.02)
    assert samples["small"].median_ms < samples["large"].median_ms
    assert all(s.p20_ms <= s.median_ms <= s.p80_ms and s.count >= 3 for s in samples.values())


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.json").write_text("no rows")
    missing, text = str(tmp_path / "missing"), str(tmp_path / "text.json")
    for arguments, message in (
        (["nonsense"], "unknown suite nonsense"),
        (["report"], "report needs a results.json"),
        (["report", missing], "No such file"),
        (["report", text], "is no results.json of this program"),
        (["check", "--text", missing], "there is no file"),
        (["calls", "--text", text], "check is not among the suites"),
        (["calls", "--out", text + "/x"], "--out: "),
        (["calls", "--device", "tpu"], "--device must be cpu or cuda, got tpu"),
        (["calls", "--device", "meta"], "--device must be cpu or cuda, got meta"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2 and message in capsys.readouterr().err
