"""``python -m benchmarks tune``: the configs of Triton's kernels beside FlexAttention and torch's FLASH, in one run.

A cell is a call and a direction. In it are timed in turns: the kernels as the tables have them ("fastattn triton"); the
same with another config of one kernel, for each of :func:`candidates`; and the two rivals. Each is checked on the
cell's inputs first, in a child process that may crash or hang (``benchmarks.cuda``, whose machinery this is).
``--seconds`` is the time that the whole run may take; cells are in the order of what matters most.

``tune.json`` has the rows, ``tune.md`` what they decide: each kernel's fastest config, for a person to put into
``fastattn/backends/triton/configs.py``, and the ratios to the rivals beside the aims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks import machine
from benchmarks.cuda import Session
from benchmarks.cuda_cells import TOKENS, WIDTH, Cell, Contender, Gradients
from benchmarks.cuda_table import geomean, groups, ratios
from benchmarks.peers import Case, _flex
from benchmarks.report import machine_lines, make_console
from benchmarks.rows import Results, Row
from benchmarks.table import Table
from fastattn import dispatch
from fastattn.backends.triton import architecture, configs

DEFAULT = "fastattn triton"
BEST = "fastattn best"
KERNELS = {"forward": ("forward",), "backward": ("dkdv", "dq")}
#: Rival -> the geometric mean to reach, and of which head_dim (None: all).
AIMS: dict[str, tuple[float, int | None]] = {"torch flex": (1.15, None), "torch flash": (0.9, 128)}
LENGTHS = (4096, 16384, 1024)
HEAD_DIMS = (128, 64, 256)


@contextmanager
def in_table(arch: str, bits: int, bucket: int, kernel: str, config: configs.Config) -> Iterator[None]:
    """With ``config`` in the table's place and the interpreter's. Triton keeps kernels apart by their tile sizes."""
    row = configs.TABLE[arch, bits, bucket]
    before, row[kernel] = row[kernel], config
    interpreter, configs.INTERPRETER = configs.INTERPRETER, config
    try:
        yield
    finally:
        row[kernel], configs.INTERPRETER = before, interpreter


def candidates(arch: str, bits: int, bucket: int, kernel: str) -> list[configs.Config]:
    """The table's config first; then the others: its tiles and those of VARIANTS, with everything on and off.

    Descriptors (TMA) and warp specialisation are what sm_90 and sm_100 have. On sm_90 Triton 3.6 to 3.9 cannot compile
    a specialised forward of 4 warps; its compiler may even abort.
    """
    table = configs.TABLE[arch, bits, bucket][kernel]
    found = [table]
    for tiles in (table, *configs.VARIANTS.get((arch, bits, bucket, kernel), ())):
        for descriptors in (False, True) if arch in ("sm_90", "sm_100") and kernel != "dkdv" else (False,):
            able = kernel == "forward" and (arch == "sm_100" or (arch == "sm_90" and tiles.num_warps == 8))
            for specialize in (False, True) if able else (False,):
                config = replace(tiles, descriptors=descriptors, specialize=specialize)
                if str(config) not in map(str, found):
                    found.append(config)
    return found


def cells(quick: bool = False) -> list[Cell]:
    """In the order in which they are run."""
    if quick:
        return [Cell(Case(1, 1, 16, 16, 16, causal=True), direction) for direction in KERNELS]
    return [
        Cell(Case(max(1, TOKENS // length), WIDTH // dim, length, length, dim, causal), direction)
        for length in LENGTHS
        for dim in HEAD_DIMS
        for causal in (True, False)
        for direction in KERNELS
    ]


def contenders(cell: Cell, device: torch.device) -> list[Contender]:
    """The table's kernels, the candidates and the rivals. In the interpreter, where nothing is fast, two candidates."""
    case, arch = cell.case, architecture(str(device))
    reasons = dispatch.reasons_against(dispatch.get_backend("triton"), case.spec(torch.bfloat16, device))
    found = [Contender(DEFAULT, partial(fastattn.attention, causal=case.causal, backend="triton"))]
    found[0] = replace(found[0], blank="; ".join(reasons) or None)
    interpreted = arch == "interpreter"
    bucket = configs.bucket(configs.Features(case.head_dim, case.head_dim))
    for kernel in KERNELS[cell.direction] if not reasons else ():
        key = ("sm_90" if interpreted else arch, 16, bucket, kernel)
        for config in candidates(*key)[1 : 3 if interpreted else None]:
            found.append(_placed(found[0], f"{DEFAULT} {kernel} {config}", partial(in_table, *key, config)))
    flash = Contender("torch flash", partial(_flash, case.causal))
    if device.type != "cuda":
        return [*found, Contender("torch flex", _flash, blank="it is compiled for GPUs"), flash]
    flex = _flex(case, device)
    return [*found, Contender("torch flex", lambda q, k, v: flex(q, k, v, None)), flash]


