"""Compiles the Triton kernels for GPUs that are not there: ``python -m tests.triton_aot sm_90`` prints what came out.

A process of its own, because TRITON_INTERPRET=1, under which the tests run, makes kernels that cannot be compiled.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from fastattn.backends.base import Tensors
from fastattn.backends.triton import configs
from fastattn.backends.triton.launch import Launch, plan_backward, plan_forward
from fastattn.spec import AttentionSpec
from tests import ragged
from tests.cases import Case, packed

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def _case(name: str, head_dim_qk: int, head_dim_v: int, **options: Any) -> Case:
    sizes = {"seqlen_q": 128, "seqlen_k": 192, "head_dim_qk": head_dim_qk, "head_dim_v": head_dim_v}
    return Case(name, **{**sizes, **options})


CLASSES = {
    case.name: case
    for case in (
        _case("plain", 128, 128),
        _case("causal", 64, 64, causal=True),
        _case("wide", 256, 256, window=(64, 64)),
        _case("widest", 576, 512, causal=True),
        _case("shaped", 64, 64, causal=True, softcap=9.0, alibi="batch", sinks=True, segments="batch", heads_q=4),
        _case("dropped", 128, 128, causal=True, window=(64, 0), prefix=(9, 50), dropout_p=0.1),
        _case("added", 64, 64, mask=(0, 0, 0, 0), bias=(0, 0, 0, 0)),
        _case("padded", 64, 64, leftpad=(3, 9), used_k=(150, 192), mask=(0, 1, 1, 0), causal=True),
        packed("packed", (128, 20), (192, 20), head_dim_qk=192, head_dim_v=128, causal=True),
        _case("paged", 576, 512, page_size=64, used_k=(150, 192), seqlen_q=2, heads_q=8, heads_k=1, causal=True),
        _case("decode", 128, 128, num_splits=4, seqlen_q=1, heads_q=8, sinks=True),
        _case("float32", 128, 128, causal=True),
    )
}


class Driver:
    """Stands for a GPU of an architecture: kernels are compiled for it, and cannot be run."""

    def __init__(self, arch: str) -> None:
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def prepared(case: Case, dtype: torch.dtype) -> tuple[AttentionSpec, Tensors]:
    """The spec and tensors of a case, as a backend gets them."""
    i = case.make(dtype)
    q, k, v, bias, sinks = (
        x if x is None else x.detach().requires_grad_(case.page_size is None) for x in (i.q, i.k, i.v, i.bias, i.sinks)
    )
    common = {"mask": i.mask, "bias": bias, "sinks": sinks, "dropout_p": case.dropout_p, **i.shaping}
    common |= {"dropout_seed": i.dropout_seed, "softmax_scale": case.softmax_scale}
    arguments = ragged.arguments(i, q, k, v, **common)
    return arguments.spec(), Tensors(*(x if x is None else x.detach() for x in arguments[:5]), *arguments.others)


def launches(spec: AttentionSpec, t: Tensors, arch: str) -> list[Launch]:
    """Every launch of a call, forward and, where it has one, backward."""
    out, lse, planned = plan_forward(spec, arch, t)
    if spec.needs_grad and spec.page_size is None and spec.seqlen_q > 2:
        planned += plan_backward(spec, arch, t, torch.empty_like(out), torch.empty_like(lse), out, lse)[1]
    return planned


def warm_up(launch: Launch) -> Any:
    return launch.kernel.run(**launch.arguments, **launch.options, grid=(launch.programs,), warmup=True)


def compiled(launch: Launch, arch: str) -> dict[str, Any]:
    """Registers, bytes of registers spilled, and shared memory of one kernel; and what it is made of."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = warm_up(launch)
    text, registers, spilled = log.getvalue(), r"Used (\d+) registers", r"(\d+) bytes spill stores"
    if arch.startswith("gfx"):
        text, registers, spilled = kernel.asm["amdgcn"], r"\.vgpr_count: +(\d+)", r"\.vgpr_spill_count: +(\d+)"
    found = [int(re.search(pattern, text)[1]) for pattern in (registers, spilled)]  # type: ignore[index]
    size = {"registers": found[0], "spilled": found[1], "shared": kernel.metadata.shared}
    return {**size, "operations": operations(kernel.asm["ttir"])}


