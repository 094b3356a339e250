"""Both ends of a token model: from token ids to vectors, and from vectors to a score for each token."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.transformer.config import TransformerConfig
from fastattn.transformer.positional import SinusoidalPositionalEncoding


class TokenEmbedding(nn.Module):
    """Token ids ``(batch, seq)`` to ``(batch, seq, d_model)``: learned embedding · sqrt(d_model) + positions, dropout.

    Weights start from N(0, 1/d_model), so that the scaled embedding has unit variance and, as a tied head, logits do.
    Scaling and the dropout of the sum are those of arXiv 1706.03762, 3.4 and 5.4; with ``config.num_segments`` the
    vector of each token's segment is added and scaled like the token's own (arXiv 1810.04805, 3).
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.vocab_size, self.padding_id, self.max_length = vocab_size, config.padding_id, config.max_length
        self.num_segments = config.num_segments
        self.scale = math.sqrt(config.d_model)
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=1 / self.scale)
        if self.num_segments:
            self.segment_weight = nn.Parameter(
                torch.empty(self.num_segments, config.d_model, device=device, dtype=dtype)
            )
            nn.init.normal_(self.segment_weight, std=1 / self.scale)
        self.positions = SinusoidalPositionalEncoding(config.d_model, config.dropout)

    def padding_mask(self, tokens: Tensor) -> Tensor | None:
        """``(batch, seq)``, True where a token is ``padding_id``; None if the configuration names none."""
        return None if self.padding_id is None else tokens == self.padding_id

    def forward(
        self, tokens: Tensor, padding: Tensor | None = None, start: int = 0, segments: Tensor | None = None
    ) -> Tensor:
        """Embed ``tokens``, which stand at ``start`` and after.

        Args:
            tokens: integers ``(batch, seq)``.
            padding: ``(batch, start + seq)``, True = padding. Positions count what is not padding, so that a sequence
                gets the same ones wherever its padding stands.
            start: number of positions before ``tokens``.
            segments: integers ``(batch, seq)`` in [0, num_segments). Default: all 0.

        Raises:
            ValueError: shapes or types; longer than ``max_length``; ``segments`` without ``num_segments``.
            IndexError: a token or segment out of range (found here on the CPU only).
        """
        self.check(tokens, start)
        seq = tokens.shape[1]
        if padding is None:
            positions = torch.arange(start, start + seq, device=tokens.device)
        else:
            positions = ((~padding).cumsum(1) - 1).clamp(min=0)[:, start:]
        x = F.embedding(tokens, self.weight)
        if self.num_segments:
            x = x + (self.segment_weight[0] if segments is None else self._segment(segments, tokens))
        elif segments is not None:
            raise ValueError("segments were given, but config.num_segments is 0")
        return self.positions(x * self.scale, positions)

    def _segment(self, segments: Tensor, tokens: Tensor) -> Tensor:
        if segments.shape != tokens.shape or segments.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"segments must be int64 or int32 of the tokens' shape {tuple(tokens.shape)}, "
                f"got {segments.dtype} of {tuple(segments.shape)}"
            )
        if segments.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range("segments", segments, self.num_segments)
        return F.embedding(segments, self.segment_weight)

    def check(self, tokens: Tensor, start: int = 0) -> None:
        """Raise on tokens that are no integers ``(batch, seq)``, too long, or (on the CPU) outside the vocabulary."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens must be int64 or int32 of shape (batch, seq), got {tokens.dtype} of {tuple(tokens.shape)}"
            )
        if self.max_length is not None and start + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"a sequence of {start + tokens.shape[1]} tokens is longer than max_length={self.max_length}"
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_range(tokens)

    def check_range(self, tokens: Tensor) -> None:
        """Raise on token ids outside the vocabulary (reads the tokens: a synchronisation on a GPU)."""
        _check_range("token ids", tokens, self.vocab_size)


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise IndexError(f"{name} must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}")


class VocabularyHead(nn.Module):
    """``(..., d_model)`` to logits ``(..., vocab_size)``. Tied, its weight is the embedding's."""

    def __init__(self, config: TransformerConfig, embedding: TokenEmbedding) -> None:
        super().__init__()
        weight = embedding.weight
        if not config.tie_head:
            weight = nn.Parameter(torch.empty_like(weight))
            nn.init.xavier_uniform_(weight)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
