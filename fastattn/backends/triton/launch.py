"""From a call to kernel launches: what is compiled, with which arguments, on which grid. Imports triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.backends.base import Gradients, Tensors, empty_like_layout, empty_lse
from fastattn.backends.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from fastattn.backends.triton.configs import INTERPRET, SMALLEST_BLOCK, Config, Features, careful_config, config
from fastattn.backends.triton.dbias import dbias_kernel
from fastattn.backends.triton.forward import combine_kernel, forward_kernel
from fastattn.backends.triton.sequences import Extras, Scales, Sizes
from fastattn.backends.triton.tiles import Matrix
from fastattn.spec import UNBOUNDED, AttentionSpec

LOG2E = 1.4426950408889634
DELTA_ROWS = 32
COMBINE_ROWS = 4
MOST_SPLITS = 128
MOST_PACKED_ROWS = 64  #: queries of a key head, its query heads together, up to which one tile holds them


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments, not yet run."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        if self.arguments.get("DESCRIPTORS") and not INTERPRET:
            # A kernel that makes descriptors keeps them in memory that Triton asks of its caller.
            triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def window_bounds(spec: AttentionSpec) -> tuple[int, int]:
    """lo and hi of the window lo <= j - i <= hi, clamped to where they still make a difference.

    Where the diagonal differs from sequence to sequence, relative to where it would begin at offset 0.
    """
    left = UNBOUNDED if spec.window[0] is None else spec.window[0]
    right = UNBOUNDED if spec.window[1] is None else spec.window[1]
    offset, furthest = spec.offset, spec.seqlen_q + spec.seqlen_k
    if spec.relative_offset and not spec.ragged:
        offset += spec.seqlen_k - spec.seqlen_q
    return max(-furthest, min(offset - left, furthest)), max(-furthest, min(offset + right, furthest))


def features(spec: AttentionSpec, hip: bool = False) -> Features:
    """What the kernels are compiled for. A window that hides nothing is no window."""
    lo, hi = window_bounds(spec)
    bottom_right = spec.relative_offset and spec.ragged
    has_lo = spec.window[0] is not None and (bottom_right or lo > 1 - spec.seqlen_q)
    has_hi = spec.window[1] is not None and (bottom_right or hi < spec.seqlen_k - 1)
    return Features(
        HEAD_DIM_QK=spec.head_dim_qk,
        HEAD_DIM_V=spec.head_dim_v,
        HAS_LO=has_lo,
        HAS_HI=has_hi,
        MASK="none" if spec.mask is None else "key" if spec.mask[2] == 1 else "full",
        BIAS="none" if spec.bias is None else "key" if spec.bias[2] == 1 else "full",
        SOFTCAP=spec.softcap != 0.0,
        ALIBI=spec.alibi is not None,
        SINKS=spec.sinks,
        SEGMENTS=spec.segments,
        PREFIX=spec.prefix and (has_lo or has_hi),
        CU_Q=spec.packed,
        CU_K=spec.packed and spec.page_size is None,
        USED_K=spec.seqused_k,
        LEFTPAD=spec.leftpad_k,
        PAGED=spec.page_size is not None,
        BOTTOM_RIGHT=bottom_right and (has_lo or has_hi or spec.alibi is not None),
        DROPOUT=spec.dropout_p > 0.0,
        NEGATE=spec.softmax_scale < 0.0,
        PRECISION="tf32" if spec.dtype is torch.float32 and not hip and _tf32_allowed() else "ieee",
    )


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        return bool(matmul.allow_tf32)


def _options(c: Config) -> dict[str, Any]:
    return {"num_warps": c.num_warps, "num_stages": c.num_stages, "enable_fp_fusion": True}


def _matrix(x: Tensor | None) -> Matrix | None:
    """A tensor for a kernel. The stride of a dimension of size 1 says nothing, and would compile kernels anew."""
    if x is None:
        return None
    return Matrix(x, tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _step(x: Tensor | None) -> int:
    """From one batch entry to the next of a contiguous (batch or 1, n)."""
    return 0 if x is None or x.shape[0] == 1 else x.shape[1]


def _describable(x: Tensor) -> bool:
    """Whether a tensor's rows can be read through tensor descriptors."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return aligned and x.stride(3) == 1 and x.stride(2) > 0


