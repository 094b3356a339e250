"""fastattn.transformer against torch.nn.Transformer and its parts: state dicts, outputs, gradients, masks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import transformer as ft
from tests.tolerance import FLOAT64

BATCH, S, T = 3, 7, 5
D, HEADS = 32, 4
#: Cases in bf16 use gelu: at relu's kink its rounding switches a gradient on or off, in torch's module as in ours.
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)


def layer_args(**changes: Any) -> dict[str, Any]:
    return {"d_model": D, "nhead": HEADS, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True} | changes


def model_args(**changes: Any) -> dict[str, Any]:
    return layer_args(num_encoder_layers=2, num_decoder_layers=2) | changes


def perturb(module: nn.Module) -> nn.Module:
    """Random values everywhere: biases start at 0 and norms at 1, which would hide an exchange of two of them."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def pair(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both with the same parameters, which went from one to the other through a strict state dict."""
    ours.load_state_dict(perturb(theirs).state_dict(), strict=True)
    return ours, theirs


def sequence(length: int, batch_first: bool = True) -> Tensor:
    return torch.randn(BATCH, length, D) if batch_first else torch.randn(length, BATCH, D)


def padding(length: int) -> Tensor:
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, -2:] = True
    mask[2, :1] = True
    return mask


def run(module: nn.Module, dtype: torch.dtype, inputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of inputs and parameters, of a copy of ``module`` in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    kwargs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
    out = module(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    (out * torch.randint(-4, 5, out.shape, generator=generator)).sum().backward()
    results = {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return results | {name: p.grad for name, p in module.named_parameters()}


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: list[Tensor],
    kwargs: dict[str, Any] | None = None,
    torch_kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The tolerance rule: torch's module with unfused attention is the naive one and, fused in float64, the oracle."""
    kwargs = kwargs or {}
    torch_kwargs = kwargs if torch_kwargs is None else torch_kwargs
    inputs, ours, theirs = [x.to(dtype) for x in inputs], ours.to(dtype), theirs.to(dtype)
    actual = run(ours, dtype, inputs, kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        naive = run(theirs, dtype, inputs, torch_kwargs)
    oracle = run(theirs, torch.float64, inputs, torch_kwargs)
    assert actual.keys() == oracle.keys()
    for name in oracle:
        assert actual[name].dtype is dtype, name
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# State dicts


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_state_dict_both_ways(bias: bool, norm_first: bool) -> None:
    args = model_args(bias=bias, norm_first=norm_first)
    ours, theirs = ft.Transformer(**args), nn.Transformer(**args)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    pair(ours, theirs)
    theirs.load_state_dict(perturb(ours).state_dict(), strict=True)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q), name


def test_same_seed_same_initial_values() -> None:
    torch.manual_seed(5)
    ours = ft.Transformer(**model_args())
    torch.manual_seed(5)
    theirs = nn.Transformer(**model_args())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


# Outputs and gradients


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh], ids=["relu", "gelu", "tanh"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "seq first"])
def test_model_equals_torch(batch_first: bool, norm_first: bool, activation: Any) -> None:
    args = model_args(batch_first=batch_first, norm_first=norm_first, activation=activation)
    ours, theirs = pair(ft.Transformer(**args), nn.Transformer(**args))
    inputs = [sequence(S, batch_first), sequence(T, batch_first)]
    compare(ours, theirs, inputs, {"tgt_is_causal": True}, {"tgt_is_causal": True, "tgt_mask": CAUSAL})


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_equals_torch_with_padding(dtype: torch.dtype) -> None:
    args = model_args(activation="gelu")
    ours, theirs = pair(ft.Transformer(**args), nn.Transformer(**args))
    masks = {
        "src_key_padding_mask": padding(S),
        "tgt_key_padding_mask": padding(T) & padding(T)[:, -1:],  # a padded first target would see nothing
        "memory_key_padding_mask": padding(S),
    }
    causal = {"tgt_mask": CAUSAL < 0, "tgt_is_causal": True}
    compare(ours, theirs, [sequence(S), sequence(T)], masks | {"tgt_is_causal": True}, masks | causal, dtype)


def visible(*shape: int) -> Tensor:
    """A boolean mask that leaves every query a key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS = {
    "bool": lambda: {"src_mask": visible(S, S), "tgt_mask": CAUSAL < 0, "memory_mask": visible(T, S)},
    "float": lambda: {"src_mask": torch.randn(S, S), "tgt_mask": CAUSAL, "memory_mask": torch.randn(T, S)},
    "per head": lambda: {
        "src_mask": visible(BATCH * HEADS, S, S),
        "tgt_mask": torch.randn(BATCH * HEADS, T, T),
        "memory_mask": visible(BATCH * HEADS, T, S),
    },
    "float padding": lambda: {
        "src_key_padding_mask": torch.randn(BATCH, S),
        "tgt_key_padding_mask": torch.randn(BATCH, T),
        "memory_key_padding_mask": torch.randn(BATCH, S),
    },
    "causal memory": lambda: {"memory_mask": torch.ones(T, S).triu(1).bool(), "memory_is_causal": True},
    "causal source": lambda: {"src_mask": torch.ones(S, S).triu(1).bool(), "src_is_causal": True},
}


@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks: str) -> None:
    ours, theirs = pair(ft.Transformer(**model_args()), nn.Transformer(**model_args()))
    kwargs = MASKS[masks]()
    compare(ours, theirs, [sequence(S), sequence(T)], kwargs)
    if masks.startswith("causal"):  # the flag alone means the same
        compare(ours, theirs, [sequence(S), sequence(T)], {k: v for k, v in kwargs.items() if v is True}, kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
def test_encoder_alone(norm: bool, dtype: torch.dtype) -> None:
    def final_norm() -> nn.LayerNorm | None:
        return nn.LayerNorm(D) if norm else None

    args = layer_args(activation="gelu")
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(**args), 3, final_norm(), False)
    ours = ft.TransformerEncoder(ft.TransformerEncoderLayer(**args), 3, final_norm())
    compare(*pair(ours, theirs), [sequence(S)], {"src_key_padding_mask": padding(S)}, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_alone(dtype: torch.dtype) -> None:
    args = layer_args(activation="gelu", norm_first=True)
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(**args), 2, nn.LayerNorm(D))
    ours = ft.TransformerDecoder(ft.TransformerDecoderLayer(**args), 2, nn.LayerNorm(D))
    kwargs = {"memory_key_padding_mask": padding(S)}
    torch_kwargs = kwargs | {"tgt_mask": CAUSAL, "tgt_is_causal": True}
    compare(*pair(ours, theirs), [sequence(T), sequence(S)], kwargs | {"tgt_is_causal": True}, torch_kwargs, dtype)


def test_layers_alone() -> None:
    ours, theirs = pair(ft.TransformerEncoderLayer(**layer_args()), nn.TransformerEncoderLayer(**layer_args()))
    compare(ours, theirs, [sequence(S)])
    ours, theirs = pair(ft.TransformerDecoderLayer(**layer_args()), nn.TransformerDecoderLayer(**layer_args()))
    compare(ours, theirs, [sequence(T), sequence(S)])


def test_unbatched() -> None:
    ours, theirs = pair(ft.Transformer(**model_args()), nn.Transformer(**model_args()))
    masks = {"src_key_padding_mask": padding(S)[1], "memory_key_padding_mask": padding(S)[1]}
    compare(ours, theirs, [torch.randn(S, D), torch.randn(T, D)], masks)


def test_evaluation_equals_training_without_dropout() -> None:
    model = ft.Transformer(**model_args())
    src, tgt = sequence(S), sequence(T)
    expected = model.train()(src, tgt)
    with torch.no_grad():
        assert torch.equal(model.eval()(src, tgt), expected)


def test_dropout() -> None:
    model = ft.Transformer(**model_args(dropout=0.5))
    src, tgt = sequence(S), sequence(T)
    torch.manual_seed(1)
    first, second = model(src, tgt), model(src, tgt)
    torch.manual_seed(1)
    assert torch.equal(model(src, tgt), first) and not torch.equal(second, first)
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


def test_dropping_everything_leaves_the_residual() -> None:
    x, memory = sequence(T), sequence(S)
    encoder = perturb(ft.TransformerEncoderLayer(**layer_args(dropout=1.0)))
    assert torch.equal(encoder(x), encoder.norm2(encoder.norm1(x)))
    assert torch.equal(encoder._feed_forward(x), encoder.linear2.bias.expand_as(x))
    decoder = perturb(ft.TransformerDecoderLayer(**layer_args(dropout=1.0)))
    assert torch.equal(decoder(x, memory), decoder.norm3(decoder.norm2(decoder.norm1(x))))
    decoder = perturb(ft.TransformerDecoderLayer(**layer_args(dropout=1.0, norm_first=True)))
    assert torch.equal(decoder(x, memory), x)


@pytest.mark.parametrize("norm_first", [True, False])
def test_fully_padded_sequences_are_finite(norm_first: bool) -> None:
    model = ft.Transformer(**model_args(norm_first=norm_first))
    src, tgt = sequence(S).requires_grad_(), sequence(T)
    masks = {"src_key_padding_mask": padding(S), "tgt_key_padding_mask": padding(T)}
    masks["src_key_padding_mask"][0] = True
    masks["tgt_key_padding_mask"][0] = True
    out = model(src, tgt, **masks, memory_key_padding_mask=masks["src_key_padding_mask"], tgt_is_causal=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert src.grad.isfinite().all() and (src.grad[0] == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_does_not_reach_the_output() -> None:
    model = ft.Transformer(**model_args())
    src, tgt, mask = sequence(S), sequence(T), padding(S)
    expected = model(src, tgt, src_key_padding_mask=mask, memory_key_padding_mask=mask)
    poisoned = src.masked_fill(mask[..., None], math.nan)
    assert torch.equal(model(poisoned, tgt, src_key_padding_mask=mask, memory_key_padding_mask=mask), expected)


def test_grouped_heads() -> None:
    model = ft.Transformer(**model_args(num_kv_heads=2))
    assert model.encoder.layers[0].self_attn.in_proj_weight.shape == (D + D, D)
    assert model(sequence(S), sequence(T), tgt_is_causal=True).shape == (BATCH, T, D)


def test_custom_stacks_and_empty_sequences() -> None:
    encoder = ft.TransformerEncoder(ft.TransformerEncoderLayer(**layer_args()), 1)
    model = ft.Transformer(**model_args(custom_encoder=encoder))
    assert model.encoder is encoder
    assert model(sequence(0), sequence(T)).isfinite().all()
    assert model(sequence(S), sequence(0)).shape == (BATCH, 0, D)


def test_backends_agree() -> None:
    model = ft.Transformer(**model_args()).double()
    src, tgt = sequence(S).double(), sequence(T).double()
    with fastattn.use_backend("reference"):
        expected = model(src, tgt, tgt_is_causal=True)
    torch.testing.assert_close(model(src, tgt, tgt_is_causal=True), expected, **FLOAT64)


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match="swish"):
        ft.TransformerEncoderLayer(**layer_args(activation="swish"))
    model = ft.Transformer(**model_args())
    with pytest.raises(ValueError, match="same batch"):
        model(sequence(S), sequence(T)[:1])
    with pytest.raises(ValueError, match="32 features"):
        model(sequence(S)[..., :5], sequence(T))


# Life of a module


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Any) -> None:
    model = ft.Transformer(**model_args(activation="gelu"))
    src, tgt = sequence(S), sequence(T)
    assert torch.equal(copied(model)(src, tgt), model(src, tgt))


def test_compiled_encoder() -> None:
    encoder = ft.TransformerEncoder(ft.TransformerEncoderLayer(**layer_args()), 2)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    x, mask = sequence(S), padding(S)
    expected = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(compiled(x, src_key_padding_mask=mask), expected, **FLOAT64)
    expected.sum().backward()
    grads = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    compiled(x, src_key_padding_mask=mask).sum().backward()
    for p, grad in zip(encoder.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, **FLOAT64)
