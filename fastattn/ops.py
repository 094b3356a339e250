"""The two torch operators, ``fastattn::attention_forward`` and ``fastattn::attention_backward``.

Defined through ``torch.library.Library`` rather than the ``custom_op`` decorator, whose eager call costs twice as much.
The arguments are those of an :class:`~fastattn.spec.AttentionSpec` that the tensors do not carry; ``functional.py``
has validated and normalised them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fastattn import dispatch
from fastattn.backends.base import Backend, Tensors, empty_like_layout, empty_lse
from fastattn.spec import AttentionSpec

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor?[] others"
_CALL = (
    "float softmax_scale, SymInt? window_left, SymInt? window_right, SymInt offset, float dropout_p, "
    "bool needs_grad, bool needs_bias_grad, str backend, float softcap=0.0, bool relative_offset=False, "
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, int num_splits=0"
)
_library = torch.library.Library("fastattn", "DEF")
_library.define(f"attention_forward({_TENSORS}, {_CALL}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

#: The operators' arguments after the tensors. The last five may be missing when they have their defaults.
Call = tuple[Any, ...]
#: Tensors without a gradient, in the order of ``Tensors`` after sinks; empty when all of them are None.
Others = Sequence[Tensor | None]
_DEFAULTS: Call = (0.0, False, 0, 0, 0)
#: While ``fastattn.explain`` is at work in this thread, what to set back then: objects, and their attributes before.
undo: ContextVar[list[tuple[Any, dict[str, Any]]] | None] = ContextVar("fastattn_undo", default=None)
_plans: dict[tuple[Any, ...], tuple[AttentionSpec, Backend | None]] = {}
_MAX_PLANS = 4096


def make_spec(t: Tensors, call: Call) -> AttentionSpec:
    """The spec of a normalised call, from the tensors' metadata and the operator's remaining arguments."""
    scale, left, right, offset, dropout_p, needs_grad, needs_bias_grad, _ = call[:8]
    softcap, relative_offset, max_seqlen_q, max_seqlen_k, num_splits = (*call[8:], *_DEFAULTS[len(call) - 8 :])
    batch, heads_q, seqlen_q, head_dim_qk = t.q.shape
    _, heads_k, seqlen_k, head_dim_v = t.v.shape
    packed, paged, total_q, total_k = t.cu_seqlens_q is not None, t.block_table is not None, 0, 0
    if t.cu_seqlens_q is not None:
        batch, total_q, seqlen_q = t.cu_seqlens_q.shape[0] - 1, seqlen_q, max_seqlen_q
        total_k, seqlen_k = 0 if paged else seqlen_k, max_seqlen_k
    elif paged:
        seqlen_k = max_seqlen_k
    bias = t.bias
    return AttentionSpec(
        batch=batch,
        heads_q=heads_q,
        heads_k=heads_k,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        dtype=t.q.dtype,
        device=t.q.device.type,
        softmax_scale=scale,
        window=(left, right),
        offset=offset,
        mask=None if t.mask is None else tuple(t.mask.shape),  # type: ignore[arg-type]
        bias=None if bias is None else tuple(bias.shape),  # type: ignore[arg-type]
        bias_dtype=None if bias is None else bias.dtype,
        dropout_p=dropout_p,
        needs_grad=needs_grad,
        needs_bias_grad=needs_bias_grad,
        softcap=softcap,
        alibi=None if t.alibi_slopes is None else tuple(t.alibi_slopes.shape),
        sinks=t.sinks is not None,
        segments=t.q_segments is not None,
        prefix=t.prefix_lens is not None,
        packed=packed,
        total_q=total_q,
        total_k=total_k,
        seqused_k=t.seqused_k is not None,
        leftpad_k=t.leftpad_k is not None,
        page_size=t.k.shape[2] if paged else None,
        num_pages=t.k.shape[0] if paged else 0,
        num_splits=num_splits,
        relative_offset=relative_offset,
    )


def find_plan(
    t: Tensors, others: Others, call: Call, direction: str = "forward"
) -> tuple[AttentionSpec, Backend | None]:
    """The spec and its backend (None: nothing to compute), remembered by everything that they depend on."""
    q, bias = t.q, t.bias
    key = (
        q.shape,
        t.k.shape,
        t.v.shape,
        q.dtype,
        q.device.type,
        bias if bias is None else (bias.shape, bias.dtype),
        t.sinks is None,
        tuple([x if x is None else x.shape for x in others]) if others else (),
        call,
        direction,
    )
    plan = _plans.get(key)
    if plan is None:
        spec = make_spec(t, call)
        chosen = dispatch.select(spec, call[7], direction)
        plan = (spec, None if spec.is_empty else chosen)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, others: Others, *call: Any
) -> tuple[Tensor, Tensor]:
    t = Tensors(q, k, v, bias, sinks, *others)
    spec, backend = find_plan(t, others, call)
    if backend is None:
        lse = empty_lse(q).fill_(-math.inf) if sinks is None else empty_lse(q).copy_(sinks.view(-1, 1))
        return empty_like_layout(q, spec.head_dim_v).zero_(), lse
    return backend.forward(spec, t)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    others: Others,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = Tensors(q, k, v, bias, sinks, *others)
    spec, backend = find_plan(t, others, call, "backward")
    if backend is None:
        gradients = [empty_like_layout(x).zero_() for x in (q, k, v)]
        dbias = None if bias is None or not spec.needs_bias_grad else torch.zeros_like(bias)
    else:
        *gradients, dbias = backend.backward(spec, t, grad_out, grad_lse, out, lse)
    dq, dk, dv = gradients
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, others: Others, *call: Any
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(q, v.shape[3]), empty_lse(q)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    others: Others,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and call[6] else q.new_empty(0)
    return empty_like_layout(q), empty_like_layout(k), empty_like_layout(v), dbias


def sinks_gradient(grad_out: Tensor, grad_lse: Tensor | None, sinks: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of the sinks, ``dsink = -sum over batch and rows of exp(sink - lse) · delta``, O(seq) memory.

    A sink is one more score whose value vector is 0, so that ``dP = 0`` there and ``dS = P · (dP - delta)``, with
    ``delta = rowsum(dO ∘ O) - dlse``.
    """
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    p = torch.where(lse == -math.inf, 0, (sinks.view(-1, 1) - lse).exp())
    return -(p * delta).sum((0, 2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        others: Others,
        *call: Any,
    ) -> tuple[Tensor, Tensor]:
        with _enclosing_levels():
            out, lse = _below_autograd(q, k, v, bias, sinks, others, *call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *others)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, lse, *others = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * (6 + len(ctx.call))
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        dq = dk = dv = dbias = None
        needs = ctx.needs_input_grad
        if ctx.call[5] or ctx.call[6]:
            plain = not torch.is_grad_enabled() and is_plain((grad_out, grad_lse, q, k, v, bias), others)
            plain = plain and torch._C._has_storage(grad_out)  # there is none in is_grads_batched
            run = _backward if plain else BACKWARD
            dq, dk, dv, dbias = run(grad_out, grad_lse, q, k, v, bias, sinks, others, out, lse, *ctx.call)
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            dbias if needs[3] else None,
            sinks_gradient(grad_out, grad_lse, sinks, out, lse) if needs[4] else None,
            *(None,) * (1 + len(ctx.call)),
        )


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with _enclosing_levels(), torch._C._AutoDispatchBelowAutograd():
            return BACKWARD(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fastattn's kernels have no second derivative; for one (gradient penalties, Hessian products) call "
            "fastattn.reference.attention, which torch differentiates any number of times"
        )


