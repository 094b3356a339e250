"""The operators under torch's machinery: opcheck, compile, autocast, meta and fake tensors, vmap, double backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import fastattn
from fastattn.call import Arguments
from fastattn.dispatch import get_backend
from fastattn.ops import run_forward
from tests import ragged
from tests.cases import CASES, Case, Inputs
from tests.tolerance import FLOAT64, assert_rounded_alike

BY_NAME = {case.name: case for case in CASES}
FEATURES = ["plain", "causal_bottom_right", "mask_blind_rows", "bias_shared_heads", "dropout_bias", "layout_bshd"]
SHAPED = ["sinks_dropout_softcap", "alibi_batch_causal_gqa", "prefix_segments_mask", "used_causal_sinks"]
PACKED = [
    "many_packed_used",
    "packed_softcap_alibi_sinks",
    "packed_used",
    "packed_dropout_bias",
    "packed_prefix_segments",
]

MANY = ["many_packed_used", "many_used", "many_split_pages"]


def operands(i: Inputs, backend: str) -> tuple[Arguments, list[Tensor]]:
    """A case's operator arguments, and those that have a gradient."""
    q, k, v = (x.detach().requires_grad_() for x in (i.q, i.k, i.v))
    bias, sinks = (None if x is None else x.detach().requires_grad_() for x in (i.bias, i.sinks))
    common = {"mask": i.mask, "bias": bias, "dropout_p": i.case.dropout_p, "dropout_seed": i.dropout_seed}
    common |= {**i.shaping, "sinks": sinks, "softmax_scale": 0.2, "backend": backend}
    return ragged.arguments(i, q, k, v, **common), [x for x in (q, k, v, bias, sinks) if x is not None]


@pytest.mark.parametrize("name", [*FEATURES, *SHAPED, *PACKED, *MANY, "paged_packed"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend: str, name: str) -> None:
    i = BY_NAME[name].make(torch.float32)
    if reasons := get_backend(backend).unsupported_reasons(i.spec()):
        pytest.skip("; ".join(reasons))
    with torch.set_grad_enabled(i.case.page_size is None):
        arguments, _ = operands(i, backend)
    leaves = [x if x is None else x.detach() for x in arguments[:5]]
    if i.case.page_size is None:
        leaves = [x if x is None else x.requires_grad_() for x in leaves]
    forward = (*leaves, arguments.others, *arguments.call)
    torch.library.opcheck(torch.ops.fastattn.attention_forward.default, forward)
    if i.case.page_size is not None:
        return
    with torch.no_grad():
        out, lse = torch.ops.fastattn.attention_forward(*forward)
    tensors = [x if x is None else x.detach() for x in leaves]
    grads = torch.randn_like(out), torch.randn_like(lse)
    backward = (*grads, *tensors, arguments.others, out, lse, *arguments.call)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, backward)


@pytest.mark.parametrize("name", [*FEATURES, *SHAPED, *PACKED])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str, name: str) -> None:
    case = replace(BY_NAME[name], head_dim_qk=3, head_dim_v=2, heads_q=2, heads_k=1)
    if case.lengths_q is None:
        case = replace(case, seqlen_q=5, seqlen_k=7, used_k=None if case.used_k is None else (6, 2))
    else:
        lengths_k = (6, 0, 3)[: case.batch]
        used = None if case.used_k is None else (4, 0, 3)[: case.batch]
        case = replace(
            case, lengths_q=(5, 2, 1)[: case.batch], lengths_k=lengths_k, seqlen_q=5, seqlen_k=6, used_k=used
        )
    i = case.make(torch.float64)
    if reasons := get_backend(backend).unsupported_reasons(i.spec()):
        pytest.skip("; ".join(reasons))
    arguments, _ = operands(i, backend)
    leaves = [x if x is None else x.detach().requires_grad_() for x in arguments[:5]]

    def call(*given):
        it = iter(given)
        out, lse = run_forward(*(x if x is None else next(it) for x in leaves), arguments.others, *arguments.call)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(call, [x for x in leaves if x is not None])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def step(q, k, v, bias, mask):
        out, lse = fastattn.attention(q, k, v, bias=bias, mask=mask, causal=True, return_lse=True)
        return fastattn.scaled_dot_product_attention(out, k, v, is_causal=True, enable_gqa=True) + lse.unsqueeze(-1)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (16, 24, 33):
        case = Case("compile", seqlen_q=seqlen, seqlen_k=seqlen, bias=(1, 0, 0, 0), mask=(0, 1, 1, 0), heads_q=4)
        i = case.make(torch.float32)
        results = []
        for function in (step, compiled):
            leaves = [x.detach().requires_grad_() for x in (i.q, i.k, i.v, i.bias)]
            out = function(*leaves, i.mask)
            results.append([out, *torch.autograd.grad(out.tanh().sum(), leaves)])
        for eager, traced in zip(*results, strict=True):
            assert_rounded_alike(traced, eager)


