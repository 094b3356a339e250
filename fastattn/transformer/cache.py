"""What decoding keeps between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kv_cache import KVCache


class DecodingState:
    """All that decoding keeps between steps: a cache per layer, and which of the cached positions are padding.

    Args:
        num_layers: layers of the decoding stack.
        max_length: positions, padding included, that the self-attention caches have room for.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.caches = [KVCache(max_length) for _ in range(num_layers)]
        self.memory_caches = [KVCache() for _ in range(num_layers)]
        self.padding: Tensor | None = None
        self.length = 0

    def advance(self, tokens: Tensor, padding: Tensor | None) -> Tensor | None:
        """Take in the padding mask ``(batch, new)`` of new ``tokens``; the mask ``(batch, length)`` of all so far.

        Returns None as long as there has been no padding.
        """
        new = tokens.shape[1]
        if self.padding is not None or padding is not None:
            parts = (self.padding, self.length), (padding, new)
            filled = [tokens.new_zeros((len(tokens), n), dtype=torch.bool) if p is None else p for p, n in parts]
            self.padding = torch.cat(filled, dim=1)
        self.length += new
        return self.padding

    def reorder(self, rows: Tensor, same_memory: bool = False) -> None:
        """Make entry ``i`` of the batch what ``rows[i]`` was, in every cache and in the padding.

        Args:
            rows: integers ``(new batch,)``.
            same_memory: each entry keeps its memory: those caches stay as they are.
        """
        for cache in self.caches if same_memory else [*self.caches, *self.memory_caches]:
            if cache.key is not None:
                cache.reorder(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]
