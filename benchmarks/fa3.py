"""FlashAttention-3, where it is installed: its own package, or the copy inside xformers (``xformers==0.0.34``).

That copy is built on torch's stable ABI and wants ``libcudart.so.12``, which the package ``nvidia-cuda-runtime-cu12``
has. Not yet run on a GPU: a signature that differs becomes the contender's blank, with the error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _library() -> Path | None:
    candidates = [folder / "flash_attn_3" for folder in [_folder("xformers")] if folder]
    candidates += [folder for folder in [_folder("flash_attn_3")] if folder]
    found = (path for folder in candidates for path in sorted(folder.glob("_C*.so")))
    return next(found, None)


@cache
def unavailable_reason() -> str | None:
    """Loads the library; why it cannot be used, or None."""
    library = _library()
    if library is None:
        return "FA3 is not installed: pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12"
    runtimes = (
        path for entry in sys.path for path in Path(entry or ".").glob("nvidia/cuda_runtime/lib/libcudart.so.12")
    )
    try:
        if (runtime := next(runtimes, None)) is not None:
            ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
        _ = torch.ops.flash_attn_3.fwd
    except (OSError, AttributeError, RuntimeError) as error:
        return f"FA3 does not load: {str(error)[:160]}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse of ``(batch, heads, seq, head_dim)`` views of tensors that lie as ``(batch, seq, heads, head_dim)``.

    Keys are split (``num_splits=0``: it chooses) for single queries only, as its users have it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    splits = 0 if q.shape[1] == 1 else 1
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=causal, num_splits=splits)
    return out.transpose(1, 2), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, as such views."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    options = {"dq": dq, "dk": dk, "dv": dv, "is_causal": causal, "deterministic": deterministic}
    torch.ops.flash_attn_3.bwd(grad, q, k, v, out, lse, **options)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
