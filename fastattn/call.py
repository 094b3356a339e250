"""Arguments of the public functions, checked and brought to the form that the operators take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastattn import checks, dispatch, ops, validate
from fastattn.backends.base import Backend, Tensors
from fastattn.spec import (
    SUPPORTED_DTYPES,
    UNBOUNDED,
    AttentionSpec,
    Window,
    check_bias,
    check_dropout,
    check_mask,
    check_scale,
    check_shapes,
    check_tensors,
    check_window,
)


class Arguments(NamedTuple):
    """What ``torch.ops.fastattn.attention_forward`` takes: its tensors and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    others: list[Tensor | None]
    call: ops.Call

    def spec(self) -> AttentionSpec:
        return ops.make_spec(Tensors(*self[:5], *self.others), self.call)


class Shaping(NamedTuple):
    """The features beyond window, mask, bias and dropout, as :func:`fastattn.attention` takes them."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    prefix_lens: Tensor | None = None


class AttentionOptions(TypedDict, total=False):
    """What :func:`fastattn.attention` takes by keyword, and explains, for functions about such a call."""

    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    window: Window | None
    offset: int | None
    softmax_scale: float | None
    dropout_p: float
    dropout_seed: Tensor | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    q_segments: Tensor | None
    k_segments: Tensor | None
    prefix_lens: Tensor | None


def shaping(
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
) -> Shaping | None:
    """None when none of them is asked for, which costs a plain call nothing."""
    if (
        (softcap is None or (softcap == 0 and not isinstance(softcap, (bool, Tensor))))
        and alibi_slopes is None
        and sinks is None
        and q_segments is None
        and k_segments is None
        and prefix_lens is None
    ):
        return None
    return Shaping(0.0 if softcap is None else softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens)


def draw_dropout_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's generator of that device: int64, one element; ``torch.manual_seed`` repeats it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def combine_window(causal: bool, window: Window | None) -> Window:
    """``causal`` and ``window`` as one pair."""
    validate.check_flag("causal", causal)
    check_window(window)
    left, right = (side if side is None or side < UNBOUNDED else None for side in window or (None, None))
    return left, 0 if causal else right


def autocast(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype where it is enabled, as torch casts for its own attention: floats other than float64."""
    tensors = (query, *others)
    if not isinstance(query, Tensor) or query.is_meta or not torch.is_autocast_enabled(query.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(query.device.type)
    kept = [not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype is torch.float64 for x in tensors]
    return tuple(x if keep else x.to(dtype) for x, keep in zip(tensors, kept, strict=True))


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


# Plain calls that have been made before (three 4-D tensors, neither gradient nor feature), and their plans.
_repeated: dict[tuple[Any, ...], tuple[AttentionSpec, Backend]] = {}


def plain_key(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Any, ...]:
    """All that the plan of a plain call depends on; () when the call is not plain or has to be checked first.

    It costs as much as 1/10 of a small call, whose cost it halves: checks, normalisation and dispatch fall away.
    """
    try:
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
            or torch._C._is_any_autocast_enabled()
            or not ops.is_plain((q, k, v), ())
        ):
            return ()
        shapes = (q.shape, k.shape, v.shape)
        return (*shapes, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, dispatch.chosen_backend(), options)
    except AttributeError:  # not a tensor: the checks will say so
        return ()


