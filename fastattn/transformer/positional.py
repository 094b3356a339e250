"""Where a token stands: the sinusoidal positional encoding of "Attention Is All You Need" (arXiv 1706.03762, 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoidal_encoding(positions: Tensor, d_model: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The encoding ``(*positions.shape, d_model)`` of integer ``positions`` of any shape.

    ``PE(pos, 2i) = sin(pos / 10000^(2i/d))`` and ``PE(pos, 2i+1) = cos(pos / 10000^(2i/d))``; an odd ``d_model`` ends
    on a sine. The angles are computed in float64, since float32 has lost them by position 10^5, and rounded once.
    """
    exponents = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device) / d_model
    angles = positions.to(torch.float64).unsqueeze(-1) * torch.pow(10000.0, -exponents)
    interleaved = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
    return interleaved[..., :d_model].to(dtype)


class SinusoidalPositionalEncoding(nn.Module):
    """Adds the sinusoidal encoding of the positions to a sequence. Any length, any ``d_model``; no parameters.

    Args:
        d_model: size of the last dimension, at least 1; may be odd.
        dropout: applied to the sum, as the paper does. Default 0.
        batch_first: the input is ``(batch, seq, d_model)`` rather than ``(seq, batch, d_model)``. Default True.
    """

    def __init__(self, d_model: int, dropout: float = 0.0, batch_first: bool = True) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        self.d_model = d_model
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """``x`` plus the encoding, in the type of ``x``.

        Args:
            x: ``(batch, seq, d_model)``, ``(seq, batch, d_model)`` unless ``batch_first``, or ``(seq, d_model)``.
            positions: integers, ``(seq,)`` or of the shape of ``x`` without its last dimension.
                Default: 0, 1, 2, ... along the sequence.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(f"expected (seq, {self.d_model}) or batched sequences of it, got shape {tuple(x.shape)}")
        seq_first = x.dim() == 3 and not self.batch_first
        if positions is None:
            positions = torch.arange(x.shape[0 if seq_first else -2], device=x.device)
        encoding = sinusoidal_encoding(positions, self.d_model, x.dtype)
        if seq_first and positions.dim() == 1:
            encoding = encoding.unsqueeze(1)
        return self.dropout(x + encoding)

    def extra_repr(self) -> str:
        return f"{self.d_model}, batch_first={self.batch_first}"
