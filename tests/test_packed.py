"""Packed sequences: against each alone, with every feature; without padding; jagged NestedTensors; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.tolerance import FLOAT64, assert_rounded_alike

BACKENDS = ["reference", "cpu"]
LENGTHS_Q, LENGTHS_K, USED = (5, 0, 17, 40, 6), (9, 3, 17, 21, 0), (9, 2, 11, 0, 0)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("used", [None, USED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_a_loop(backend: str, used: tuple[int, ...] | None) -> None:
    """Sequences without queries, without keys, and with more queries than keys; all features but dropout at once."""
    heads, batch = torch.randn(4, dtype=torch.float64), len(LENGTHS_Q)
    sizes = ((LENGTHS_Q, 4, 8), (LENGTHS_K, 2, 8), (LENGTHS_K, 2, 3))
    packed = [torch.randn(sum(n), h, d, dtype=torch.float64) for n, h, d in sizes]
    bias = torch.randn(batch, 1, 40, 21, dtype=torch.float64)
    mask = torch.rand(1, 4, 40, 21) > 0.2
    of_q, of_k = (torch.randint(0, 2, (sum(n),)) for n in (LENGTHS_Q, LENGTHS_K))
    prefix, slopes = torch.tensor([3, 1, 0, 9, 0]), torch.rand(batch, 4)
    options: dict[str, Any] = {"causal": True, "window": (12, None), "softcap": 2.0, "return_lse": True}
    options |= {"backend": backend, "softmax_scale": 0.3}
    results = []
    for one_by_one in (False, True):
        q, k, v, sinks, b = leaves = [x.detach().requires_grad_() for x in (*packed, heads, bias)]
        rest = {**options, "sinks": sinks}
        if one_by_one:
            parts = []
            rows = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True)
            ids = zip(of_q.split(LENGTHS_Q), of_k.split(LENGTHS_K), strict=True)
            for n, (sequence, (ids_q, ids_k)) in enumerate(zip(rows, ids, strict=True)):
                count = LENGTHS_K[n] if used is None else used[n]
                x, y, z = (
                    part[:length].transpose(0, 1)[None]
                    for part, length in zip(sequence, (None, count, count), strict=True)
                )
                at = (slice(n, n + 1), slice(None), slice(LENGTHS_Q[n]), slice(count))
                own = {"bias": b[at], "mask": mask[:, :, at[2], at[3]], "alibi_slopes": slopes[n]}
                own |= {"q_segments": ids_q[None], "k_segments": ids_k[None, :count], "prefix_lens": prefix[n : n + 1]}
                parts.append(fastattn.attention(x, y, z, **rest, **own))
            out = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
            lse = torch.cat([x[0] for _, x in parts], dim=1)
        else:
            rest |= {"bias": b, "mask": mask, "alibi_slopes": slopes, "prefix_lens": prefix}
            rest |= {"q_segments": of_q, "k_segments": of_k, "seqused_k": None if used is None else torch.tensor(used)}
            out, lse = fastattn.attention_varlen(q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), **rest)
        loss = (out * torch.arange(3)).sum() + lse.tanh().sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for packed_result, alone in zip(*results, strict=True):
        torch.testing.assert_close(packed_result, alone, **FLOAT64)


def test_dropout_counts_from_the_start_of_each_sequence() -> None:
    q, seed = torch.randn(22, 2, 8), torch.tensor([11])
    lengths = (5, 17)
    got = fastattn.attention_varlen(q, q, q, cumulative(lengths), dropout_p=0.4, dropout_seed=seed)
    dense = torch.zeros(2, 17, 2, 8)
    for b, part in enumerate(q.split(lengths)):
        dense[b, : len(part)] = part
    dense = dense.transpose(1, 2)
    keys = torch.arange(17) < torch.tensor(lengths)[:, None, None, None]
    out = fastattn.attention(dense, dense, dense, mask=keys, dropout_p=0.4, dropout_seed=seed).transpose(1, 2)
    assert_rounded_alike(got, torch.cat([out[b, :n] for b, n in enumerate(lengths)]))


def test_segments_of_pages_and_of_caches() -> None:
    """An id for each row of a page, or for each place of a cache."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8)
    of_q, of_k = torch.randint(0, 2, (2, 3)), torch.randint(0, 2, (2, 12))
    options: dict[str, Any] = {"causal": True, "q_segments": of_q}
    expected = fastattn.attention(q, k[:, :, :10], k[:, :, :10], k_segments=of_k[:, :10], **options)
    for lengths in (10, torch.tensor([10, 10])):
        got = fastattn.attention_with_kv_cache(q, k, k, cache_seqlens=lengths, k_segments=of_k, **options)
        assert_rounded_alike(got, expected)
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    pages, ids = torch.full((6, 4, 2, 8), torch.nan), torch.zeros(6, 4, dtype=torch.int64)
    for b in range(2):
        for n in range(3):
            pages[table[b, n]] = k[b, :, 4 * n : 4 * n + 4].transpose(0, 1)
            ids[table[b, n]] = of_k[b, 4 * n : 4 * n + 4]
    rows = q.transpose(1, 2).flatten(0, 1)
    got = fastattn.attention_varlen(
        rows, pages, pages, cumulative((3, 3)), None, 3, seqused_k=torch.tensor([10, 10]), block_table=table,
        causal=True, q_segments=of_q.flatten(), k_segments=ids,
    )  # fmt: skip
    assert_rounded_alike(got.unflatten(0, (2, 3)).transpose(1, 2), expected)