def run_repeated(plain: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """The kernel's result if there was a call with this key before."""
    plan = _repeated.get(plain)
    return None if plan is None else plan[1].forward(plan[0], Tensors(q, k, v))


def remember(plain: tuple[Any, ...], arguments: Arguments, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keep the plan of a call that has run; one whose tensors had to be reshaped first is not plain."""
    if not plain or arguments.q is not q or arguments.k is not k or arguments.v is not v:
        return
    spec, backend = ops.find_plan(Tensors(*arguments[:5]), (), arguments.call)
    if backend is not None:
        if len(_repeated) >= _MAX_KNOWN:
            _repeated.clear()
        _repeated[plain] = (spec, backend)


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


def fold_mask(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """A mask or bias with four dimensions, size 1 where it is broadcast (over the whole batch, or not at all)."""
    if x.dim() == 4 and len(batch) == 1:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*batch, *x.shape[-3:]).flatten(0, -4)


def _fold_rows(x: Tensor, batch: tuple[int, ...], row: tuple[int, ...]) -> Tensor:
    """``(*batch, *row)``, or what broadcasts to it in the batch, as ``(batch or 1, *row)``."""
    lead = x.shape[: x.dim() - len(row)]
    if math.prod(lead) == 1:
        return x.reshape(1, *row)
    return x.expand(*batch, *row).reshape(math.prod(batch), *row)


def unfold(x: Tensor, like: Tensor, batch: tuple[int, ...]) -> Tensor:
    """An output with the batch and heads dimensions that the query came with."""
    if like.dim() == 4:
        return x
    if like.dim() == 3:
        return x.squeeze(0)
    if like.dim() == 2:
        return x.squeeze(0).squeeze(0)
    return x.unflatten(0, batch)


def seed_for(dropout_p: float, seed: Tensor | None, q: Tensor) -> Tensor | None:
    if seed is not None:
        validate.check_seed(seed, q)
    if dropout_p == 0:
        return None
    return draw_dropout_seed(q.device) if seed is None else seed


def shape_tensors(s: Shaping, q: Tensor, seqlen_k: int, seqlen_q: int, batch: tuple[int, ...]) -> Shaping:
    """The tensors of ``s``, checked, in the shapes and types of :class:`~fastattn.backends.base.Tensors`."""
    validate.check_softcap(s.softcap)
    slopes, sinks, of_q, of_k, prefix = s[1:]
    heads, number = q.shape[1], math.prod(batch)
    if slopes is not None:
        validate.check_slopes(slopes, q, (*batch, heads))
        slopes = slopes.float() if slopes.dim() == 1 else _fold_rows(slopes.float(), batch, (heads,))
    if sinks is not None:
        validate.check_sinks(sinks, q)
        sinks = sinks.to(torch.float64 if q.dtype is torch.float64 else torch.float32)
    if of_q is None and of_k is not None:
        raise ValueError("k_segments needs q_segments beside it")
    if of_q is not None:
        validate.check_integers("q_segments", of_q, q, (*batch, seqlen_q))
        if of_k is None and seqlen_q != seqlen_k:
            raise ValueError(f"q_segments needs k_segments beside it: there are {seqlen_q} queries, {seqlen_k} keys")
        of_k = of_q if of_k is None else of_k
        validate.check_integers("k_segments", of_k, q, (*batch, seqlen_k))
        if checks.enabled():
            checks.check_int32("q_segments", of_q)
            checks.check_int32("k_segments", of_k)
        of_q, of_k = (_fold_rows(x.to(torch.int32), batch, (n,)) for x, n in ((of_q, seqlen_q), (of_k, seqlen_k)))
    if prefix is not None:
        validate.check_integers("prefix_lens", prefix, q, batch)
        prefix = prefix.to(torch.int32).expand(batch).reshape(number)
    return Shaping(float(s.softcap), slopes, sinks, of_q, of_k, prefix)


def prepare(
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
    shaped: Shaping | None = None,
    gqa_hint: str | None = None,
    mask_name: str | None = None,
    dtypes: tuple[torch.dtype, ...] = SUPPORTED_DTYPES,
) -> tuple[Arguments, tuple[int, ...]]:
    """Validate and normalise a call on ``(..., heads, seq, head_dim)`` tensors; also the batch shape to give back."""
    check_scale(softmax_scale)
    check_dropout(dropout_p)
    validate.check_offset(offset)
    usual = dtypes is SUPPORTED_DTYPES
    if usual:
        query, key, value = autocast(query, key, value)
    signature = (
        () if torch.compiler.is_compiling() or not usual else _signature(query, key, value, mask, bias, gqa_hint)
    )
    if signature in _known:
        q, k, v = query, key, value
        batch: tuple[int, ...] = q.shape[:1]
    else:
        check_tensors(query, key, value, dtypes)
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
        mask = fold_mask(mask, batch)
    if bias is not None:
        bias = fold_mask(bias, batch)
    seed = seed_for(dropout_p, dropout_seed, q)
    diagonal = k.shape[2] - q.shape[2] if offset is None else offset
    call = scalars(q, k, v, bias, window, diagonal, softmax_scale, dropout_p, backend)
    if shaped is None:
        others = [] if mask is None and seed is None else [mask, seed, *(None,) * 9]
        return Arguments(q, k, v, bias, None, others, call), batch
    softcap, slopes, sinks, *rows = shape_tensors(shaped, q, k.shape[2], q.shape[2], batch)
    if rows[2] is not None and checks.enabled():
        checks.check_lengths("prefix_lens", rows[2], k.shape[2], "the keys that there are")
    others = [mask, seed, slopes, *rows, *(None,) * 5]
    return Arguments(q, k, v, bias, sinks, others, (*call, softcap) if softcap else call), batch


def prepare_options(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    backend: str | None = None,
    dtypes: tuple[torch.dtype, ...] = SUPPORTED_DTYPES,
) -> tuple[Arguments, tuple[int, ...]]:
    """:func:`prepare` for a function that takes the options of a call as they were given."""
    if unknown := options.keys() - AttentionOptions.__annotations__.keys():
        raise TypeError(f"{function} does not take {', '.join(sorted(unknown))}")
    given: dict[str, Any] = dict(options)
    get = given.get
    return prepare(
        query,
        key,
        value,
        get("mask"),
        get("bias"),
        combine_window(get("causal", False), get("window")),
        get("offset"),
        get("softmax_scale"),
        get("dropout_p", 0.0),
        get("dropout_seed"),
        backend,
        shaping(*map(get, Shaping._fields)),
        dtypes=dtypes,
    )


def scalars(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Window,
    offset: int,
    softmax_scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> ops.Call:
    grad = torch.is_grad_enabled()
    if backend is not None and not isinstance(backend, str):
        dispatch.get_backend(backend)  # raises, where a list would be no key of a dict
    return (
        q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale),
        window[0],
        window[1],
        offset,
        float(dropout_p),
        grad and (q.requires_grad or k.requires_grad or v.requires_grad),
        grad and bias is not None and bias.requires_grad,
        dispatch.chosen_backend() if backend is None else backend,
    )
