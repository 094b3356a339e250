"""Batches of sequences of like length, bounded by their padded number of tokens, in an order that a seed determines."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor


class BatchPlan:
    """Which examples make up which batch, epoch after epoch.

    An epoch is shuffled, sorted by length within pools of ``pool`` examples, cut into batches of at most
    ``max_tokens`` tokens, padding included, and the batches are shuffled again. Everything follows from ``seed`` and
    the epoch, so that a run can be taken up at any batch.

    Args:
        lengths: per example the length of each of its sequences, such as (source, target); all of them are padded.
        max_tokens: of one batch, all its sequences together. A longer example makes a batch of its own.
    """

    def __init__(self, lengths: Sequence[tuple[int, ...]], max_tokens: int, seed: int, pool: int = 20_000) -> None:
        if not lengths:
            raise ValueError("there is no example to make a batch of")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.lengths, self.max_tokens, self.seed, self.pool = lengths, max_tokens, seed, pool

    def fingerprint(self) -> str:
        """The same for the same number of examples of the same lengths in the same order."""
        return hashlib.sha256(array("q", chain.from_iterable(self.lengths)).tobytes()).hexdigest()

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch: every example once."""
        rng = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), self.pool):
            batches += self._cut(sorted(order[start : start + self.pool], key=lambda i: self.lengths[i]))
        rng.shuffle(batches)
        return batches

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        longest: tuple[int, ...] = ()
        for i in order:
            grown = tuple(map(max, longest, self.lengths[i])) if batch else self.lengths[i]
            if batch and sum(grown) * (len(batch) + 1) > self.max_tokens:
                yield batch
                batch, grown = [], self.lengths[i]
            batch.append(i)
            longest = grown
        if batch:
            yield batch

    def batches(self, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """``(epoch, batch)`` without end, from the batch with number ``start`` on."""
        epoch = 0
        while True:
            batches = self.epoch(epoch)
            if start < len(batches):
                for batch in batches[start:]:
                    yield epoch, batch
            start = max(0, start - len(batches))
            epoch += 1


def pad(sequences: Sequence[Sequence[int] | Tensor], padding_id: int) -> Tensor:
    """Sequences of token ids as one int64 tensor ``(batch, longest)``, padded on the right."""
    rows = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding_id)
