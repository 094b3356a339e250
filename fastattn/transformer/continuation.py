"""A batch of sequences that a model continues: what every way of generating shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastattn.transformer.cache import DecodingState
from fastattn.transformer.embedding import TokenEmbedding
from fastattn.transformer.heads import CausalLM, Seq2SeqTransformer

Model = CausalLM | Seq2SeqTransformer


@dataclass(frozen=True)
class Request:
    """What is asked of :func:`generate_greedy`, :func:`generate_sample` and :func:`generate_beam` alike.

    The fields are their arguments; :meth:`check` says what is wrong with them.
    """

    model: Model
    prompt: Tensor
    max_new_tokens: int
    src: Tensor | None = None
    eos_id: int | None = None
    padding: Tensor | None = None
    src_padding: Tensor | None = None
    use_cache: bool = True

    @property
    def filler(self) -> int:
        """What stands behind the end of a sequence: padding, or where there is none the end again."""
        padding_id = self.model.config.padding_id
        return (self.eos_id or 0) if padding_id is None else padding_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens that can be generated."""
        return _decoding_side(self.model, self.src).vocab_size

    def check(self) -> tuple[Tensor | None, Tensor | None]:
        """Raise on what cannot be continued; the padding masks of prompt and source, None where there is none."""
        embedding = _decoding_side(self.model, self.src)
        padding = _check_prompt(embedding, self.prompt, self.padding, self.max_new_tokens, "prompt")
        if self.eos_id is not None and not 0 <= self.eos_id < embedding.vocab_size:
            raise IndexError(f"eos_id must be in [0, {embedding.vocab_size}), got {self.eos_id}")
        if self.src is None or not isinstance(self.model, Seq2SeqTransformer):
            return padding, None
        if len(self.src) != len(self.prompt):
            raise ValueError(f"prompt and src must have the same batch, got {len(self.prompt)} and {len(self.src)}")
        return padding, _check_prompt(self.model.src_embedding, self.src, self.src_padding, 0, "src")


class Continuation:
    """The sequences so far, as the model needs them: all of their tokens, or the newest ones and a cache of the others.

    Ask for :meth:`logits` once, then :meth:`append` a token to each row; :meth:`reorder` before it where rows move.
    """

    def __init__(self, request: Request) -> None:
        self.model = request.model
        self.padding, self.memory_padding = request.check()
        self.tokens = request.prompt
        self.last = _last_token(self.tokens, self.padding)
        self.memory: Tensor | None = None
        if isinstance(self.model, Seq2SeqTransformer):
            assert request.src is not None
            self.memory = self.model.encode(request.src, self.memory_padding)
        self.state: DecodingState | None = None
        if request.use_cache:
            length = self.tokens.shape[1] + request.max_new_tokens
            self.state = DecodingState(self.model.config.num_decoder_layers, max(1, length))

    def logits(self) -> Tensor:
        """``(rows, vocab_size)``: scores of the token that comes next in each row."""
        if isinstance(self.model, Seq2SeqTransformer):
            assert self.memory is not None
            hidden = self.model.decode(
                self.tokens, self.padding, self.state, memory=self.memory, memory_padding=self.memory_padding
            )
        else:
            hidden = self.model.decode(self.tokens, self.padding, self.state)
        logits: Tensor = self.model.head(hidden[torch.arange(len(hidden), device=hidden.device), self.last])
        return logits

    def append(self, token: Tensor) -> None:
        """Continue each row by its ``token``, integers ``(rows,)``."""
        token = token[:, None].to(self.tokens.dtype)
        if self.state is not None:  # the state holds all that came before
            self.tokens, self.padding = token, None
        else:
            self.tokens = torch.cat((self.tokens, token), dim=1)
            if self.padding is not None:
                self.padding = torch.cat((self.padding, torch.zeros_like(self.padding[:, :1])), dim=1)
        self.last = torch.full_like(token[:, 0], self.tokens.shape[1] - 1, dtype=torch.int64)

    def reorder(self, rows: Tensor, same_memory: bool = False) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; ``same_memory``: of the same source as row ``i`` is."""
        self.tokens, self.last = self.tokens[rows], self.last[rows]
        self.padding = None if self.padding is None else self.padding[rows]
        if not same_memory:
            self.memory = None if self.memory is None else self.memory[rows]
            self.memory_padding = None if self.memory_padding is None else self.memory_padding[rows]
        if self.state is not None:
            self.state.reorder(rows, same_memory)


def _last_token(prompt: Tensor, padding: Tensor | None) -> Tensor:
    """``(batch,)``: the index of each prompt's last token that is not padding."""
    index = torch.arange(prompt.shape[1], device=prompt.device)
    if padding is None:
        return index[-1:].expand(len(prompt))
    return torch.where(padding, -1, index).amax(dim=1)


def _decoding_side(model: nn.Module, src: Tensor | None) -> TokenEmbedding:
    """The embedding of the tokens to generate."""
    if isinstance(model, Seq2SeqTransformer):
        if src is None:
            raise TypeError("a Seq2SeqTransformer generates from a source: pass src")
        return model.tgt_embedding
    if isinstance(model, CausalLM):
        if src is not None:
            raise TypeError("a CausalLM has no source: src must be None")
        return model.embedding
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
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
