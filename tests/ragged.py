"""Cases with sequences of different lengths: from padded tensors to packed and paged ones, and the results back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.call import Arguments, Ragged, Shaping, combine_window, prepare_ragged

if TYPE_CHECKING:
    from tests.cases import Inputs


def pack(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """``(batch, heads, seq, dim)`` to ``(1, heads, total, dim)``, a view of ``(total, heads, dim)``."""
    rows = [sequence[:, :n].transpose(0, 1) for sequence, n in zip(x, lengths, strict=True)]
    return torch.cat(rows).transpose(0, 1).unsqueeze(0)


def unpack(x: Tensor, lengths: tuple[int, ...], seqlen: int, fill: float) -> Tensor:
    """``(1, heads, total, ...)`` to ``(batch, heads, seq, ...)``."""
    rows = []
    for part in x.split(lengths, dim=2):
        missing = part.new_full((1, part.shape[1], seqlen - part.shape[2], *part.shape[3:]), fill)
        rows.append(torch.cat([part, missing], dim=2))
    return torch.cat(rows)


def page(k: Tensor, v: Tensor, page_size: int, used: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in shuffled pages, and their block table. What no sequence uses is NaN; unused entries are 0."""
    batch, heads, seqlen, _ = k.shape
    pages = math.ceil(seqlen / page_size)
    order = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    table = order[: batch * pages].view(batch, pages)
    stores = []
    for x in (k, v):
        store = x.new_full((batch * pages + 2, page_size, heads, x.shape[3]), math.nan).transpose(1, 2)
        for b, n in enumerate(used):
            for j in range(n):
                store[table[b, j // page_size], :, j % page_size] = x[b, :, j]
        stores.append(store)
    for b, n in enumerate(used):
        table[b, math.ceil(n / page_size) :] = 0
    return stores[0], stores[1], table.to(k.device)


def cumulative(lengths: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def arguments(i: Inputs, q: Tensor, k: Tensor, v: Tensor, **common: Any) -> Arguments:
    """The operator's arguments for a ragged case, from its padded tensors."""
    case = i.case
    table = None
    if case.page_size is not None:
        used = case.used_k or (case.seqlen_k,) * case.batch
        k, v, table = page(k, v, case.page_size, used)
    if case.lengths_q is not None:
        q = pack(q, case.lengths_q)
    if case.lengths_k is not None:
        k, v = pack(k, case.lengths_k), pack(v, case.lengths_k)
    ragged = Ragged(
        cumulative(case.lengths_q, q.device),
        cumulative(case.lengths_k, q.device),
        i.lengths["seqlens_k"] if case.used_k is not None else None,
        i.lengths["leftpad_k"],
        table,
        case.seqlen_q,
        case.seqlen_k,
        case.num_splits,
    )
    shaping = Shaping(
        common["softcap"],
        common["alibi_slopes"],
        common["sinks"],
        common["q_segments"],
        common["k_segments"],
        common["prefix_lens"],
    )
    return prepare_ragged(
        q,
        k,
        v,
        ragged,
        common["mask"],
        common["bias"],
        combine_window(case.causal, case.window),
        case.offset,
        common["softmax_scale"],
        common["dropout_p"],
        common["dropout_seed"],
        common.get("backend"),
        shaping,
    )


def attend(i: Inputs, q: Tensor, k: Tensor, v: Tensor, **common: Any) -> tuple[Tensor, Tensor]:
    """out and lse of a ragged case, padded."""
    call = arguments(i, q, k, v, **common)
    out, lse = ops.run_forward(*call[:6], *call.call)
    if i.case.lengths_q is None:
        return out, lse
    return (unpack(x, i.case.lengths_q, i.case.seqlen_q, f) for x, f in ((out, 0.0), (lse, -math.inf)))  # type: ignore
