"""What users call: attention functions on tensors. Each call is validated here, before any kernel runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, ops, reference
from fastattn.spec import (
    Window,
    check_bias,
    check_dropout,
    check_mask,
    check_scale,
    check_shapes,
    check_tensors,
    check_window,
)


def draw_dropout_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's generator of that device: int64, one element; ``torch.manual_seed`` repeats it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as torch casts for its own attention: floating tensors other than float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# Calls whose tensors have been checked and need no reshaping, by all that the checks look at.
_known: set[tuple[Any, ...]] = set()
_MAX_KNOWN = 4096


def _signature(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, gqa_hint: str | None
) -> tuple[Any, ...]:
    """All that the checks of tensors look at; () when something is not a plain tensor and must be told so."""
    try:
        return (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            q.layout,
            k.layout,
            v.layout,
            gqa_hint is None,
            mask if mask is None else (mask.shape, mask.dtype, mask.device, mask.layout),
            bias if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout),
        )
    except AttributeError:
        return ()


def _batch_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """The batch dimensions (all before heads) that the three broadcast to; (1,) when there are none."""
    if not q.dim() == k.dim() == v.dim():
        raise ValueError(
            "query, key and value must have the same number of dimensions; got "
            f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
        )
    if q.dim() < 4:
        return (1,)
    batch = q.shape[:-3]
    if batch == k.shape[:-3] and batch == v.shape[:-3]:
        return tuple(batch)
    try:
        return tuple(torch.broadcast_shapes(batch, k.shape[:-3], v.shape[:-3]))
    except RuntimeError:
        raise ValueError(
            "the batch dimensions of query, key and value must be equal or 1; got "
            f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
        ) from None


def _fold(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``x`` with exactly four dimensions: heads and batch of 1 where missing, batch dimensions broadcast and folded."""
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    if x.shape[:-3] != batch:
        x = x.expand(*batch, *x.shape[-3:])
    return x if x.dim() == 4 else x.flatten(0, -4)


def _fold_mask(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """A mask or bias with four dimensions, size 1 where it is broadcast (over the whole batch, or not at all)."""
    if x.dim() == 4 and len(batch) == 1:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*batch, *x.shape[-3:]).flatten(0, -4)


def _unfold(x: Tensor, like: Tensor, batch: tuple[int, ...]) -> Tensor:
    """An output with the batch and heads dimensions that the query came with."""
    if like.dim() == 4:
        return x
    if like.dim() == 3:
        return x.squeeze(0)
    if like.dim() == 2:
        return x.squeeze(0).squeeze(0)
    return x.unflatten(0, batch)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    window: Window,
    offset: int | None,
    softmax_scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str | None,
    gqa_hint: str | None = None,
    mask_name: str | None = None,
) -> tuple[tuple[Tensor | None, ...], ops.Call, tuple[int, ...]]:
    """Validate and normalise: the operator's tensors, its other arguments, and the batch shape to give back."""
    check_scale(softmax_scale)
    check_dropout(dropout_p)
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
        raise TypeError(f"offset must be None or an int, got {offset!r}")
    if isinstance(query, Tensor) and not query.is_meta and torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(x) for x in (query, key, value))
    signature = () if torch.compiler.is_compiling() else _signature(query, key, value, mask, bias, gqa_hint)
    if signature in _known:
        q, k, v = query, key, value
        batch: tuple[int, ...] = q.shape[:1]
    else:
        check_tensors(query, key, value)
        batch = _batch_shape(query, key, value)
        q, k, v = _fold(query, batch), _fold(key, batch), _fold(value, batch)
        check_shapes(q, k, v, gqa_hint)
        full = (*batch, q.shape[1], q.shape[2], k.shape[2])[-query.dim() :]
        if mask is not None:
            check_mask(mask, q, full, mask_name or "mask")
        if bias is not None:
            check_bias(bias, q, full, mask_name or "bias")
        if signature and q is query and k is key and v is value:
            if len(_known) >= _MAX_KNOWN:
                _known.clear()
            _known.add(signature)
    if mask is not None:
        mask = _fold_mask(mask, batch)
    if bias is not None:
        bias = _fold_mask(bias, batch)
    if dropout_p == 0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = draw_dropout_seed(q.device)
    else:
        _check_seed(dropout_seed, q)
    grad = torch.is_grad_enabled()
    call: ops.Call = (
        q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale),
        window[0],
        window[1],
        k.shape[2] - q.shape[2] if offset is None else offset,
        float(dropout_p),
        grad and (q.requires_grad or k.requires_grad or v.requires_grad),
        grad and bias is not None and bias.requires_grad,
        dispatch.chosen_backend() if backend is None else backend,
    )
    return (q, k, v, mask, bias, dropout_seed), call, batch


