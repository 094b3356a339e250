"""The stack of decoder layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastattn.kv_cache import KVCache
from fastattn.transformer.encoder import check_caches, clone_layers


class TransformerDecoder(nn.Module):
    """``torch.nn.TransformerDecoder``: ``num_layers`` copies of ``decoder_layer``, then ``norm`` if there is one."""

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = clone_layers(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        caches: Sequence[KVCache] | None = None,
        memory_caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """The stack's output, of the shape of ``tgt``; arguments as in :meth:`TransformerDecoderLayer.forward`.

        Args:
            tgt_is_causal: no target position sees a later one. None (default) is False: a causal ``tgt_mask`` is
                applied as any other mask is; ``tgt_is_causal=True`` without a mask is the faster way.
            caches: one :class:`KVCache` per layer for the target, for incremental decoding.
            memory_caches: one :class:`KVCache` per layer for the memory, filled by the first call.
        """
        x = tgt
        if caches is not None:
            check_caches("caches", caches, self.layers)
        if memory_caches is not None:
            check_caches("memory_caches", memory_caches, self.layers)
        for i, layer in enumerate(self.layers):
            extra = {} if caches is None else {"cache": caches[i]}
            if memory_caches is not None:
                extra["memory_cache"] = memory_caches[i]
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
                **extra,
            )
        return x if self.norm is None else self.norm(x)
