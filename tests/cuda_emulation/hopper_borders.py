"""Calls at the borders of what the Hopper kernels take: which kernel runs them, with which tiles and workspace.

Host code only, but for ``LAYOUTS``: how tensors may lie is known when a call is made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastattn
from fastattn.backends import cuda
from fastattn.backends.native import pack_call
from fastattn.spec import FP8
from tests.cases import Case
from tests.cuda_emulation.backend import EmulatedBackend
from tests.cuda_emulation.hopper_cases import case, packed
from tests.tolerance import assert_rounded_alike

FORWARD, BACKWARD = "Hopper (sm_90a: TMA, wgmma), forward, ", "Hopper (sm_90a: TMA, wgmma), backward, "
DECODING, E4M3 = "Hopper (sm_90a: TMA), decoding, ", "Hopper (sm_90a: TMA, wgmma of e4m3), forward, "


@dataclass(frozen=True)
class Border:
    case: Case
    said: str  # what the backend says of the call begins with it
    backward: str = ""  # what it says of its backward, if anything
    bytes: int | None = None  # of workspace: of the forward's, or of the backward's, with sums of dQ
    dtype: torch.dtype = torch.bfloat16

    def check(self, backend: EmulatedBackend) -> None:
        spec = self.case.make(torch.bfloat16).spec()
        spec = replace(spec, dtype=self.dtype, needs_grad=bool(self.backward))
        reason = cuda._C.cuda_e4m3_reason(pack_call(spec), 0) if spec.dtype is FP8 else ""
        found = reason or backend.configuration(spec)
        assert found.startswith(self.said), f"{self.case.name}: {found}, not {self.said}"
        assert self.backward in found, f"{self.case.name}: {found}, not {self.backward}"
        if self.bytes is None:
            return
        if self.backward:
            size = cuda._C.cuda_backward_workspace_bytes(pack_call(spec), False)
        else:
            size = cuda._C.cuda_forward_workspace_bytes(pack_call(spec), 0)
        assert size == self.bytes, f"{self.case.name}: {size} bytes of workspace, not {self.bytes}"


def tiles(queries: int, keys: int, stages: int, rest: str = "") -> str:
    return f"tiles of {queries} queries x {keys} keys, {stages} stages{rest}; "


def rows(dim: int, keys: int) -> dict[str, Any]:
    """One head of one query: a part of the keys has 4 (dim + 1) bytes of output and lse."""
    return {"name": f"d{dim}-{keys}-keys", "dims": dim, "seq": (1, keys)}


def sums(dim: int) -> int:
    """Of 70 queries: delta and lse, up to a multiple of 128 bytes, and two tiles of sums."""
    return 640 + 4 * 128 * dim


def border(said: str, more: dict[str, Any] | None = None, /, **options: Any) -> Border:
    return Border(case(**{"seq": (70, 90), "dims": 64, "name": "any", **options}), said, **(more or {}))


LONG_64 = FORWARD + tiles(192, 128, 2, ", ping-pong")
BANDED_64 = FORWARD + tiles(192, 128, 2, ", ping-pong, persistent")
SPLIT = f"{DECODING}tiles of 16 rows x 64 keys, "
BORDERS = [
    # Head dimensions: the table of tiles.
    *(
        border(FORWARD + tiles(*tile), dims=dims, causal=causal)
        for dims, causal, *tile in (
            (64, False, 192, 128, 2, ", ping-pong"),
            (64, True, 192, 128, 2, ", ping-pong, persistent"),
            ((72, 8), False, 128, 128, 2, ", ping-pong"),
            (96, False, 128, 128, 2, ", ping-pong"),
            (96, True, 128, 128, 2, ", ping-pong, persistent"),
            (104, False, 128, 176, 2, ", ping-pong"),
            (128, False, 128, 176, 2, ", ping-pong"),
            (128, True, 128, 128, 2, ", ping-pong, persistent"),
            ((136, 128), False, 128, 112, 2),
            ((192, 128), True, 128, 112, 2, ", persistent"),
            ((192, 136), False, 128, 80, 2),
            ((200, 128), False, 128, 80, 2),
            (256, True, 128, 80, 2, ", persistent"),
        )
    ),
    *(
        border(
            E4M3 + tiles(*tile).replace("; ", ", summed in float32; "),
            {"dtype": FP8, "bytes": size},
            dims=dims,
            seq=(70, keys),
            causal=causal,
        )
        for dims, keys, causal, size, *tile in (
            (64, 96, False, 64 * 96, 128, 128, 3, ", ping-pong"),
            (80, 97, False, 80 * 128, 128, 128, 3, ", ping-pong"),
            (128, 65, True, 128 * 96, 128, 128, 3, ", ping-pong, persistent"),
            (144, 1, False, 144 * 32, 128, 128, 2),
            (256, 32, True, 256 * 32, 128, 128, 2, ", persistent"),
        )
    ),
    *(
        border(said, {"dtype": FP8}, **options)
        for said, options in (
            ("head_dim_qk 72: must be a multiple of 16, at most 256", {"dims": (72, 64)}),
            ("head_dim_v 40: must be a multiple of 16, at most 256", {"dims": (64, 40)}),
            ("head_dim_qk 272: must be a multiple of 16, at most 256", {"dims": 272}),
            ("softmax_scale 0: must be positive", {"softmax_scale": 0.0}),
            (E4M3, {"softmax_scale": 1e-30}),
        )
    ),
    border("", {"backward": BACKWARD, "bytes": sums(64)}),
    border("", {"backward": BACKWARD, "bytes": sums(128)}, dims=(72, 64)),
    border("", {"backward": BACKWARD, "bytes": sums(128)}, dims=128),
    border("", {"backward": BACKWARD, "bytes": sums(192)}, dims=(136, 128)),
    border("", {"backward": BACKWARD, "bytes": sums(256)}, dims=136),
    border("", {"backward": BACKWARD, "bytes": sums(256)}, dims=(200, 128)),
    border("not the Hopper forward (head_dim_qk 68: must be a multiple of 8)", dims=(68, 64)),
    border("not the Hopper forward (head_dim_v 60: must be a multiple of 8)", dims=(64, 60)),
    # Whether every query sees every key; packed sequences always have the tiles for a band.
    border(LONG_64, window=(None, 89), offset=0),
    border(BANDED_64, window=(None, 88), offset=0),
    border(LONG_64, window=(69, None), offset=0),
    border(BANDED_64, window=(68, None), offset=0),
    border(LONG_64, window=(89, 69)),
    border(BANDED_64, window=(88, 69)),
    border(BANDED_64, window=(89, 68)),
    Border(
        packed("packed", 64, (70, 9), (90, 9)), FORWARD + "tiles of 192 queries x 128 keys, 2 stages, ping-pong, pac"
    ),
    # Few queries, and their rows.
    border(SPLIT + "6 stages, up to 128 splits of the keys; ", seq=(16, 90)),
    border(LONG_64, seq=(17, 90)),
    border(SPLIT, seq=(4, 90), heads=(8, 2)),
    border(
        "not the Hopper forward (seqlen_q 2: with 9 heads to a head of keys 18 rows, at most 16",
        seq=(2, 9),
        heads=(9, 1),
    ),
    border(SPLIT + "6 stages", seq=(1, 90), dims=(48, 64)),
    border(SPLIT + "3 stages", seq=(1, 90), dims=(72, 64)),
    border(SPLIT + "3 stages", seq=(1, 90), dims=256),
    border(DECODING, seq=(1, 64), used_k=(60,), page_size=8),
    border("not the Hopper forward (page_size 12: must be a multiple of 8)", seq=(1, 60), used_k=(60,), page_size=12),
    border("not the Hopper forward (paged keys: for at most 16 queries)", seq=(17, 64), used_k=(60,), page_size=16),
    # Parts of the keys: a tile at least to each, eight blocks on the emulated device, four at head_dim 256.
    border(SPLIT, {"bytes": 0}, **rows(64, 64)),
    border(SPLIT, {"bytes": 4 * 2 * 65}, **rows(64, 65)),
    border(SPLIT, {"bytes": 4 * 8 * 129}, **rows(128, 9 * 64)),
    border(SPLIT, {"bytes": 4 * 7 * 137}, **rows(136, 9 * 64)),  # four; the kernels of sm80 would take seven
    border(SPLIT, {"bytes": 4 * 4 * 2 * 65}, **rows(64, 5 * 64) | {"heads": (2, 2)}),
    border(SPLIT, {"bytes": 4 * 3 * 65}, **rows(64, 9 * 64), used_k=(576,), num_splits=3),
    border(SPLIT, {"bytes": 4 * 128 * 65}, **rows(64, 9 * 64), used_k=(576,), num_splits=129),
    border(FORWARD, used_k=(90,), num_splits=1),
    border("not the Hopper forward (num_splits 2)", used_k=(90,), num_splits=2),
    # softmax_scale is positive, since maxima are of scores before it.
    border(LONG_64, softmax_scale=1e-30),
    border("not the Hopper forward (softmax_scale 0: must be positive)", softmax_scale=0.0),
    border("not the Hopper forward (softmax_scale -1: must be positive)", softmax_scale=-1.0),
    border(LONG_64, {"dtype": torch.float16}),
    border("general SIMT", {"dtype": torch.float32}),
]


@dataclass(frozen=True)
class Layout:
    """A tensor's size beyond (2, 2, 70, 64), or batch 1; strides; the first element."""

    name: str
    taken: bool
    stride: tuple[int, int, int, int]
    first: int = 0
    batch: int = 2

    def place(self, x: Tensor) -> Tensor:
        size = (self.batch, *x.shape[1:])
        reach = self.first + 1 + sum((n - 1) * step for n, step in zip(size, self.stride, strict=True))
        return x.new_zeros(reach).as_strided(size, self.stride, self.first)