def _tiled(
    kernel: Any, kind: str, arch: str, f: Features, c: Config, arguments: dict[str, Any], lines: int, count: int
) -> list[Launch]:
    """A kernel with one program for each tile of ``count`` queries (keys: dkdv), in each of ``lines``.

    Where keys may be invisible a second launch redoes the tiles that the first marks as broken.
    """

    def owned(c: Config) -> int:
        return c.BLOCK_N if kind == "dkdv" else c.BLOCK_M

    broken = None
    if f.RESTRICTED:
        broken = arguments["q"].data.new_empty((lines, triton.cdiv(count, owned(c))), dtype=torch.uint8)

    def launch(tiles: Config, careful: bool) -> Launch:
        of_kernel = {
            **arguments,
            "broken": broken,
            "F": f,
            "BLOCK_M": tiles.BLOCK_M,
            "BLOCK_N": tiles.BLOCK_N,
            "FLAG_BLOCK": owned(c),
            "CAREFUL": careful,
        }
        if kind != "dkdv":
            plain = careful or f.PAGED or f.LEFTPAD
            described = tiles.descriptors and not plain
            of_kernel["DESCRIPTORS"] = described and all(_describable(arguments[name].data) for name in "kv")
        if kind == "forward":
            of_kernel["SPECIALIZE"] = tiles.specialize and not careful
            of_kernel["SHARE_BLOCK"] = c.BLOCK_N
        return Launch(kernel, lines * triton.cdiv(count, owned(tiles)), of_kernel, _options(tiles))

    first = launch(c, False)
    return [first] if broken is None else [first, launch(careful_config(arch), True)]


@dataclass(frozen=True)
class Strategy:
    """How a forward is cut: the kind of its config, the config, and into how many splits the keys."""

    features: Features
    config: Config
    splits: int
    rows: int  #: of tiles: queries, or with PACK those of a key head's query heads together

    def __str__(self) -> str:
        splits = f" in {self.splits} splits" if self.splits > 1 else ""
        return f"{self.config}{', heads packed' if self.features.PACK else ''}{splits}"


def strategy(spec: AttentionSpec, arch: str) -> Strategy:
    """How a forward is cut. Few queries make small tiles, query heads packed, and the keys are split among programs."""
    f = features(spec, arch == "gfx942")
    short = spec.seqlen_q * spec.group_size <= MOST_PACKED_ROWS
    # Packed heads are one tile, whose keys are found by one mask.
    pack = short and spec.group_size > 1 and (f.MASK != "key" or (spec.mask is not None and spec.mask[1] == 1))
    f = replace(f, PACK=pack)
    rows = spec.seqlen_q * (spec.group_size if pack else 1)
    c = config(arch, bits(spec), f, "decode" if short else "forward")
    if short:
        c = replace(c, BLOCK_M=min(max(SMALLEST_BLOCK, triton.next_power_of_2(rows)), c.BLOCK_M))
    splits = spec.num_splits
    if f.PREFIX and f.HAS_LO:
        splits = 1  # two ranges of keys
    elif splits == 0 and not short:
        splits = 1
    elif splits == 0:
        programs = spec.batch * (spec.heads_k if pack else spec.heads_q) * triton.cdiv(rows, c.BLOCK_M)
        splits = choose_splits(programs, triton.cdiv(visible_keys(spec), c.BLOCK_N), processors(spec.device))
    return Strategy(f, c, splits, rows)


def bits(spec: AttentionSpec) -> int:
    return 32 if spec.dtype is torch.float32 else 16


def visible_keys(spec: AttentionSpec) -> int:
    """The most keys that a call's queries may see together."""
    left, right = spec.window
    if left is None or right is None:
        return spec.seqlen_k
    return min(spec.seqlen_k, left + right + spec.seqlen_q)


