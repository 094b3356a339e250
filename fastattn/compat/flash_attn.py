"""flash-attn 2's functions, argument for argument, on every device::

    from fastattn.compat.flash_attn import flash_attn_func  # instead of: from flash_attn import flash_attn_func

Tensors are ``(batch, seq, heads, head_dim)``, packed ``(total, heads, head_dim)``; ``causal`` and ``window_size`` are
aligned to the last key; -1 in a window is unbounded. Two arguments mean less here: ``deterministic`` (kernels are
deterministic on CPU and in Triton; the CUDA ones obey ``torch.use_deterministic_algorithms``), and
``return_attn_probs``, which returns ``(out, softmax_lse, None)`` without flash-attn's sign-coded test matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.cache import attention_with_kv_cache
from fastattn.functional import attention
from fastattn.packed import attention_varlen
from fastattn.spec import Window

Result = Tensor | tuple[Tensor, Tensor, None]


def window_of(window_size: tuple[int, int]) -> Window | None:
    """``window_size`` with None where flash-attn has -1."""
    left, right = (None if side < 0 else side for side in window_size)
    return None if left is None and right is None else (left, right)


def _causal_window(causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    return {"causal": causal, "window": window_of(window_size)}


def _check(q: Tensor, deterministic: bool, return_attn_probs: bool, dropout_p: float) -> None:
    if deterministic and q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic=True: on CUDA call torch.use_deterministic_algorithms(True), which kernels obey"
        )
    if return_attn_probs and dropout_p:
        raise ValueError(
            "return_attn_probs with dropout: flash-attn's test matrix is not made; fastattn.attention_weights gives "
            "the weights, after dropout"
        )


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``q (batch, seqlen_q, heads_q, head_dim)``, ``k, v (batch, seqlen_k, heads_k, head_dim)``; the output like ``q``.

    With ``return_attn_probs`` also ``softmax_lse (batch, heads_q, seqlen_q)`` and None.
    """
    _check(q, deterministic, return_attn_probs, dropout_p)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        **_causal_window(causal, window_size),
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return _result(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``qkv (batch, seqlen, 3, heads, head_dim)``; read in place, without a copy."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (batch, seqlen, 3, heads, head_dim), got {tuple(qkv.shape)}")
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Packed ``q (total_q, heads_q, head_dim)``; ``k, v`` likewise, or ``(num_pages, page_size, heads_k, head_dim)``.

    With ``return_attn_probs`` also ``softmax_lse (heads_q, total_q)`` and None.
    """
    _check(q, deterministic, return_attn_probs, dropout_p)
    out, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        block_table=block_table,
        **_causal_window(causal, window_size),
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return _result(out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``q (batch, seqlen_q, heads_q, head_dim)``; caches ``(batch, capacity, heads_k, head_dim)``, or pages.

    ``cache_batch_idx`` says which row of the caches belongs to each query: they are then read as pages of ``capacity``
    keys, nothing is copied.
    """
    capacity = k_cache.shape[1]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx and block_table exclude each other")
        block_table = cache_batch_idx.to(torch.int32).view(-1, 1)
        if cache_seqlens is None and k is None:
            cache_seqlens = capacity
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens is needed to append k and v")
    result = attention_with_kv_cache(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)),
        *(None if x is None else x.transpose(1, 2) for x in (k, v)),
        cache_seqlens=cache_seqlens,
        leftpad_k=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        **_causal_window(causal, window_size),
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=True,
    )
    out = result[0].transpose(1, 2)
    return (out, result[1]) if return_softmax_lse else out