def test_use_backend_is_seen_by_a_compiled_function() -> None:
    q = torch.randn(1, 2, 20, 8)
    compiled = torch.compile(lambda x: fastattn.attention(x, x, x), fullgraph=True, backend="aot_eager")
    compiled(q)
    with fastattn.use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' cannot run this call"):
        compiled(q)


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention(q, k.to(torch.bfloat16), v)
        assert out.dtype is torch_sdpa(q, k, v).dtype is torch.bfloat16
        assert fastattn.attention(q.double(), k.double(), v.double()).dtype is torch.float64
        packed, cu_seqlens = (
            (q[0].transpose(0, 1), k[0].transpose(0, 1).half()),
            torch.tensor([0, 9], dtype=torch.int32),
        )
        assert fastattn.attention_varlen(*packed, packed[1], cu_seqlens).dtype is torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype is torch.float32


def test_meta_tensors_have_the_right_shapes() -> None:
    q, k, v = (torch.empty(2, h, 5, d, device="meta", dtype=torch.bfloat16) for h, d in ((4, 8), (2, 8), (2, 3)))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 5, 3) and out.dtype is torch.bfloat16
    assert lse.shape == (2, 4, 5) and lse.dtype is torch.float32


def test_second_derivative_raises_clearly() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(fastattn.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*fastattn\.reference\.attention"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda x: fastattn.reference.attention(x, x, x, causal=True),
        torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True),
    )


def test_changing_a_saved_tensor_raises() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    k = torch.randn(1, 1, 4, 8)
    out = fastattn.attention(q, k, k)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode_negative_bit_and_aliases() -> None:
    q = torch.randn(1, 2, 6, 8)
    with torch.inference_mode():
        assert torch.equal(fastattn.attention(q, q, q), fastattn.attention(q, q.clone(), q.clone()))
    negative = torch._neg_view(q)
    assert negative.is_neg()
    assert torch.equal(fastattn.attention(negative, q, negative), fastattn.attention(-q, q, -q))


@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap(in_dim: int) -> None:
    q, mask = torch.randn(3, 2, 2, 6, 8), torch.rand(3, 6, 6) > 0.3
    out = torch.func.vmap(lambda x, m: fastattn.attention(x, x, x, mask=m), in_dims=(in_dim, 0))(
        q.movedim(0, in_dim), mask
    )
    expected = torch.stack([fastattn.attention(x, x, x, mask=m) for x, m in zip(q, mask, strict=True)])
    assert torch.equal(out, expected)
    assert torch.func.vmap(lambda x: fastattn.attention(x, x, x))(q[:0]).shape == (0, 2, 2, 6, 8)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, seq, head_dim); without the look at the data that the reference takes, which vmap cannot."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return s.softmax(-1) @ v, s.logsumexp(-1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return fastattn.attention(q, k, v, bias=bias, return_lse=True)  # type: ignore[return-value]


