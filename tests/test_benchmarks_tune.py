"""``python -m benchmarks tune`` in Triton's interpreter: its candidates, a run of it all, and what it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton")

from benchmarks import cuda, tune
from benchmarks.__main__ import main
from benchmarks.cuda_cells import Cell, Contender
from benchmarks.rows import Results, Row
from fastattn.backends.triton import configs
from tests.child_jobs import InProcess

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here, and nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_candidates_are_few_and_have_everything_on_and_off() -> None:
    for arch, bits, bucket in configs.TABLE:
        for kernel in ("forward", "dkdv", "dq"):
            table, *others = tune.candidates(arch, bits, bucket, kernel)
            assert table is configs.TABLE[arch, bits, bucket][kernel]
            assert len({str(c) for c in (table, *others)}) == 1 + len(others) <= 12
            for feature in ("descriptors", "specialize"):
                has = {getattr(c, feature) for c in others}
                assert has <= ({True, False} if arch in ("sm_90", "sm_100") and kernel != "dkdv" else {False})
    for arch in ("sm_90", "sm_100"):
        found = {(c.descriptors, c.specialize) for c in tune.candidates(arch, 16, 128, "forward")}
        assert found == {(False, False), (False, True), (True, False), (True, True)}
    assert all(c.num_warps == 8 for c in tune.candidates("sm_90", 16, 64, "forward") if c.specialize)
    for arch, bits, bucket, kernel in configs.VARIANTS:
        assert configs.TABLE[arch, bits, bucket][kernel] not in configs.VARIANTS[arch, bits, bucket, kernel]
        assert configs.bucket(configs.Features(bucket, bucket)) == bucket


def test_cells_have_every_kind_among_the_first() -> None:
    every = tune.cells()
    kinds = [{(c.case.head_dim, c.case.causal, c.direction) for c in some} for some in (every[:12], every)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 12
    assert not [c for c in every if c.deterministic or c.case.heads_k]


def test_a_variant_stands_in_the_tables_place() -> None:
    f = configs.Features(128, 128)
    table, *others = tune.candidates("sm_90", 16, 128, "forward")
    with tune.in_table("sm_90", 16, 128, "forward", others[0]):
        assert configs.config("sm_90", 16, f, "forward") is configs.config("interpreter", 16, f, "dq") is others[0]
    assert configs.config("sm_90", 16, f, "forward") is table


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="rehearsed on the CPU, where Triton is interpreted: not where there is a GPU"
)
def test_a_rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, with a candidate that is wrong, but in this process and with few samples."""

    def who(cell: Cell, device: torch.device) -> list[Contender]:
        found = real(cell, device)
        forward = found[0].forward
        wrong = Contender(f"{tune.DEFAULT} {tune.KERNELS[cell.direction][-1]} wrong", lambda *x: 1.5 * forward(*x))
        return [*found, wrong]

    real, seen = tune.contenders, []
    config = configs.config

    def spied(*arguments: Any) -> configs.Config:
        seen.append(config(*arguments))
        return seen[-1]

    monkeypatch.setattr(tune, "contenders", who)
    monkeypatch.setattr("fastattn.backends.triton.launch.config", spied)
    monkeypatch.setattr(cuda, "Child", InProcess)
    monkeypatch.setattr(cuda, "_ceilings", lambda device, quick: {"matmul bfloat16": 100.0, "copy": 10.0})
    monkeypatch.setattr("benchmarks.timing.MAX_ROUNDS", 1)
    assert tune.run(tmp_path, CPU, True, 600.0, ["tune"]) == 1, "a candidate was wrong"
    said = capsys.readouterr().out
    assert said.count("FAILED: fastattn triton ") == 2 and "A rehearsal" in said
    rows = Results.load(tmp_path / "tune.json").rows
    assert {row.suite for row in rows} == {"tune"} and {row.direction for row in rows} == {"forward", "backward"}
    timed = {row.contender for row in rows if row.median_ms}
    for row in rows:
        assert (row.median_ms is None) == ("wrong" in row.contender or row.contender == "torch flex"), row
    assert {"torch flash", tune.DEFAULT} < timed and len(timed) >= 5
    names = {name.split(" ", 3)[3] for name in timed if name.startswith(tune.DEFAULT + " ")}
    assert names <= set(map(str, seen)), "a candidate was timed and never put in the table's place"
    assert "| forward | 16 | 1 | " in (tmp_path / "tune.md").read_text()


def row(case: str, contender: str, ms: float, dim: int = 128, direction: str = "forward") -> Row:
    return Row("tune", case, direction, "bfloat16", contender, {"head_dim": dim}, median_ms=ms)


def test_what_the_rows_decide() -> None:
    rows = [
        row("S1", tune.DEFAULT, 2.0),
        row("S1", f"{tune.DEFAULT} forward A", 1.0),
        row("S1", f"{tune.DEFAULT} forward B", 4.0),
        row("S1", "torch flex", 2.0),
        row("S1", "torch flash", 1.6),
        row("S2", tune.DEFAULT, 2.0),
        row("S2", f"{tune.DEFAULT} forward A", 2.0),
        row("S2", "torch flex", 3.0),
        row("S3", tune.DEFAULT, 1.0, dim=64),
        row("S3", "torch flash", 0.1, dim=64),
        row("S3", tune.DEFAULT, 2.0, direction="backward"),
        row("S3", f"{tune.DEFAULT} dq C", 3.0, direction="backward"),
    ]
    by_kernel = {(r[0], r[1]): r[2:] for r in tune.config_table(rows).rows}
    assert by_kernel["forward", "128"] == ["2", "A", "A: 1.41×; B: 0.50×"]  # sqrt(2 x 1)
    assert by_kernel["forward", "64"] == ["1", "the table's", ""]
    assert by_kernel["dq", "128"] == ["1", "the table's", "C: 0.67×"]
    against = {(r[0], r[1], r[2]): r[3:] for r in tune.rival_table(rows).rows}
    # sqrt(1 x 1.5) and sqrt(2 x 1.5); FLASH counts at head_dim 128 alone
    assert against["forward", "torch flex", tune.DEFAULT] == ["2", "1.22×", "1.00× in S1", "1.15×", "reached"]
    assert against["forward", "torch flex", tune.BEST] == ["2", "1.73×", "1.50× in S2", "1.15×", "reached"]
    assert against["forward", "torch flash", tune.DEFAULT] == ["1", "0.80×", "0.80× in S1", "0.90×", "missed"]
    assert len(against) == 4