def operations(ttir: str) -> dict[str, int]:
    """How many of the operations that features add, and pointers among its arguments, a kernel has as written."""
    names = ("tt.load", "tt.descriptor_load", "tt.store", "tt.dot", "math.exp2", "math.log2", "tt.mulhiui")
    signature = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttir)
    found = {name: len(re.findall(rf"(?<![\w.]){re.escape(name)} ", ttir)) for name in names}
    return {**found, "pointers": signature[1].count("!tt.ptr")}  # type: ignore[index]


def compile_all(arch: str) -> Iterator[dict[str, Any]]:
    """What comes out of every class, kernels that redo broken tiles (the same for all) in one class only."""
    triton.runtime.driver.set_active(Driver(arch))
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    for name, case in CLASSES.items():
        spec, t = prepared(case, torch.float32 if name == "float32" else torch.bfloat16)
        for launch in launches(spec, t, arch):
            kernel, careful = launch.kernel.fn.__name__, launch.arguments.get("CAREFUL", False)
            if (careful and name != "causal") or (kernel == "delta_kernel" and name != "plain"):
                continue
            yield {"class": name, "kernel": kernel, "careful": careful, **compiled(launch, arch)}
    if arch == "sm_90":
        yield from compile_described(arch)


def compile_described(arch: str) -> Iterator[dict[str, Any]]:
    """The plain call's kernels that can read through tensor descriptors, and the forward with specialised warps."""
    spec, t = prepared(CLASSES["plain"], torch.bfloat16)
    row = configs.TABLE[arch, 16, 128]
    row |= {name: replace(row[name], descriptors=True, specialize=name == "forward") for name in ("forward", "dq")}
    for launch in launches(spec, t, arch):
        if launch.arguments.get("DESCRIPTORS"):
            kernel = launch.kernel.fn.__name__
            yield {"class": "described", "kernel": kernel, "careful": False, **compiled(launch, arch)}


def compilations(case: Case, lengths: list[tuple[int, int]]) -> dict[str, int]:
    """How many kernels calls of one case with these numbers of queries and keys would compile, by kernel."""
    keys = defaultdict(set)

    def note(kernel: triton.JITFunction, key: str, *_: Any) -> None:
        keys[kernel.fn.__name__].add(key)

    triton.runtime.driver.set_active(Driver("sm_90"))
    triton.JITFunction._do_compile = note
    for seqlen_q, seqlen_k in lengths:
        if case.lengths_q is not None:
            sizes = {"lengths_q": (seqlen_q, 3), "lengths_k": (seqlen_k, 7)}
            changed = replace(case, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **sizes)
        else:
            changed = replace(case, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        for launch in launches(*prepared(changed, torch.bfloat16), "sm_90"):
            if not launch.arguments.get("CAREFUL"):
                warm_up(launch)
    return {name: len(found) for name, found in keys.items()}


LONG = [(65, 65), (80, 129), (97, 1000), (128, 128), (200, 77), (511, 512), (1000, 97)]
SHORT = [(1, 33), (1, 64), (2, 500), (5, 77), (8, 1024), (16, 100)]
COUNTED = {
    "plain": (_case("plain", 64, 64), LONG),
    "causal": (_case("causal", 64, 64, causal=True, layout="bshd", heads_q=4), LONG),
    "packed": (packed("packed", (9, 9), (9, 9), head_dim_qk=64, head_dim_v=64, causal=True), LONG),
    "segments": (_case("segments", 64, 64, segments="batch", alibi="heads", sinks=True), LONG),
    "bias": (_case("bias", 64, 64, bias=(1, 0, 0, 0)), LONG),
    "decode": (_case("decode", 64, 64, heads_q=8, causal=True), SHORT),
    "used": (_case("used", 64, 64, used_k=(60, 3), leftpad=(2, 0), causal=True), LONG),
    "paged": (_case("paged", 64, 64, page_size=16, heads_q=8, causal=True, num_splits=2), SHORT),
}


def main(what: str) -> None:
    if what == "recompilations":
        found: Any = {name: compilations(*counted) for name, counted in COUNTED.items()}
    else:
        found = list(compile_all(what))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
