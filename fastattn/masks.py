"""torch's ``nn.MultiheadAttention`` masks (True = masked out, or added to the scores) as ``mask`` and ``bias``."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.spec import SUPPORTED_DTYPES, Window, dtype_names


def _check_mask(name: str, mask: Tensor, q: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean (True = masked out) or floating (added), got {mask.dtype}")
    if mask.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {mask.layout}")
    if mask.is_floating_point() and q.dtype is not torch.float64 and mask.dtype not in SUPPORTED_DTYPES[:3]:
        raise TypeError(
            f"{name} must be boolean or of dtype {dtype_names(SUPPORTED_DTYPES[:3])} when the inputs are "
            f"{dtype_names((q.dtype,))}, got {dtype_names((mask.dtype,))}"
        )
    if mask.device != q.device:
        raise ValueError(f"{name} must be on the query's device {q.device}, got {mask.device}")


def expand_padding_mask(mask: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    """``key_padding_mask (N, S)`` as ``(N, 1, 1, S)``."""
    if mask is None:
        return None
    _check_mask("key_padding_mask", mask, q)
    batch, _, _, seqlen_k = shape
    if mask.shape != (batch, seqlen_k):
        raise ValueError(
            f"key_padding_mask must have shape (batch, keys) = ({batch}, {seqlen_k}), or (keys,) when the inputs are "
            f"unbatched; got {tuple(mask.shape)}"
        )
    return mask[:, None, None, :]


def expand_attn_mask(mask: Tensor | None, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    """``attn_mask`` in any of its forms as a 4-D view that broadcasts to ``shape``."""
    if mask is None:
        return None
    _check_mask("attn_mask", mask, q)
    batch, heads, seqlen_q, seqlen_k = shape
    if mask.shape == (seqlen_q, seqlen_k):
        return mask[None, None]
    if mask.shape == (batch * heads, seqlen_q, seqlen_k):
        return mask.unflatten(0, (batch, heads))
    if mask.dim() == 4 and all(have in (1, want) for have, want in zip(mask.shape, shape, strict=True)):
        return mask
    raise ValueError(
        f"attn_mask must have shape (queries, keys) = ({seqlen_q}, {seqlen_k}), (batch * heads, queries, keys) = "
        f"({batch * heads}, {seqlen_q}, {seqlen_k}), or be 4-D and broadcast to {tuple(shape)}; got {tuple(mask.shape)}"
    )


def pad_keys(mask: Tensor | None, seqlen_k: int, appended: int) -> Tensor | None:
    """Extend a mask by appended keys that every query sees: False in a boolean mask, 0 in an additive one."""
    if mask is None:
        return None
    return F.pad(mask.expand(*mask.shape[:3], seqlen_k), (0, appended))


def hidden_by_window(
    seqlen_q: int, seqlen_k: int, appended: int, causal: bool, window: Window | None, device: torch.device
) -> Tensor:
    """What a window (diagonal at 0) hides, ``(1, 1, L, S + appended)``, True = masked; appended keys never."""
    left, right = window or (None, None)
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k + appended, device=device)
    hidden = torch.zeros(seqlen_q, seqlen_k + appended, dtype=torch.bool, device=device)
    if left is not None:
        hidden = hidden | (j < i - left)
    if causal or right is not None:
        hidden = hidden | (j > i + (0 if causal or right is None else right))
    return (hidden & (j < seqlen_k))[None, None]


def merge_masks(masks: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Boolean masks (True = masked) to one ``mask`` (True = may attend), additive ones to one ``bias``.

    Neither is expanded beyond what broadcasting its own parts asks for.
    """
    hidden = [mask for mask in masks if mask is not None and mask.dtype is torch.bool]
    added = [mask for mask in masks if mask is not None and mask.dtype is not torch.bool]
    mask = ~functools.reduce(operator.or_, hidden) if hidden else None
    bias = functools.reduce(operator.add, added) if added else None
    return mask, bias
