"""``python -m benchmarks tune``: the Triton tables' configs and their variants, beside torch's kernels, in one run.

For each head dim, direction and kernel of ``fastattn.backends.triton.configs`` the table's config and each of its
``VARIANTS`` is put in the table's place, checked, and timed in turn with the others, FlexAttention and torch's FLASH.
Rows go to ``tune.json``; what was fastest is printed beside what the table has, for a person to put into the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks import machine
from benchmarks.check import compare, run_attention, run_naive, worst
from benchmarks.peers import Case, _flex, _ours, _sdpa
from benchmarks.rows import Results, Row
from benchmarks.timing import time_calls
from fastattn.backends.triton import architecture, configs

KERNELS = {"forward": "forward", "dkdv": "backward", "dq": "backward"}


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
    """The table's config first, then its variants."""
    return [configs.TABLE[arch, bits, bucket][kernel], *configs.VARIANTS.get((arch, bits, bucket, kernel), ())]


def _cases(quick: bool) -> Iterator[Case]:
    for head_dim in (64,) if quick else (64, 128, 256):
        for causal in (False, True):
            lengths = (256,) if quick else (2048, 8192)
            for length in lengths:
                yield Case(
                    max(1, 16384 // length) if not quick else 1, 2 if quick else 16, length, length, head_dim, causal
                )


def _call(attention: Any, inputs: tuple[Any, ...], direction: str) -> Any:
    q, k, v, _, grad = inputs
    if direction == "forward":
        return torch.no_grad()(lambda: attention(q, k, v, None))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, None)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def tune_case(case: Case, arch: str, kernel: str, device: torch.device) -> Iterator[Row]:
    """One row per config of ``kernel`` and per peer; what fails its check or its launch says so and is not timed."""
    dtype, direction, ours = torch.bfloat16, KERNELS[kernel], _ours("triton", case.causal)
    bucket = configs.bucket(configs.Features(case.head_dim, case.head_dim))
    inputs = case.inputs(dtype, device)
    q, k, v, mask, grad = inputs
    oracle = run_naive(q, k, v, mask, grad, case.causal, torch.float64)
    naive = run_naive(q, k, v, mask, grad, case.causal, dtype)
    calls, blank, errors = {}, {}, {}
    for config in candidates(arch, 16, bucket, kernel):
        name = f"{kernel} {config}"

        def placed(*tensors: Any, config: configs.Config = config) -> Any:
            with in_table(arch, 16, bucket, kernel, config):
                return ours(*tensors)

        try:
            with in_table(arch, 16, bucket, kernel, config):
                found = worst(compare(run_attention(ours, q, k, v, mask, grad), oracle, naive, dtype))
            errors[name] = found.error
            if not found.passed:
                blank[name] = f"wrong: {found.name} off by {found.error:.2g}, allowed {found.limit:.2g}"
                continue
            call = _call(placed, inputs, direction)
            if direction == "backward":

                def call(call: Any = call, config: configs.Config = config) -> None:
                    with in_table(arch, 16, bucket, kernel, config):
                        call()

            calls[name] = call
        except Exception as error:  # a compiler's failure is a result
            blank[name] = f"{type(error).__name__}: {str(error)[:160]}"
    peers = {"torch flex": _flex(case, device), "torch sdpa flash": _sdpa(case, SDPBackend.FLASH_ATTENTION)}
    for name, attention in peers.items() if device.type == "cuda" else ():
        try:
            calls[name] = _call(attention, inputs, direction)
        except RuntimeError as error:
            blank[name] = f"{type(error).__name__}: {str(error)[:160]}"
    samples = time_calls(calls, device) if device.type == "cuda" else {}
    flops = case.spec(dtype, device).flops(direction)
    for name in [*calls, *blank]:
        row = Row("tune", str(case), direction, "bfloat16", name, case.labels(), max_error=errors.get(name))
        if sample := samples.get(name):
            row.median_ms, row.p20_ms, row.p80_ms, row.samples = (
                sample.median_ms,
                sample.p20_ms,
                sample.p80_ms,
                sample.count,
            )
            row.gflops = flops / sample.median_ms / 1e6
        else:
            row.blank = {"median_ms": blank.get(name, "interpreted: checked, not timed")}
        yield row


def run(out: Path, device: torch.device, quick: bool, arguments: list[str]) -> int:
    """Times everything, writes ``tune.json``, prints each kernel's fastest config. 1 if a config was wrong."""
    results = Results(machine.describe(device, arguments), [])
    arch = architecture(str(device))
    for case in _cases(quick):
        for kernel in KERNELS:
            rows = list(tune_case(case, "sm_90" if arch == "interpreter" else arch, kernel, device))
            results.rows += rows
            timed = sorted((row for row in rows if row.median_ms), key=lambda row: row.median_ms or 0.0)
            print(f"{case} {KERNELS[kernel]}")
            for row in timed:
                print(f"  {row.median_ms:9.4f} ms {(row.gflops or 0) / 1000:7.1f} TFLOP/s  {row.contender}")
            for row in rows:
                if row.blank:
                    print(f"  {row.contender}: {row.blank['median_ms']}")
            results.save(out / "tune.json")
    print(f"written: {out / 'tune.json'}")
    return 1 if any(row.blank.get("median_ms", "").startswith("wrong") for row in results.rows) else 0
