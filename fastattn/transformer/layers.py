"""One layer of the encoder and of the decoder: attention, feed-forward, residual and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.kv_cache import KVCache
from fastattn.modules import MultiHeadAttention

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu}


def get_activation(activation: str | Activation) -> Activation:
    """The function that ``"relu"`` or ``"gelu"`` names; a callable is returned as it is."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'relu', 'gelu' or a callable, got {activation!r}")
    return ACTIVATIONS[activation]


class TransformerLayer(nn.Module):
    """What the encoder and the decoder layer share: self-attention, feed-forward, residuals and norms.

    Submodules carry torch's names and are registered in torch's order, so state dicts (and the parameter order an
    optimiser sees) are those of ``torch.nn.TransformerEncoderLayer`` and ``torch.nn.TransformerDecoderLayer``.
    """

    has_cross_attention: ClassVar[bool]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {} if num_kv_heads is None else {"num_kv_heads": num_kv_heads}
        attention: dict[str, Any] = {"dropout": dropout, "bias": bias, "batch_first": batch_first, **heads, **factory}
        sublayers = 3 if self.has_cross_attention else 2

        self.self_attn = MultiHeadAttention(d_model, nhead, **attention)
        if self.has_cross_attention:
            self.multihead_attn = MultiHeadAttention(d_model, nhead, **attention)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = norm_first
        for i in range(1, sublayers + 1):
            self.add_module(f"norm{i}", nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory))
        for i in range(1, sublayers + 1):
            self.add_module(f"dropout{i}", nn.Dropout(dropout))
        self.activation = get_activation(activation)

    def _residual(self, i: int, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Sublayer ``i`` around its residual: ``x + f(norm(x))`` (pre-norm) or ``norm(x + f(x))`` (post-norm)."""
        norm, dropout = self.get_submodule(f"norm{i}"), self.get_submodule(f"dropout{i}")
        if self.norm_first:
            return x + dropout(sublayer(norm(x)))
        return norm(x + dropout(sublayer(x)))

    def _self_attention(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        if cache is not None and (attn_mask is not None or not is_causal):
            raise ValueError("a cache serves causal self-attention: pass is_causal=True and no attention mask")
        out, _ = self.self_attn(
            x, x, x, key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=is_causal,
            cache=cache,
        )  # fmt: skip
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(TransformerLayer):
    """``torch.nn.TransformerEncoderLayer`` on :class:`fastattn.MultiHeadAttention`: same arguments, same state dict.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, bias, device, dtype: as in torch.
        activation: ``"relu"`` (default), ``"gelu"`` or a callable.
        batch_first: ``(batch, seq, d_model)`` instead of torch's default ``(seq, batch, d_model)``.
        norm_first: pre-norm, ``x + f(norm(x))``, instead of post-norm, ``norm(x + f(x))``.
        num_kv_heads: key and value heads, a divisor of ``nhead`` (grouped-query attention). Default ``nhead``.
    """

    has_cross_attention = False

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The layer's output, of the shape of ``src``.

        Args:
            src: ``(batch, seq, d_model)``, ``(seq, batch, d_model)`` unless ``batch_first``, or ``(seq, d_model)``.
            src_mask: ``(seq, seq)`` or ``(batch * nhead, seq, seq)``; bool (True = masked) or float (added).
            src_key_padding_mask: ``(batch, seq)``, bool (True = padding) or float (added).
            is_causal: no position sees a later one. Needs no ``src_mask``; beside one it is only a hint.
            cache: keys and values of the positions before ``src``; those of ``src`` are appended. The padding mask
                then covers the cached positions too.
        """
        x = self._residual(1, src, lambda y: self._self_attention(y, src_mask, src_key_padding_mask, is_causal, cache))
        return self._residual(2, x, self._feed_forward)


class TransformerDecoderLayer(TransformerLayer):
    """``torch.nn.TransformerDecoderLayer`` on :class:`fastattn.MultiHeadAttention`: same arguments, same state dict.

    The arguments are those of :class:`TransformerEncoderLayer`.
    """

    has_cross_attention = True

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        memory_cache: KVCache | None = None,
    ) -> Tensor:
        """The layer's output, of the shape of ``tgt``.

        Masks are as in :meth:`TransformerEncoderLayer.forward`; ``memory_mask`` is ``(seq_tgt, seq_memory)`` or
        ``(batch * nhead, seq_tgt, seq_memory)``, ``memory_key_padding_mask`` is ``(batch, seq_memory)``.

        Args:
            tgt: the sequence to decode, laid out like the encoder layer's ``src``.
            memory: the encoder's output, in the same layout, of its own length.
            cache: keys and values of the target positions before ``tgt``; those of ``tgt`` are appended.
            memory_cache: keys and values of ``memory``; computed into it by the first call, read by every later one.
        """
        x = self._residual(
            1, tgt, lambda y: self._self_attention(y, tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache)
        )
        x = self._residual(
            2,
            x,
            lambda y: self._cross_attention(
                y, memory, memory_mask, memory_key_padding_mask, memory_is_causal, memory_cache
            ),
        )
        return self._residual(3, x, self._feed_forward)

    def _cross_attention(
        self, x: Tensor, memory: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        if cache is not None and (attn_mask is not None or is_causal):
            raise ValueError("a memory cache serves unmasked cross-attention: pass no memory mask")
        projected = cache is not None and cache.key is not None
        keys = None if projected else memory
        out, _ = self.multihead_attn(
            x, keys, keys, key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask,
            is_causal=is_causal, cache=cache,
        )  # fmt: skip
        return out
