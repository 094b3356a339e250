"""``torch.nn.attention.varlen.varlen_attn``, argument for argument, on every device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.compat.flash_attn import window_of
from fastattn.packed import attention_varlen


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed ``query (total_q, heads_q, head_dim)``; ``window_size=(-1, 0)`` is causal, aligned to the last key.

    Args:
        return_aux: torch's ``AuxRequest``; with ``lse`` also returns the log-sum-exp ``(heads_q, total_q)``.
        enable_gqa: allow ``heads_q`` to be a multiple of ``heads_k``.
        seqused_k, block_table, num_splits: as in :func:`fastattn.attention_varlen`. ``seqused_k`` has gradients here.

    Raises:
        TypeError, ValueError: as :func:`fastattn.attention_varlen`; and when heads differ without ``enable_gqa``.
    """
    if not enable_gqa and query.shape[1] != key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[-2]}: pass enable_gqa=True to share key heads"
        )
    out, lse = attention_varlen(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        seqused_k=seqused_k,
        block_table=block_table,
        window=window_of(window_size),
        softmax_scale=scale,
        num_splits=num_splits or 0,
        return_lse=True,
    )
    return (out, lse) if return_aux is not None and return_aux.lse else out
