"""What a transformer is trained for: masked and causal language modelling, next sentence, sequence to sequence."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.transformer.heads import CausalLM, Seq2SeqTransformer

#: A label that does not count.
IGNORED = -100


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean", ignored: int = IGNORED
) -> Tensor:
    """Cross-entropy over the last dimension, in float32 at least, where the label is not ``ignored``.

    With ``label_smoothing`` e and ``V`` classes the target distribution is ``(1 - e) · onehot + e / V``
    (arXiv 1512.00567, 7), so a term is ``-(1 - e) · log p[label] - e / V · Σ log p``.

    Args:
        logits: ``(..., V)``.
        labels: integers ``(...)``.
        label_smoothing: in [0, 1). Default 0.
        reduction: ``"mean"`` over the labels that count (0 if none does) or ``"sum"``.
        ignored: the label that does not count.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, got {labels.shape}")
    logits = logits if logits.dtype is torch.float64 else logits.float()
    total = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten().long(), ignore_index=ignored, reduction="sum",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return total if reduction == "sum" else total / (labels != ignored).sum().clamp(min=1)


def mask_tokens(
    tokens: Tensor,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int] = (),
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked language modelling (arXiv 1810.04805, 3.1): the tokens to show, and the labels to predict.

    Each token that is not special is chosen with ``probability``, on its own. Of those chosen, 80% become ``mask_id``,
    10% a random token that is not special, 10% stay as they are. The label of a chosen token is itself; of all others
    :data:`IGNORED`.

    Args:
        tokens: integers ``(batch, seq)``.
        vocab_size: random tokens are below it.
        mask_id: the mask; counts as special.
        special_ids: tokens never chosen: padding, separators.
        generator: of the random choices, on the device of ``tokens``.

    Returns:
        ``(inputs, labels)``, both of the shape of ``tokens``.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    special = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device)
    special[[mask_id, *special_ids]] = True
    ordinary = (~special).nonzero().flatten()
    if not len(ordinary):
        raise ValueError(f"all {vocab_size} tokens are special: none is left to predict")
    draw, fate = torch.rand((2, *tokens.shape), generator=generator, device=tokens.device)
    chosen = (draw < probability) & ~special[tokens]
    labels = torch.where(chosen, tokens, IGNORED)
    other = torch.randint(len(ordinary), tokens.shape, generator=generator, device=tokens.device)
    replaced = torch.where(fate < 0.8, mask_id, ordinary[other].to(tokens.dtype))
    return torch.where(chosen & (fate < 0.9), replaced, tokens), labels


def next_sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]], rng: random.Random
) -> list[tuple[Sequence[int], Sequence[int], bool]]:
    """Next-sentence prediction (arXiv 1810.04805, 3.1): each sentence but a document's last, with a second one.

    Half the time, by ``rng``, the second is the sentence that follows (True); else a random sentence of another
    document (False).

    Args:
        documents: documents of sentences of token ids; at least two hold a sentence.
    """
    filled = [i for i, document in enumerate(documents) if len(document)]
    if len(filled) < 2:
        raise ValueError(f"next-sentence prediction needs two documents with a sentence, got {len(filled)}")
    pairs: list[tuple[Sequence[int], Sequence[int], bool]] = []
    for place, i in enumerate(filled):
        document = documents[i]
        for first, second in pairwise(document):
            if rng.random() < 0.5:
                pairs.append((first, second, True))
                continue
            other = documents[filled[(place + rng.randrange(1, len(filled))) % len(filled)]]
            pairs.append((first, rng.choice(other), False))
    return pairs


def causal_lm_loss(
    model: CausalLM, tokens: Tensor, padding: Tensor | None = None, label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy of each token but the first, given those before it; padding does not count.

    Args:
        tokens: integers ``(batch, seq)``, padded on the right; ``padding`` as in :meth:`CausalLM.forward`.
    """
    padding = model.embedding.padding_mask(tokens) if padding is None else padding
    labels = tokens if padding is None else tokens.masked_fill(padding, IGNORED)
    logits = model(tokens[:, :-1], None if padding is None else padding[:, :-1])
    return cross_entropy(logits, labels[:, 1:], label_smoothing, reduction)


def seq2seq_loss(
    model: Seq2SeqTransformer, src: Tensor, tgt: Tensor, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Teacher forcing: cross-entropy of each target token but the first, given the source and the true tokens before.

    Args:
        src: integers ``(batch, seq_src)``.
        tgt: integers ``(batch, seq_tgt)``, begin-of-sequence first; ``config.padding_id`` in both does not count.
    """
    padding = model.tgt_embedding.padding_mask(tgt)
    labels = tgt if padding is None else tgt.masked_fill(padding, IGNORED)
    return cross_entropy(model(src, tgt[:, :-1]), labels[:, 1:], label_smoothing, reduction)
