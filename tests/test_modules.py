"""MultiHeadAttention against torch.nn.MultiheadAttention: results, gradients, parameters, and the traps it removes."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle
from torch import Tensor, nn

import fastattn
from fastattn import MultiHeadAttention, modules

E, H, N, L, S = 24, 4, 3, 5, 7

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 10, "vdim": 14, "batch_first": True},
    "kdim, no bias": {"kdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "bias_kv, zero": {"add_bias_kv": True, "add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 14, "batch_first": True},
}
MASKS = ["none", "padding", "padding float", "2d", "2d float", "3d", "3d float", "both", "both float", "both 3d"]


def make_masks(kind: str, batch: int | None, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """``key_padding_mask`` and ``attn_mask`` of one kind; every query keeps a key, as torch needs."""
    n = batch or 1
    generator = torch.Generator().manual_seed(5)
    padding = torch.rand(n, seqlen_k, generator=generator) < 0.4
    shape = (seqlen_q, seqlen_k) if "3d" not in kind else (n * H, seqlen_q, seqlen_k)
    attn = torch.rand(shape, generator=generator) < 0.4
    padding[:, 1] = False
    attn[..., 1] = False
    masks = {}
    if "padding" in kind or "both" in kind:
        masks["key_padding_mask"] = padding if batch else padding[0]
    if "2d" in kind or "3d" in kind or "both" in kind:
        masks["attn_mask"] = attn
    if "float" in kind:
        masks = {name: torch.randn(m.shape, generator=generator, dtype=dtype) for name, m in masks.items()}
        for mask in masks.values():
            mask[..., 0] = -torch.inf
    return masks


def make_inputs(module: nn.MultiheadAttention, batched: bool = True, self_attention: bool = False) -> list[Tensor]:
    def one(length: int, dim: int) -> Tensor:
        x = torch.randn((N, length, dim) if batched else (length, dim))
        return x.transpose(0, 1).contiguous() if batched and not module.batch_first else x

    if self_attention:
        return [one(L, E)] * 3
    return [one(L, E), one(S, module.kdim), one(S, module.vdim)]


def pair(**config: Any) -> tuple[nn.MultiheadAttention, MultiHeadAttention]:
    """torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, **config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)  # scores of order 1, as with trained or initial weights
    ours = MultiHeadAttention(E, H, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Output, weights and every gradient; of a copy in ``dtype`` when given. Tensors passed twice stay one tensor."""
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
        kwargs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    leaves = {id(x): x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs}
    out, weights = module(*(leaves[id(x)] for x in inputs), **kwargs)
    results = {"out": out}
    generator = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    if weights is not None:
        results["weights"] = weights
        loss = loss + (weights * torch.randn(weights.shape, generator=generator).to(weights.dtype)).sum()
    module.zero_grad()
    loss.backward()
    results |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    results |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves.values())}
    return {name: x.detach() for name, x in results.items()}


def compare(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], **kwargs: Any) -> None:
    actual, naive = run(ours, inputs, **kwargs), run(theirs, inputs, **kwargs)
    oracle = run(theirs, inputs, torch.float64, **kwargs)
    assert actual.keys() == oracle.keys()
    for name in oracle:
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every attention call that MultiHeadAttention makes."""
    seen: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return fastattn.attention(*args, **kwargs)

    monkeypatch.setattr(modules, "attention", spy)
    return seen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


# ---------------------------------------------------------------- the same as torch


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_initial_values_and_random_state(config: dict[str, Any]) -> None:
    torch.manual_seed(11)
    theirs, after = nn.MultiheadAttention(E, H, **config), torch.rand(3)
    torch.manual_seed(11)
    ours = MultiHeadAttention(E, H, **config)
    assert torch.equal(torch.rand(3), after)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dict_loads_both_ways(config: dict[str, Any]) -> None:
    theirs, ours = nn.MultiheadAttention(E, H, **config), MultiHeadAttention(E, H, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    nn.MultiheadAttention(E, H, **config).load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matches_torch(config: dict[str, Any], mask: str) -> None:
    theirs, ours = pair(**config)
    masks = make_masks(mask, N, L, S, torch.float32)
    compare(theirs, ours, make_inputs(ours), average_attn_weights=False, **masks)


@pytest.mark.parametrize("need_weights, average", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_matches_torch_in_every_form(batch_first: bool, batched: bool, need_weights: bool, average: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    for self_attention, mask in itertools.product((True, False), ("none", "both", "3d float")):
        inputs = make_inputs(ours, batched, self_attention)
        masks = make_masks(mask, N if batched else None, L, L if self_attention else S, torch.float32)
        compare(theirs, ours, inputs, need_weights=need_weights, average_attn_weights=average, **masks)


def test_key_and_value_the_same_tensor() -> None:
    theirs, ours = pair()
    query, key, _ = make_inputs(ours)
    compare(theirs, ours, [query, key, key])
    compare(theirs, ours, [query, query, torch.randn_like(query)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    theirs, ours = (m.to(dtype) for m in pair(batch_first=True))
    inputs = [x.to(dtype) for x in make_inputs(ours)]
    masks = make_masks("both float", N, L, S, dtype)
    compare(theirs, ours, inputs, average_attn_weights=False, **masks)


def test_gradient_of_a_float_mask() -> None:
    theirs, ours = pair()
    inputs = make_inputs(ours)
    grads = []
    for module in (theirs, ours):
        mask = torch.linspace(-1, 1, L * S).view(L, S).requires_grad_()
        module(*inputs, attn_mask=mask, need_weights=False)[0].square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_empty_batch_and_no_keys() -> None:
    module = MultiHeadAttention(E, H, batch_first=True)
    out, weights = module(torch.randn(0, L, E), *[torch.randn(0, S, E)] * 2)
    assert out.shape == (0, L, E) and weights.shape == (0, L, S)
    out, weights = module(torch.randn(N, L, E), *[torch.randn(N, 0, E)] * 2)
    assert torch.equal(out, module.out_proj.bias.expand_as(out)) and weights.shape == (N, L, 0)


# ---------------------------------------------------------------- fused in every mode


def test_weights_do_not_change_the_output() -> None:
    module = MultiHeadAttention(E, H, dropout=0.3)
    inputs = make_inputs(module)
    torch.manual_seed(3)
    plain, none = module(*inputs, need_weights=False)
    torch.manual_seed(3)
    out, weights = module(*inputs)
    assert none is None and torch.equal(out, plain)
    assert weights.shape == (N, L, S)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_dropout(p: float, calls: list[dict[str, Any]]) -> None:
    """Training: the weights returned are those, after dropout, that made the output. Eval: no dropout."""
    module = MultiHeadAttention(E, H, dropout=p, batch_first=True, num_kv_heads=2)
    query, key, value = make_inputs(module)
    out, weights = module(query, key, value, average_attn_weights=False)
    _, _, v = module._project(query, key, value)
    torch.testing.assert_close(out, module._merge(weights @ v.repeat_interleave(2, dim=1)))
    assert (weights == 0).any() == (p > 0) and (weights == 0).all() == (p == 1)
    module.eval()
    _, weights = module(query, key, value)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, L))
    assert [call["dropout_p"] for call in calls] == [p, 0.0]


def test_masks_reach_the_kernel_unexpanded(calls: list[dict[str, Any]]) -> None:
    module = MultiHeadAttention(E, H, batch_first=True)
    inputs = make_inputs(module)
    padding = make_masks("padding", N, L, S, torch.float32)["key_padding_mask"]
    added = torch.randn(L, S)
    module(*inputs, key_padding_mask=padding, attn_mask=added, need_weights=False)
    module(*inputs, key_padding_mask=added[:N], attn_mask=padding.any(0).expand(L, S), need_weights=False)
    assert [tuple(call["mask"].shape) for call in calls] == [(N, 1, 1, S), (1, 1, L, S)]
    assert [tuple(call["bias"].shape) for call in calls] == [(1, 1, L, S), (N, 1, 1, S)]
    assert calls[0]["mask"].dtype is torch.bool and torch.equal(calls[0]["mask"][:, 0, 0], ~padding)
    assert calls[0]["bias"].data_ptr() == added.data_ptr()


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_are_views(batch_first: bool) -> None:
    module = MultiHeadAttention(E, H, batch_first=batch_first, num_kv_heads=2)
    x = make_inputs(module, self_attention=True)[0]
    q, k, v = module._project(x, x, x)
    assert q.shape == (N, H, L, E // H) and k.shape == v.shape == (N, 2, L, E // H)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    out = fastattn.attention(q, k, v)
    assert isinstance(out, Tensor) and out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


# ---------------------------------------------------------------- traps of torch's, removed


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("appended", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("mask", ["none", "padding", "padding float"])
def test_causal_needs_no_mask(appended: dict[str, bool], mask: str, need_weights: bool) -> None:
    """Aligned to the first key, for any lengths; appended keys stay visible; the same as torch with the mask."""
    theirs, ours = pair(batch_first=True, **appended)
    hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
    inputs = make_inputs(ours)
    padding = make_masks(mask, N, L, S, torch.float32)
    if padding:
        padding["key_padding_mask"][:, 0] = 0  # the first query sees the first key
    if mask == "padding float":  # torch wants two masks of one type
        hidden = torch.zeros(L, S).masked_fill(hidden, -torch.inf)
    actual = run(ours, inputs, is_causal=True, need_weights=need_weights, **padding)
    naive = run(theirs, inputs, attn_mask=hidden, need_weights=need_weights, **padding)
    oracle = run(theirs, inputs, torch.float64, attn_mask=hidden, need_weights=need_weights, **padding)
    for name in oracle:
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)


@pytest.mark.parametrize("need_weights", [True, False])
def test_with_a_mask_the_causal_hint_has_no_effect(need_weights: bool) -> None:
    module = MultiHeadAttention(E, H)
    inputs = make_inputs(module)
    mask = make_masks("2d", N, L, S, torch.float32)["attn_mask"]
    hinted = module(*inputs, attn_mask=mask, is_causal=True, need_weights=need_weights)
    plain = module(*inputs, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(hinted[0], plain[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["padding", "float padding", "attn", "float attn", "both"])
def test_rows_that_see_nothing_are_zero(kind: str, need_weights: bool, training: bool) -> None:
    module = pair(batch_first=True)[1].train(training)
    x = make_inputs(module, self_attention=True)[0].requires_grad_()
    padding = torch.zeros(N, L, dtype=torch.bool)
    attn = torch.zeros(L, L, dtype=torch.bool)
    empty = torch.zeros(N, L, dtype=torch.bool)
    if "padding" in kind:
        padding[0], empty[0] = True, True
    elif "attn" in kind:
        attn[2], empty[:, 2] = True, True
    else:
        padding[0, 1:], attn[2, 0], empty[0, 2] = True, True, True
    masks: list[Tensor] = [padding, attn]
    if "float" in kind:
        masks = [torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in masks]
    out, weights = module(x, x, x, key_padding_mask=masks[0], attn_mask=masks[1], need_weights=need_weights)
    assert torch.equal(out[empty], module.out_proj.bias.expand_as(out[empty]))
    assert not torch.equal(out[~empty], module.out_proj.bias.expand_as(out[~empty]))
    if need_weights:
        assert (weights[empty] == 0).all() and weights.isfinite().all()
        out = out + weights.square().sum()
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("shape", [(N, H, L, S), (1, H, 1, S), (N, 1, L, S), (N, 1, L, 1), (1, 1, L, S)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("appended", [False, True])
def test_four_dimensional_masks(shape: tuple[int, ...], dtype: torch.dtype, appended: bool) -> None:
    theirs, ours = pair(add_bias_kv=appended, add_zero_attn=appended)
    mask = torch.rand(shape) < 0.5 if dtype is torch.bool else torch.randn(shape)
    if dtype is torch.bool:
        mask[..., 0] = False
    full = mask.expand(N, H, L, S).reshape(N * H, L, S)
    inputs = make_inputs(ours)
    actual, naive = run(ours, inputs, attn_mask=mask), run(theirs, inputs, attn_mask=full)
    oracle = run(theirs, inputs, torch.float64, attn_mask=full)
    for name in oracle:
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)


@pytest.mark.parametrize("config", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("window, causal", [((2, 1), False), ((1, None), True), ((None, 2), False), ((2, 2), True)])
def test_window(config: dict[str, bool], window: fastattn.spec.Window, causal: bool) -> None:
    theirs, ours = pair(**config)
    left, right = window
    i, j = torch.arange(L)[:, None], torch.arange(S)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    if left is not None:
        hidden |= j < i - left
    if right is not None or causal:
        hidden |= j > i + (0 if causal else right)
    inputs = make_inputs(ours)
    expected = theirs(*inputs, attn_mask=hidden)
    torch.testing.assert_close(ours(*inputs, is_causal=causal, window=window), expected)


# ---------------------------------------------------------------- grouped key heads


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_grouped_heads_are_torchs_with_repeated_weights(config: dict[str, Any], num_kv_heads: int) -> None:
    ours = MultiHeadAttention(E, H, num_kv_heads=num_kv_heads, **config)
    theirs = nn.MultiheadAttention(E, H, **config)
    head_dim, kv_dim = E // H, num_kv_heads * E // H

    def repeat(x: Tensor) -> Tensor:
        return x.unflatten(0, (num_kv_heads, head_dim)).repeat_interleave(H // num_kv_heads, dim=0).flatten(0, 1)

    state = {}
    for name, x in ours.state_dict().items():
        if name.startswith("in_proj"):
            q, k, v = x.split([E, kv_dim, kv_dim])
            x = torch.cat([q, repeat(k), repeat(v)])
        elif name.startswith(("k_proj", "v_proj")):
            x = repeat(x)
        elif name.startswith("bias_"):
            x = repeat(x.view(-1)).view(1, 1, -1)
        state[name] = x
    theirs.load_state_dict(state, strict=True)
    inputs = make_inputs(ours)
    masks = make_masks("both", N, L, S, torch.float32)
    actual, naive = (run(m, inputs, **masks, average_attn_weights=False) for m in (ours, theirs))
    oracle = run(theirs, inputs, torch.float64, **masks, average_attn_weights=False)
    for name in ("out", "weights", "grad of out_proj.weight", "grad of input 0", "grad of input 1", "grad of input 2"):
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)


# ---------------------------------------------------------------- a module among modules


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_pickle_and_deepcopy(num_kv_heads: int | None) -> None:
    module = MultiHeadAttention(E, H, add_bias_kv=True, num_kv_heads=num_kv_heads)
    inputs = make_inputs(module)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(*inputs)[0], module(*inputs)[0])
        assert other.in_proj_weight.data_ptr() != module.in_proj_weight.data_ptr()


def test_device_dtype_and_repr() -> None:
    module = MultiHeadAttention(E, H, device="meta", dtype=torch.bfloat16, add_bias_kv=True, num_kv_heads=1)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())
    assert "embed_dim=24, num_heads=4, num_kv_heads=1" in repr(module)
    assert isinstance(module, nn.MultiheadAttention)


@pytest.mark.parametrize("config", [{}, {"add_bias_kv": True, "num_kv_heads": 2}])
def test_autocast(config: dict[str, Any]) -> None:
    module = MultiHeadAttention(E, H, **config)
    inputs = make_inputs(module)
    masks = make_masks("both float", N, L, S, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(*inputs, **masks)
    assert out.dtype is torch.bfloat16
    expected, expected_weights = module(*inputs, **masks)
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(weights.float(), expected_weights, atol=0.02, rtol=0.02)
    out.sum().backward()


@pytest.mark.parametrize("need_weights", [True, False])
def test_compile(need_weights: bool) -> None:
    module = pair(batch_first=True, add_zero_attn=True)[1]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = make_inputs(module, self_attention=True)
    padding = make_masks("padding", N, L, L, torch.float32)
    for kwargs in ({}, padding, {"is_causal": True}):
        actual = run(compiled, x, need_weights=need_weights, **kwargs)
        expected = run(module, x, need_weights=need_weights, **kwargs)
        for (name, a), b in zip(actual.items(), expected.values(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_masks_apply_the_same_under_functional_call_and_no_grad() -> None:
    module = MultiHeadAttention(E, H)
    inputs = make_inputs(module)
    with torch.inference_mode():
        inference = module(*inputs)[0]
    assert torch.equal(torch.func.functional_call(module, dict(module.named_parameters()), tuple(inputs))[0], inference)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10, num_heads=4"),
        ({"embed_dim": 8, "num_heads": 4, "num_kv_heads": 3}, "num_heads=4, num_kv_heads=3"),
        ({"embed_dim": 0, "num_heads": 1}, "embed_dim must be greater than 0, got 0"),
        ({"embed_dim": 8, "num_heads": 4, "num_kv_heads": 0}, "num_kv_heads must be greater than 0, got 0"),
        ({"embed_dim": 8, "num_heads": 4, "dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"embed_dim": 8, "num_heads": 4, "dropout": "0"}, "dropout must be a float, got '0'"),
        ({"embed_dim": 8.0, "num_heads": 4}, "embed_dim must be an int, got 8.0"),
        ({"embed_dim": 8, "num_heads": 4, "kdim": "3"}, "kdim must be an int, got '3'"),
        ({"embed_dim": 8, "num_heads": 4, "num_kv_heads": True}, "num_kv_heads must be an int, got True"),
        ({"embed_dim": 8, "num_heads": 4, "dtype": torch.int32}, "dtype must be None or a floating-point.*int32"),
    ],
)
def test_bad_constructor_arguments(config: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MultiHeadAttention(**config)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(N, L, E + 1)}, ValueError, "query must have 24 features.*25"),
        ({"value": torch.zeros(N, S + 1, E)}, ValueError, "key and value must have one length"),
        ({"query": torch.zeros(N + 1, L, E)}, ValueError, "one batch"),
        ({"query": torch.zeros(L, E)}, ValueError, "3-D"),
        ({"query": torch.zeros(N, L, E, dtype=torch.float64)}, TypeError, "float64"),
        ({"query": None}, TypeError, "query must be a torch.Tensor"),
        ({"key_padding_mask": torch.zeros(S, dtype=torch.bool)}, ValueError, r"key_padding_mask.*\(3, 7\)"),
        ({"key_padding_mask": torch.zeros(N, S, dtype=torch.uint8)}, TypeError, "key_padding_mask.*uint8"),
        ({"attn_mask": torch.zeros(S, L)}, ValueError, r"attn_mask.*\(5, 7\).*got \(7, 5\)"),
        ({"attn_mask": torch.zeros(N, L, S)}, ValueError, r"attn_mask.*\(12, 5, 7\)"),
        ({"attn_mask": torch.zeros(2, H, L, S)}, ValueError, r"attn_mask.*\(3, 4, 5, 7\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.long)}, TypeError, "attn_mask.*int64"),
        ({"attn_mask": torch.zeros(L, S, device="meta")}, ValueError, "attn_mask.*meta"),
        ({"window": (-1, 2)}, ValueError, "window.*-1"),
        ({"window": 3}, TypeError, "window"),
        ({"attn_mask": torch.zeros(L, S).double()}, TypeError, "attn_mask must be boolean or .*float32, got float64"),
        ({"key_padding_mask": torch.zeros(N, S).double()}, TypeError, "key_padding_mask must be boolean or .*float64"),
        ({"attn_mask": torch.zeros(L, S).to_sparse()}, TypeError, "attn_mask must be a dense"),
        ({"query": torch.zeros(N, L, E).to_sparse()}, TypeError, "query must be a dense"),
        ({"key": torch.zeros(N, S, E, device="meta")}, ValueError, "parameters' device cpu; .* key meta"),
        ({"is_causal": "no"}, TypeError, "is_causal must be True or False, got str"),
        ({"cache": 3, "need_weights": False}, TypeError, "cache must be a fastattn.KVCache"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    module = MultiHeadAttention(E, H, batch_first=True)
    arguments = dict(zip(("query", "key", "value"), make_inputs(module), strict=True)) | change
    with pytest.raises(error, match=message):
        module(**arguments)


def test_strided_nested_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)], layout=torch.strided)
    with pytest.raises(NotImplementedError, match="key_padding_mask"):
        MultiHeadAttention(E, H, batch_first=True)(x, x, x)
