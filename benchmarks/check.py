"""Is it right? Errors against a float64 oracle, judged by what the naive implementation makes of the same inputs.

    max |x - oracle|  <=  2 · max |naive - oracle|  +  8 · eps(dtype) · max |oracle|

One rule for outputs and for every gradient, with no tolerance set by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import reference

Tensors = Mapping[str, Tensor]  # "output" and the gradients by name


@dataclass(frozen=True)
class Comparison:
    """One tensor against the oracle; both figures are fractions of the oracle's largest value."""

    name: str
    error: float
    limit: float

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
        found.append(Comparison(name, largest_error(candidate[name], truth) / unit, limit / unit))
    return found


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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, causal: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the naive implementation makes of the inputs, one key head at a time to spare memory.

    It computes in float32 for 16-bit dtypes and rounds once: as exact as the type allows, so the stricter yardstick.
    """
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    group = q.shape[1] // k.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return reference.attention(q, k, v, mask=mask, causal=causal)

    def part(b: int, h: int) -> dict[str, Tensor]:
        heads = slice(h * group, (h + 1) * group)
        one = None if mask is None else mask[b : b + 1]
        return run_attention(
            call,
            q[b : b + 1, heads].to(wide),
            k[b : b + 1, h : h + 1].to(wide),
            v[b : b + 1, h : h + 1].to(wide),
            one,
            grad[b : b + 1, heads].to(wide),
        )

    rows = [[part(b, h) for h in range(k.shape[1])] for b in range(q.shape[0])]
    whole = {name: torch.cat([torch.cat([p[name] for p in row], 1) for row in rows]) for name in rows[0][0]}
    return {name: x.to(dtype) for name, x in whole.items()}