LAYOUTS = (
    Layout("whole chunks", True, (2 * 70 * 72, 70 * 72, 72, 1)),
    Layout("one batch entry, a stride that is never stepped", True, (7, 70 * 64, 64, 1), batch=1),
    Layout("a start at a chunk", True, (2 * 70 * 64, 70 * 64, 64, 1), first=8),
    Layout("a start within a chunk", False, (2 * 70 * 64, 70 * 64, 64, 1), first=4),
    Layout("rows of no whole chunks", False, (2 * 70 * 68, 70 * 68, 68, 1)),
    Layout("heads of no whole chunks", False, (2 * (70 * 64 + 4), 70 * 64 + 4, 64, 1)),
    Layout("the same for all heads", False, (70 * 64, 0, 64, 1)),
    Layout("elements apart", False, (2 * 70 * 128, 70 * 128, 128, 2)),
)


def check_layout(layout: Layout, backend: EmulatedBackend) -> None:
    """Each of q, k and v in this layout, the others dense: who takes the call, and the same results as all dense."""
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(2, 2, 70, 64, generator=generator).bfloat16()[: layout.batch] for _ in range(4)]
    if layout.stride[1] == 0:
        dense = [x[:, :1].expand_as(x) for x in dense]

    def results(tensors: list[Tensor]) -> list[Tensor]:
        backend.emulator.statistics()
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = fastattn.attention(*leaves, backend="cuda")
        assert (backend.emulator.statistics().wgmma > 0) == (tensors is clean or layout.taken), (
            f"forward: {layout.name}"
        )
        grads = torch.autograd.grad(out, leaves, tensors[3])
        assert (backend.emulator.statistics().wgmma > 0) == (tensors is clean or layout.taken), (
            f"backward: {layout.name}"
        )
        return [out.detach(), *grads]

    clean = [x.contiguous() for x in dense]
    want = results(clean)
    for n in range(3):
        tensors = list(clean)
        tensors[n] = layout.place(clean[n])
        if layout.stride[1] == 0:
            tensors[n][:, :1] = dense[n][:, :1]
        else:
            tensors[n].copy_(dense[n])
        found = results(tensors)
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
            if layout.taken and torch.are_deterministic_algorithms_enabled():
                assert torch.equal(actual, expected), f"{layout.name}: {name}"
            else:
                assert_rounded_alike(actual, expected, f"{layout.name}: {name}")


