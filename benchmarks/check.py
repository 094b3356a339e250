"""Is it right? Errors against a float64 oracle, judged by what the naive implementation makes of the same inputs.

    max |x - oracle|  <=  2 · max |naive - oracle|  +  8 · eps(dtype) · max |oracle|

One rule for outputs and for every gradient, with no tolerance set by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastattn import reference

Tensors = Mapping[str, Tensor]  # "output" and the gradients by name

QUERIES = 1024  # that the naive implementation takes at a time,
SMALL = 1 << 23  # unless there are no more scores or elements of K than this


@dataclass(frozen=True)
class Comparison:
    """One tensor against the oracle; error and limit are fractions of the oracle's largest value."""

    name: str
    error: float
    limit: float
    rms: float  #: the root mean square of the error, over that of the oracle

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN

    @property
    def severity(self) -> float:
        """1 at the limit; NaN counts as infinitely bad."""
        ratio = self.error / self.limit if self.limit else (0.0 if self.error == 0 else float("inf"))
        return ratio if ratio == ratio else float("inf")


def largest_error(x: Tensor, oracle: Tensor) -> float:
    """``max |x - oracle|`` in float64; NaN if any element is; infinite if the shapes differ."""
    if x.shape != oracle.shape:
        return float("inf")
    return (x.detach().double() - oracle).abs().max().item() if oracle.numel() else 0.0


def compare(candidate: Tensors, oracle: Tensors, naive: Tensors, dtype: torch.dtype) -> list[Comparison]:
    """The rule above for every tensor of the oracle, by name."""
    found = []
    for name, truth in oracle.items():
        scale = truth.abs().max().item() if truth.numel() else 0.0
        unit = scale or 1.0
        limit = 2 * largest_error(naive[name], truth) + 8 * torch.finfo(dtype).eps * scale
        found.append(
            Comparison(
                name, largest_error(candidate[name], truth) / unit, limit / unit, rms_error(candidate[name], truth)
            )
        )
    return found


def rms_error(x: Tensor, oracle: Tensor) -> float:
    if x.shape != oracle.shape:
        return float("inf")
    size = oracle.norm().item()
    return (x.detach().double() - oracle).norm().item() / (size or 1.0)


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    return max(comparisons, key=lambda each: each.severity)


def run_attention(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grad: Tensor,
) -> dict[str, Tensor]:
    """Output and gradients of one attention call."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, mask)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
    return {"output": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def run_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    causal: bool,
    dtype: torch.dtype,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """What the naive implementation makes of the inputs, one key head and some queries at a time to spare memory.

    ``mask`` has one row for all queries. ``options`` go to ``reference.attention``; with dropout, which depends on
    where an entry is, all is computed at once.

    It computes in float32 for 16-bit dtypes and rounds once: as exact as the type allows, so the stricter yardstick.
    """
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    group, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]

    def part(b: slice, heads: slice, heads_k: slice, rows: slice) -> dict[str, Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return reference.attention(q, k, v, mask=mask, causal=causal, offset=offset + (rows.start or 0), **options)

        queries = [x[b, heads, rows].to(wide) for x in (q, grad)]
        keys = [x[b, heads_k].to(wide) for x in (k, v)]
        return run_attention(call, queries[0], *keys, None if mask is None else mask[b], queries[1])

    small = max(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2], k.numel() * group) <= SMALL
    if small or options.get("dropout_p"):
        every = slice(None)
        return {name: x.to(dtype) for name, x in part(every, every, every, every).items()}

    def head(b: int, h: int) -> dict[str, Tensor]:
        place = slice(b, b + 1), slice(h * group, (h + 1) * group), slice(h, h + 1)
        blocks = [part(*place, slice(i, i + QUERIES)) for i in range(0, q.shape[2], QUERIES)]
        found = {name: torch.cat([block[name] for block in blocks], 2) for name in ("output", "dq")}
        return found | {name: torch.stack([block[name] for block in blocks]).sum(0) for name in ("dk", "dv")}

    rows = [[head(b, h) for h in range(k.shape[1])] for b in range(q.shape[0])]
    whole = {name: torch.cat([torch.cat([p[name] for p in row], 1) for row in rows]) for name in rows[0][0]}
    return {name: x.to(dtype) for name, x in whole.items()}
