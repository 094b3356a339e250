"""Beam search and sampling: what they find, and that cache, padding, batch and backend make no difference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from test_generation import NEW, PAD, VOCAB, config, lively, pad, tokens
from torch import Tensor, nn

import fastattn
from fastattn import transformer as ft
from fastattn.transformer.beam import length_penalty_of
from tests.devices import BACKENDS, device_or_skip
from tests.tolerance import FLOAT64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def seq2seq(**changes: Any) -> ft.Seq2SeqTransformer:
    return lively(ft.Seq2SeqTransformer(config(norm_first=True, **changes)))


def causal(**changes: Any) -> ft.CausalLM:
    return lively(ft.CausalLM(config(norm_first=True, **changes)))


def log_probability(model: ft.CausalLM, prompt: Tensor, new: Tensor) -> float:
    """Of ``new`` after ``prompt``, both ``(n,)``, by the whole model."""
    logp = model(torch.cat((prompt, new))[None])[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(new))


# Beams


def test_length_penalty() -> None:
    assert [length_penalty_of(n, 2.0) for n in (1, 7, 13)] == pytest.approx([1, 4, 9])
    assert length_penalty_of(7, -0.5) == pytest.approx(2**-0.5) and length_penalty_of(99, 0.0) == 1


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 5.0, -1.0])
def test_one_beam_is_greedy(alpha: float, early_stopping: bool) -> None:
    for model, extra in ((causal(), {}), (seq2seq(), {"src": tokens(8, 6)})):
        prompt = pad([tokens(1, 1 + i % 4) for i in range(8)], "left")
        free = ft.generate_greedy(model, prompt, max_new_tokens=NEW, **extra)
        for eos in (None, int(free[0, 3])):
            expected = ft.generate_greedy(model, prompt, max_new_tokens=NEW, eos_id=eos, **extra)
            found = ft.generate_beam(
                model, prompt, max_new_tokens=NEW, eos_id=eos, num_beams=1, length_penalty=alpha,
                early_stopping=early_stopping, **extra,
            )  # fmt: skip
            assert torch.equal(found.tokens[:, 0], expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all(alpha: float) -> None:
    """Every sequence of up to three tokens of a small vocabulary, scored one by one by the whole model."""
    model, eos = causal(vocab_size=5, padding_id=None), 2
    prompt = torch.tensor([[1, 3]])
    scored = {}
    for length in (1, 2, 3):
        for new in itertools.product(range(5), repeat=length):
            if eos in new[:-1] or (length < 3 and new[-1] != eos):
                continue
            score = log_probability(model, prompt[0], torch.tensor(new)) / length_penalty_of(length, alpha)
            scored[new] = score
    best = sorted(scored, key=scored.__getitem__, reverse=True)[:10]
    beams = ft.generate_beam(
        model, prompt, max_new_tokens=3, num_beams=125, num_return=10, eos_id=eos, length_penalty=alpha
    )  # fmt: skip
    found = [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in beams.tokens[0].tolist()]
    assert found == best
    torch.testing.assert_close(beams.scores[0], torch.tensor([scored[b] for b in best], dtype=torch.float64), **FLOAT64)


def test_beams_are_distinct_sorted_and_scored_as_the_model_scores_them() -> None:
    model = causal()
    prompt = tokens(3, 4)
    eos = int(ft.generate_greedy(model, prompt, max_new_tokens=5)[0, 4])
    beams = ft.generate_beam(model, prompt, max_new_tokens=NEW, eos_id=eos, num_beams=5, num_return=5)
    assert (beams.scores.diff(dim=1) <= 0).all()
    for i in range(3):
        rows = [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in beams.tokens[i].tolist()]
        assert len(set(rows)) == 5
        for row, score in zip(rows, beams.scores[i].tolist(), strict=True):
            expected = log_probability(model, prompt[i], torch.tensor(row)) / length_penalty_of(len(row), 0.6)
            assert score == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("alpha", [0.6, -1.0])
def test_beams_are_those_of_a_search_written_out(alpha: float, early_stopping: bool) -> None:
    """Hypothesis by hypothesis, by the whole model: what has ended keeps its place among the beams."""
    model, num_beams, steps = causal(), 3, 5
    prompt = tokens(4, 2)
    eos = int(ft.generate_greedy(model, prompt, max_new_tokens=2)[0, 1])
    found = ft.generate_beam(
        model, prompt, max_new_tokens=steps, num_beams=num_beams, num_return=num_beams, eos_id=eos,
        length_penalty=alpha, early_stopping=early_stopping,
    )  # fmt: skip
    early_ends = 0
    for row, new, scores in zip(prompt, found.tokens.tolist(), found.scores.tolist(), strict=True):
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int]]] = []
        for step in range(1, steps + 1):
            grown = []
            for score, ids in live:
                logp = model(torch.cat((row, torch.tensor(ids, dtype=torch.int64)))[None])[0, -1].log_softmax(-1)
                grown += [(score + p, [*ids, t]) for t, p in enumerate(logp.tolist())]
            best = sorted(grown, reverse=True)[: num_beams - len(ended)]
            over = [(s, ids) for s, ids in best if ids[-1] == eos or step == steps]
            early_ends += len(over) if step < steps else 0
            ended += [(s / length_penalty_of(step, alpha), ids) for s, ids in over]
            live = [(s, ids) for s, ids in best if (s, ids) not in over]
        ended.sort(reverse=True)
        assert [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new] == [ids for _, ids in ended]
        assert scores == pytest.approx([score for score, _ in ended], rel=1e-9)
    assert early_ends >= 3


@pytest.mark.parametrize("num_return", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 1.5, -2.0])
def test_early_stopping_changes_nothing_but_the_time(
    alpha: float, num_return: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seq2seq()
    src, prompt = tokens(6, 5), tokens(6, 1)
    eos = int(ft.generate_greedy(model, prompt, src=src, max_new_tokens=2)[0, 1])
    steps = []
    decode = ft.Seq2SeqTransformer.decode
    monkeypatch.setattr(ft.Seq2SeqTransformer, "decode", lambda *a, **k: steps.append(1) or decode(*a, **k))
    kwargs = {"src": src, "max_new_tokens": 4 * NEW, "eos_id": eos, "num_beams": 3, "length_penalty": alpha}
    stopped = ft.generate_beam(model, prompt, num_return=num_return, **kwargs)
    early, steps[:] = len(steps), []
    whole = ft.generate_beam(model, prompt, num_return=num_return, early_stopping=False, **kwargs)
    assert torch.equal(stopped.tokens, whole.tokens) and torch.equal(stopped.scores, whole.scores)
    assert early <= len(steps)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_cached_uncached_batched_and_alone(side: str) -> None:
    model = seq2seq()
    sources, prompts = [tokens(1, n) for n in (3, 7, 5)], [tokens(1, n) for n in (2, 1, 4)]
    eos = int(ft.generate_greedy(model, prompts[0], src=sources[0], max_new_tokens=4)[0, 3])
    kwargs = {"max_new_tokens": NEW, "eos_id": eos, "num_beams": 4, "num_return": 2}
    batch = {"src": pad(sources, side), "prompt": pad(prompts, side)}
    cached = ft.generate_beam(model, **batch, **kwargs)
    uncached = ft.generate_beam(model, **batch, use_cache=False, **kwargs)
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.scores, uncached.scores, **FLOAT64)
    for i, (src, prompt) in enumerate(zip(sources, prompts, strict=True)):
        alone = ft.generate_beam(model, prompt, src=src, **kwargs)
        n = alone.tokens.shape[2]
        assert torch.equal(cached.tokens[i, :, :n], alone.tokens[0]) and (cached.tokens[i, :, n:] == PAD).all()


def test_beams_at_the_edges() -> None:
    model = causal(vocab_size=3, padding_id=None)
    beams = ft.generate_beam(model, torch.tensor([[1]]), max_new_tokens=1, num_beams=6, num_return=6)
    assert beams.scores[0].isfinite().tolist() == [True] * 3 + [False] * 3
    assert sorted(beams.tokens[0, :3, 0].tolist()) == [0, 1, 2]
    assert ft.generate_beam(causal(), tokens(2, 3), max_new_tokens=0).tokens.shape == (2, 1, 0)
    assert ft.generate_beam(causal(), tokens(2, 3)[:0], max_new_tokens=4).tokens.shape == (0, 1, 0)
    for kwargs, message in (
        ({"num_return": 5}, "num_beams=4"), ({"num_beams": 0, "num_return": 0}, "num_return"),
        ({"length_penalty": math.nan}, "nan"), ({"eos_id": VOCAB}, "eos_id"),
    ):  # fmt: skip
        with pytest.raises((ValueError, IndexError), match=message):
            ft.generate_beam(causal(), tokens(1, 2), max_new_tokens=2, **kwargs)


# Sampling


def test_filter_closed_forms() -> None:
    probability = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    logits = probability.log()

    def left(**kwargs: Any) -> list[float]:
        return ft.filter_logits(logits, **kwargs).softmax(-1).tolist()

    assert left() == pytest.approx(probability.tolist())
    assert left(temperature=2.0) == pytest.approx((probability.sqrt() / probability.sqrt().sum()).tolist())
    assert left(top_k=2) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert left(top_k=99) == pytest.approx(probability.tolist())
    assert left(top_p=0.6) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert left(top_p=0.66) == pytest.approx([0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85])
    assert left(top_p=1e-9) == pytest.approx([0, 1, 0, 0, 0])
    # top_p counts in what top_k left: 0.4 of 0.65 is more than 0.6.
    assert left(top_k=2, top_p=0.6) == pytest.approx([0, 1, 0, 0, 0])
    assert ft.filter_logits(torch.zeros(7), top_k=3).isfinite().sum() == 3
    for kwargs in ({"temperature": 0.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            ft.filter_logits(logits, **kwargs)


def test_sampled_frequencies_are_the_model_s() -> None:
    model = causal(vocab_size=6, padding_id=None)
    n, prompt = 4000, torch.tensor([[1, 2]])
    expected = ft.filter_logits(model(prompt)[0, -1].detach(), 1.5, 4, 0.95).softmax(-1)
    drawn = ft.generate_sample(
        model, prompt.expand(n, 2), max_new_tokens=1, temperature=1.5, top_k=4, top_p=0.95,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert not counts[expected == 0].any()
    assert ((counts / n - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_samples_repeat_end_and_tend_to_greedy() -> None:
    model = causal()
    prompt = pad([tokens(1, 5), tokens(1, 2)], "left")
    greedy = ft.generate_greedy(model, prompt, max_new_tokens=NEW)
    assert torch.equal(ft.generate_sample(model, prompt, max_new_tokens=NEW, temperature=1e-6), greedy)
    assert torch.equal(ft.generate_sample(model, prompt, max_new_tokens=NEW, top_k=1), greedy)

    def draw(use_cache: bool, eos_id: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return ft.generate_sample(
            model, prompt, max_new_tokens=NEW, generator=generator, use_cache=use_cache, eos_id=eos_id
        )  # fmt: skip

    free = draw(True)
    assert torch.equal(free, draw(False)) and not torch.equal(free, greedy)
    eos = int(free[0, 4])
    for row, before in zip(draw(True, eos).tolist(), free.tolist(), strict=True):
        end = before.index(eos) + 1 if eos in before else len(row)
        assert set(row[end:]) <= {PAD}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_generates_the_same(backend: str) -> None:
    device = device_or_skip(backend)
    interpreted = backend == "triton" and device == "cpu"  # slow
    model: nn.Module = seq2seq(num_encoder_layers=1, num_decoder_layers=1, nhead=1).float().to(device)
    src = pad([tokens(1, 3), tokens(1, 6)], "right").to(device)
    kwargs = {"src": src, "max_new_tokens": 2 if interpreted else 8, "prompt": tokens(2, 1).to(device)}

    def everything() -> list[Tensor]:
        return [
            ft.generate_greedy(model, **kwargs),
            ft.generate_beam(model, num_beams=2, num_return=2, **kwargs).tokens,
            ft.generate_sample(model, generator=torch.Generator(device).manual_seed(0), **kwargs),
        ]

    with fastattn.use_backend("reference"):
        expected = everything()
    with fastattn.use_backend(backend):
        for a, b in zip(everything(), expected, strict=True):
            assert torch.equal(a, b)