#: Of e4m3 tensors (1, 2, 40, 64), which the Python side copies and the kernel's own check refuses.
REFUSED = (
    Layout("a start within a chunk", False, (2 * 40 * 64, 40 * 64, 64, 1), first=8),
    Layout("rows of no whole chunks", False, (2 * 40 * 72, 40 * 72, 72, 1)),
    Layout("the same for all heads", False, (40 * 64, 0, 64, 1)),
    Layout("elements apart", False, (2 * 40 * 128, 40 * 128, 128, 2)),
)


def check_refused(layout: Layout) -> None:
    dense = torch.zeros(1, 2, 40, 64, dtype=FP8)
    strided = replace(layout, batch=1).place(dense)
    for n in range(2 if layout.stride[3] == 1 else 3):  # v is transposed by a kernel, as its heads and rows may lie
        tensors = [strided if n == m else dense for m in range(3)]
        with mock.patch.object(cuda, "_in_chunks", lambda x: x):
            try:
                fastattn.attention_fp8(*tensors, backend="cuda")
            except RuntimeError as error:
                assert "strides of q or k are no multiples of 16" in str(error), layout.name
            else:
                raise AssertionError(f"{layout.name}: taken")


def check_variants() -> None:
    """Those that this build has, and no others."""
    q = torch.zeros(1, 1, 20, 64, dtype=torch.bfloat16)
    for asked in ("-1", "0", "1", "2"):
        with mock.patch.dict(os.environ, {"FASTATTN_SM90_VARIANT": asked}):
            try:
                fastattn.attention(q, q, q, backend="cuda")
            except RuntimeError as error:
                assert f"FASTATTN_SM90_VARIANT {asked}: this build has 2 variants" in str(error)
                assert asked in ("-1", "2"), error
            else:
                assert asked in ("0", "1"), f"variant {asked} runs"