def test_padding_free_equals_masked() -> None:
    x = torch.randn(3, 9, 16, requires_grad=True)
    padding = torch.rand(3, 9) < 0.4
    padding[1] = True
    u = fastattn.unpad(x, padding)
    rows = u.values.unflatten(1, (2, 8))
    out = fastattn.pad(
        fastattn.attention_varlen(rows, rows, rows, u.cu_seqlens, max_seqlen_q=u.max_seqlen).flatten(1), u
    )
    y = x.unflatten(2, (2, 8)).transpose(1, 2)
    full = fastattn.attention(y, y, y, mask=~padding[:, None, None]).transpose(1, 2).flatten(2)
    full = full.masked_fill(padding[..., None], 0)
    assert_rounded_alike(out, full)
    assert not out[padding].any()
    assert_rounded_alike(*(torch.autograd.grad(z.tanh().sum(), x)[0] for z in (out, full)))


@pytest.mark.parametrize("lengths", [(1, 3), (0, 0), (4,)])
def test_nothing_to_do(lengths: tuple[int, ...]) -> None:
    """No keys at all, no rows at all, no sequences at all."""
    q, k = torch.randn(sum(lengths), 2, 8, requires_grad=True), torch.randn(0, 2, 8, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int32)
    out, lse = fastattn.attention_varlen(
        q, k, k, cumulative(lengths), cumulative((0,) * len(lengths)), return_lse=True,
        q_segments=ids.new_zeros(len(q)), k_segments=ids,
    )  # fmt: skip
    assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
    for x, grad in zip((q, k), torch.autograd.grad(out.sum(), (q, k)), strict=True):
        assert grad.shape == x.shape and not grad.any()
    none = fastattn.attention_varlen(k, k, k, torch.zeros(1, dtype=torch.int32))
    assert none.shape == k.shape


# ---------------------------------------------------------------- jagged NestedTensors

PARTS = (5, 1, 0, 12)


def jagged(rows: Tensor, lengths: tuple[int, ...]) -> Any:
    """``(batch, seq*, ...)`` of ``(total, ...)``."""
    return torch.nested.nested_tensor_from_jagged(rows, cumulative(lengths).long())


