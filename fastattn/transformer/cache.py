"""Keys and values kept between the steps of incremental decoding, and attention that reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.modules import MultiHeadAttention


class KVCache:
    """Keys and values of one attention layer, appended in place. For inference: gradients do not pass through it.

    Room for ``max_length`` positions is allocated by the first :meth:`append`, in the heads, type and device of what
    it is given. An empty cache of ``max_length=None`` takes exactly the first tensors it is given, without a copy.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    @property
    def key(self) -> Tensor:
        """``(batch, heads_k, length, head_dim)``: a view of the keys so far."""
        if self._key is None:
            raise RuntimeError("the cache is empty")
        return self._key[:, :, : self.length]

    @property
    def value(self) -> Tensor:
        """``(batch, heads_k, length, head_dim)``: a view of the values so far."""
        if self._value is None:
            raise RuntimeError("the cache is empty")
        return self._value[:, :, : self.length]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``(batch, heads_k, new, head_dim)`` keys and values; views of all of them, the new ones last.

        Raises:
            ValueError: there is no room, or batch, heads or head_dim differ from what is cached.
            RuntimeError: the tensors carry a gradient, which an in-place cache would lose.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("a KVCache is for inference: call the model under torch.no_grad()")
        if self._key is None or self._value is None:
            if self.max_length is None:
                self._key, self._value, self.length = key, value, key.shape[2]
                return key, value
            batch, heads, _, dim = key.shape
            self._key = key.new_empty(batch, heads, self.max_length, dim)
            self._value = torch.empty_like(self._key)
        start, end = self.length, self.length + key.shape[2]
        if end > self._key.shape[2]:
            raise ValueError(f"the cache has room for {self._key.shape[2]} positions: {start} used, {end - start} new")
        held = self._key[:, :, start:end]
        if key.shape != held.shape or value.shape != held.shape:
            raise ValueError(
                f"the cache holds (batch, heads, *, head_dim) = {(*held.shape[:2], '*', held.shape[3])}; "
                f"got key {tuple(key.shape)}, value {tuple(value.shape)}"
            )
        held.copy_(key)
        self._value[:, :, start:end].copy_(value)
        self.length = end
        return self.key, self.value

    def reorder(self, rows: Tensor) -> None:
        """Make entry ``i`` of the batch what ``rows[i]`` was; ``rows``, integers, may repeat, drop and add entries."""
        if self._key is None or self._value is None:
            raise RuntimeError("the cache is empty")
        for name in ("_key", "_value"):
            held = getattr(self, name)
            new = held.new_empty(len(rows), *held.shape[1:])
            new[:, :, : self.length] = held[rows, :, : self.length]
            setattr(self, name, new)


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
            if cache.length:
                cache.reorder(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]


def attend_to_cache(mha: MultiHeadAttention, x: Tensor, cache: KVCache, key_padding_mask: Tensor | None) -> Tensor:
    """Causal self-attention of new positions ``x`` to themselves and to all that ``cache`` holds before them.

    Args:
        x: ``(batch, new, d_model)``, or ``(new, batch, d_model)`` unless ``mha.batch_first``.
        key_padding_mask: bool ``(batch, cached + new)``, True = padding.
    """
    if x.dim() != 3:
        raise ValueError(f"decoding with a cache takes a batch, (batch, seq, d_model), got shape {tuple(x.shape)}")
    q, k, v = mha._project(x, x, x)
    k, v = cache.append(k, v)
    return _attend(mha, q, k, v, key_padding_mask, causal=True)


def attend_to_memory(
    mha: MultiHeadAttention, x: Tensor, memory: Tensor, cache: KVCache, key_padding_mask: Tensor | None
) -> Tensor:
    """Attention of ``x`` to ``memory``, whose keys and values are computed when ``cache`` is empty, else read from it.

    Args:
        x: ``(batch, new, d_model)``, or ``(new, batch, d_model)`` unless ``mha.batch_first``.
        memory: the encoder's output, in the same layout.
        key_padding_mask: bool ``(batch, seq_memory)``, True = padding.
    """
    if x.dim() != 3:
        raise ValueError(f"decoding with a cache takes a batch, (batch, seq, d_model), got shape {tuple(x.shape)}")
    if cache.length == 0:
        cache.append(*mha._project_key_value(memory, memory))
    return _attend(mha, mha._project_query(x), cache.key, cache.value, key_padding_mask, causal=False)


def _attend(
    mha: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, causal: bool
) -> Tensor:
    mask = None
    if key_padding_mask is not None:
        expected = (k.shape[0], k.shape[2])
        if key_padding_mask.dtype is not torch.bool or key_padding_mask.shape != expected:
            raise ValueError(
                f"with a cache, the key padding mask must be bool of shape (batch, keys) = {expected}, cached keys "
                f"included; got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
            )
        mask = ~key_padding_mask[:, None, None, :]
    dropout_p = float(mha.dropout) if mha.training else 0.0
    out = attention(q, k, v, mask=mask, causal=causal, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return mha._merge(out)
