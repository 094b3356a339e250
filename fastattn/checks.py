"""Checks of values that live on the device: off by default, since reading them waits for the device."""

from __future__ import annotations

import itertools
from types import TracebackType

import torch
from torch import Tensor

_enabled = False


class debug_checks:
    """Check lengths, offsets and tables, whose values are on the device, in every call: wait for it and raise.

    As a function it switches for good, as a context manager for a block::

        fastattn.debug_checks()           # from here on
        with fastattn.debug_checks():     # or here alone
            out = fastattn.attention_varlen(q, k, v, cu_seqlens)

    Without it these values are trusted, on every device: one that is out of range reads or writes memory that is not
    its own. What is checked: cu_seqlens start at 0, do not decrease, end at the number of packed rows, and no sequence
    is longer than ``max_seqlen``; ``seqused_k``, ``leftpad_k``, ``prefix_lens`` lie within the keys that there are;
    the pages in use of a ``block_table`` exist; a cache has room for what is appended, and rotary tables for its
    positions; segment ids fit in int32; scales of ``attention_fp8`` are positive. Inside ``torch.compile`` nothing is
    checked.

    Args:
        enabled: False switches the checks off. Default: True.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _enabled
        self._before, _enabled = _enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _enabled
        _enabled = self._before


def enabled() -> bool:
    return _enabled and not torch.compiler.is_compiling()


def _outside(name: str, x: Tensor, low: int, high: int | Tensor, what: str) -> None:
    """Raise, naming the first offender, unless ``low <= x <= high``."""
    wrong = ((x < low) | (x > high)).nonzero()
    if wrong.shape[0]:
        at = tuple(wrong[0].tolist())
        limit = high[at[: high.dim()]].item() if isinstance(high, Tensor) and high.dim() else high
        index = ", ".join(map(str, at))
        raise ValueError(f"{name}[{index}] is {x[at].item()}: must be from {low} to {limit}, {what}")


def check_cumulative(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{name} must go from 0 to the {total} packed rows, got {values[0]} to {values[-1]}")
    for b, (begin, end) in enumerate(itertools.pairwise(values)):
        if end < begin:
            raise ValueError(f"{name} must not decrease, got {begin} and {end} at {b} and {b + 1}")
        if end - begin > longest:
            limit = name.replace("cu_seqlens", "max_seqlen")
            raise ValueError(f"{name}: sequence {b} has {end - begin} rows, more than {limit} = {longest}")


def check_lengths(name: str, x: Tensor, limit: int | Tensor, what: str) -> None:
    _outside(name, x, 0, limit, what)


def check_positive(name: str, x: Tensor) -> None:
    if (wrong := (~(x > 0)).nonzero()).shape[0]:
        at = tuple(wrong[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, at))}] is {x[at].item()}: must be positive")


def check_int32(name: str, x: Tensor) -> None:
    """Ids are compared as int32: those that are not, may be equal there."""
    if x.dtype is torch.int64:
        _outside(name, x, -(2**31), 2**31 - 1, "kernels compare int32")


def check_pages(block_table: Tensor, num_pages: int, page_size: int, used: Tensor | None) -> None:
    """The entries that hold keys: ``used`` of each sequence, all without it."""
    table = block_table
    if used is not None:
        pages = torch.arange(table.shape[1], device=table.device)
        table = torch.where(pages * page_size < used[:, None], table, 0)
    _outside("block_table", table, 0, num_pages - 1, f"the cache has {num_pages} pages")
