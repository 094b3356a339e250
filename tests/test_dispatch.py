"""Who runs a call, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.spec import AttentionSpec

Q = torch.randn(1, 2, 5, 8)


def spec(**changes: object) -> AttentionSpec:
    sizes = {
        "batch": 1,
        "heads_q": 4,
        "heads_k": 2,
        "seqlen_q": 6,
        "seqlen_k": 8,
        "head_dim_qk": 16,
        "head_dim_v": 8,
        "dtype": torch.float32,
        "device": "cpu",
        "softmax_scale": 0.25,
    }
    return AttentionSpec(**{**sizes, **changes})  # type: ignore[arg-type]


def test_the_cpu_kernel_is_first_on_the_cpu() -> None:
    assert dispatch.select(spec()).name == "cpu"


def test_a_reason_sends_the_call_to_the_next() -> None:
    assert dispatch.get_backend("cpu").unsupported_reasons(spec(head_dim_qk=577)) == ["head_dim_qk 577: at most 576"]
    assert dispatch.select(spec(head_dim_qk=577)).name == "reference"


def test_a_named_backend_never_falls_back() -> None:
    wide = torch.randn(1, 1, 3, 577)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this call.*head_dim_qk 577"):
        fastattn.attention(wide, wide, wide, backend="cpu")
    with fastattn.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run this call"):
        fastattn.attention(wide, wide, wide)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="one of cpu, triton, cuda, reference, got 'tpu'"):
        fastattn.attention(Q, Q, Q, backend="tpu")
    with pytest.raises(ValueError, match="got 'tpu'"), fastattn.use_backend("tpu"):
        pass


def test_use_backend_nests_ends_and_keeps_to_its_thread() -> None:
    seen = []
    with fastattn.use_backend("reference"):
        with fastattn.use_backend(None):
            assert dispatch.chosen_backend() == ""
        thread = threading.Thread(target=lambda: seen.append(dispatch.chosen_backend()))
        thread.start()
        thread.join()
        assert dispatch.chosen_backend() == "reference"
    assert dispatch.chosen_backend() == "" and seen == [""]


def test_threads_that_leave_use_backend_in_any_order_leave_nothing_behind() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with fastattn.use_backend("reference"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    with fastattn.use_backend("cpu"):
        leave.set()
        thread.join()
        assert dispatch._chosen_when_tracing == "cpu"
    assert dispatch._chosen_when_tracing == ""


def test_the_backward_runs_on_the_forwards_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backend = dispatch.get_backend("reference")
    backward = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *a: (calls.append(1), backward(*a))[1])
    q = Q.clone().requires_grad_()
    with fastattn.use_backend("reference"):
        out = fastattn.attention(q, q, q)
    out.sum().backward()
    assert calls == [1]


def test_explain_names_what_runs_and_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    fastattn.explain(Q, Q, Q, causal=True)
    text = capsys.readouterr().out
    assert "causal (offset 0)" in text and "cpu        RUNS: " in text and "cuda       no: " in text
    fastattn.explain(Q, Q, Q, backend="cuda")
    assert "nothing runs" in capsys.readouterr().out
    fastattn.explain(Q[:, :, :0], Q, Q)
    assert "runs nothing" in capsys.readouterr().out
    fastattn.explain()
    assert "cpu        available" in capsys.readouterr().out
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'key' and 'value'"):
        fastattn.explain(Q)


def test_explain_tells_of_any_function_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rows, cu = torch.randn(7, 2, 8, requires_grad=True), torch.tensor([0, 5, 7], dtype=torch.int32)
    fastattn.explain(fastattn.attention_varlen, rows, rows, rows, cu, causal=True, softcap=2.0)
    text = capsys.readouterr().out
    assert "batch 2" in text and "packed sequences (7 queries, 7 keys)" in text and "forward and backward" in text
    cache = torch.zeros(1, 2, 9, 8)
    held = torch.tensor([3])
    fastattn.explain(fastattn.attention_with_kv_cache, Q, cache, cache, Q, Q, cache_seqlens=held, window=(4, 0))
    text = capsys.readouterr().out
    assert "keys 9" in text and "seqused_k" in text and "window (4, 0)" in text and "cpu        RUNS: " in text
    assert not cache.any()
    layer, state = fastattn.MultiHeadAttention(8, 2, dropout=0.1), torch.get_rng_state()
    fastattn.explain(layer, Q[0], Q[0], Q[0], need_weights=False)
    assert "dropout 0.1" in capsys.readouterr().out and torch.equal(torch.get_rng_state(), state)
    fastattn.explain(torch.nn.Linear(8, 8), Q)
    assert "no attention call" in capsys.readouterr().out
    with pytest.raises(ValueError, match="room for 9 keys"):
        fastattn.explain(fastattn.attention_with_kv_cache, Q, cache, cache, Q, Q, cache_seqlens=8)


def test_explain_of_nested_tensors_and_of_caches_that_it_leaves_as_they_were(capsys: pytest.CaptureFixture) -> None:
    x = torch.nested.nested_tensor_from_jagged(torch.randn(7, 2, 8), torch.tensor([0, 5, 7])).transpose(1, 2)
    for function in (fastattn.attention, fastattn.scaled_dot_product_attention):
        fastattn.explain(function, x, x, x)
        assert "batch 2, heads 2, queries 5" in capsys.readouterr().out
    for cache in (fastattn.KVCache(30), fastattn.PagedKVCache(30, 2)):
        for filled in (False, True):
            before = {name: x[:] if isinstance(x, list) else x for name, x in vars(cache).items()}
            fastattn.explain(lambda cache=cache: [cache.attend(Q, Q, Q) for _ in range(2)])
            text = capsys.readouterr().out
            assert text.count("RUNS: ") == 2
            if filled:
                paged = isinstance(cache, fastattn.PagedKVCache)
                change, rows = (cache.free, 0) if paged else (cache.reorder, torch.tensor([0]))
                bits = [x.view(torch.int32).clone() for x in (cache.key, cache.value)]  # NaN may stand where no key is

                def changed(cache=cache, change=change, rows=rows) -> None:
                    cache.lengths = cache.lengths - 1
                    change(rows)
                    cache.attend(Q, Q, Q)

                fastattn.explain(changed)
                assert capsys.readouterr().out.count("RUNS: ") == 1
                now = (x.view(torch.int32) for x in (cache.key, cache.value))
                assert all(map(torch.equal, now, bits))
            assert all(x is vars(cache)[name] or x == vars(cache)[name] for name, x in before.items())
            if not filled:
                cache.attend(Q, Q, Q)


def test_explain_leaves_other_threads_alone() -> None:
    cache = fastattn.KVCache(30)

    def elsewhere() -> None:
        thread = threading.Thread(target=cache.attend, args=(Q, Q, Q))
        thread.start()
        thread.join()

    fastattn.explain(elsewhere)
    assert cache.lengths == 5 and cache.key is not None and torch.equal(cache.key[:, :, :5], Q)


def test_flops_count_visible_pairs() -> None:
    assert spec().flops() == 2 * 4 * 48 * 24
    assert spec(window=(None, 0), offset=2).visible_pairs() == 3 + 4 + 5 + 6 + 7 + 8
    assert spec(window=(1, 1)).visible_pairs() == 2 + 3 * 5
    equal = spec(head_dim_v=16)
    assert equal.flops("backward") == 2.5 * equal.flops()
    with pytest.raises(ValueError, match="direction"):
        spec().flops("sideways")


def test_import_is_light() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastattn
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "numpy", "matplotlib", "rich", "transformers", "tokenizers", "safetensors"}, loaded
assert "triton" not in sys.modules and "fastattn.transformer" not in sys.modules and not torch.cuda.is_initialized()
assert fastattn.transformer.Transformer
try:
    fastattn.transformers
except AttributeError as error:
    assert "no attribute 'transformers'" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