def _flash(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _placed(table: Contender, name: str, place: Callable[[], Any]) -> Contender:
    """The same call with another config in the table's place, while it runs forward and while it runs backward."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with place():
            return table.forward(q, k, v)

    def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Gradients:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = table.forward(*leaves)

        def call() -> tuple[Tensor, ...]:
            with place():
                return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return call

    return Contender(name, forward, backward=backward)


def config_table(rows: Sequence[Row]) -> Table:
    """Per kernel and head_dim: the table's time over each config's, over the cells that both were timed in."""
    body = []
    for direction, found in groups(rows).items():
        dims = {case: next(iter(cell.values())).labels["head_dim"] for case, cell in found.items()}
        for dim in sorted(set(dims.values())):
            some = {case: cell for case, cell in found.items() if dims[case] == dim}
            for kernel in KERNELS[direction]:
                prefix = f"{DEFAULT} {kernel} "
                names = {name for cell in some.values() for name in cell if name.startswith(prefix)}
                speed = {name.removeprefix(prefix): ratios(some, name, DEFAULT) for name in names}
                means = {name: geomean(list(each.values())) for name, each in speed.items() if each}
                order = sorted(means, key=lambda name: -means[name])
                best = order[0] if order and means[order[0]] > 1 else "the table's"
                said = "; ".join(f"{name}: {means[name]:.2f}×" for name in order)
                body.append([kernel, str(dim), str(len(some)), best, said])
    headers = ["kernel", "head_dim", "cells", "fastest", "the table's time over theirs"]
    return Table("Configs: above 1 is faster than the table's", headers, body)


def rival_table(rows: Sequence[Row]) -> Table:
    """The rivals' time over ours, as the table has it and with the fastest candidate of each cell, beside the aims."""
    body = []
    for direction, found in groups(rows).items():
        for rival, (aim, dim) in AIMS.items():
            some = {
                case: cell
                for case, cell in found.items()
                if rival in cell and dim in (None, cell[rival].labels["head_dim"])
            }
            for contender in (DEFAULT, BEST):
                if speed := ratios(some, contender, rival):
                    mean, worst = geomean(list(speed.values())), min(speed, key=lambda case: speed[case])
                    verdict = "reached" if mean >= aim else "missed"
                    of = f"{speed[worst]:.2f}× in {worst}"
                    names = [direction, rival, contender, str(len(speed))]
                    body.append([*names, f"{mean:.2f}×", of, f"{aim:.2f}×", verdict])
    headers = ["direction", "rival", "contender", "cells", "geomean", "worst", "aim", ""]
    return Table("Time of the rival over ours: above 1 is faster", headers, body)


def run(out: Path, device: torch.device, quick: bool, seconds: float, arguments: Sequence[str]) -> int:
    """Writes ``tune.json`` and ``tune.md``; 1 if a config was wrong or the table's failed, 2 without a GPU."""
    if device.type != "cuda" and not quick:
        print(
            "python -m benchmarks tune: torch sees no GPU here, and nothing was measured. "
            "(--device cpu --quick rehearses the program in Triton's interpreter.)"
        )
        return 2
    results = Results(machine.describe(device, arguments), [])
    path = out / "tune.json"
    # A compiler of another package may take long over its first kernel.
    session = Session(device, seconds, contenders, quick=quick, patience_s=180.0, suite="tune")
    session.measure(cells(quick), results, lambda: results.save(path))
    results.save(path)
    tables = [table for table in (config_table(results.rows), rival_table(results.rows)) if table.rows]
    lines = [*machine_lines(results)]
    if device.type != "cuda":
        lines.append("A rehearsal in Triton's interpreter: its times say nothing.")
    blanks = {row.contender: row.blank["median_ms"] for row in results.rows if "median_ms" in row.blank}
    lines += [f"not timed: {name}: {reason}" for name, reason in blanks.items()]
    console = make_console()
    for table in tables:
        console.print(table.rich())
    for line in lines:
        console.print(line, highlight=False)
    text = "\n\n".join([table.markdown() for table in tables] + [f"- {line}" for line in lines])
    path.with_suffix(".md").write_text(text + "\n")
    print(f"written: {path}, {path.with_suffix('.md')}")
    bad = [x for x in session.failures if x.startswith(f"{DEFAULT},") or ": wrong" in x]
    for failure in bad:
        print(f"FAILED: {failure}")
    return 1 if bad or not results.rows else 0