def choose_splits(programs: int, tiles: int, processors: int) -> int:
    """Into how many splits the tiles of keys are cut for ``programs`` programs to keep ``processors`` busy.

    None where 80 % of the processors have work; else the least number that comes within 15 % of the best use of
    whole waves of programs.
    """
    if programs >= 0.8 * processors:
        return 1
    use = {}
    for splits in range(1, min(tiles, processors, MOST_SPLITS) + 1):
        if splits == 1 or triton.cdiv(tiles, splits) < triton.cdiv(tiles, splits - 1):
            waves = programs * splits / processors
            use[splits] = waves / math.ceil(waves)
    best = max(use.values())
    return next(splits for splits, value in use.items() if value >= 0.85 * best)


@cache
def processors(device: str) -> int:
    """Multiprocessors (compute units) of a device; of the interpreter, enough to make it split."""
    if INTERPRET or not torch.cuda.is_available():
        return 16
    return torch.cuda.get_device_properties(device).multi_processor_count


def _arguments(spec: AttentionSpec, t: Tensors) -> dict[str, Any]:
    """The arguments that all kernels of attention take."""
    lo, hi = window_bounds(spec)
    offset = spec.offset
    if spec.relative_offset and not spec.ragged:
        offset += spec.seqlen_k - spec.seqlen_q
    threshold = min(int(spec.dropout_p * 2**32), 2**32 - 1)
    slopes = t.alibi_slopes
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes[None]
    sizes = Sizes(
        batch=spec.batch,
        heads_q=spec.heads_q,
        group=spec.group_size,
        seqlen_q=spec.seqlen_q,
        seqlen_k=spec.seqlen_k,
        rows_q=t.q.shape[2],
        lo=lo,
        hi=hi,
        offset=offset,
        page_size=spec.page_size or 1,
        splits=1,
        # The bits of a uint32 in an int32, for its type not to depend on its value.
        threshold=threshold - 2**32 if threshold >= 2**31 else threshold,
        slopes_step=_step(slopes),
        q_segments_step=_step(t.q_segments),
        k_segments_step=_step(t.k_segments),
        pages_step=_step(t.block_table),
    )
    unit = LOG2E if spec.bias is None else 1.0
    scales = Scales(
        scores=spec.softmax_scale / spec.softcap if spec.softcap else spec.softmax_scale * unit,
        cap=spec.softcap * unit,
        softmax=spec.softmax_scale,
        dropout=0.0 if spec.dropout_p >= 1.0 else 1.0 / (1.0 - spec.dropout_p),
    )
    x = Extras(
        mask=None,
        bias=None,
        slopes=_contiguous(slopes),
        sinks=_contiguous(t.sinks),
        seed=t.dropout_seed,
        q_segments=_contiguous(t.q_segments),
        k_segments=_contiguous(t.k_segments),
        prefix=_contiguous(t.prefix_lens),
        cu_q=_contiguous(t.cu_seqlens_q),
        cu_k=_contiguous(t.cu_seqlens_k),
        used_k=_contiguous(t.seqused_k),
        leftpad_k=_contiguous(t.leftpad_k),
        pages=_contiguous(t.block_table),
    )
    return {
        "q": _matrix(t.q),
        "k": _matrix(t.k),
        "v": _matrix(t.v),
        "mask": _matrix(None if t.mask is None else t.mask.view(torch.uint8)),
        "bias": _matrix(t.bias),
        "x": tuple(x[2:]),
        "scales": scales,
        **sizes._asdict(),
    }


