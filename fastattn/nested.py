"""NestedTensors in jagged layout: sequences packed one behind the other, as torch holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.packed import attention_varlen
from fastattn.validate import check_flag


def is_nested(*tensors: object) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def _jagged(name: str, x: Any, ragged_dim: int) -> Any:
    """``x`` as ``(batch, seq*, ...)`` without holes, or an error unless it is jagged in dimension ``ragged_dim``."""
    if not x.is_nested or x.layout is not torch.jagged:
        kind = "a NestedTensor in strided layout" if x.is_nested else "a dense tensor"
        raise NotImplementedError(
            f"{name} is {kind}: query, key, value and segments must all be NestedTensors with layout=torch.jagged, or "
            "all dense"
        )
    if x._ragged_idx != ragged_dim:
        raise ValueError(f"{name} must be jagged in dimension {ragged_dim}, got {x._ragged_idx}")
    x = x.transpose(1, ragged_dim)
    return x if x.lengths() is None else _without_holes(x)


def _without_holes(x: Any) -> Tensor:
    """The rows in use, one behind the other; differentiable, which ``x.contiguous()`` is not."""
    ends = x.lengths().cumsum(0)
    moved = (x.offsets()[:-1] - ends + x.lengths()).repeat_interleave(x.lengths())
    rows = torch.arange(moved.shape[0], device=moved.device) + moved
    return torch.nested.nested_tensor_from_jagged(x.values()[rows], offsets=torch.nn.functional.pad(ends, (1, 0)))


def attention_nested(query: Any, key: Any, value: Any, gqa_hint: str | None = None, **options: Any) -> Any:
    """:func:`fastattn.attention` of jagged ``(batch, heads, seq*, head_dim)``; an output like the query.

    Such a tensor is ``torch.nested.nested_tensor(..., layout=torch.jagged)`` of ``(batch, seq*, heads, head_dim)``,
    transposed. ``return_lse`` gives ``(batch, heads, seq*)``, jagged as well.
    """
    named = (("query", query), ("key", key), ("value", value))
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got {x.dim()} dimensions")
    q, k, v = (_jagged(name, x, 2) for name, x in named)
    if gqa_hint and query.shape[1] != key.shape[1]:
        raise ValueError(f"query and key have different numbers of heads; {gqa_hint}")
    of_q, of_k = q.offsets().to(torch.int32), k.offsets().to(torch.int32)
    if k.offsets() is not v.offsets() and not torch.equal(k.offsets(), v.offsets()):
        raise ValueError("key and value must have the same sequence lengths")
    for name, of in (("q_segments", q), ("k_segments", k)):
        if (ids := options.get(name)) is not None:
            ids = _jagged(name, ids, 1)
            if ids.offsets() is not of.offsets() and not torch.equal(ids.offsets(), of.offsets()):
                raise ValueError(f"{name} must have the sequence lengths of {'query' if of is q else 'key'}")
            options[name] = ids.values()
    if options.get("k_segments") is None and k.offsets() is q.offsets():
        options["k_segments"] = options.get("q_segments")
    return_lse = options.pop("return_lse", False)
    check_flag("return_lse", return_lse)
    of_k = of_q if k.offsets() is q.offsets() else of_k
    out, lse = attention_varlen(q.values(), k.values(), v.values(), of_q, of_k, return_lse=True, **options)
    out = like(q, out).transpose(1, 2)
    return (out, like(q, lse.transpose(0, 1)).transpose(1, 2)) if return_lse else out


def like(x: Any, values: Tensor) -> Tensor:
    """A jagged tensor of other values with the sequence lengths of ``x``; torch knows that they are the same."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets())
