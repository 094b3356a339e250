"""The two torch operators, ``fastattn::attention_forward`` and ``fastattn::attention_backward``.

Defined through ``torch.library.Library`` rather than the ``custom_op`` decorator, whose eager call costs twice as much.
The arguments are those of an :class:`~fastattn.spec.AttentionSpec` that the tensors do not carry; ``functional.py``
has validated and normalised them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.backends.base import Backend, empty_like_layout, empty_lse
from fastattn.spec import AttentionSpec

_CALL = (
    "float softmax_scale, SymInt? window_left, SymInt? window_right, SymInt offset, float dropout_p, "
    "bool needs_grad, bool needs_bias_grad, str backend"
)
_library = torch.library.Library("fastattn", "DEF")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? dropout_seed, "
    f"{_CALL}) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, "
    f"Tensor? dropout_seed, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
)

Call = tuple[float, int | None, int | None, int, float, bool, bool, str]
_plans: dict[tuple[Any, ...], tuple[AttentionSpec, Backend | None]] = {}
_MAX_PLANS = 4096


def make_spec(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, call: Call) -> AttentionSpec:
    """The spec of a normalised call, from the tensors' metadata and the operator's remaining arguments."""
    scale, left, right, offset, dropout_p, needs_grad, needs_bias_grad, _ = call
    batch, heads_q, seqlen_q, head_dim_qk = q.shape
    _, heads_k, seqlen_k, head_dim_v = v.shape
    return AttentionSpec(
        batch=batch,
        heads_q=heads_q,
        heads_k=heads_k,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        dtype=q.dtype,
        device=q.device.type,
        softmax_scale=scale,
        window=(left, right),
        offset=offset,
        mask=None if mask is None else tuple(mask.shape),  # type: ignore[arg-type]
        bias=None if bias is None else tuple(bias.shape),  # type: ignore[arg-type]
        bias_dtype=None if bias is None else bias.dtype,
        dropout_p=dropout_p,
        needs_grad=needs_grad,
        needs_bias_grad=needs_bias_grad,
    )


def _plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, call: Call
) -> tuple[AttentionSpec, Backend | None]:
    """The spec and its backend (None: nothing to compute), remembered by everything that they depend on."""
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device.type,
        mask if mask is None else mask.shape,
        bias if bias is None else (bias.shape, bias.dtype),
        call,
    )
    plan = _plans.get(key)
    if plan is None:
        spec = make_spec(q, k, v, mask, bias, call)
        chosen = dispatch.select(spec, call[-1])
        plan = (spec, None if spec.is_empty else chosen)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_seed: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor]:
    spec, backend = _plan(q, k, v, mask, bias, call)
    if backend is None:
        return empty_like_layout(q, spec.head_dim_v).zero_(), empty_lse(q).fill_(-math.inf)
    return backend.forward(spec, q, k, v, mask, bias, dropout_seed)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, backend = _plan(q, k, v, mask, bias, call)
    if backend is None:
        gradients = [empty_like_layout(x).zero_() for x in (q, k, v)]
        dbias = None if bias is None or not spec.needs_bias_grad else torch.zeros_like(bias)
    else:
        *gradients, dbias = backend.backward(spec, grad_out, grad_lse, q, k, v, mask, bias, dropout_seed, out, lse)
    dq, dk, dv = gradients
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_seed: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[3]), empty_lse(q)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and call[6] else q.new_empty(0)
    return empty_like_layout(q), empty_like_layout(k), empty_like_layout(v), dbias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        dropout_seed: Tensor | None,
        *call: Any,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _forward_op(q, k, v, mask, bias, dropout_seed, *call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, bias, dropout_seed, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, dropout_seed, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * (6 + len(ctx.call))
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        dq, dk, dv, dbias = _backward_op(grad_out, grad_lse, q, k, v, mask, bias, dropout_seed, out, lse, *ctx.call)
        needs = ctx.needs_input_grad
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            None,
            dbias if needs[4] else None,
            *(None,) * (1 + len(ctx.call)),
        )


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fastattn's kernels have no second derivative; for one (gradient penalties, Hessian products) call "
            "fastattn.reference.attention, which torch differentiates any number of times"
        )


def _forward_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, _, bias, *_ = arguments
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*arguments)


def _backward_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _AttentionBackward.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(*arguments)


for _name, _kernel, _autograd, _fake in (
    ("attention_forward", _forward, _forward_autograd, _forward_fake),
    ("attention_backward", _backward, _backward_autograd, _backward_fake),
):
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        _library.impl(_name, _kernel, _key)
    _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastattn.attention_forward.default
_backward_op = torch.ops.fastattn.attention_backward.default


def run_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastattn::attention_forward``; in eager mode past the dispatcher's autograd layer, which costs a third."""
    return _forward_op(*arguments) if torch.compiler.is_compiling() else _forward_autograd(*arguments)
