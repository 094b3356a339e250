"""Greedy generation: the cache changes nothing but the time, padding and batching change nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import modules
from fastattn import transformer as ft
from fastattn.transformer import cache as cache_module
from tests.tolerance import assert_rounded_alike

VOCAB, PAD, NEW = 29, 0, 12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def config(**changes: Any) -> ft.TransformerConfig:
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "num_encoder_layers": 2, "num_decoder_layers": 2}
    return ft.TransformerConfig(
        **({"vocab_size": VOCAB, "padding_id": PAD, "dropout": 0.0, "tie_head": False} | sizes | changes)
    )


def lively(model: nn.Module) -> nn.Module:
    """The model in float64, led to vary: a fresh one, its head tied to the embedding, repeats its last token for ever.

    Here the head is the embedding shifted by one token, which would count downwards if the layers did nothing.
    """
    embedding = model.tgt_embedding if isinstance(model, ft.Seq2SeqTransformer) else model.embedding
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        if model.head.weight is not embedding.weight:
            model.head.weight.copy_(embedding.weight.roll(-1, 0))
    return model.double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape)


def pad(rows: list[Tensor], side: str) -> Tensor:
    """``(1, n)`` rows of different length as one batch, padded on one side."""
    width = max(row.shape[1] for row in rows)
    gaps = [width - row.shape[1] for row in rows]
    return torch.cat(
        [F.pad(row, (n, 0) if side == "left" else (0, n), value=PAD) for row, n in zip(rows, gaps, strict=True)]
    )


CONFIGS = {
    "pre-norm": {"norm_first": True},
    "post-norm": {},
    "gelu, tied": {"activation": "gelu", "tie_head": True},
    "grouped heads": {"num_kv_heads": 2, "norm_first": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_lm_cached_equals_uncached(name: str) -> None:
    model = lively(ft.CausalLM(config(**CONFIGS[name])))
    prompt = tokens(3, 5)
    cached = ft.generate_greedy(model, prompt, max_new_tokens=NEW)
    assert cached.shape == (3, NEW) and len(cached.unique()) > (2 if "tied" in name else 4)
    assert torch.equal(cached, ft.generate_greedy(model, prompt, max_new_tokens=NEW, use_cache=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_seq2seq_cached_equals_uncached(name: str) -> None:
    model = lively(ft.Seq2SeqTransformer(config(**CONFIGS[name])))
    src, prompt = pad([tokens(1, 6), tokens(1, 9), tokens(1, 2)], "right"), tokens(3, 2)
    cached = ft.generate_greedy(model, prompt, src=src, max_new_tokens=NEW)
    assert cached.shape == (3, NEW) and len(cached.unique()) > (2 if "tied" in name else 4)
    assert torch.equal(cached, ft.generate_greedy(model, prompt, src=src, max_new_tokens=NEW, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_follow_the_whole_model(dtype: torch.dtype) -> None:
    """Token for token by the state; in each type as close to float64 as the whole model is."""
    model = lively(ft.CausalLM(config(norm_first=True))).to(dtype)
    prompt = tokens(2, 9)
    with torch.no_grad():
        whole = model(prompt)
        state = cache_module.DecodingState(2, 9)
        parts = [prompt[:, :4], prompt[:, 4:5], prompt[:, 5:8], prompt[:, 8:]]
        steps = torch.cat([model.head(model.decode(part, None, state)) for part in parts], dim=1)
        oracle = model.double()(prompt)
    error, naive = (steps - oracle).abs().max(), (whole - oracle).abs().max()
    assert error <= 2 * naive + 8 * torch.finfo(dtype).eps * oracle.abs().max()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_alone(side: str, use_cache: bool) -> None:
    model = lively(ft.CausalLM(config()))
    rows = [tokens(1, 5), tokens(1, 1), tokens(1, 8)]
    batch = ft.generate_greedy(model, pad(rows, side), max_new_tokens=NEW, use_cache=use_cache)
    for row, generated in zip(rows, batch, strict=True):
        assert torch.equal(ft.generate_greedy(model, row, max_new_tokens=NEW)[0], generated)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sources_and_prompts_equal_each_alone(side: str, use_cache: bool) -> None:
    model = lively(ft.Seq2SeqTransformer(config(norm_first=True)))
    sources, prompts = [tokens(1, 3), tokens(1, 7)], [tokens(1, 4), tokens(1, 1)]
    batch = ft.generate_greedy(
        model, pad(prompts, side), src=pad(sources, side), max_new_tokens=NEW, use_cache=use_cache
    )  # fmt: skip
    for src, prompt, generated in zip(sources, prompts, batch, strict=True):
        assert torch.equal(ft.generate_greedy(model, prompt, src=src, max_new_tokens=NEW)[0], generated)


def test_explicit_padding_overrides_the_padding_id() -> None:
    model = lively(ft.CausalLM(config(padding_id=None)))
    prompt = tokens(2, 4)
    prompt[:, 1] = PAD
    expected = ft.generate_greedy(model, prompt, max_new_tokens=5)
    padded = torch.cat((tokens(2, 3), prompt), dim=1)
    mask = torch.arange(7).expand(2, 7) < 3
    assert torch.equal(ft.generate_greedy(model, padded, max_new_tokens=5, padding=mask), expected)


def test_generated_padding_ids_are_tokens() -> None:
    model = lively(ft.CausalLM(config(norm_first=True)))
    prompt = F.pad(tokens(32, 4), (1, 0), value=PAD)
    cached = ft.generate_greedy(model, prompt, max_new_tokens=2 * NEW)
    assert (cached[:, : -NEW // 2] == PAD).any(dim=1).sum() > 4
    assert torch.equal(cached, ft.generate_greedy(model, prompt, max_new_tokens=2 * NEW, use_cache=False))
    assert torch.equal(cached, ft.generate_greedy(model, prompt[:, 1:], max_new_tokens=2 * NEW))


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_token_is_the_most_likely_one(use_cache: bool) -> None:
    model = lively(ft.CausalLM(config(padding_id=None)))
    prompt = tokens(2, 3)
    new = ft.generate_greedy(model, prompt, max_new_tokens=6, use_cache=use_cache)
    logits = model(torch.cat((prompt, new), dim=1))
    assert torch.equal(logits[:, 2:-1].argmax(-1), new)


@pytest.mark.parametrize("use_cache", [True, False])
def test_end_of_sequence(use_cache: bool) -> None:
    model = lively(ft.CausalLM(config()))
    prompt = tokens(4, 5)
    free = ft.generate_greedy(model, prompt, max_new_tokens=NEW, use_cache=use_cache)
    eos = int(free[0, 3])
    result = ft.generate_greedy(model, prompt, max_new_tokens=NEW, eos_id=eos, use_cache=use_cache)
    lengths = []
    for before, row in zip(free.tolist(), result.tolist(), strict=True):
        end = before.index(eos) + 1 if eos in before else NEW
        lengths.append(end)
        assert row == (before[:end] + [PAD] * NEW)[: result.shape[1]]
    assert result.shape[1] == max(lengths)
    alone = ft.generate_greedy(model, prompt[:1], max_new_tokens=NEW, eos_id=eos, use_cache=use_cache)
    assert alone.tolist() == [free[0, : lengths[0]].tolist()]


def test_without_padding_id_rows_end_in_eos() -> None:
    model = lively(ft.CausalLM(config(padding_id=None)))
    prompt = tokens(4, 5)
    eos = int(ft.generate_greedy(model, prompt, max_new_tokens=1)[0, 0])
    row = ft.generate_greedy(model, prompt, max_new_tokens=4, eos_id=eos)[0]
    assert (row == eos).all()


def test_memory_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = modules.MultiHeadAttention._project_key_value

    def counted(self: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(key.shape)
        return original(self, key, value)

    monkeypatch.setattr(modules.MultiHeadAttention, "_project_key_value", counted)
    model = ft.Seq2SeqTransformer(config())
    ft.generate_greedy(model, tokens(2, 1), src=tokens(2, 6), max_new_tokens=NEW)
    assert len(calls) == 2  # one per decoder layer


def test_dropout_is_off_and_modes_come_back() -> None:
    model = lively(ft.CausalLM(config(dropout=0.5))).train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prompt = tokens(2, 3)
    first = ft.generate_greedy(model, prompt, max_new_tokens=NEW)
    assert torch.equal(ft.generate_greedy(model, prompt, max_new_tokens=NEW), first)
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad


def test_backends_generate_the_same() -> None:
    model = lively(ft.CausalLM(config()))
    prompt = pad([tokens(1, 3), tokens(1, 6)], "left")
    with fastattn.use_backend("reference"):
        expected = ft.generate_greedy(model, prompt, max_new_tokens=NEW)
    assert torch.equal(ft.generate_greedy(model, prompt, max_new_tokens=NEW), expected)


def test_inference_mode_int32_and_nothing_to_do() -> None:
    model = ft.CausalLM(config())
    prompt = tokens(2, 3)
    with torch.inference_mode():
        new = ft.generate_greedy(model, prompt, max_new_tokens=3)
    narrow = ft.generate_greedy(model, prompt.int(), max_new_tokens=3)
    assert narrow.dtype is torch.int32 and torch.equal(narrow.long(), new)
    assert ft.generate_greedy(model, prompt, max_new_tokens=0).shape == (2, 0)
    assert ft.generate_greedy(model, prompt[:0], max_new_tokens=3).shape[0] == 0


# Bad input


BAD = {
    "vocabulary": (lambda: torch.tensor([[1, VOCAB]]), {}, IndexError, r"\[0, 29\)"),
    "negative": (lambda: torch.tensor([[1, -3]]), {}, IndexError, "got -3"),
    "eos": (lambda: tokens(1, 2), {"eos_id": VOCAB}, IndexError, "eos_id"),
    "prompt too long": (lambda: tokens(1, 21), {"max_new_tokens": 0}, ValueError, "max_length=20"),
    "result too long": (lambda: tokens(1, 9), {"max_new_tokens": 12}, ValueError, "9 tokens and 12 new ones make 21"),
    "empty prompt": (lambda: tokens(1, 0), {}, ValueError, "at least one token"),
    "padding only": (lambda: torch.tensor([[1, 2], [PAD, PAD]]), {}, ValueError, "at least one token"),
    "one dimension": (lambda: tokens(4), {}, ValueError, r"\(batch, seq\)"),
    "floats": (lambda: torch.ones(1, 4), {}, ValueError, "float32"),
    "negative count": (lambda: tokens(1, 2), {"max_new_tokens": -1}, ValueError, "-1"),
    "padding shape": (lambda: tokens(1, 2), {"padding": torch.zeros(1, 3, dtype=torch.bool)}, ValueError, r"\(1, 2\)"),
    "padding type": (lambda: tokens(1, 2), {"padding": torch.zeros(1, 2)}, ValueError, "bool"),
    "source": (lambda: tokens(1, 2), {"src": torch.ones(1, 2, dtype=torch.int64)}, TypeError, "no source"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    prompt, changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ft.generate_greedy(ft.CausalLM(config(max_length=20)), prompt(), **({"max_new_tokens": 3} | changes))


def test_bad_source() -> None:
    model = ft.Seq2SeqTransformer(config(tgt_vocab_size=7))
    with pytest.raises(TypeError, match="pass src"):
        ft.generate_greedy(model, torch.ones(1, 1, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="same batch"):
        ft.generate_greedy(model, torch.ones(2, 1, dtype=torch.int64), src=tokens(1, 3), max_new_tokens=1)
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        ft.generate_greedy(model, torch.tensor([[8]]), src=tokens(1, 3), max_new_tokens=1)
    with pytest.raises(ValueError, match="every src"):
        ft.generate_greedy(model, torch.tensor([[1]]), src=torch.tensor([[PAD]]), max_new_tokens=1)
    with pytest.raises(TypeError, match="EncoderModel"):
        ft.generate_greedy(ft.EncoderModel(config()), tokens(1, 2), max_new_tokens=1)  # type: ignore[arg-type]


# The cache


def test_the_memory_is_taken_as_it_is_and_rows_move() -> None:
    k, v, q = torch.randn(3, 2, 3, 4, 8).unbind(0)
    memory = ft.KVCache()
    out = memory.attend(q, k, v, causal=False)
    assert memory.key is k and memory.value is v and memory.lengths == 4
    assert torch.equal(memory.attend(q, causal=False), out)
    cache, rows = ft.KVCache(5), torch.tensor([1, 1, 0])
    cache.attend(q, k, v)
    cache.reorder(rows)
    assert torch.equal(cache.key[:, :, :4], k[rows]) and torch.equal(cache.value[:, :, :4], v[rows])
    x = torch.randn(3, 3, 1, 8)
    expected = fastattn.attention(x, *(torch.cat([y[rows], x], dim=2) for y in (k, v)), causal=True)
    assert_rounded_alike(cache.attend(x, x, x), expected)
    cache.lengths = torch.tensor([4, 2, 3])  # go back, sequence by sequence
    out = cache.attend(x, x, x)
    for b, n in enumerate((4, 2, 3)):
        keys, values = (torch.cat([y[rows[b], :, :n], x[b]], dim=1) for y in (k, v))
        assert_rounded_alike(out[b], fastattn.attention(x[b], keys, values, causal=True))
    assert cache.lengths.tolist() == [5, 3, 4]


def test_cache_refuses() -> None:
    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match="at least 1"):
        ft.KVCache(0)
    for empty in (ft.KVCache(5), ft.KVCache()):
        with pytest.raises(ValueError, match="empty"):
            empty.attend(x)
        with pytest.raises(ValueError, match="empty"):
            empty.reorder(torch.tensor([0]))
        with pytest.raises(ValueError, match="no gradient"):
            empty.attend(x, x.clone().requires_grad_(), x)
    cache = ft.KVCache(5)
    cache.attend(x, x, x)
    with pytest.raises(ValueError, match="4 used, 4 new"):
        cache.attend(x, x, x)
    with pytest.raises(ValueError, match="like its cache"):
        cache.attend(x[:, :, :1], x[:, :1, :1], x[:, :1, :1])
    layer = ft.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    with pytest.raises(ValueError, match="is_causal=True"):
        layer(torch.randn(1, 2, 8), cache=ft.KVCache(5))
    stack = ft.TransformerEncoder(layer, 2)
    with pytest.raises(ValueError, match="2 layers, 1 caches"):
        stack(torch.randn(1, 2, 8), is_causal=True, caches=[ft.KVCache(5)])
    with pytest.raises(ValueError, match="no gradient"):
        stack(torch.randn(1, 2, 8), is_causal=True, caches=[ft.KVCache(5), ft.KVCache(5)])
    attention = fastattn.MultiHeadAttention(8, 2, batch_first=True).eval()
    y = torch.randn(1, 2, 8)
    for options, message in (
        ({}, "need_weights must be False"),
        ({"need_weights": False, "attn_mask": torch.zeros(2, 2)}, "no attn_mask"),
        ({"need_weights": False, "key_padding_mask": torch.zeros(1, 2)}, "must be bool of shape"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            attention(y, y, y, cache=ft.KVCache(5), **options)
    with pytest.raises(ValueError, match="eval"):
        fastattn.MultiHeadAttention(8, 2, dropout=0.1)(y, y, y, cache=ft.KVCache(5), need_weights=False)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
        attention(y, None, None)
