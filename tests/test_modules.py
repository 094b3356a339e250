"""MultiHeadAttention against torch.nn.MultiheadAttention: results, gradients, parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import MultiHeadAttention
from tests.tolerance import assert_close_to_oracle
from tests.torch_module import CONFIGS, MASKS, E, H, L, N, S, compare, make_inputs, make_masks, pair, run


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
    for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        mask = torch.linspace(-1, 1, L * S).view(L, S).to(dtype).requires_grad_()
        wide = [x.to(dtype) for x in inputs]
        module.to(dtype)(*wide, attn_mask=mask, need_weights=False)[0].square().sum().backward()
        grads.append(mask.grad)
    assert_close_to_oracle(*grads)


def test_empty_batch_and_no_keys() -> None:
    module = MultiHeadAttention(E, H, batch_first=True)
    out, weights = module(torch.randn(0, L, E), *[torch.randn(0, S, E)] * 2)
    assert out.shape == (0, L, E) and weights.shape == (0, L, S)
    out, weights = module(torch.randn(N, L, E), *[torch.randn(N, 0, E)] * 2)
    assert torch.equal(out, module.out_proj.bias.expand_as(out)) and weights.shape == (N, L, 0)


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