def transforming() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _record(function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """``function.apply``; under torch.func, which hands its levels to autograd one by one, for the one at hand.

    It is that of the base class: ``torch.autograd.Function``'s own looks for torch.func first, a tenth of a small call.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if not transforming():
        return apply(*arguments)
    with enable_single_level_autograd_function():
        return apply(*arguments)


_NOTHING = nullcontext()


@contextmanager
def _levels() -> Iterator[None]:
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _enclosing_levels() -> AbstractContextManager[None]:
    """Within a Function's forward, where nothing is recorded: let the levels of torch.func around this one record."""
    return _levels() if transforming() else _NOTHING


def _refuse_tangents(arguments: Sequence[Any]) -> None:
    flat = (x for item in arguments for x in (item if isinstance(item, (list, tuple)) else (item,)))
    tensors = (x for x in flat if isinstance(x, Tensor) and x.is_floating_point())
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "fastattn's kernels have no forward-mode derivative (torch.func.jvp, jacfwd, hessian); for one call "
            "fastattn.reference.attention, or use reverse mode (grad, vjp, jacrev)"
        )


def _forward_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, bias, sinks, others, *call = arguments
    if forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    if torch.is_grad_enabled():
        needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
        needs_bias_grad = bias is not None and bias.requires_grad
        if needs_grad or needs_bias_grad or (sinks is not None and sinks.requires_grad):
            if needs_grad > call[5] or needs_bias_grad > call[6]:  # what vmap takes apart asked for no gradient
                call[5:7] = needs_grad, needs_bias_grad
                arguments = (q, k, v, bias, sinks, others, *call)
            return _record(_Attention, arguments)
    return _below_autograd(*arguments)


