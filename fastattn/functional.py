"""What users call: attention functions on tensors. Each call is validated here, before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch, ops, reference
from fastattn.backends.base import Tensors
from fastattn.call import combine_window, prepare, shaping, unfold
from fastattn.spec import Window


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
        shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens),
    )
    out, lse = ops.run_forward(*arguments[:6], *arguments.call)
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
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other; give one of them")
    mask = bias = None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        bias = attn_mask
    elif attn_mask is not None:
        mask = attn_mask
    hint = None if enable_gqa else "pass enable_gqa=True to share key heads among query heads"
    window: Window = (None, 0) if is_causal else (None, None)
    arguments, batch = prepare(
        query, key, value, mask, bias, window, 0, scale, dropout_p, None, None, gqa_hint=hint, mask_name="attn_mask"
    )
    out, _ = ops.run_forward(*arguments[:6], *arguments.call)
    return unfold(out, query, batch)


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
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
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
    shaped = shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens)
    window = combine_window(causal, window)
    arguments, batch = prepare(
        query, key, key, mask, bias, window, offset, softmax_scale, dropout_p, dropout_seed, None, shaped
    )
    q, k, _, bias, _, others, (scale, _, _, diagonal, *_) = arguments
    t = Tensors(q, k, k, bias, None, *others)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    visible = reference.visible_keys(
        q.shape[2],
        k.shape[2],
        window,
        diagonal,
        t.mask,
        bias,
        q.device,
        q_segments=t.q_segments,
        k_segments=t.k_segments,
        prefix_lens=t.prefix_lens,
    )
    with torch.autocast(q.device.type, enabled=False):
        repeated = reference.repeat_heads(k.to(wide), q.shape[1])
        s = reference.scores(q.to(wide), repeated, visible, bias, scale, softcap or 0.0, t.alibi_slopes, diagonal)
    p, seed = reference.weights_from_lse(s, lse.reshape(q.shape[:3])), t.dropout_seed
    if seed is not None:
        keep = reference.dropout_keep(p.shape[0], p.shape[1], p.shape[2], p.shape[3], dropout_p, seed)
        p = torch.where(keep, p / (1 - dropout_p), 0) if dropout_p < 1 else torch.zeros_like(p)
    return unfold(p.to(q.dtype), query, batch)


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
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
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
    arguments, _ = prepare(
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
        shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens),
    )
    print(dispatch.describe(arguments.spec(), arguments.call[7]))
