"""Greedy generation: one token at a time, each the most likely one, with the keys and values of the past cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastattn.transformer.cache import DecodingState
from fastattn.transformer.heads import CausalLM, Seq2SeqTransformer, TokenEmbedding

Decode = Callable[[Tensor, Tensor | None, DecodingState | None], Tensor]


@torch.no_grad()
def generate_greedy(
    model: CausalLM | Seq2SeqTransformer,
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
    embedding, num_layers = _decoding_side(model, src)
    padding = _check_prompt(embedding, prompt, padding, max_new_tokens, "prompt")
    if eos_id is not None and not 0 <= eos_id < embedding.vocab_size:
        raise IndexError(f"eos_id must be in [0, {embedding.vocab_size}), got {eos_id}")
    with _dropout_off(model):
        decode: Decode
        if isinstance(model, Seq2SeqTransformer):
            assert src is not None
            if len(src) != len(prompt):
                raise ValueError(f"prompt and src must have the same batch, got {len(prompt)} and {len(src)}")
            src_padding = _check_prompt(model.src_embedding, src, src_padding, 0, "src")
            memory = model.encode(src, src_padding)
            decode = partial(model.decode, memory=memory, memory_padding=src_padding)
        else:
            decode = model.decode
        state = DecodingState(num_layers, prompt.shape[1] + max_new_tokens) if use_cache else None
        return _continue(decode, model.head, prompt, padding, state, max_new_tokens, eos_id, model.config.padding_id)


def _continue(
    decode: Decode, head: nn.Module, prompt: Tensor, padding: Tensor | None, state: DecodingState | None,
    max_new_tokens: int, eos_id: int | None, padding_id: int | None,
) -> Tensor:  # fmt: skip
    """The loop of :func:`generate_greedy`, on arguments that have been checked."""
    rows = torch.arange(len(prompt), device=prompt.device)
    last = _last_token(prompt, padding)
    filler = eos_id if padding_id is None else padding_id
    finished = torch.zeros_like(rows, dtype=torch.bool)
    tokens, new = prompt, prompt[:, :0]
    for _ in range(max_new_tokens if len(prompt) else 0):
        hidden = decode(tokens, padding, state)
        token = head(hidden[rows, last]).argmax(-1).to(prompt.dtype)
        if eos_id is not None and filler is not None:
            token = torch.where(finished, filler, token)
            finished = finished | (token == eos_id)
        new = torch.cat((new, token[:, None]), dim=1)
        if eos_id is not None and bool(finished.all()):
            break
        if state is not None:  # the state holds all that came before
            tokens, padding = token[:, None], None
        else:
            tokens = torch.cat((tokens, token[:, None]), dim=1)
            if padding is not None:
                padding = torch.cat((padding, torch.zeros_like(padding[:, :1])), dim=1)
        last = torch.full_like(rows, tokens.shape[1] - 1)
    return new


def _last_token(prompt: Tensor, padding: Tensor | None) -> Tensor:
    """``(batch,)``: the index of each prompt's last token that is not padding."""
    index = torch.arange(prompt.shape[1], device=prompt.device)
    if padding is None:
        return index[-1:].expand(len(prompt))
    return torch.where(padding, -1, index).amax(dim=1)


def _decoding_side(model: nn.Module, src: Tensor | None) -> tuple[TokenEmbedding, int]:
    """The embedding of the tokens to generate and the number of layers that decode them."""
    if isinstance(model, Seq2SeqTransformer):
        if src is None:
            raise TypeError("a Seq2SeqTransformer generates from a source: pass src")
        return model.tgt_embedding, model.config.num_decoder_layers
    if isinstance(model, CausalLM):
        if src is not None:
            raise TypeError("a CausalLM has no source: src must be None")
        return model.embedding, model.config.num_decoder_layers
    raise TypeError(f"model must be a CausalLM or a Seq2SeqTransformer, got {type(model).__name__}")


def _check_prompt(
    embedding: TokenEmbedding, tokens: Tensor, padding: Tensor | None, new_tokens: int, name: str
) -> Tensor | None:
    """Validate tokens to start from; their padding mask, or None if there is no padding."""
    if new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {new_tokens}")
    embedding.check(tokens)
    embedding.check_range(tokens)
    length, limit = tokens.shape[1] + new_tokens, embedding.max_length
    if limit is not None and length > limit:
        raise ValueError(
            f"{name} of {tokens.shape[1]} tokens and {new_tokens} new ones make {length}, more than max_length={limit}"
        )
    if padding is None:
        padding = embedding.padding_mask(tokens)
    elif padding.dtype is not torch.bool or padding.shape != tokens.shape:
        raise ValueError(
            f"the padding of {name} must be bool of shape {tuple(tokens.shape)}, "
            f"got {padding.dtype} of shape {tuple(padding.shape)}"
        )
    if tokens.shape[1] == 0 or (padding is not None and bool(padding.all(dim=1).any())):
        raise ValueError(f"every {name} must hold at least one token that is not padding")
    return padding if padding is not None and bool(padding.any()) else None


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