def plan_forward(spec: AttentionSpec, arch: str, t: Tensors) -> tuple[Tensor, Tensor, list[Launch]]:
    """out, lse and the launches that will fill them, in order."""
    how = strategy(spec, arch)
    out, lse = empty_like_layout(t.q, spec.head_dim_v), empty_lse(t.q)
    part, statistics = out[None], lse
    if how.splits > 1:
        part = torch.empty((how.splits, *lse.shape, spec.head_dim_v), dtype=torch.float32, device=t.q.device)
        statistics = torch.empty((2, how.splits, *lse.shape), dtype=torch.float32, device=t.q.device)
    arguments = _arguments(spec, t)
    arguments |= {
        "out": _matrix(part[0]),
        "lse": statistics,
        "splits": how.splits,
        "scales": arguments["scales"]._replace(scores=abs(arguments["scales"].scores)),
        "SPLIT": how.splits > 1,
    }
    lines = how.splits * spec.batch * (spec.heads_k if how.features.PACK else spec.heads_q)
    launches = _tiled(forward_kernel, "forward", arch, how.features, how.config, arguments, lines, how.rows)
    if how.splits > 1:
        of_combine = {
            "parts": part,
            "statistics": statistics,
            "out": _matrix(out),
            "lse": lse,
            "sinks": _contiguous(t.sinks),
            "count": lse.numel(),
            "heads_q": lse.shape[1],
            "rows_q": lse.shape[2],
            "splits": how.splits,
            "F": Features(spec.head_dim_v, spec.head_dim_v, BIAS=how.features.BIAS, SINKS=spec.sinks),
            "BLOCK": COMBINE_ROWS,
        }
        programs = triton.cdiv(lse.numel(), COMBINE_ROWS)
        launches.append(Launch(combine_kernel, programs, of_combine, {"num_warps": 4}))
    return out, lse, launches


def plan_backward(
    spec: AttentionSpec, arch: str, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Gradients, list[Launch]]:
    """The gradients and the launches that will fill them, in order."""
    f = features(spec, arch == "gfx942")
    dq, dk, dv = empty_like_layout(t.q), empty_like_layout(t.k), empty_like_layout(t.v)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    shared = {**_arguments(spec, t), "grad_out": _matrix(grad_out), "lse": lse.contiguous(), "delta": delta}
    of_delta = {
        "out": _matrix(out),
        "grad_out": _matrix(grad_out),
        "grad_lse": _contiguous(grad_lse),
        "delta": delta,
        "heads_q": lse.shape[1],
        "rows_q": lse.shape[2],
        "F": Features(spec.head_dim_v, spec.head_dim_v),
        "BLOCK_M": DELTA_ROWS,
    }
    programs = lse.shape[0] * lse.shape[1] * triton.cdiv(lse.shape[2], DELTA_ROWS)
    launches = [Launch(delta_kernel, programs, of_delta, {"num_warps": 4})]
    for kernel, kind, gradients, heads, count in (
        (dkdv_kernel, "dkdv", {"dk": dk, "dv": dv}, spec.heads_k, spec.seqlen_k),
        (dq_kernel, "dq", {"dq": dq}, spec.heads_q, spec.seqlen_q),
    ):
        arguments = {**shared, **{name: _matrix(x) for name, x in gradients.items()}}
        c = config(arch, bits(spec), f, kind)
        launches += _tiled(kernel, kind, arch, f, c, arguments, spec.batch * heads, count)
    dbias = None
    if spec.needs_bias_grad and t.bias is not None:
        dbias = torch.empty(t.bias.shape, dtype=t.bias.dtype, device=t.bias.device)
        launches.append(_dbias_launch(spec, arch, f, shared, dbias))
    return (dq, dk, dv, dbias), launches


def _dbias_launch(spec: AttentionSpec, arch: str, f: Features, shared: dict[str, Any], dbias: Tensor) -> Launch:
    c, shape = config(arch, bits(spec), f, "dbias"), dbias.shape
    arguments = {
        **shared,
        "dbias": _matrix(dbias),
        "bias_b": shape[0],
        "bias_h": shape[1],
        "bias_m": shape[2],
        "bias_n": shape[3],
        "SUM_M": shape[2] == 1,
        "SUM_N": shape[3] == 1,
        "F": f,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
    }
    tiles = triton.cdiv(shape[2], c.BLOCK_M) * triton.cdiv(shape[3], c.BLOCK_N)
    return Launch(dbias_kernel, shape[0] * shape[1] * tiles, arguments, _options(c))
