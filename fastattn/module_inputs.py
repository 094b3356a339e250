"""What ``MultiHeadAttention`` does with inputs other than dense ones: jagged NestedTensors, and a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.kv_cache import KVCache
from fastattn.nested import like
from fastattn.packed import attention_varlen
from fastattn.spec import Window

if TYPE_CHECKING:
    from fastattn.modules import MultiHeadAttention


def attend_nested(
    mha: MultiHeadAttention, query: Any, key: Any, value: Any, unmasked: bool, causal: bool, window: Window | None
) -> Tensor:
    """Jagged ``(N, seq*, E)`` inputs: projections and attention of the packed rows, no padding anywhere."""
    inputs = (("query", query, mha.embed_dim), ("key", key, mha.kdim), ("value", value, mha.vdim))
    for name, x, dim in inputs:
        if not x.is_nested or x.layout is not torch.jagged:
            raise NotImplementedError(
                f"{name} is no jagged NestedTensor: MultiHeadAttention takes NestedTensors with layout=torch.jagged, "
                "all three of them, or dense tensors with key_padding_mask (in an nn.TransformerEncoder: construct "
                "it with enable_nested_tensor=False, or call fastattn.swap_attention on the whole encoder)"
            )
        if x.dim() != 3 or x.shape[-1] != dim or x.lengths() is not None:
            raise ValueError(f"{name} must be jagged (N, seq*, {dim}) without holes, got {tuple(x.shape)}")
    if not (unmasked and mha.batch_first and mha.bias_k is None and not mha.add_zero_attn):
        raise ValueError(
            "NestedTensors need batch_first=True and need_weights=False, and exclude masks, add_bias_kv and "
            "add_zero_attn"
        )
    of_q, of_k = query.offsets(), key.offsets()
    if of_k is not value.offsets() and not torch.equal(of_k, value.offsets()):
        raise ValueError("key and value must have the same sequence lengths")
    rows = query.values().unsqueeze(0)
    others = rows if key is query else key.values().unsqueeze(0)
    last = others if value is key else value.values().unsqueeze(0)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in mha._project(rows, others, last))
    cu_q = of_q.to(torch.int32)
    cu_k = cu_q if of_k is of_q else of_k.to(torch.int32)
    dropout_p = float(mha.dropout) if mha.training else 0.0
    out = attention_varlen(q, k, v, cu_q, cu_k, causal=causal, window=window, offset=0, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return like(query, mha.out_proj(out.flatten(1)))


def attend_to_cache(
    mha: MultiHeadAttention,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: KVCache,
    key_padding_mask: Tensor | None,
    causal: bool,
    window: Window | None,
) -> Tensor:
    """Append the projected keys and values, if there are any, to the cache, and attend to all that it holds."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a fastattn.KVCache or fastattn.PagedKVCache, got {type(cache).__name__}")
    if query.dim() != 3 or mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError("a cache needs batched inputs, and excludes add_bias_kv and add_zero_attn")
    if mha.training and mha.dropout:
        raise ValueError("a cache is for inference: call eval() first, there is dropout")
    mask = None
    if key_padding_mask is not None:
        if key_padding_mask.dtype is not torch.bool or key_padding_mask.dim() != 2:
            raise ValueError(
                "with a cache, key_padding_mask must be bool of shape (batch, keys), keys that the cache holds "
                f"included; got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
            )
        mask = ~key_padding_mask[:, None, None, :]
    if key is None or value is None:
        new: tuple[Tensor, ...] = (mha._project_query(query),)
    else:
        new = mha._project(query, key, value)
    out = cache.attend(*new, mask=mask, causal=causal, window=window)
    assert isinstance(out, Tensor)
    return mha._merge(out)
