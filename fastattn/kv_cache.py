"""Keys and values that a layer keeps between the steps of decoding, dense or in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.cache import attention_with_kv_cache
from fastattn.validate import check_length


class KVCache:
    """Keys and values of one attention layer, appended in place. For inference: no gradient passes through it.

    Room is made by the first append, for its batch, heads, head dims, type and device.

    Args:
        capacity: keys of a sequence that there is room for. None: what the first append brings, taken as it is, without
            a copy (the keys of a memory, which stay the same).

    Attributes:
        key, value: ``(batch, heads_k, capacity, head_dim)``; None before the first append.
        lengths: keys held: an int as long as all sequences hold as many, or integers ``(batch,)``, which may be
            assigned (where sequences differ, to go back, to start one anew) and changed in place.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and check_length("capacity", capacity) < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.block_table: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.lengths = 0

    @property
    def lengths(self) -> int | Tensor:
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: int | Tensor) -> None:
        self._remember()
        self._lengths = lengths
        # Keys of the longest sequence: an upper bound, for which nobody has to wait for the device. None: not known.
        self._most = None if isinstance(lengths, Tensor) else lengths

    def attend(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append ``key`` and ``value``, if there are any, and attend to all that is held.

        Arguments and result are those of :func:`fastattn.attention_with_kv_cache`; ``causal`` is True by default.

        Raises:
            ValueError: there is no room; or as that function.
        """
        before = self._remember()
        try:
            if key is not None and value is not None:
                self._reserve(key, value)
            if self.key is None or self.value is None:
                raise ValueError("the cache is empty: key and value are needed")
            taken = key is self.key  # a memory, which is not appended to anything
            new, *appended = (0, None, None) if key is None or taken else (key.shape[2], key, value)
            options = {"causal": True, "block_table": self.block_table, **options}
            result = attention_with_kv_cache(
                query, self.key, self.value, *appended, cache_seqlens=self.lengths, **options
            )
        except Exception:
            vars(self).update(before)
            raise
        self._lengths = self._lengths + new
        self._most = None if self._most is None else self._most + new
        return result

    def _remember(self) -> dict[str, Any]:
        """The attributes before a change, which ``fastattn.explain`` takes back when it is done."""
        before = {name: x[:] if isinstance(x, list) else x for name, x in vars(self).items()}
        if not torch.compiler.is_compiling() and (undo := ops.undo.get()) is not None:
            undo.append((self, before))
        return before

    def _reserve(self, key: Tensor, value: Tensor) -> None:
        """Make room for new keys in every sequence, or raise ValueError."""
        new = key.shape[2]
        if self.capacity is None:
            if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
                raise ValueError("a cache has no gradient: call the model under torch.no_grad()")
            self.key, self.value, self.capacity, self.lengths = key, value, new, new
            return
        if self._most is None or self._most + new > self.capacity:
            self._most = int(self._lengths.max()) if isinstance(self._lengths, Tensor) else self._lengths
        if self._most + new > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} keys: {self._most} used, {new} new")
        if self.key is None:
            self.key, self.value = (_room(x, x.shape[0], self.capacity) for x in (key, value))

    def reorder(self, rows: Tensor) -> None:
        """Make entry ``i`` of the batch what ``rows[i]`` was; ``rows``, integers, may repeat, drop and add entries."""
        if self.key is None or self.value is None:
            raise ValueError("the cache is empty: there is nothing to reorder")
        self._remember()
        used = self.key.shape[2] if self._most is None else self._most
        for name in ("key", "value"):
            held = getattr(self, name)
            moved = _room(held, len(rows), held.shape[2])
            moved[:, :, :used] = held[rows, :, :used]
            setattr(self, name, moved)
        if isinstance(self._lengths, Tensor):
            self._lengths = self._lengths[rows]


class PagedKVCache(KVCache):
    """The same in pages that sequences take from a common store as they grow, and give back when they end.

    Args:
        num_pages: pages in the store.
        page_size: keys to a page.
        max_pages: of one sequence. Default: ``num_pages``.

    Attributes:
        key, value: ``(num_pages, heads_k, page_size, head_dim)``; None before the first append.
        block_table: int32 ``(batch, max_pages)``; what stands behind the pages in use has no meaning. None before the
            first append.
        lengths: int32 ``(batch,)``: keys held; 0 before the first append.
    """

    def __init__(self, num_pages: int, page_size: int, max_pages: int | None = None) -> None:
        self.num_pages, self.page_size = check_length("num_pages", num_pages), check_length("page_size", page_size)
        self.max_pages = num_pages if max_pages is None else check_length("max_pages", max_pages)
        super().__init__(self.max_pages * page_size)
        self._free = list(range(num_pages))[::-1]
        self._held: list[list[int]] = []
        self._used: list[int] = []

    def _reserve(self, key: Tensor, value: Tensor) -> None:
        batch, new = key.shape[0], key.shape[2]
        if self.block_table is None:
            self.key, self.value = (_room(x, self.num_pages, self.page_size) for x in (key, value))
            self.block_table = torch.zeros(batch, self.max_pages, dtype=torch.int32, device=key.device)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=key.device)
            self._held, self._used = [[] for _ in range(batch)], [0] * batch
        needed = [
            -(-(used + new) // self.page_size) - len(held) for used, held in zip(self._used, self._held, strict=True)
        ]
        longest = max(self._used, default=0) + new
        if longest > self.max_pages * self.page_size:
            raise ValueError(f"a sequence has room for {self.capacity} keys: {longest - new} used, {new} new")
        if sum(needed) > len(self._free):
            raise ValueError(f"{new} new keys need {sum(needed)} pages, {len(self._free)} are free")
        for b, count in enumerate(needed):
            pages = [self._free.pop() for _ in range(count)]
            if pages:
                start = len(self._held[b])
                filled = torch.tensor(pages, dtype=torch.int32, device=key.device)
                self.block_table[b, start : start + count] = filled
                self._held[b] = self._held[b] + pages
        self._used = [used + new for used in self._used]

    def free(self, b: int) -> None:
        """Give back the pages of sequence ``b``, which is then empty."""
        if self.block_table is None or not isinstance(self.lengths, Tensor):
            return
        self._remember()
        self._free += self._held[b][::-1]
        self._held[b], self._used[b] = [], 0
        self.block_table[b] = 0
        self.lengths[b] = 0

    def reorder(self, rows: Tensor) -> None:
        raise NotImplementedError("pages belong to one sequence each: reorder a KVCache")


def _room(like: Tensor, batch: int, capacity: int) -> Tensor:
    """``(batch, heads, capacity, dim)`` for keys or values as ``like``, a view of ``(batch, capacity, heads, dim)``."""
    return like.new_empty(batch, capacity, like.shape[1], like.shape[3]).transpose(1, 2)
