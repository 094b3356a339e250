"""Who sees whom, exactly: NaN in one key must show in the queries that see it and nowhere else, and the reverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn


@dataclass(frozen=True)
class Edge:
    """A window, and a key and a query at the edge of what they see."""

    name: str
    seqlen_q: int
    seqlen_k: int
    window: tuple[int | None, int | None]
    offset: int
    key: int
    query: int
    heads: int = 1  # of queries, all with the same keys

    def visible(self) -> Tensor:
        relative = torch.arange(self.seqlen_k) - torch.arange(self.seqlen_q)[:, None] - self.offset
        left, right = (math.inf if x is None else x for x in self.window)
        return (-left <= relative) & (relative <= right)


EDGES = (
    # The last row of a tile of 64 sees one tile more than the others, or not all of a tile that they see all of.
    Edge("last_key", 65, 65, (None, 0), 0, key=64, query=64),
    Edge("last_key_of_two_heads", 65, 65, (None, 0), 0, key=64, query=64, heads=2),
    Edge("first_key", 20, 130, (64, None), 110, key=64, query=19),
    Edge("last_query", 70, 20, (45, None), 0, key=19, query=64),
    Edge("last_key_of_tile", 65, 70, (1, 0), 0, key=63, query=64),  # no other key of its tile is seen by the query
    Edge("first_query", 130, 128, (None, 0), 62, key=127, query=64),
    Edge("no_query", 20, 150, (5, None), 140, key=0, query=0),  # none sees a key of the first tile of 128
    # Of the warps that share a tile of keys some have keys that the query sees, some have not, some have none at all.
    Edge("some_warps", 20, 70, (None, 0), 0, key=5, query=5),
    Edge("one_query", 1, 70, (None, 0), 5, key=6, query=0),
)


def check_edge(edge: Edge, dtype: torch.dtype, general: bool) -> None:
    """``general``: by the kernels that look at single entries, here at a mask that hides nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, heads, n, 32, generator=generator).to(dtype)
        for heads, n in ((edge.heads, edge.seqlen_q), *[(1, edge.seqlen_k)] * 2, (edge.heads, edge.seqlen_q))
    )
    mask = torch.ones(1, 1, edge.seqlen_q, edge.seqlen_k, dtype=torch.bool) if general else None

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        *inputs, grad_out = tensors
        leaves = [x.clone().requires_grad_() for x in inputs]
        options: dict[str, Any] = {"window": edge.window, "offset": edge.offset, "mask": mask, "backend": "cuda"}
        out = fastattn.attention(*leaves, **options)
        found = (out.detach(), *torch.autograd.grad(out, leaves, grad_out))
        return {name: x[0] for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True)}

    def poisoned(x: Tensor, row: int) -> Tensor:
        return x.index_put((*torch.tensor([[0], [0], [row], [3]]),), torch.tensor(math.nan, dtype=dtype))

    clean, visible = run(q, k, v, grad), edge.visible()
    of_key = run(q, poisoned(k, edge.key), poisoned(v, edge.key), grad)
    of_query = run(poisoned(q, edge.query), k, v, poisoned(grad, edge.query))
    sees_key, seen_keys = visible[:, edge.key].repeat(edge.heads, 1), visible[edge.query, None]
    query = torch.arange(edge.heads * edge.seqlen_q).view(edge.heads, edge.seqlen_q) == edge.query  # of head 0
    for name, found, hit in (
        *((name, of_key[name], sees_key) for name in ("out", "dq")),
        *((name, of_query[name], query) for name in ("out", "dq")),
        *((name, of_query[name], seen_keys) for name in ("dk", "dv")),
    ):
        assert clean[name].isfinite().all(), f"{edge.name}: {name} is not finite"
        assert found[hit].isnan().all(), f"{edge.name}: NaN has not reached {name}"
        assert torch.equal(found[~hit], clean[name][~hit]), (
            f"{edge.name}: NaN has reached {name} of what does not see it"
        )
