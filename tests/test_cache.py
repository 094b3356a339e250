"""Decoding from caches: step by step against the whole, dense and paged; what is wrong raises; compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.compat import flash_attn as fa
from fastattn.compat.varlen import varlen_attn
from tests.tolerance import FLOAT64, assert_close_to_oracle, assert_rounded_alike

STEPS = (5, 1, 1, 4, 1)


def t(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("paged", [False, True])
def test_decoding_equals_the_whole(paged: bool, backend: str) -> None:
    """Sequences that start at different lengths, by steps of one and more queries, with everything on."""
    q, k, v = t(2, 4, 12, 8), t(2, 2, 12, 8), t(2, 2, 12, 6)
    options: dict[str, Any] = {"window": (7, 0), "softcap": 2.0, "alibi_slopes": torch.rand(4), "sinks": t(4)}
    options["backend"] = backend
    whole = fastattn.attention(q, k, v, **options)
    if paged:
        cache: Any = fastattn.PagedKVCache(9, 3)
    else:
        cache = fastattn.KVCache(12)
    start, outs = 0, []
    for n in STEPS:
        rows = slice(start, start + n)
        outs.append(cache.attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], num_splits=len(outs) % 3, **options))
        start += n
        if start == STEPS[0] and not paged:
            cache.lengths = torch.full((2,), start)  # from here on as if sequences differed
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, **FLOAT64)
    assert cache.lengths.tolist() == [12, 12]
    with pytest.raises(ValueError, match="12 used, 17 new"):
        cache.attend(*(x[:, :, :1].repeat(1, 1, 17, 1) for x in (q, k, v)))
    if paged:
        cache.free(1)
        assert cache.lengths.tolist() == [12, 0] and not cache.block_table[1].any()


REFUSED = {
    "dense": (lambda: fastattn.KVCache(8), 0),
    "dense held": (lambda: fastattn.KVCache(8), 4),
    "paged": (lambda: fastattn.PagedKVCache(6, 3), 0),
    "paged held": (lambda: fastattn.PagedKVCache(6, 3), 4),
    "memory": (fastattn.KVCache, 0),  # which is filled once
}


@pytest.mark.parametrize("make, held", REFUSED.values(), ids=REFUSED)
def test_a_refused_step_changes_nothing(make: Any, held: int) -> None:
    """The same cache goes on as if the call had not been; the keys of the call are not in it."""
    q, k, v, other = t(2, 2, 9, 4), t(2, 2, 9, 4), t(2, 2, 9, 4), make()
    cache, first, step = make(), slice(0, held), slice(held, held + 2)
    for each in (cache, other) if held else ():
        each.attend(*(x[:, :, first] for x in (q, k, v)))
    before = cache.key.clone() if held else None
    for wrong, message in ({"softcap": -1.0}, "softcap"), ({"mask": torch.zeros(2, 3, 2, 2).bool()}, "mask"):
        with pytest.raises(ValueError, match=message):
            cache.attend(*(x[:, :, step] for x in (q, k, v)), **wrong)
    assert torch.equal(cache.key, before) if held else cache.key is None
    assert torch.equal(torch.as_tensor(cache.lengths), torch.as_tensor(other.lengths))
    for _ in range(2 if cache.capacity else 1):
        ours, theirs = (each.attend(*(x[:, :, step] for x in (q, k, v))) for each in (cache, other))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_flash_attn_with_kvcache(indexed: bool, interleaved: bool) -> None:
    """Appending with rotary embedding and left padding at each sequence's own length, against each alone."""
    q, k, v = (t(2, 3, h, 8) for h in (4, 2, 2))
    caches = [t(3, 20, 2, 8) for _ in range(2)]
    before = [c.clone() for c in caches]
    lengths, leftpad, rows = torch.tensor([6, 11], dtype=torch.int32), torch.tensor([2, 0]), torch.tensor([2, 0])
    cos, sin = t(20, 3), t(20, 3)
    if not indexed:
        caches, before, rows = [c[:2].clone() for c in caches], [c[:2] for c in before], torch.tensor([0, 1])
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, lengths, rows if indexed else None, leftpad.int(), causal=True,
        rotary_interleaved=interleaved, return_softmax_lse=True,
    )  # fmt: skip
    for b in range(2):
        n, at = int(lengths[b]), int(rows[b])
        angles = cos[None, n : n + 3], sin[None, n : n + 3]
        turned = [fastattn.apply_rotary(x[b : b + 1].transpose(1, 2), *angles, interleaved) for x in (q, k)]
        pad = int(leftpad[b])
        keys = torch.cat([before[0][at, pad:n], turned[1][0].transpose(0, 1)]).transpose(0, 1)
        values = torch.cat([before[1][at, pad:n], v[b]]).transpose(0, 1)
        expected, expected_lse = fastattn.attention(turned[0][0], keys, values, causal=True, return_lse=True)
        torch.testing.assert_close(out[b].transpose(0, 1), expected, **FLOAT64)
        torch.testing.assert_close(lse[b], expected_lse, **FLOAT64)
        torch.testing.assert_close(caches[0][at, n : n + 3], turned[1][0].transpose(0, 1), **FLOAT64)
        assert torch.equal(caches[0][at, n + 3 :], before[0][at, n + 3 :])  # nothing else is touched


