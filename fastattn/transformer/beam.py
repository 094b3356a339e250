"""Beam search: the likeliest whole sequences, as far as a fixed number of hypotheses can find them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.transformer.continuation import Continuation, Model, Request, dropout_off


class Beams(NamedTuple):
    """The best continuations of each prompt, best first.

    Attributes:
        tokens: ``(batch, num_return, n)``, the new tokens alone; after the end a row holds ``config.padding_id``
            (``eos_id`` where that is None).
        scores: ``(batch, num_return)`` float64: log-probability over the length penalty. -inf where the search has
            no hypothesis left to give, as when the vocabulary is smaller than ``num_return``.
    """

    tokens: Tensor
    scores: Tensor


def length_penalty_of(length: int, alpha: float) -> float:
    """``((5 + length) / 6) ^ alpha``, by which a log-probability is divided (arXiv 1609.08144, 7)."""
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def generate_beam(
    model: Model,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    early_stopping: bool = True,
    num_return: int = 1,
    src: Tensor | None = None,
    eos_id: int | None = None,
    padding: Tensor | None = None,
    src_padding: Tensor | None = None,
    use_cache: bool = True,
) -> Beams:
    """Continue each prompt by the sequences that score highest among ``num_beams`` hypotheses kept at every step.

    A hypothesis that reaches ``eos_id`` or ``max_new_tokens`` is finished and leaves its place empty; a prompt is done
    when no place is filled. One beam is therefore :func:`generate_greedy`, whatever the penalty.

    Args:
        num_beams: hypotheses per prompt, at least 1. Default 4.
        length_penalty: the exponent ``alpha`` of :func:`length_penalty_of`; 0: none, larger favours longer sequences.
            Default 0.6, as in arXiv 1706.03762, 6.1.
        early_stopping: leave a prompt once its ``num_return`` best finished hypotheses score at least what any other
            could still reach. It saves time and never changes the result. Default True.
        num_return: how many of the best to return, at most ``num_beams``. Default 1.

    The other arguments and the errors are those of :func:`generate_greedy`.
    """
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return must be in [1, num_beams={num_beams}], got {num_return}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    request = Request(model, prompt, max_new_tokens, src, eos_id, padding, src_padding, use_cache)
    with dropout_off(model):
        return _Search(request, num_beams, length_penalty, num_return, early_stopping).run()


class _Search:
    """The state of a beam search. B prompts, K beams, V tokens; log-probabilities are float64, so that adding them up
    makes no ties."""

    def __init__(self, request: Request, num_beams: int, alpha: float, num_return: int, early_stopping: bool) -> None:
        self.request, self.alpha = request, alpha
        self.num_beams, self.num_return, self.early_stopping = num_beams, num_return, early_stopping
        self.continuation = Continuation(request)
        prompt = request.prompt
        self.batch, self.device = len(prompt), prompt.device
        width, most = num_beams, request.max_new_tokens
        self.live = torch.zeros(self.batch, 1, dtype=torch.float64, device=self.device)  # (B, 1), then (B, K)
        self.tokens = prompt.new_empty(self.batch, 1, 0)  # (B, 1 or K, steps so far)
        self.scores = self.live.new_full((self.batch, width), -math.inf)  # finished ones, best first
        self.finished = prompt.new_full((self.batch, width, most), request.filler)
        self.lengths = prompt.new_zeros((self.batch, width), dtype=torch.int64)

    def run(self) -> Beams:
        steps = self.request.max_new_tokens if self.batch else 0
        if not self.request.max_new_tokens:
            self.scores[:, 0] = 0.0
        for step in range(1, steps + 1):
            rows, token = self._extend(step)
            if not bool(self.live.isfinite().any()):
                break
            self.continuation.reorder(rows, same_memory=step > 1)
            self.continuation.append(token)
        tokens = self.finished[:, : self.num_return]
        longest = int(self.lengths[:, : self.num_return].max()) if self.batch else 0
        return Beams(tokens[:, :, :longest], self.scores[:, : self.num_return])

    def _extend(self, step: int) -> tuple[Tensor, Tensor]:
        """Take the best extensions of the live hypotheses; which row each continues, and by which token: ``(B·K,)``."""
        width = self.live.shape[1]
        logp = self.continuation.logits().double().log_softmax(-1).unflatten(0, (self.batch, width))
        total = (self.live[:, :, None] + logp).flatten(1)  # (B, width · V)
        live, index = total.topk(min(self.num_beams, total.shape[1]), dim=1)
        if missing := self.num_beams - live.shape[1]:
            live = torch.nn.functional.pad(live, (0, missing), value=-math.inf)
            index = torch.nn.functional.pad(index, (0, missing))
        # A finished hypothesis keeps its place: only as many candidates go on as there are places left.
        places = self.num_beams - self.scores.isfinite().sum(1, keepdim=True)
        live = live.masked_fill(torch.arange(self.num_beams, device=self.device) >= places, -math.inf)
        beam, token = index // logp.shape[-1], index % logp.shape[-1]
        self.tokens = self.tokens.gather(1, beam[:, :, None].expand(-1, -1, self.tokens.shape[2]))
        self.tokens = torch.cat((self.tokens, token[:, :, None].to(self.tokens.dtype)), dim=2)
        self.live = self._finish(live, token, step)
        first_row = torch.arange(self.batch, device=self.device)[:, None] * width
        return (first_row + beam).flatten(), token.flatten()

    def _finish(self, live: Tensor, token: Tensor, step: int) -> Tensor:
        """Move what has ended from the live hypotheses to the finished ones; the live scores that remain."""
        most = self.request.max_new_tokens
        ended = live.isfinite()
        if step < most:
            ended = ended & (token == self.request.eos_id) if self.request.eos_id is not None else ended & False
        scores = live.masked_fill(~ended, -math.inf) / length_penalty_of(step, self.alpha)
        sequences = torch.full_like(self.finished, self.request.filler)
        sequences[:, :, :step] = self.tokens
        self.scores, order = torch.cat((self.scores, scores), 1).topk(self.num_beams, dim=1)
        lengths = torch.cat((self.lengths, torch.full_like(self.lengths, step) * ended), 1)
        self.lengths = lengths.gather(1, order)
        both = torch.cat((self.finished, sequences), 1)
        self.finished = both.gather(1, order[:, :, None].expand(-1, -1, most))
        live = live.masked_fill(ended, -math.inf)
        if self.early_stopping and step < most:
            # A log-probability only falls: what it is now, over the kindest penalty to come, is out of reach.
            best = live.amax(1)
            reach = torch.maximum(
                best / length_penalty_of(step + 1, self.alpha), best / length_penalty_of(most, self.alpha)
            )
            live = live.masked_fill((self.scores[:, self.num_return - 1] >= reach)[:, None], -math.inf)
        return live
