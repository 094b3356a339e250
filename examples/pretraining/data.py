"""Plain text as documents of sentences, labelled sentences, and the token sequences that models read."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.common.batching import pad
from examples.common.errors import UserError
from examples.common.files import read_text
from examples.common.tokenizer import BOS, CLS, EOS, PAD, SEP, Tokenizer
from examples.grammar import things
from fastattn.transformer import next_sentence_pairs

SENTENCES_PER_DOCUMENT = 20
Labelled = list[tuple[str, str]]


def read_documents(paths: Sequence[Path]) -> list[list[str]]:
    """Documents of sentences: blank lines part documents, and full stops, question and exclamation marks sentences.

    A stretch of more than 20 sentences makes several documents.
    """
    documents: list[list[str]] = []
    for path in paths:
        text = read_text(path)
        for block in re.split(r"\n\s*\n", text):
            sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(block.split())) if s]
            starts = range(0, len(sentences), SENTENCES_PER_DOCUMENT)
            documents += [sentences[i : i + SENTENCES_PER_DOCUMENT] for i in starts]
    if len(documents) < 2:
        raise UserError(f"the text must hold at least two paragraphs or {SENTENCES_PER_DOCUMENT + 1} sentences")
    return documents


def read_labelled(path: Path) -> Labelled:
    """Lines of a label, a tab and a sentence."""
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        label, tab, sentence = line.partition("\t")
        if not (tab and label.strip() and sentence.strip()):
            raise UserError(f"{path}, line {number}: expected a label, a tab and a sentence, got {line[:60]!r}")
        pairs.append((label.strip(), sentence.strip()))
    return pairs


class Task(NamedTuple):
    """Labelled sentences: a pool to draw training sets from, and two held-out sets."""

    pool: Labelled
    validation: Labelled
    test: Labelled

    @property
    def labels(self) -> list[str]:
        return sorted({label for label, _ in self.pool})


def default_task(largest: int, held_out: int = 600) -> Task:
    """What kind of thing is it? No sentence is in two sets."""
    test = things.labelled(held_out, seed=1)
    validation = things.labelled(held_out, seed=2, exclude=[s for _, s in test])
    return Task(things.labelled(2 * largest, 3, [s for _, s in test + validation]), validation, test)


def task_from_file(path: Path, largest: int, seed: int = 0) -> Task:
    """A fifth of the lines each for validation and test."""
    pairs = list(dict.fromkeys(read_labelled(path)))
    random.Random(seed).shuffle(pairs)
    held = len(pairs) // 5
    task = Task(pairs[2 * held :], pairs[:held], pairs[held : 2 * held])
    if not held or len(task.pool) < largest or len(task.labels) < 2:
        raise UserError(
            f"{path} holds {len(pairs)} different lines with {len(task.labels)} labels; fine-tuning on {largest} needs "
            f"at least {largest * 5 // 3 + 5} and two labels"
        )
    return task


def draw(task: Task, size: int, seed: int) -> Labelled:
    """``size`` labelled sentences of the pool, every label as often as any other, as far as there are enough."""
    rng = random.Random(f"draw {seed}")
    pools = {label: [p for p in task.pool if p[0] == label] for label in task.labels}
    for pool in pools.values():
        rng.shuffle(pool)
    turns = [pool[i] for i in range(max(map(len, pools.values()))) for pool in pools.values() if i < len(pool)]
    return turns[:size]


class Example(NamedTuple):
    """A sequence to pre-train on: token ids, the segment of each, and whether the second sentence is the next one."""

    tokens: list[int]
    segments: list[int]
    is_next: bool


def masked_examples(documents: list[list[str]], tokenizer: Tokenizer, max_length: int, seed: int) -> list[Example]:
    """Sentence pairs, ``[CLS] a [SEP] b [SEP]``."""
    encoded = [tokenizer.encode(sentences) for sentences in documents]
    room = (max_length - 3) // 2
    examples = []
    for first, second, is_next in next_sentence_pairs(encoded, random.Random(seed)):
        a, b = [CLS, *first[:room], SEP], [*second[:room], SEP]
        examples.append(Example(a + b, [0] * len(a) + [1] * len(b), is_next))
    if not examples:
        raise UserError("no document of the text has two sentences: next-sentence prediction needs some")
    return examples


def causal_examples(documents: list[list[str]], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Whole documents, ``[BOS] … [EOS]``, cut into pieces of ``max_length``."""
    examples = []
    for ids in tokenizer.encode([" ".join(sentences) for sentences in documents]):
        tokens = [BOS, *ids, EOS]
        for start in range(0, len(tokens) - 1, max_length - 1):  # pieces overlap by a token: each is predicted once
            piece = tokens[start : start + max_length]
            examples.append(Example(piece, [0] * len(piece), False))
    return examples


def collate(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens (batch, seq)``, ``segments (batch, seq)``, ``is_next (batch,)``."""
    tokens = pad([e.tokens for e in examples], PAD)
    segments = pad([e.segments for e in examples], 0)
    is_next = torch.tensor([int(e.is_next) for e in examples])
    return tokens.to(device), segments.to(device), is_next.to(device)


def sentences_to_tokens(sentences: Sequence[str], tokenizer: Tokenizer, causal: bool, max_length: int) -> Tensor:
    """Sentences as a classifier reads them, framed as in pre-training: ``(batch, seq)``."""
    start, end = (BOS, EOS) if causal else (CLS, SEP)
    return pad([[start, *ids[: max_length - 2], end] for ids in tokenizer.encode(sentences)], PAD)