def _check_seed(seed: Tensor, q: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int64 tensor of one element, got {got}")
    if seed.device != q.device:
        raise ValueError(f"dropout_seed must be on the query's device {q.device}, got {seed.device}")


def _window(causal: bool, window: Window | None) -> Window:
    check_window(window)
    left, right = window or (None, None)
    if causal:
        right = 0
    return left, right


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    offset: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale · Q Kᵀ + bias) V``, by the fastest kernel that can run the call.

    Query head ``h`` reads key head ``h // (heads_q // heads_k)`` (grouped-query attention; multi-query when
    ``heads_k`` is 1). ``causal`` is aligned to the last key, so that a query appended to a sequence sees all of it::

        causal, 3 queries, 5 keys:   ■ ■ ■ □ □      window=(1, 0), 5 × 5:   ■ □ □ □ □
                                     ■ ■ ■ ■ □                              ■ ■ □ □ □
                                     ■ ■ ■ ■ ■                              □ ■ ■ □ □
                                                                            □ □ ■ ■ □
                                                                            □ □ □ ■ ■

    A query that sees no key has output 0, log-sum-exp -inf and gradient 0. Gradients reach query, key, value and bias;
    memory is O(seq) beyond the arguments. The equivalent in plain torch is :func:`fastattn.reference.attention`.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``, float16, bfloat16, float32 or float64, any strides; with three
            dimensions ``(heads_q, seq_q, head_dim_qk)``, with two ``(seq_q, head_dim_qk)``.
        key: ``(..., heads_k, seq_k, head_dim_qk)``, of the query's dtype and device; batch dimensions broadcast.
        value: ``(..., heads_k, seq_k, head_dim_v)``.
        mask: boolean, broadcastable to ``(..., heads_q, seq_q, seq_k)``; True = may attend. Default: none.
        bias: floating, broadcastable to the same, added to the scaled scores; -inf hides a key. Default: none.
        causal: query i sees key j iff ``j <= i + offset``. Default: False.
        window: ``(left, right)``, each None (unbounded) or >= 0: ``i + offset - left <= j <= i + offset + right``.
            ``causal`` sets ``right`` to 0. Default: None, all keys.
        offset: the diagonal of ``causal`` and ``window``. Default: ``seq_k - seq_q`` (bottom-right); 0 is top-left.
        softmax_scale: finite; any sign. Default: ``head_dim_qk ** -0.5``.
        dropout_p: probability in [0, 1] of dropping an attention weight; always applied. Default: 0.
        dropout_seed: int64 tensor of one element; the same seed drops the same entries on every backend.
            Default: drawn from torch's generator of the device.
        return_lse: also return the natural log-sum-exp of the scores, differentiable. Default: False.
        backend: "cpu", "triton", "cuda" or "reference"; raises where it cannot run the call. Default: the one of
            :func:`fastattn.use_backend`, else automatic.

    Returns:
        ``(..., heads_q, seq_q, head_dim_v)`` in the query's dtype; with ``return_lse`` also ``(..., heads_q, seq_q)``
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes that do not fit together, a value out of range, tensors on different devices.
        RuntimeError: a named backend cannot run this call; the message gives its reasons.
    """
    tensors, call, batch = _call(
        query, key, value, mask, bias, _window(causal, window), offset, softmax_scale, dropout_p, dropout_seed, backend
    )
    out, lse = ops.run_forward(*tensors, *call)
    out = _unfold(out, query, batch)
    return (out, _unfold(lse, query, batch)) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, argument for argument.

    ``is_causal`` is aligned to the first key (top-left), as in torch: query i sees key j iff ``j <= i``.
    A row that sees nothing gives 0, where some of torch's kernels give NaN.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``.
        key: ``(..., heads_k, seq_k, head_dim_qk)``.
        value: ``(..., heads_k, seq_k, head_dim_v)``.
        attn_mask: broadcastable to ``(..., heads_q, seq_q, seq_k)``; boolean, True = may attend, or floating, added to
            the scaled scores (differentiable). Default: none.
        dropout_p: always applied, in training or not. Default: 0.
        is_causal: excludes ``attn_mask``. Default: False.
        scale: softmax scale. Default: ``head_dim_qk ** -0.5``.
        enable_gqa: allow ``heads_q`` to be a multiple of ``heads_k``. Default: False.

    Returns:
        ``(..., heads_q, seq_q, head_dim_v)``.

    Raises:
        TypeError, ValueError: as :func:`attention`; also when a mask comes together with ``is_causal``, or head counts
            differ without ``enable_gqa``.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other; give one of them")
    mask = bias = None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        bias = attn_mask
    elif attn_mask is not None:
        mask = attn_mask
    hint = None if enable_gqa else "pass enable_gqa=True to share key heads among query heads"
    window: Window = (None, 0) if is_causal else (None, None)
    tensors, call, batch = _call(
        query, key, value, mask, bias, window, 0, scale, dropout_p, None, None, gqa_hint=hint, mask_name="attn_mask"
    )
    out, _ = ops.run_forward(*tensors, *call)
    return _unfold(out, query, batch)


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    offset: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The attention matrix of an :func:`attention` call, recomputed from its log-sum-exp: ``exp(scores - lse)``.

    No second softmax is taken; the result holds ``seq_q · seq_k`` numbers per head and is differentiable in
    query, key, bias and lse.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``.
        key: ``(..., heads_k, seq_k, head_dim_qk)``.
        lse: ``(..., heads_q, seq_q)``, as ``attention(..., return_lse=True)`` returns it.
        mask, bias, causal, window, offset, softmax_scale: as given to :func:`attention`.
        dropout_p, dropout_seed: likewise; the weights are then those after dropout. The seed must be given.

    Returns:
        ``(..., heads_q, seq_q, seq_k)`` in the query's dtype; rows that see nothing are 0.

    Raises:
        TypeError, ValueError: as :func:`attention`; also when dropout comes without its seed.
    """
    if dropout_p and dropout_seed is None:
        raise ValueError("dropout_p > 0 needs the dropout_seed of the attention call whose weights these are")
    (q, k, _, mask, bias, seed), call, batch = _call(
        query, key, key, mask, bias, _window(causal, window), offset, softmax_scale, dropout_p, dropout_seed, None
    )
    assert q is not None and k is not None
    scale, left, right, diagonal = call[:4]
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    visible = reference.visible_keys(q.shape[2], k.shape[2], (left, right), diagonal, mask, bias, q.device)
    with torch.autocast(q.device.type, enabled=False):
        s = reference.scores(q.to(wide), reference.repeat_heads(k.to(wide), q.shape[1]), visible, bias, scale)
    p = reference.weights_from_lse(s, lse.reshape(q.shape[:3]))
    if seed is not None:
        keep = reference.dropout_keep(p.shape[0], p.shape[1], p.shape[2], p.shape[3], dropout_p, seed)
        p = torch.where(keep, p / (1 - dropout_p), 0) if dropout_p < 1 else torch.zeros_like(p)
    return _unfold(p.to(q.dtype), query, batch)


def explain(
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    offset: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> None:
    """Print what :func:`attention` would run for these arguments, how it is configured, and why nothing else would.

    Without arguments: which backends can run on this machine, and why the others cannot. Nothing is computed.

    Raises:
        TypeError, ValueError: as :func:`attention`.
    """
    if query is None or key is None or value is None:
        if not query is key is value is None:
            raise TypeError("explain takes query, key and value together, or none of them")
        print(dispatch.describe(None))
        return
    (q, k, v, m, b, _), call, _ = _call(
        query, key, value, mask, bias, _window(causal, window), offset, softmax_scale, dropout_p, dropout_seed, backend
    )
    assert q is not None and k is not None and v is not None
    print(dispatch.describe(ops.make_spec(q, k, v, m, b, call), call[-1]))