def gradients_through(how: str, function: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a batch of calls, k shared, by way of one of torch's transforms."""

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out, lse = function(q, k, v, bias)
        return out.sin().sum() + lse.cos().sum()

    dims, wanted = (0, None, 0, 0), (0, 1, 2, 3)
    if how == "grad":
        return torch.func.grad(lambda *x: torch.stack([loss(*y) for y in unstack(*x)]).sum(), wanted)(q, k, v, bias)
    if how == "per sample":
        return torch.func.vmap(torch.func.grad(loss, wanted), dims)(q, k, v, bias)
    if how == "grad of vmap":
        return torch.func.grad(lambda *x: torch.func.vmap(loss, dims)(*x).sum(), wanted)(q, k, v, bias)
    if how == "compiled":
        compiled = torch.compile(torch.func.grad(loss, wanted), fullgraph=True, backend="aot_eager")
        return compiled(q[0], k, v[0], bias[0])
    if how == "jacrev":
        return torch.func.jacrev(lambda x: function(x, k, v[0], bias[0])[0].sum(-1))(q[0])
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    if how == "leaves outside vmap":
        return torch.autograd.grad(torch.func.vmap(loss, dims)(*leaves).sum(), leaves)
    assert how == "batched gradients"
    out, _ = function(leaves[0][0], leaves[1], leaves[2][0], leaves[3][0])
    some = torch.linspace(-1, 1, 3 * out.numel()).view(3, *out.shape)
    return torch.autograd.grad(out, leaves, some, is_grads_batched=True)


def unstack(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[tuple[Tensor, ...]]:
    return [(*x[:1], k, *x[1:]) for x in zip(q, v, bias, strict=True)]


TRANSFORMS = [
    "grad", "per sample", "grad of vmap", "compiled", "jacrev", "leaves outside vmap", "batched gradients"
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", TRANSFORMS)
def test_gradients_through_transforms(how: str) -> None:
    sizes = ((3, 2, 4, 8), (2, 5, 8), (3, 2, 5, 6), (3, 4, 5))
    operands = [torch.randn(size, dtype=torch.float64) for size in sizes]
    found, expected = (gradients_through(how, f, *operands) for f in (fused_attention, plain_attention))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
        assert b.any()


def test_what_has_no_derivative_says_so() -> None:
    q = torch.randn(1, 2, 4, 8)

    def call(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x)

    def loss(x: Tensor) -> Tensor:
        return call(x).square().sum()

    call(q)  # the short path of repeated calls must not lose a tangent either
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(call(q), fastattn.attention(q, q, q))
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*fastattn\.reference\.attention"):
            call(torch.autograd.forward_ad.make_dual(q, q))
        x = q.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(call(x), x, torch.autograd.forward_ad.make_dual(q, q))
    for transform in (torch.func.jacfwd(call), torch.func.hessian(loss), torch.func.jacfwd(torch.func.grad(loss))):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            transform(q)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*torch\.export"), pytest.warns():
        torch.jit.trace(call, (q,), check_trace=False)


def test_export_with_free_sizes() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return fastattn.attention(q, k, k, causal=True)

    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    dims = [{0: torch.export.Dim("batch"), 2: torch.export.Dim(name)} for name in ("queries", "keys")]
    exported = torch.export.export(Model(), (q, k), dynamic_shapes=dims).module()
    for batch, queries, keys in ((2, 5, 7), (3, 9, 4)):
        q, k = torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8)
        assert torch.equal(exported(q, k), fastattn.attention(q, k, k, causal=True))


def test_equals_torch_with_its_own_arguments() -> None:
    q, k, v = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, 9), (2, 11), (2, 11)))
    mask = torch.rand(2, 1, 9, 11) > 0.3
    for options in (
        {"is_causal": True, "enable_gqa": True},
        {"attn_mask": mask, "enable_gqa": True},
        {"attn_mask": torch.randn(4, 9, 11, dtype=torch.float64), "enable_gqa": True, "scale": 0.1},
    ):
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch_sdpa(q, k, v, **options)
        torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v, **options), expected, **FLOAT64)


@pytest.mark.parametrize("shape", [(7, 8), (3, 7, 8), (2, 3, 7, 8), (2, 2, 3, 7, 8), (2, 1, 2, 3, 7, 8)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(*shape[:-1], 7) > 0.3
    mask[..., 0] = True
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch_sdpa(q, q, q, attn_mask=mask)
    out, lse = fastattn.attention(q, q, q, mask=mask, return_lse=True)
    torch.testing.assert_close(out, expected, **FLOAT64)
    assert lse.shape == shape[:-1]
    if len(shape) > 4:
        shared = mask[:1, :1, ..., :1, :, :]
        assert torch.equal(
            fastattn.attention(q, q, q, mask=shared), fastattn.attention(q, q, q, mask=shared.expand(mask.shape))
        )


def test_batch_one_is_broadcast_with_gradient() -> None:
    q = torch.randn(4, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: fastattn.attention(a, b, b), (q, k))


def test_attention_weights_are_those_of_the_call() -> None:
    case = BY_NAME["dropout_bias"]
    i = case.make(torch.float64)
    options = {"bias": i.bias, "dropout_p": case.dropout_p, "dropout_seed": i.dropout_seed}
    out, lse = fastattn.attention(i.q, i.k, i.v, return_lse=True, **options)
    weights = fastattn.attention_weights(i.q, i.k, lse, **options)
    torch.testing.assert_close(weights @ i.v, out, **FLOAT64)
    with pytest.raises(ValueError, match="dropout_seed"):
        fastattn.attention_weights(i.q, i.k, lse, dropout_p=0.5)


def test_a_repeated_plain_call_is_the_same_call() -> None:
    """The short path of calls that were made before: the same bits, and nothing is taken for plain that is not."""
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    first, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    again, lse_again = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(first, again) and torch.equal(lse, lse_again)
    assert not torch.equal(first, fastattn.attention(q, k, v))
    assert torch.equal(fastattn.scaled_dot_product_attention(q, k, v), fastattn.attention(q, k, v))
    assert fastattn.attention(q.clone().requires_grad_(), k, v, causal=True).requires_grad
    with fastattn.use_backend("reference"):
        assert_rounded_alike(first, fastattn.attention(q, k, v, causal=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.attention(q, k, v, causal=True).dtype is torch.bfloat16
    with torch.profiler.profile() as profile:
        fastattn.attention(q, k, v, causal=True)
    assert "fastattn::attention_forward" in {event.key for event in profile.key_averages()}
    with pytest.raises(TypeError, match="dense"):
        fastattn.attention(q.to_sparse(), k, v, causal=True)
    with pytest.raises(TypeError, match="scale"):
        fastattn.attention(q, k, v, causal=True, softmax_scale=True)