def _below_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    if is_plain(arguments[:5], arguments[5]):
        return _forward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(*arguments)


def _backward_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _record(_AttentionBackward, arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return BACKWARD(*arguments)


def _slice(x: Any, dim: Any, n: int) -> Any:
    """Entry ``n`` of what ``torch.func.vmap`` maps over, as it is where ``dim`` is None."""
    if isinstance(x, (list, tuple)):
        return [_slice(item, d, n) for item, d in zip(x, dim, strict=True)]
    if dim is None:
        return x
    return x.select(dim, n) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :])


def _vmap(name: str) -> Callable[..., Any]:
    """One call after the other: packed sequences have no batch dimension to fold another into."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        op = getattr(torch.ops.fastattn, name).default
        results = [op(*_slice(arguments, in_dims, n)) for n in range(max(info.batch_size, 1))]
        outputs = (torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return tuple(outputs), (0,) * len(results[0])

    return rule


for _name, _kernel, _autograd, _fake in (
    ("attention_forward", _forward, _forward_autograd, forward_fake),
    ("attention_backward", _backward, _backward_autograd, _backward_fake),
):
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        _library.impl(_name, _kernel, _key)
    _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"fastattn::{_name}", _vmap(_name), lib=_library)

FORWARD = torch.ops.fastattn.attention_forward.default
BACKWARD = torch.ops.fastattn.attention_backward.default


def is_plain(tensors: Sequence[Tensor | None], others: Others) -> bool:
    """Whether a kernel alone would look at a call: no tracing, mode, transform, subclass, negation or profiler."""
    for x in (*tensors, *others):
        if x is not None and (
            type(x) not in _PLAIN_TYPES or x.layout is not torch.strided or x.is_nested or x.is_neg()
        ):
            return False
    first = tensors[0]
    return (
        first is not None
        and (first.is_cpu or first.is_cuda)
        and not torch._C._len_torch_dispatch_stack()
        and not transforming()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and not torch.autograd.profiler._is_profiler_enabled
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def run_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastattn::attention_forward``; eager calls take the shortest path: the dispatcher is half of a small call."""
    if torch.compiler.is_compiling() or transforming():
        return FORWARD(*arguments)
    if torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record fastattn's operators: use torch.export.export or torch.compile"
        )
    return _forward_autograd(*arguments)
