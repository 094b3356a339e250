"""The stack of encoder layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from fastattn.kv_cache import KVCache


def clone_layers(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """``num_layers`` deep copies of ``layer``, each with its own parameters (of equal initial values)."""
    if num_layers < 0:
        raise ValueError(f"num_layers must not be negative, got {num_layers}")
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])


def check_caches(name: str, caches: Sequence[KVCache], layers: nn.ModuleList) -> None:
    """Raise unless there is one cache per layer."""
    if len(caches) != len(layers):
        raise ValueError(f"{name} must hold one KVCache per layer: {len(layers)} layers, {len(caches)} caches")


class TransformerEncoder(nn.Module):
    """``torch.nn.TransformerEncoder``: ``num_layers`` copies of ``encoder_layer``, then ``norm`` if there is one.

    With ``is_causal=True`` it is the stack of a decoder-only model. ``enable_nested_tensor`` and ``mask_check`` are
    torch's and change nothing here: padding is never packed away, so the output always has the shape of the input,
    and its padded positions hold finite values of no meaning (torch's inference path makes them 0).
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = clone_layers(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """The stack's output, of the shape of ``src``; arguments as in :meth:`TransformerEncoderLayer.forward`.

        Args:
            is_causal: no position sees a later one. None (default) is False: a causal ``mask`` is applied as any
                other mask is, without torch's attempt to recognise it; ``is_causal=True`` without one is faster.
            caches: one :class:`KVCache` per layer, for incremental decoding.
        """
        x = src
        if caches is not None:
            check_caches("caches", caches, self.layers)
        for i, layer in enumerate(self.layers):
            extra = {} if caches is None else {"cache": caches[i]}
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal), **extra)
        return x if self.norm is None else self.norm(x)