def test_rotary_turns_by_angles() -> None:
    """(a + ib) · exp(iθ), pair by pair."""
    x, angle = t(1, 2, 5, 6), t(5, 2)
    for interleaved in (True, False):
        y = fastattn.apply_rotary(x, angle.cos()[None], angle.sin()[None], interleaved)
        a, b = (slice(0, 4, 2), slice(1, 4, 2)) if interleaved else (slice(0, 2), slice(2, 4))
        product = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(torch.complex(y[..., a], y[..., b]), product, **FLOAT64)
        assert torch.equal(y[..., 4:], x[..., 4:])


def test_flash_attn_functions() -> None:
    qkv = t(2, 9, 3, 4, 8)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    expected, lse = fastattn.attention(q, k, v, window=(3, 0), softcap=1.5, return_lse=True)
    got = fa.flash_attn_qkvpacked_func(qkv, window_size=(3, 0), softcap=1.5, return_attn_probs=True)
    assert torch.equal(got[0], expected.transpose(1, 2)) and torch.equal(got[1], lse) and got[2] is None
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in qkv.unbind(2)]
    packed = fa.flash_attn_varlen_func(*flat, cu, cu, 9, 9, window_size=(3, 0), softcap=1.5)
    torch.testing.assert_close(packed.unflatten(0, (2, 9)), expected.transpose(1, 2), **FLOAT64)
    aux = type("AuxRequest", (), {"lse": True})
    out, sums = varlen_attn(*flat, cu, cu, 9, 9, window_size=(-1, 0), return_aux=aux)
    causal, causal_lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out.unflatten(0, (2, 9)), causal.transpose(1, 2), **FLOAT64)
    torch.testing.assert_close(sums.unflatten(1, (2, 9)).transpose(0, 1), causal_lse, **FLOAT64)
    with pytest.raises(ValueError, match="test matrix"):
        fa.flash_attn_qkvpacked_func(qkv, dropout_p=0.1, return_attn_probs=True)
    with pytest.raises(ValueError, match="enable_gqa"):
        varlen_attn(flat[0], *(x[:, :2] for x in flat[1:]), cu, cu, 9, 9)


Q, CACHE, ROWS = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8), torch.randn(12, 2, 8)
NEW, PAGES = torch.randn(2, 2, 3, 8), torch.randn(5, 2, 4, 8)
TABLE, USED, CU = torch.tensor([[0, 1], [2, 9]]).int(), torch.tensor([3, 7]).int(), torch.tensor([0, 5, 12]).int()

ANGLES, IDS = torch.randn(30, 3), torch.tensor([[0] * 9 + [2**32]] * 2)
TURN = {"cache_seqlens": 1, "rotary_cos": ANGLES, "rotary_sin": ANGLES}


def varlen(cu: Any = CU, **options: Any) -> Any:
    return fastattn.attention_varlen(ROWS, ROWS, ROWS, cu, **options)


def cached(**options: Any) -> Any:
    return fastattn.attention_with_kv_cache(Q, CACHE, CACHE.clone(), **options)


def paged(**options: Any) -> Any:
    return fastattn.attention_with_kv_cache(Q, PAGES, PAGES, **{"block_table": TABLE, "cache_seqlens": USED, **options})


def cached_apart(keys: Tensor, values: Tensor, table: Tensor | None = None) -> Any:
    return fastattn.attention_with_kv_cache(Q, keys, values, NEW, NEW, cache_seqlens=USED, block_table=table)


