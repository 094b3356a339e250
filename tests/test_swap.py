"""swap_attention and MultiHeadAttention.from_torch: the kernels under torch's own Transformer modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastattn import MultiHeadAttention, swap_attention
from tests.tolerance import assert_close_to_oracle, assert_rounded_alike

E, H, N, L, S = 16, 4, 3, 6, 8
Run = Callable[..., list[Tensor]]
PADDING = torch.arange(L) >= torch.tensor([[6], [4], [3]])  # (N, L), True = padding, on the right


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, **{"batch_first": True, **kwargs})


def encoder(**kwargs: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(**kwargs), 2, enable_nested_tensor=False)


def transformer(batch_first: bool = True) -> nn.Transformer:
    return nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=batch_first)


def outputs(model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    found = model(*inputs, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def outputs_and_gradients(model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    """Of a sum with random signs and sizes: that of squares is constant behind a LayerNorm."""
    out = model(*inputs, **options)
    model.zero_grad()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(grad.to(out.dtype))
    return [out.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def in_float64(run: Run, model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    options = {name: wide(x) for name, x in options.items()}
    return run(copy.deepcopy(model).double(), *map(wide, inputs), **options)


def assert_as_torch(
    actual: list[Tensor], run: Run, model: nn.Module, *inputs: Tensor, real: Any = ..., **options: Any
) -> None:
    """By the one rule, torch's ``model`` being the naive one; of the rows ``real`` where some are padding."""
    naive, oracle = run(model, *inputs, **options), in_float64(run, model, *inputs, **options)
    for n, (a, b, c) in enumerate(zip(actual, naive, oracle, strict=True)):
        assert_close_to_oracle(a[real], b[real], c[real], f"result {n}")


# ---------------------------------------------------------------- inside torch's modules


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first, norm_first", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDING}, {"mask": "causal"}, {"is_causal": True}])
def test_encoder(
    batch_first: bool, norm_first: bool, training: bool, masks: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    model = encoder(batch_first=batch_first, norm_first=norm_first).train(training)
    swapped = copy.deepcopy(model)
    assert swap_attention(swapped) == 2
    src = torch.randn((N, L, E) if batch_first else (L, N, E))
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    masks = {name: causal if value == "causal" else value for name, value in masks.items()} if masks else {}
    torchs = {"mask": causal} if "is_causal" in masks else masks  # torch asks for the mask as well
    assert_as_torch(outputs_and_gradients(swapped, src, **masks), outputs_and_gradients, model, src, **torchs)
    assert len(calls) == 2


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_encoder_layer_fast_path_does_not_go_round_the_kernel(grad: Any, calls: list[dict[str, Any]]) -> None:
    model = encoder_layer().eval()
    swapped, src = copy.deepcopy(model), torch.randn(N, L, E)
    with grad():
        swap_attention(swapped)
        assert_as_torch([swapped(src)], outputs, model, src)
    assert len(calls) == 1


def test_encoder_layer_fast_path_with_reloaded_and_copied_modules(calls: list[dict[str, Any]]) -> None:
    model = encoder_layer().eval()
    swap_attention(model)
    layers = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    fresh = encoder_layer().eval()
    fresh.self_attn = MultiHeadAttention(E, H, batch_first=True).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        src = torch.randn(N, L, E)
        for layer in (*layers, fresh):
            assert torch.equal(layer(src), model(src))
    assert len(calls) == 6


@pytest.mark.parametrize("how", ["swap the encoder", "swap around it", "build from a swapped layer"])
def test_padded_batch_is_not_made_a_nested_tensor(how: str, calls: list[dict[str, Any]]) -> None:
    """In eval mode nn.TransformerEncoder turns a padded batch into a NestedTensor; a swapped one must not."""
    layer = encoder_layer()
    model = nn.TransformerEncoder(layer, 2).eval()
    torchs, src = copy.deepcopy(model), torch.randn(N, L, E)
    with torch.no_grad():
        if how == "swap the encoder":
            swap_attention(model)
        elif how == "swap around it":
            swap_attention(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"encoder": model})))
        else:
            swap_attention(layer)
            state = model.state_dict()
            with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
                model = nn.TransformerEncoder(layer, 2).eval()
            model.load_state_dict(state)
        actual = model(src, src_key_padding_mask=PADDING)
        assert_as_torch([actual], outputs, torchs, src, real=~PADDING, src_key_padding_mask=PADDING)
    assert len(calls) == 2


def test_encoder_swapped_layer_by_layer_says_what_to_do() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 1).eval()
    swap_attention(model.layers)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="swap_attention on the whole encoder"):
        model(torch.randn(N, L, E), src_key_padding_mask=PADDING)
    assert swap_attention(model) == 0
    with torch.no_grad():
        assert model(torch.randn(N, L, E), src_key_padding_mask=PADDING).isfinite().all()


