"""From a call to kernel launches: what is compiled, with which arguments, on which grid. Imports triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.backends.base import Gradients, Tensors, empty_like_layout
from fastattn.backends.triton.backward import dbias_kernel, delta_kernel, dkdv_kernel, dq_kernel
from fastattn.backends.triton.configs import Config, Features, careful_config, config
from fastattn.backends.triton.forward import forward_kernel
from fastattn.spec import UNBOUNDED, AttentionSpec

LOG2E = 1.4426950408889634
DELTA_ROWS = 32


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments, not yet run."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def window_bounds(spec: AttentionSpec) -> tuple[int, int]:
    """lo and hi of the window lo <= j - i <= hi, clamped to where they still make a difference."""
    left = UNBOUNDED if spec.window[0] is None else spec.window[0]
    right = UNBOUNDED if spec.window[1] is None else spec.window[1]

    def clamp(x: int) -> int:
        return max(-spec.seqlen_q, min(x, spec.seqlen_k))

    return clamp(spec.offset - left), clamp(spec.offset + right)


def features(spec: AttentionSpec, hip: bool = False) -> Features:
    """What the kernels are compiled for. A window that hides nothing is no window."""
    lo, hi = window_bounds(spec)
    return Features(
        HEAD_DIM_QK=spec.head_dim_qk,
        HEAD_DIM_V=spec.head_dim_v,
        HAS_LO=lo > 1 - spec.seqlen_q,
        HAS_HI=hi < spec.seqlen_k - 1,
        MASK="none" if spec.mask is None else "key" if spec.mask[2] == 1 else "full",
        BIAS="none" if spec.bias is None else "key" if spec.bias[2] == 1 else "full",
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


def _tiled(
    kernel: Any, kind: str, arch: str, f: Features, arguments: dict[str, Any], rows: int, count: int
) -> list[Launch]:
    """A kernel with one program for each tile of ``count`` queries (keys: dkdv), in each of ``rows`` heads.

    Where keys may be invisible a second launch redoes the tiles that the first marks as broken.
    """
    bits = 8 * arguments["q"].element_size()

    def launch(c: Config, flag_block: int, careful: bool) -> Launch:
        of_kernel = {
            **arguments,
            "broken": broken,
            "F": f,
            "BLOCK_M": c.BLOCK_M,
            "BLOCK_N": c.BLOCK_N,
            "FLAG_BLOCK": flag_block,
            "CAREFUL": careful,
        }
        return Launch(kernel, rows * triton.cdiv(count, owned(c)), of_kernel, _options(c))

    def owned(c: Config) -> int:
        return c.BLOCK_N if kind == "dkdv" else c.BLOCK_M

    c = config(arch, bits, f, kind)
    if not f.RESTRICTED:
        broken = None
        return [launch(c, owned(c), False)]
    broken = arguments["q"].new_empty((rows, triton.cdiv(count, owned(c))), dtype=torch.uint8)
    return [launch(c, owned(c), False), launch(careful_config(f), owned(c), True)]


def _inputs(spec: AttentionSpec, t: Tensors) -> dict[str, Any]:
    """The arguments that all kernels of attention take."""
    q, k, v, mask, bias = t.q, t.k, t.v, t.mask, t.bias
    shape = (spec.batch, spec.heads_q, spec.seqlen_q, spec.seqlen_k)
    unused = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.view(torch.uint8).expand(shape)
    if bias is not None:
        bias = bias.expand(shape)
    threshold = min(int(spec.dropout_p * 2**32), 2**32 - 1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "bias": bias,
        "seed": t.dropout_seed,
        "q_stride": q.stride(),
        "k_stride": k.stride(),
        "v_stride": v.stride(),
        "mask_stride": unused if mask is None else mask.stride(),
        "bias_stride": unused if bias is None else bias.stride(),
        "sizes": (spec.heads_q, spec.group_size, spec.seqlen_q, spec.seqlen_k, *window_bounds(spec)),
        # The bits of a uint32 in an int32, for its type not to depend on its value.
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
    }


def _scales(spec: AttentionSpec) -> tuple[float, float, float]:
    """Of the scores (in base 2 without a bias), of the softmax, of what dropout keeps."""
    of_scores = spec.softmax_scale * (LOG2E if spec.bias is None else 1.0)
    return of_scores, spec.softmax_scale, 0.0 if spec.dropout_p >= 1.0 else 1.0 / (1.0 - spec.dropout_p)


def plan_forward(spec: AttentionSpec, arch: str, t: Tensors) -> tuple[Tensor, Tensor, list[Launch]]:
    """out, lse and the launches that will fill them, in order."""
    f = features(spec, arch == "gfx942")
    out = empty_like_layout(t.q, spec.head_dim_v)
    lse = torch.empty((spec.batch, spec.heads_q, spec.seqlen_q), dtype=torch.float32, device=t.q.device)
    of_scores, _, of_dropout = _scales(spec)
    arguments = {
        **_inputs(spec, t),
        "out": out,
        "lse": lse,
        "out_stride": out.stride(),
        "scale": abs(of_scores),
        "dropout_scale": of_dropout,
    }
    heads = spec.batch * spec.heads_q
    return out, lse, _tiled(forward_kernel, "forward", arch, f, arguments, heads, spec.seqlen_q)


def plan_backward(
    spec: AttentionSpec,
    arch: str,
    t: Tensors,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Gradients, list[Launch]]:
    """The gradients and the launches that will fill them, in order."""
    q, k, v, bias = t.q, t.k, t.v, t.bias
    f = features(spec, arch == "gfx942")
    dq, dk, dv = empty_like_layout(q), empty_like_layout(k), empty_like_layout(v)
    delta = torch.empty((spec.batch, spec.heads_q, spec.seqlen_q), dtype=torch.float32, device=q.device)
    inputs = _inputs(spec, t)
    shared = {
        **inputs,
        "grad_out": grad_out,
        "grad_out_stride": grad_out.stride(),
        "lse": lse.contiguous(),
        "delta": delta,
        "scales": _scales(spec),
    }
    heads = spec.batch * spec.heads_q
    of_delta = {
        "out": out,
        "grad_out": grad_out,
        "grad_lse": grad_lse,
        "delta": delta,
        "out_stride": out.stride(),
        "grad_out_stride": grad_out.stride(),
        "grad_lse_stride": (0, 0, 0) if grad_lse is None else grad_lse.stride(),
        "sizes": inputs["sizes"],
        "F": f,
        "BLOCK_M": DELTA_ROWS,
    }
    launches = [Launch(delta_kernel, heads * triton.cdiv(spec.seqlen_q, DELTA_ROWS), of_delta, {"num_warps": 4})]

    of_dkdv = {**shared, "dk": dk, "dv": dv, "dk_stride": dk.stride(), "dv_stride": dv.stride()}
    launches += _tiled(dkdv_kernel, "dkdv", arch, f, of_dkdv, spec.batch * spec.heads_k, spec.seqlen_k)
    of_dq = {**shared, "dq": dq, "dq_stride": dq.stride()}
    launches += _tiled(dq_kernel, "dq", arch, f, of_dq, heads, spec.seqlen_q)

    dbias = None
    if spec.needs_bias_grad and bias is not None:
        c = config(arch, 8 * q.element_size(), f, "dbias")
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        of_dbias = {
            **shared,
            "dbias": dbias,
            "dbias_stride": dbias.stride(),
            "extent": (spec.batch, spec.heads_q, *bias.shape),
            "SUM_M": bias.shape[2] == 1,
            "SUM_N": bias.shape[3] == 1,
            "F": f,
            "BLOCK_M": c.BLOCK_M,
            "BLOCK_N": c.BLOCK_N,
        }
        tiles = triton.cdiv(bias.shape[2], c.BLOCK_M) * triton.cdiv(bias.shape[3], c.BLOCK_N)
        launches.append(Launch(dbias_kernel, bias.shape[0] * bias.shape[1] * tiles, of_dbias, _options(c)))
    return (dq, dk, dv, dbias), launches