def varlen_pages(keys: Tensor, values: Tensor) -> Any:
    pages = (x.transpose(1, 2) for x in (keys, values))
    return fastattn.attention_varlen(ROWS, *pages, CU, seqused_k=USED, block_table=TABLE)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_without_pages_nothing_is_seen(backend: str) -> None:
    queries, pages, none = torch.randn(4, 2, 8), torch.empty(0, 4, 2, 8), torch.zeros(2, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    out, lse = fastattn.attention_varlen(
        queries, pages, pages, cu_seqlens, seqused_k=none, block_table=none[:, None], return_lse=True, backend=backend
    )
    assert out.shape == queries.shape and not out.any()
    assert lse.isneginf().all()


def shaped(**options: Any) -> Any:
    return fastattn.attention(Q, CACHE, CACHE, **options)


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: varlen(CU.long()), TypeError, "cu_seqlens_q must be int32, got int64"),
    (lambda: varlen(CU[None]), ValueError, r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(1, 3\)"),
    (lambda: varlen(CU, cu_seqlens_k=CU[:2]), ValueError, r"cu_seqlens_k must have shape .* \(3,\), got \(2,\)"),
    (lambda: varlen(CU - 1), ValueError, "cu_seqlens_q must go from 0 to the 12 packed rows, got -1 to 11"),
    (lambda: varlen(torch.tensor([0, 13, 12]).int()), ValueError, "must not decrease, got 13 and 12"),
    (lambda: varlen(max_seqlen_q=6), ValueError, "sequence 1 has 7 rows, more than max_seqlen_q = 6"),
    (lambda: varlen(max_seqlen_q=-1), ValueError, "max_seqlen_q must be at least 0, got -1"),
    (lambda: varlen(seqused_k=torch.tensor([6, 7])), ValueError, r"seqused_k\[0\] is 6: must be from 0 to 5"),
    (lambda: varlen(block_table=TABLE), ValueError, "key must be pages"),
    (lambda: paged(), ValueError, r"block_table\[1, 1\] is 9: must be from 0 to 4, the cache has 5 pages"),
    (lambda: paged(block_table=TABLE.long()), TypeError, "block_table must be an int32 tensor, got torch.int64"),
    (lambda: paged(block_table=TABLE[:1]), ValueError, r"block_table must have shape \(batch, pages\) = \(2, pages\)"),
    (lambda: paged(cache_seqlens=USED + 2), ValueError, r"cache_seqlens\[1\] is 9: must be from 0 to 8"),
    (lambda: paged(cache_seqlens=None), ValueError, "cache_seqlens is needed"),
    (lambda: cached(key=NEW, cache_seqlens=1), ValueError, "appended together"),
    (lambda: cached(key=NEW, value=NEW), ValueError, "cache_seqlens is needed"),
    (lambda: cached(key=NEW, value=NEW[..., :7], cache_seqlens=1), ValueError, "value must be .*like its cache"),
    (lambda: cached(key=NEW, value=NEW, cache_seqlens=8), ValueError, "room for 10 keys: 8 used, 3 new"),
    (lambda: cached(key=NEW, value=NEW, cache_seqlens=torch.tensor([1, 8])), ValueError, r"cache_seqlens\[1\] is 8"),
    (lambda: cached(leftpad_k=torch.tensor([0, 11])), ValueError, r"leftpad_k\[1\] is 11: must be from 0 to 10"),
    (lambda: cached(cache_seqlens=torch.tensor([1.0, 2.0])), TypeError, "cache_seqlens must hold integers"),
    (lambda: cached(rotary_cos=torch.ones(3, 2)), ValueError, "rotary_cos and rotary_sin must both be given"),
    (lambda: cached(rotary_cos=ANGLES, rotary_sin=ANGLES, cache_seqlens=USED + 23), ValueError, r"30 positions"),
    (lambda: cached_apart(CACHE, CACHE[:1]), ValueError, r"must have the same batch .*value \(1, 2, 10, 8\)"),
    (lambda: cached_apart(PAGES, PAGES[:4], TABLE), ValueError, "number of pages"),
    (lambda: varlen_pages(PAGES, PAGES[:4]), ValueError, "number of pages"),
    (lambda: cached_apart(None, CACHE), TypeError, "key_cache must be a torch.Tensor, got NoneType"),
    (lambda: cached(cache_seqlens=[3, 5]), TypeError, r"cache_seqlens must be an int or .* got \[3, 5\]"),
    (lambda: cached(cache_seqlens=3, mask=[True]), TypeError, "mask must be a torch.Tensor, got list"),
    (lambda: cached(cache_seqlens=3, bias=[0.0]), TypeError, "bias must be a torch.Tensor, got list"),
    (
        lambda: cached(cache_seqlens=3, q_segments=IDS[:, :3], k_segments=[0]),
        TypeError,
        "k_segments must be .*got list",
    ),
    (lambda: cached(key=NEW[0], value=NEW, **TURN), TypeError, r"key must be a torch.Tensor \(batch, .*got \(2, 3, 8"),
    (lambda: cached(**{**TURN, "rotary_cos": ANGLES.int()}), TypeError, "rotary_cos must be floating, got int32"),
    (lambda: cached(**{**TURN, "rotary_sin": ANGLES.to("meta")}), ValueError, "rotary_sin must be on the query's dev"),
    (lambda: cached(rotary_interleaved="no", **TURN), TypeError, "rotary_interleaved must be True or False, got str"),
    (lambda: fastattn.KVCache("8"), TypeError, "capacity must be an int, got '8'"),
    (lambda: fastattn.KVCache(0), ValueError, "capacity must be at least 1, got 0"),
    (lambda: fastattn.PagedKVCache(4, 2.5), TypeError, "page_size must be an int, got 2.5"),
    (lambda: cached(return_lse="no"), TypeError, "return_lse must be True or False"),
    (lambda: varlen(return_lse="no"), TypeError, "return_lse must be True or False"),
    (lambda: cached(num_splits=-1), ValueError, "num_splits must be at least 0"),
    (lambda: shaped(softcap=-1.0), ValueError, "softcap must be 0 .*got -1"),
    (lambda: shaped(softcap=torch.nan), ValueError, "softcap must be 0 .*got nan"),
    (lambda: shaped(alibi_slopes=torch.ones(2)), ValueError, r"alibi_slopes must have shape \(heads_q,\) = \(4,\)"),
    (lambda: shaped(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError, "alibi_slopes get no gradient"),
    (lambda: shaped(alibi_slopes=torch.ones(4).double()), TypeError, "alibi_slopes must be of dtype"),
    (lambda: shaped(sinks=torch.ones(2, 4)), ValueError, r"sinks must have shape \(heads_q,\) = \(4,\), got \(2, 4\)"),
    (lambda: shaped(sinks=torch.ones(4).int()), TypeError, "sinks must be of dtype .*got int32"),
    (lambda: shaped(q_segments=torch.ones(2, 3).int()), ValueError, "q_segments needs k_segments.* 3 queries, 10 keys"),
    (lambda: shaped(k_segments=torch.ones(2, 10).int()), ValueError, "k_segments needs q_segments"),
    (lambda: shaped(q_segments=IDS[:, :3], k_segments=IDS), ValueError, r"k_segments\[0, 9\] is 4294967296.* int32"),
    (lambda: shaped(prefix_lens=torch.ones(3).int()), ValueError, r"prefix_lens must have shape \(2,\), got \(3,\)"),
    (lambda: shaped(prefix_lens=torch.tensor([1, 11])), ValueError, r"prefix_lens\[1\] is 11"),
]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[2][:30])
def test_bad_input(row: tuple[Any, type[Exception], str]) -> None:
    call, error, message = row
    with fastattn.debug_checks(), pytest.raises(error, match=message):
        call()


