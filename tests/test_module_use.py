"""MultiHeadAttention as a module among modules: copies, dtypes, autocast, compile; bad input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn import MultiHeadAttention
from tests.tolerance import assert_close_to_oracle, assert_rounded_alike
from tests.torch_module import E, H, L, N, S, make_inputs, make_masks, pair, run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


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
    with torch.autocast("cpu", torch.bfloat16), fastattn.use_backend("reference"):
        naive = module(*inputs, **masks)
    wide = copy.deepcopy(module).double()
    oracle = wide(*(x.double() for x in inputs), **{name: mask.double() for name, mask in masks.items()})
    for name, a, b, c in zip(("out", "weights"), (out, weights), naive, oracle, strict=True):
        assert_close_to_oracle(a, b, c, name)
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
            assert_rounded_alike(a, b, name)


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
