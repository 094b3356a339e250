"""Models on tokens: positions, embedding, heads, padding, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transformer import BATCH, CAUSAL, HEADS, D, S, T, model_args
from torch import Tensor, nn

from fastattn import transformer as ft
from tests.tolerance import FLOAT64


def config(**changes: Any) -> ft.TransformerConfig:
    sizes = {"d_model": D, "nhead": HEADS, "dim_feedforward": 48, "num_encoder_layers": 2, "num_decoder_layers": 2}
    return ft.TransformerConfig(**({"vocab_size": 23, "dropout": 0.0, "padding_id": 0} | sizes | changes))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Positions


@pytest.mark.parametrize("d_model", [1, 2, 5, 16])
def test_positions_follow_the_formula(d_model: int) -> None:
    encoding = ft.SinusoidalPositionalEncoding(d_model)(torch.zeros(2, 9, d_model, dtype=torch.float64))
    far = ft.sinusoidal_encoding(torch.tensor([99_999, 1_000_003]), d_model, torch.float64)
    for pos, rows in [*enumerate(encoding.unbind(1)), (99_999, far[:1]), (1_000_003, far[1:])]:
        for i in range(d_model):
            angle = pos / 10000 ** (2 * (i // 2) / d_model)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert rows[:, i].tolist() == pytest.approx([expected] * len(rows), rel=0, abs=1e-13 + 1e-15 * pos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_rounded_once(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 99_999, 1_000_003])
    exact = ft.sinusoidal_encoding(positions, 12, torch.float64)
    assert torch.equal(ft.sinusoidal_encoding(positions, 12, dtype), exact.to(dtype))


def test_positions_in_every_layout() -> None:
    x = torch.randn(4, 6, 8)
    batch_first = ft.SinusoidalPositionalEncoding(8)
    seq_first = ft.SinusoidalPositionalEncoding(8, batch_first=False)
    assert torch.equal(seq_first(x.transpose(0, 1)), batch_first(x).transpose(0, 1))
    assert torch.equal(batch_first(x[0]), batch_first(x)[0])
    assert torch.equal(seq_first(x[0]), batch_first(x)[0])
    positions = torch.arange(6).expand(4, 6)
    assert torch.equal(batch_first(x, positions), batch_first(x))
    assert torch.equal(seq_first(x.transpose(0, 1), positions.T), batch_first(x).transpose(0, 1))
    assert not list(batch_first.state_dict())
    with pytest.raises(ValueError, match="8"):
        batch_first(torch.randn(4, 6, 7))


# Models


def test_seq2seq_is_embedding_transformer_head() -> None:
    model = ft.Seq2SeqTransformer(config()).double()
    src, tgt = torch.randint(1, 23, (BATCH, S)), torch.randint(1, 23, (BATCH, T))
    src[1, -2:] = 0

    def embed(tokens: Tensor) -> Tensor:
        positions = ft.sinusoidal_encoding(torch.arange(tokens.shape[1]), D, torch.float64)
        return math.sqrt(D) * model.src_embedding.weight[tokens] + positions

    mask = src == 0
    stacks = nn.Transformer(**model_args()).double()
    stacks.load_state_dict(model.transformer.state_dict())
    hidden = stacks(
        embed(src), embed(tgt), tgt_mask=CAUSAL, src_key_padding_mask=mask, memory_key_padding_mask=mask
    )  # fmt: skip
    torch.testing.assert_close(model(src, tgt), hidden @ model.src_embedding.weight.T, **FLOAT64)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [ft.EncoderModel, ft.CausalLM])
def test_padding_side_does_not_matter(kind: Any, side: str) -> None:
    model = kind(config()).double()
    tokens = torch.randint(1, 23, (1, 4))
    padded = F.pad(tokens, (3, 0) if side == "left" else (0, 3))
    logits = model(padded)[:, 3:] if side == "left" else model(padded)[:, :4]
    torch.testing.assert_close(logits, model(tokens), **FLOAT64)


def test_causal_lm_does_not_see_the_future() -> None:
    model = ft.CausalLM(config(norm_first=True))
    tokens = torch.randint(1, 23, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = 1 + tokens[:, 4:] % 22
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], **FLOAT64)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("tie", [True, False])
def test_heads(tie: bool) -> None:
    for kind in (ft.EncoderModel, ft.CausalLM):
        model = kind(config(tie_head=tie))
        assert (model.head.weight is model.embedding.weight) is tie
        assert model(torch.randint(1, 23, (2, 5))).shape == (2, 5, 23)
    model = ft.Seq2SeqTransformer(config(tie_head=tie, tgt_vocab_size=17))
    logits = model(torch.randint(1, 23, (2, 5)), torch.randint(1, 17, (2, 4)))
    assert logits.shape == (2, 4, 17)
    F.cross_entropy(logits.flatten(0, 1), torch.randint(17, (8,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_head_stays_tied(copied: Any) -> None:
    model = ft.CausalLM(config())
    twin = copied(model)
    assert twin.head.weight is twin.embedding.weight
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(twin(tokens), model(tokens))


def test_bad_tokens() -> None:
    model = ft.CausalLM(config(max_length=6))
    with pytest.raises(IndexError, match=r"\[0, 23\), got 1 to 23"):
        model(torch.tensor([[1, 23]]))
    with pytest.raises(IndexError, match="got -1 to 2"):
        model(torch.tensor([[-1, 2]]))
    with pytest.raises(ValueError, match="max_length=6"):
        model(torch.ones(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32"):
        model(torch.ones(1, 3))
    with pytest.raises(ValueError, match="same batch"):
        ft.Seq2SeqTransformer(config())(torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="padding_id"):
        config(padding_id=23)