def test_checks_are_off_unless_asked_for() -> None:
    from fastattn import checks

    assert not checks.enabled()
    with fastattn.debug_checks():
        assert checks.enabled()
        paged(block_table=TABLE.clamp(max=4))
    assert not checks.enabled()


def test_caches_have_no_gradient() -> None:
    q = Q.clone().requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        fastattn.attention_with_kv_cache(q, CACHE.clone(), CACHE.clone(), NEW, NEW, cache_seqlens=1)
    with pytest.raises(ValueError, match="no gradient"):
        fastattn.attention_with_kv_cache(q, PAGES, PAGES, block_table=TABLE.clamp(max=4), cache_seqlens=USED)
    out = fastattn.attention_with_kv_cache(q, CACHE, CACHE, cache_seqlens=USED)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def assert_compiled_once(step: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """The compiled ``step`` gives what the eager one does, and changing sizes and lengths compile nothing again.

    Tensors that ask for a gradient are compared by theirs, others by what has become of them. (Sizes that are equal in
    the first call are taken for one and the same, so first calls have different ones.)
    """
    torch._dynamo.reset()
    counter, first = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for call in calls:
        results = []
        for function in (step, compiled):
            own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in call]
            leaves = [x for x in own if isinstance(x, Tensor) and x.requires_grad]
            torch.manual_seed(0)
            out = function(*own)
            results.append([out, *(torch.autograd.grad(out.sum(), leaves) if leaves else own)])
        for eager, traced in zip(*results, strict=True):
            if isinstance(eager, Tensor) and eager.is_floating_point():
                assert_rounded_alike(traced, eager)
            else:
                assert torch.equal(traced, eager) if isinstance(eager, Tensor) else traced == eager
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_compiled_varlen_with_changing_lengths() -> None:
    def step(x: Tensor, cu: Tensor, longest: int, ids: Tensor, used: Tensor) -> Tensor:
        options = {"causal": True, "softcap": 2.0, "dropout_p": 0.3, "q_segments": ids, "seqused_k": used}
        return fastattn.attention_varlen(x, x, x, cu, None, longest, **options).tanh()

    def calls() -> Iterator[tuple[Any, ...]]:
        for lengths in ((5, 9, 6), (17, 3), (30, 0, 11, 6), (8, 40)):
            x = torch.randn(sum(lengths), 2, 8, requires_grad=True)
            cu = torch.tensor([0, *lengths]).cumsum(0).int()
            ids, used = torch.randint(0, 2, (sum(lengths),)), torch.tensor([max(n - 1, 0) for n in lengths])
            yield x, cu, max(lengths), ids, used

    assert_compiled_once(step, calls())


