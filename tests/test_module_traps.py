"""What MultiHeadAttention does that torch's does not: fused in every mode, and without its traps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import MultiHeadAttention
from tests.tolerance import assert_close_to_oracle, assert_rounded_alike
from tests.torch_module import E, H, L, N, S, make_inputs, make_masks, pair, run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


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
    assert_rounded_alike(out, module._merge(weights @ v.repeat_interleave(2, dim=1)))
    assert (weights == 0).any() == (p > 0) and (weights == 0).all() == (p == 1)
    module.eval()
    _, weights = module(query, key, value)
    assert_rounded_alike(weights.sum(-1), torch.ones(N, L))
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
    naive = theirs(*inputs, attn_mask=hidden)
    oracle = copy.deepcopy(theirs).double()(*(x.double() for x in inputs), attn_mask=hidden)
    for a, b, c in zip(ours(*inputs, is_causal=causal, window=window), naive, oracle, strict=True):
        assert_close_to_oracle(a, b, c)