def test_padded_rows_give_no_nan(calls: list[dict[str, Any]]) -> None:
    model = encoder().eval()
    swap_attention(model)
    padding = torch.ones(N, L, dtype=torch.bool)
    with torch.no_grad():
        assert model(torch.randn(N, L, E), src_key_padding_mask=padding).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_and_decoder(batch_first: bool, training: bool, calls: list[dict[str, Any]]) -> None:
    model = transformer(batch_first).train(training)
    swapped = copy.deepcopy(model)
    assert swap_attention(swapped) == 6
    src, tgt = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    kwargs = {
        "tgt_mask": torch.ones(S, S, dtype=torch.bool).triu(1),
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    actual = outputs_and_gradients(swapped, src, tgt, **kwargs)
    assert_as_torch(actual, outputs_and_gradients, model, src, tgt, **kwargs)
    with torch.no_grad():
        assert_as_torch([swapped(src, tgt, **kwargs)], outputs, model, src, tgt, **kwargs)
    assert len(calls) == 12


def test_compiled_encoder_layer() -> None:
    model = encoder_layer()
    swap_attention(model)
    src = torch.randn(N, L, E)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_rounded_alike(compiled(src, src_key_padding_mask=PADDING), model(src, src_key_padding_mask=PADDING))
    model.eval()
    with torch.no_grad():
        assert_rounded_alike(compiled(src), model(src))


# ---------------------------------------------------------------- what the swap keeps


def test_everything_stays_the_same_object() -> None:
    model = transformer()
    model.encoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    model.decoder.eval()
    before = dict(model.named_modules()), dict(model.named_parameters()), model.state_dict()
    flags = {name: module.training for name, module in model.named_modules()}
    assert swap_attention(model) == 6
    assert all(model.get_submodule(name) is module for name, module in before[0].items())
    assert all(p is before[1][name] for name, p in model.named_parameters())
    assert not model.encoder.layers[0].self_attn.in_proj_weight.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert list(model.state_dict()) == list(before[2])
    transformer().load_state_dict(model.state_dict(), strict=True)
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert all(type(m) is MultiHeadAttention for m in attentions)
    assert swap_attention(model) == 0


def test_hooks_go_on_firing() -> None:
    model = encoder_layer(batch_first=False)
    fired: list[str] = []
    attn = model.self_attn
    handle = attn.register_forward_hook(lambda *_: fired.append("forward"))
    attn.register_forward_pre_hook(lambda *_: fired.append("pre"))
    attn.register_full_backward_hook(lambda *_: fired.append("backward"))
    attn.register_state_dict_post_hook(lambda *_: fired.append("state"))
    swap_attention(model)
    model(torch.randn(L, N, E, requires_grad=True)).sum().backward()
    model.state_dict()
    assert sorted(fired) == ["backward", "forward", "pre", "state"]
    handle.remove()
    model(torch.randn(L, N, E))
    assert fired.count("forward") == 1


def test_the_model_itself_and_shared_modules_count_once() -> None:
    attn = nn.MultiheadAttention(E, H, kdim=5, vdim=7)
    assert swap_attention(attn) == 1 and isinstance(attn, MultiHeadAttention)
    shared = nn.MultiheadAttention(E, H)
    assert swap_attention(nn.ModuleList([shared, shared])) == 1
    assert swap_attention(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    "config", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_from_torch_shares_parameters(config: dict[str, Any]) -> None:
    theirs = nn.MultiheadAttention(E, H, dropout=0.25, batch_first=True, **config).eval()
    ours = MultiHeadAttention.from_torch(theirs)
    assert type(theirs) is nn.MultiheadAttention and type(ours) is MultiHeadAttention
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training and ours.dropout == 0.25 and ours.num_kv_heads == H
    inputs = torch.randn(N, L, E), torch.randn(N, S, theirs.kdim), torch.randn(N, S, theirs.vdim)
    assert_as_torch(outputs(ours, *inputs), outputs, theirs, *inputs)
    ours.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    ours.register_forward_hook(lambda *_: None)
    assert not hasattr(theirs, "extra") and not theirs._forward_hooks


# ---------------------------------------------------------------- what it refuses


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnConstructor(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(E, H)


def test_a_subclass_with_its_own_constructor_alone_is_swapped() -> None:
    assert swap_attention(nn.Sequential(OwnConstructor())) == 1


@pytest.mark.parametrize("kind", ["forward", "quantizable", "parametrized"])
def test_subclasses_whose_behaviour_would_be_lost_are_refused(kind: str) -> None:
    if kind == "forward":
        bad: nn.Module = OwnForward(E, H)
    elif kind == "quantizable":
        bad = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    else:
        bad = parametrizations.orthogonal(nn.MultiheadAttention(E, H), "in_proj_weight")
    model = nn.ModuleDict({"good": nn.MultiheadAttention(E, H), "bad": bad})
    with pytest.raises(TypeError, match="bad: cannot swap a"):
        swap_attention(model)
    assert type(model["good"]) is nn.MultiheadAttention  # nothing was changed
    with pytest.raises(TypeError, match="cannot swap"):
        MultiHeadAttention.from_torch(bad)


def test_from_torch_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        swap_attention([nn.MultiheadAttention(E, H)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Linear"):
        MultiHeadAttention.from_torch(nn.Linear(2, 2))  # type: ignore[arg-type]