def test_compiled_cache_with_changing_lengths() -> None:
    def step(q: Tensor, k: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return fastattn.attention_with_kv_cache(q, keys, values, k, k, cache_seqlens=lengths, causal=True)

    assert_compiled_once(step, ((Q, NEW, CACHE, CACHE, torch.tensor([n, n + 1]).int()) for n in (0, 3, 6)))


def test_compiled_pages_with_changing_lengths() -> None:
    def step(q: Tensor, k: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        return fastattn.attention_with_kv_cache(
            q, keys, values, k, k, cache_seqlens=lengths, causal=True, block_table=table, leftpad_k=lengths // 2,
            rotary_cos=ANGLES.cos(), rotary_sin=ANGLES.sin(),
        )  # fmt: skip

    def calls() -> Iterator[tuple[Any, ...]]:
        for n, pages in ((0, 5), (3, 5), (6, 6), (9, 7)):
            table = torch.randperm(16)[: 2 * pages].view(2, pages).int()
            store = torch.randn(16, 2, 4, 8)
            yield Q, NEW, store, store, torch.tensor([n, n // 2]).int(), table

    assert_compiled_once(step, calls())


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model: fastattn against transformers' own eager attention, padding, sinks, windows, softcap."""
    softmax = torch.nn.functional.softmax  # which eager attention takes in float32, of float64 too

    def wide(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype is torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide)
    transformers = pytest.importorskip("transformers", minversion="5")
    from fastattn.compat.transformers import register

    register()
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    configs = {
        "llama": ("LlamaConfig", {}),
        "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}),
        "gemma2": ("Gemma2Config", {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    }
    name, extra = configs[kind]
    config = getattr(transformers, name)(**sizes, **extra)
    ids, seen = torch.randint(3, 40, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    seen[1, :5] = 0
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager") if kind == "gpt_oss" else None
    found: dict[str, list[Tensor]] = {}
    for name, implementation, dtype in (
        ("oracle", "eager", torch.float64),
        ("naive", "eager", torch.float32),
        ("ours", "fastattn", torch.float32),
    ):
        model.to(dtype).set_attn_implementation(implementation)
        for mask in (None, seen):
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=mask).logits
            found.setdefault(name, []).append(out if mask is None else out[seen.bool()])
    for ours, naive, oracle in zip(found["ours"], found["naive"], found["oracle"], strict=True):
        assert_close_to_oracle(ours, naive, oracle)
