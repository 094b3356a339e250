"""Generation one token at a time: the most likely one, or one drawn at random. Beams are in ``beam.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastattn.transformer.continuation import Continuation, Model, Request, dropout_off


@torch.no_grad()
def generate_greedy(
    model: Model,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    src: Tensor | None = None,
    eos_id: int | None = None,
    padding: Tensor | None = None,
    src_padding: Tensor | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each prompt by its most likely next token until ``eos_id`` or ``max_new_tokens``.

    Prompts of different length are padded on either side: padding is seen by nobody and counts as no position, so
    a prompt is continued as it would be alone. Dropout is off, in training mode too.

    Args:
        model: a :class:`CausalLM`, or a :class:`Seq2SeqTransformer` together with ``src``.
        prompt: integers ``(batch, seq)``, at least one token each; for a sequence-to-sequence model what the target
            starts with, such as a column of begin-of-sequence tokens.
        max_new_tokens: at least 0.
        src: ``(batch, seq_src)``, the source sequences of a sequence-to-sequence model.
        eos_id: the token that ends a sequence; it is part of the result. Default None: none does.
        padding: bool, of the shape of ``prompt``, True = padding. Default: where the token is ``config.padding_id``.
        src_padding: likewise for ``src``.
        use_cache: keep keys and values of past positions instead of computing them again at every step. The tokens
            are the same, ties within rounding apart.

    Returns:
        The new tokens alone, ``(batch, n)`` with ``n <= max_new_tokens``: as many as the longest continuation has.
        After its ``eos_id`` a row holds ``config.padding_id`` (``eos_id`` where that is None).

    Raises:
        TypeError: the model is of another kind; ``src`` is missing, or given to a :class:`CausalLM`.
        ValueError: shapes or types of the tokens; a prompt without a token; ``prompt`` and ``max_new_tokens`` together
            longer than ``config.max_length``.
        IndexError: a token id outside the vocabulary.
    """
    request = Request(model, prompt, max_new_tokens, src, eos_id, padding, src_padding, use_cache)
    return _continue(request, lambda logits: logits.argmax(-1))


@torch.no_grad()
def generate_sample(
    model: Model,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    src: Tensor | None = None,
    eos_id: int | None = None,
    padding: Tensor | None = None,
    src_padding: Tensor | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each prompt by tokens drawn from the model's distribution, narrowed by :func:`filter_logits`.

    Args:
        temperature: logits are divided by it, above 0; towards 0 the draw becomes greedy. Default 1.
        top_k: only the ``top_k`` most likely tokens are drawn. Default None: all.
        top_p: only the fewest most likely tokens whose probabilities add up to ``top_p`` are drawn, in (0, 1]
            (nucleus sampling, arXiv 1904.09751). Default None: all. It applies to what ``top_k`` left.
        generator: of the random draws, on the device of ``prompt``.

    The other arguments, the result and the errors are those of :func:`generate_greedy`.
    """
    check_filter(temperature, top_k, top_p)
    request = Request(model, prompt, max_new_tokens, src, eos_id, padding, src_padding, use_cache)
    narrow = partial(filter_logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial(narrow(logits).softmax(-1), 1, generator=generator)[:, 0]

    return _continue(request, draw)


def check_filter(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ``ValueError`` on a temperature, ``top_k`` or ``top_p`` out of its range."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}; generate_greedy needs none")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits ``(..., vocab_size)`` in float32 at least, divided by ``temperature``; -inf for tokens not to be drawn.

    Of equally likely tokens at the edge, exactly as many are kept as ``top_k`` or ``top_p`` calls for.
    """
    check_filter(temperature, top_k, top_p)
    logits = (logits if logits.dtype is torch.float64 else logits.float()) / temperature
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        dropped[..., top_k:] = True
    if top_p is not None:
        probability = ordered.masked_fill(dropped, -math.inf).softmax(-1)
        before = probability.cumsum(-1) - probability  # of all that is more likely
        beyond = before >= top_p
        beyond[..., 0] = False
        dropped |= beyond
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def _continue(request: Request, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The new tokens, each what ``choose`` makes of the logits ``(batch, vocab_size)``."""
    prompt, eos_id = request.prompt, request.eos_id
    with dropout_off(request.model):
        continuation = Continuation(request)
        finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        new = prompt[:, :0]
        for _ in range(request.max_new_tokens if len(prompt) else 0):
            token = choose(continuation.logits()).to(prompt.dtype)
            if eos_id is not None:
                token = torch.where(finished, request.filler, token)
                finished = finished | (token == eos_id)
            new = torch.cat((new, token[:, None]), dim=1)
            if eos_id is not None and bool(finished.all()):
                break
            continuation.append(token)
        return new
