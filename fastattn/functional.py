"""What users call: attention functions on tensors. Each call is validated here, before any kernel runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import ops
from fastattn.call import combine_window, plain_key, prepare, remember, run_repeated, shaping, unfold
from fastattn.nested import attention_nested
from fastattn.spec import Window
from fastattn.validate import check_flag


def _is_default(dropout_p: float, scale: float | None, flag: bool) -> bool:
    """No dropout, and kinds that need no check; the scale's value has been checked if there was such a call before."""
    kinds = type(dropout_p) is float and (scale is None or type(scale) is float) and type(flag) is bool
    return kinds and dropout_p == 0


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
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale · Q Kᵀ + bias) V``, by the fastest kernel that can run the call.

    Scores are shaped in this order: scaled, capped by ``softcap``, ALiBi and bias added, hidden where not visible.

    Query head ``h`` reads key head ``h // (heads_q // heads_k)`` (grouped-query attention; multi-query when
    ``heads_k`` is 1). ``causal`` is aligned to the last key, so that a query appended to a sequence sees all of it::

        causal, 3 queries, 5 keys:   ■ ■ ■ □ □      window=(1, 0), 5 × 5:   ■ □ □ □ □
                                     ■ ■ ■ ■ □                              ■ ■ □ □ □
                                     ■ ■ ■ ■ ■                              □ ■ ■ □ □
                                                                            □ □ ■ ■ □
                                                                            □ □ □ ■ ■

    A query that sees no key has output 0, log-sum-exp -inf and gradient 0. Gradients reach query, key, value, bias and
    sinks; memory is O(seq) beyond the arguments. The equivalent in plain torch is :func:`fastattn.reference.attention`.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``, float16, bfloat16, float32 or float64, any strides; with three
            dimensions ``(heads_q, seq_q, head_dim_qk)``, with two ``(seq_q, head_dim_qk)``. All three may be jagged
            NestedTensors ``(batch, heads, seq*, head_dim)``: then as :func:`fastattn.attention_varlen`, with segments
            that are NestedTensors ``(batch, seq*)``.
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
        softcap: scores become ``softcap · tanh(scores / softcap)``. Default: 0, as they are.
        alibi_slopes: ``(heads_q,)`` or ``(batch, heads_q)``, not differentiable: ``-slope · |i + offset - j|`` is added
            to the scores. Default: none.
        sinks: floating ``(heads_q,)``: one more logit per head, in the softmax's denominator only, so that the weights
            of a row may sum to less than 1. A row that sees nothing has output 0 and lse = sink. Default: none.
        q_segments: integers ``(batch or 1, seq_q)``, within int32: a query sees the keys of its own segment (document
            masks).
        k_segments: integers ``(batch or 1, seq_k)``. Default: ``q_segments``.
        prefix_lens: integers ``(batch,)``: keys ``j < prefix_lens[b]`` are visible whatever ``causal`` and ``window``
            say (prefix language models); mask and segments still hold. Default: none.
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
    if getattr(query, "is_nested", False) or getattr(key, "is_nested", False):
        return attention_nested(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            causal=causal,
            window=window,
            offset=offset,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            q_segments=q_segments,
            k_segments=k_segments,
            prefix_lens=prefix_lens,
            return_lse=return_lse,
            backend=backend,
        )
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    shaped = shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens)
    plain: tuple[Any, ...] = ()
    if mask is bias is window is offset is shaped is backend is None and _is_default(dropout_p, softmax_scale, causal):
        plain = plain_key(query, key, value, "attention", causal, softmax_scale)
        if (result := run_repeated(plain, query, key, value)) is not None:
            return result if return_lse else result[0]
    arguments, batch = prepare(
        query,
        key,
        value,
        mask,
        bias,
        combine_window(causal, window),
        offset,
        softmax_scale,
        dropout_p,
        dropout_seed,
        backend,
        shaped,
    )
    out, lse = ops.run_forward(*arguments[:6], *arguments.call)
    remember(plain, arguments, query, key, value)
    out = unfold(out, query, batch)
    return (out, unfold(lse, query, batch)) if return_lse else out


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
    plain: tuple[Any, ...] = ()
    if attn_mask is None and _is_default(dropout_p, scale, is_causal):
        plain = plain_key(query, key, value, "sdpa", is_causal, scale, enable_gqa)
        if (result := run_repeated(plain, query, key, value)) is not None:
            return result[0]
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other; give one of them")
    mask = bias = None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        bias = attn_mask
    elif attn_mask is not None:
        mask = attn_mask
    hint = None if enable_gqa else "pass enable_gqa=True to share key heads among query heads"
    if getattr(query, "is_nested", False) or getattr(key, "is_nested", False):
        options = {"causal": is_causal, "offset": 0, "softmax_scale": scale, "dropout_p": dropout_p}
        return attention_nested(query, key, value, gqa_hint=hint, mask=mask, bias=bias, **options)
    window: Window = (None, 0) if is_causal else (None, None)
    arguments, batch = prepare(
        query, key, value, mask, bias, window, 0, scale, dropout_p, None, None, gqa_hint=hint, mask_name="attn_mask"
    )
    out, _ = ops.run_forward(*arguments[:6], *arguments.call)
    remember(plain, arguments, query, key, value)
    return unfold(out, query, batch)
