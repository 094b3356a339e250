"""Cases with sequences of different lengths: from padded tensors to packed and paged ones, and the results back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import ops
from fastattn.call import Arguments, Shaping, combine_window
from fastattn.ragged import Ragged, prepare_ragged

if TYPE_CHECKING:
    from tests.inputs import Inputs


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
        fill = math.nan if x.is_floating_point() else -1
        store = x.new_full((batch * pages + 2, page_size, heads, x.shape[3]), fill).transpose(1, 2)
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
    """out and lse of a ragged case, padded: by the public function, where one takes such a call."""
    case = i.case
    if case.lengths_q is not None and case.leftpad is None:
        out, lse = varlen(i, q, k, v, **common)
    elif case.lengths_q is None and not case.dropout_p and case.offset is None:
        return cached(i, q, k, v, **common)
    else:
        call = arguments(i, q, k, v, **common)
        out, lse = ops.run_forward(*call[:6], *call.call)
    if case.lengths_q is None:
        return out, lse
    return (unpack(x, case.lengths_q, case.seqlen_q, f) for x, f in ((out, 0.0), (lse, -math.inf)))  # type: ignore


def varlen(i: Inputs, q: Tensor, k: Tensor, v: Tensor, **common: Any) -> tuple[Tensor, Tensor]:
    """``attention_varlen``, its result as the operator's."""
    case, table = i.case, None
    options = {"causal": case.causal, "window": case.window, "offset": case.offset, **common}
    ids = [options.pop(name) for name in ("q_segments", "k_segments")]
    ids = [None if x is None else x.expand(case.batch, -1)[:, None, :, None] for x in ids]
    if case.page_size is not None:
        used = case.used_k or (case.seqlen_k,) * case.batch
        if ids[1] is not None:
            ids[1] = page(ids[1], ids[1], case.page_size, used)[0][:, 0, :, 0]
        k, v, table = page(k, v, case.page_size, used)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        options |= {name: widened(common[name], case, table) for name in ("mask", "bias")}
    else:
        assert case.lengths_k is not None
        ids[1] = None if ids[1] is None else pack(ids[1], case.lengths_k)[0, 0, :, 0]
        k, v = (pack(x, case.lengths_k)[0].transpose(0, 1) for x in (k, v))
    assert case.lengths_q is not None
    rows = pack(q, case.lengths_q)[0].transpose(0, 1)
    of_q = None if ids[0] is None else pack(ids[0], case.lengths_q)[0, 0, :, 0]
    cu = cumulative(case.lengths_q, q.device), cumulative(case.lengths_k, q.device)
    used_k = i.lengths["seqlens_k"] if case.used_k is not None or table is not None else None
    out, lse = fastattn.attention_varlen(
        rows, k, v, *cu, case.seqlen_q, case.seqlen_k, seqused_k=used_k, block_table=table, q_segments=of_q,
        k_segments=ids[1], num_splits=case.num_splits, return_lse=True, **options,
    )  # fmt: skip
    return out.transpose(0, 1)[None], lse[None]


def cached(i: Inputs, q: Tensor, k: Tensor, v: Tensor, **common: Any) -> tuple[Tensor, Tensor]:
    """``attention_with_kv_cache``."""
    case, table, used = i.case, None, i.lengths["seqlens_k"]
    options = {name: x for name, x in common.items() if not name.startswith("dropout")}
    if case.page_size is not None:
        k, v, table = page(k, v, case.page_size, case.used_k or (case.seqlen_k,) * case.batch)
        options |= {name: widened(common[name], case, table) for name in ("mask", "bias", "k_segments")}
    return fastattn.attention_with_kv_cache(  # type: ignore[return-value]
        q, k, v, cache_seqlens=case.seqlen_k if table is not None and used is None else used,
        leftpad_k=i.lengths["leftpad_k"], block_table=table, causal=case.causal, window=case.window,
        num_splits=case.num_splits, return_lse=True, **options,
    )  # fmt: skip


def widened(x: Tensor | None, case: Any, table: Tensor) -> Tensor | None:
    """A mask, bias or ids of keys as wide as the pages of a sequence."""
    wide = table.shape[1] * case.page_size
    return x if x is None or x.shape[-1] == 1 else F.pad(x, (0, wide - x.shape[-1]))
