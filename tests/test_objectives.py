"""What models are trained for: against closed forms, and down to no loss on a batch that can be learnt by heart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import transformer as ft
from tests.tolerance import FLOAT64

VOCAB, PAD, MASK = 23, 0, 1


def config(**changes: Any) -> ft.TransformerConfig:
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}
    return ft.TransformerConfig(**({"vocab_size": VOCAB, "padding_id": PAD, "dropout": 0.0} | sizes | changes))


# Closed forms


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (3, 4))
    labels[0, 1] = labels[2, 3] = ft.IGNORED
    logp = logits.log_softmax(-1)
    terms = [
        -(1 - smoothing) * logp[i, j, labels[i, j]] - smoothing / VOCAB * logp[i, j].sum()
        for i in range(3)
        for j in range(4)
        if labels[i, j] >= 0
    ]
    expected = torch.stack(terms)
    torch.testing.assert_close(ft.cross_entropy(logits, labels, smoothing, "sum"), expected.sum(), **FLOAT64)
    torch.testing.assert_close(ft.cross_entropy(logits, labels, smoothing), expected.mean(), **FLOAT64)


def test_smoothed_loss_is_least_at_the_smoothed_distribution() -> None:
    smoothing = 0.1
    target = torch.full((VOCAB,), smoothing / VOCAB, dtype=torch.float64)
    target[5] += 1 - smoothing
    loss = ft.cross_entropy(target.log()[None], torch.tensor([5]), smoothing)
    assert loss.item() == pytest.approx(-(target * target.log()).sum().item())


def test_cross_entropy_without_labels_and_bad_arguments() -> None:
    logits, labels = torch.randn(2, 3, requires_grad=True), torch.tensor([ft.IGNORED, ft.IGNORED])
    loss = ft.cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    half = ft.cross_entropy(logits.bfloat16(), torch.tensor([1, 2]))
    assert half.dtype is torch.float32
    for kwargs, message in (({"label_smoothing": 1.0}, "1.0"), ({"reduction": "max"}, "max")):
        with pytest.raises(ValueError, match=message):
            ft.cross_entropy(logits, labels, **kwargs)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        ft.cross_entropy(logits, labels[:1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_token_is_predicted_from_those_before_it(smoothing: float) -> None:
    """Term for term: the logits at i are for token i + 1, the first token is given, padding does not count."""
    torch.manual_seed(0)
    src, tokens = torch.randint(1, VOCAB, (3, 4)), torch.randint(1, VOCAB, (3, 6))
    tokens[0, 4:] = src[1, 3:] = PAD

    def expected(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        terms = [
            -(1 - smoothing) * logp[i, j, tokens[i, j + 1]] - smoothing / VOCAB * logp[i, j].sum()
            for i in range(3)
            for j in range(5)
            if tokens[i, j + 1] != PAD
        ]
        assert len(terms) == 13
        return torch.stack(terms)

    causal, seq2seq = ft.CausalLM(config()).double(), ft.Seq2SeqTransformer(config()).double()
    for terms, loss in (
        (expected(causal(tokens)), lambda r: ft.causal_lm_loss(causal, tokens, None, smoothing, r)),
        (expected(causal(tokens)), lambda r: ft.causal_lm_loss(causal, tokens, tokens == PAD, smoothing, r)),
        (expected(seq2seq(src, tokens)), lambda r: ft.seq2seq_loss(seq2seq, src, tokens, smoothing, r)),
    ):
        torch.testing.assert_close(loss("sum"), terms.sum(), **FLOAT64)
        torch.testing.assert_close(loss("mean"), terms.mean(), **FLOAT64)


def within(observed: float, n: int, p: float) -> bool:
    """A relative frequency of n draws within five standard deviations: one false alarm in a million."""
    return abs(observed - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_masking_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (400, 500), generator=generator)
    inputs, labels = ft.mask_tokens(
        tokens, vocab_size=VOCAB, mask_id=MASK, special_ids=(PAD, 2), generator=generator
    )  # fmt: skip
    special = (tokens == PAD) | (tokens == MASK) | (tokens == 2)
    chosen = labels != ft.IGNORED
    assert torch.equal(labels[chosen], tokens[chosen]) and not (chosen & special).any()
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    n = int((~special).sum())
    assert within(int(chosen.sum()) / n, n, 0.15)
    k, before, after = int(chosen.sum()), tokens[chosen], inputs[chosen]
    assert within((after == MASK).double().mean().item(), k, 0.8)
    # A random token is the same again once in the 20 ordinary ones.
    assert within((after == before).double().mean().item(), k, 0.1 + 0.1 / 20)
    random_ones = after[(after != MASK) & (after != before)]
    counts = torch.bincount(random_ones, minlength=VOCAB)
    assert not counts[[PAD, MASK, 2]].any()
    assert all(within(int(c) / len(random_ones), len(random_ones), 1 / 20) for c in counts[3:])
    # Each token is chosen on its own: neighbours are chosen together as often as chance has it.
    both = (~special[:, 1:] & ~special[:, :-1]).double()
    assert within(((chosen[:, 1:] & chosen[:, :-1]).sum() / both.sum()).item(), int(both.sum()), 0.15**2)


def test_masking_edges() -> None:
    tokens = torch.tensor([[3, 4, PAD]], dtype=torch.int32)
    inputs, labels = ft.mask_tokens(tokens, vocab_size=5, mask_id=MASK, special_ids=[PAD], probability=0.0)
    assert torch.equal(inputs, tokens) and (labels == ft.IGNORED).all()
    _, labels = ft.mask_tokens(tokens, vocab_size=5, mask_id=MASK, special_ids=[PAD], probability=1.0)
    assert labels.tolist() == [[3, 4, ft.IGNORED]]
    with pytest.raises(ValueError, match=r"1\.5"):
        ft.mask_tokens(tokens, vocab_size=5, mask_id=MASK, probability=1.5)
    with pytest.raises(ValueError, match="all 2 tokens are special"):
        ft.mask_tokens(tokens, vocab_size=2, mask_id=1, special_ids=[0])


def test_next_sentence_pairs() -> None:
    documents = [[[100 * d + s] for s in range(1 + d % 4)] for d in range(4000)] + [[]]
    pairs = ft.next_sentence_pairs(documents, random.Random(0))
    assert [p[0][0] for p in pairs] == [s[0] for d in documents for s in d[:-1]]
    for first, second, is_next in pairs:
        if is_next:
            assert second[0] == first[0] + 1
        else:
            assert second[0] // 100 != first[0] // 100
    assert within(sum(p[2] for p in pairs) / len(pairs), len(pairs), 0.5)
    assert pairs == ft.next_sentence_pairs(documents, random.Random(0))
    with pytest.raises(ValueError, match="two documents"):
        ft.next_sentence_pairs([[[1]], []], random.Random(0))


def test_segments() -> None:
    torch.manual_seed(0)
    model = ft.EncoderModel(config(num_segments=2)).double()
    tokens, segments = torch.randint(3, VOCAB, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    plain = ft.EncoderModel(config()).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "segment" not in k})
    positions = ft.sinusoidal_encoding(torch.arange(5), 32, torch.float64)
    expected = math.sqrt(32) * (model.embedding.weight[tokens] + model.embedding.segment_weight[segments]) + positions
    torch.testing.assert_close(model.embedding(tokens, segments=segments), expected, **FLOAT64)
    assert torch.equal(model(tokens), model(tokens, segments=torch.zeros_like(segments)))
    assert not torch.equal(model(tokens), model(tokens, segments=segments))
    with pytest.raises(ValueError, match="num_segments is 0"):
        plain(tokens, segments=segments)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        model(tokens, segments=segments[:, :2])
    with pytest.raises(IndexError, match=r"segments must be in \[0, 2\)"):
        model(tokens, segments=segments + 1)


@pytest.mark.parametrize("causal", [False, True])
def test_classifier_ignores_padding(causal: bool) -> None:
    torch.manual_seed(0)
    model = ft.SequenceClassifier(config(), 3, causal=causal).double()
    tokens = torch.randint(1, VOCAB, (2, 4))
    expected = model(tokens)
    assert expected.shape == (2, 3)
    for padded in ((0, 3), (2, 0)):
        torch.testing.assert_close(model(nn.functional.pad(tokens, padded)), expected, **FLOAT64)
    # It reads every token: the causal one pools the last, the other one sees all.
    for i in range(4):
        changed = tokens.clone()
        changed[:, i] = 1 + tokens[:, i] % (VOCAB - 1)
        assert not torch.allclose(model(changed), expected)
    with pytest.raises(ValueError, match="num_labels"):
        ft.SequenceClassifier(config(), 0)


# By heart


def masked_language(tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    inputs, labels = ft.mask_tokens(
        tokens, vocab_size=VOCAB, mask_id=MASK, special_ids=[PAD], probability=0.3,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return ft.EncoderModel(config()), lambda m: ft.cross_entropy(m(inputs, tokens == PAD), labels)


def next_sentence(tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    segments = (torch.arange(8) > 3).long().expand(6, 8)
    is_next = torch.tensor([0, 1, 1, 0, 1, 0])
    model = ft.PretrainingModel(config(num_segments=2))
    return model, lambda m: ft.cross_entropy(m(tokens, segments=segments)[1], is_next)


def classification(causal: bool) -> Callable[[Tensor], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def make(tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        labels = torch.tensor([0, 1, 2, 2, 1, 0])
        return ft.SequenceClassifier(config(), 3, causal), lambda m: ft.cross_entropy(m(tokens), labels)

    return make


def causal_language(tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tokens = tokens.clone()
    tokens[:, 0] = torch.arange(6) + 2  # the first is given: it must tell the rows apart
    return ft.CausalLM(config()), lambda m: ft.causal_lm_loss(m, tokens)


def sequence_to_sequence(tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tgt = torch.cat((torch.full((6, 1), 2), tokens.flip(0, 1)[:, 2:]), dim=1)
    return ft.Seq2SeqTransformer(config(tie_head=False)), lambda m: ft.seq2seq_loss(m, tokens, tgt)


OBJECTIVES = {
    "masked language": masked_language,
    "next sentence": next_sentence,
    "classification": classification(False),
    "causal classification": classification(True),
    "causal language": causal_language,
    "sequence to sequence": sequence_to_sequence,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_learnt_by_heart(name: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCAB, (6, 8))
    tokens[1, 6:] = tokens[4, 5:] = PAD
    model, loss_of = OBJECTIVES[name](tokens)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(700):
        loss = loss_of(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 1e-3:
            return
    pytest.fail(f"the loss is still {loss.item():.1e}")