def like(rows: Tensor, other: Any) -> Any:
    """The same, with the lengths of another, which torch then knows to be the same."""
    return torch.nested.nested_tensor_from_jagged(rows, other.offsets())


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (fastattn.attention, {"causal": True, "softcap": 2.0, "sinks": torch.randn(4)}),
    "window": (fastattn.attention, {"window": (3, 1), "alibi_slopes": torch.rand(4)}),
    "sdpa": (fastattn.scaled_dot_product_attention, {"is_causal": True}),
    "sdpa, grouped": (fastattn.scaled_dot_product_attention, {"scale": 0.2, "enable_gqa": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_nested_tensors_equal_their_sequences(name: str) -> None:
    """Outputs and gradients; keys of the queries' lengths, and of others."""
    function, options = CALLS[name]
    heads_k = 2 if "grouped" in name else 4
    for lengths_k in (PARTS, (2, 7, 3, 0)):
        sizes = ((PARTS, 4), (lengths_k, heads_k), (lengths_k, heads_k))
        rows = [torch.randn(sum(lengths), h, 8, requires_grad=True) for lengths, h in sizes]
        q = jagged(rows[0], PARTS)
        k = like(rows[1], q) if lengths_k is PARTS else jagged(rows[1], lengths_k)
        nested = q, k, like(rows[2], k)
        out = function(*(x.transpose(1, 2) for x in nested), **options).transpose(1, 2).values()
        parts = zip(*(x.split(lengths) for x, (lengths, _) in zip(rows, sizes, strict=True)), strict=True)
        alone = torch.cat([function(*(x.transpose(0, 1) for x in one), **options).transpose(0, 1) for one in parts])
        assert_rounded_alike(out, alone)
        grads = [torch.autograd.grad(x.sin().sum(), rows) for x in (out, alone)]
        for a, b in zip(*grads, strict=True):
            assert_rounded_alike(a, b)


def test_nested_tensors_with_holes() -> None:
    """Rows between the end of a sequence and the next one's beginning belong to none."""
    rows, offsets, lengths = torch.randn(18, 2, 8, requires_grad=True), [0, 5, 6, 9, 18], [3, 1, 0, 4]
    x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor(offsets), lengths=torch.tensor(lengths))
    out = fastattn.attention(*[x.transpose(1, 2)] * 3, causal=True).transpose(1, 2).values()
    parts = [rows[begin : begin + n].transpose(0, 1) for begin, n in zip(offsets, lengths, strict=False)]
    alone = torch.cat([fastattn.attention(y, y, y, causal=True).transpose(0, 1) for y in parts])
    assert_rounded_alike(out, alone)
    assert_rounded_alike(*(torch.autograd.grad(y.sin().sum(), rows)[0] for y in (out, alone)))


def test_nested_segments_and_lse() -> None:
    x = jagged(torch.randn(sum(PARTS), 2, 8), PARTS).transpose(1, 2)
    ids = like(torch.randint(0, 2, (sum(PARTS),)), x.transpose(1, 2))
    out, lse = fastattn.attention(x, x, x, q_segments=ids, return_lse=True)
    for y, z, s, row in zip(out.unbind(), x.unbind(), ids.unbind(), lse.unbind(), strict=True):
        expected = fastattn.attention(z, z, z, q_segments=s[None], return_lse=True)
        assert_rounded_alike(y, expected[0])
        assert_rounded_alike(row, expected[1], "lse")
    with pytest.raises(NotImplementedError, match="q_segments is a dense tensor"):
        fastattn.attention(x, x, x, q_segments=torch.zeros(4, 12, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="key is a dense tensor"):
        fastattn.attention(x, torch.randn(4, 2, 3, 8), torch.randn(4, 2, 3, 8))


@pytest.mark.parametrize("cross", [False, True])
def test_nested_tensors_through_the_module(cross: bool) -> None:
    """Outputs, and gradients of inputs and parameters, against each sequence alone."""
    module = fastattn.MultiHeadAttention(32, 4, batch_first=True, num_kv_heads=2)
    lengths = PARTS, (3, 2, 6, 0)
    rows = [torch.randn(sum(n), 32, requires_grad=True) for n in lengths[: cross + 1]]
    nested = [jagged(x, n) for x, n in zip(rows, lengths, strict=False)]
    options: dict[str, Any] = {"need_weights": False, "is_causal": not cross}
    inputs = (nested[0], nested[cross], nested[cross])
    out = module(*inputs, **options)[0].values()
    parts = zip(rows[0].split(lengths[0]), rows[cross].split(lengths[cross]), strict=True)
    alone = torch.cat([module(x[None], y[None], y[None], **options)[0][0] for x, y in parts])
    assert_rounded_alike(out, alone)
    leaves = [*rows, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (out, alone)), strict=True):
        assert_rounded_alike(a, b)
    with pytest.raises(ValueError, match="need_weights=False"):
        module(*inputs)


# ---------------------------------------------------------------- bad input

ROWS, CU = torch.randn(12, 2, 8), cumulative((5, 7))
IDS = torch.zeros(12, dtype=torch.int32)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"q_segments": IDS[:5]}, ValueError, r"q_segments must have shape \(12,\), got \(5,\)"),
        ({"q_segments": IDS[:1]}, ValueError, r"q_segments must have shape \(12,\), got \(1,\)"),
        ({"q_segments": IDS.float()}, TypeError, "q_segments must hold integers"),
        ({"k_segments": IDS}, ValueError, "q_segments is missing"),
        ({"q_segments": IDS, "cu_seqlens_k": CU}, ValueError, "k_segments is missing"),
        ({"num_splits": -1}, ValueError, "num_splits must be at least 0, got -1"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(ROWS, ROWS, ROWS, CU, **options)
