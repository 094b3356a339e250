"""The features of a call together: whole calls drawn at random, the definition in loops, the weights of a call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.call import combine_window
from tests.cases import Case, Inputs
from tests.devices import device_of
from tests.tolerance import FLOAT64, assert_close_to_oracle

DRAWN = {"reference": (10, 4), "cpu": (30, 4), "triton": (6, 1)}  # examples, and draws of each: Triton is interpreted


@st.composite
def drawn_cases(draw: st.DrawFn, largest: int) -> Case:
    """Any combination of features, in calls dense, packed, from a cache, and paged. Of a few numbers the naive error is
    a matter of luck: there are never fewer than 8 queries and 16 keys."""
    batch, heads_k = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    window = st.one_of(st.none(), st.integers(0, largest // 2))
    options: dict[str, Any] = {
        "batch": batch,
        "heads_q": heads_k * draw(st.integers(1, 3)),
        "heads_k": heads_k,
        "seqlen_q": draw(st.integers(8, largest)),
        "seqlen_k": draw(st.integers(16, 2 * largest)),
        "head_dim_qk": draw(st.sampled_from([8, 20, 64, largest])),
        "head_dim_v": draw(st.sampled_from([4, 16, 33, largest])),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(window, window))),
        "offset": draw(st.one_of(st.none(), st.integers(-10, largest))),
        "softmax_scale": draw(st.sampled_from([None, None, -0.2])),
        "mask": draw(st.one_of(st.none(), st.tuples(*[st.integers(0, 1)] * 4))),
        "bias": draw(st.one_of(st.none(), st.tuples(*[st.integers(0, 1)] * 4))),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.2])),
        "blind_rows": draw(st.booleans()),
        "layout": draw(st.sampled_from(["bhsd", "bshd", "strided", "sliced", "transposed", "expanded"])),
        "grad_layout": draw(st.sampled_from(["dense", "strided"])),
        "grad_lse": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "alibi": draw(st.sampled_from(["", "heads", "batch"])),
        "sinks": draw(st.booleans()),
        "sinks_dtype": draw(st.sampled_from([None, torch.float32])),
        "segments": draw(st.sampled_from(["", "shared", "batch"])),
        "num_splits": draw(st.sampled_from([0, 2])),
    }

    def lengths(longest: int, shortest: int = 0) -> tuple[int, ...]:
        some = st.integers(max(shortest, 8), longest)
        return tuple(draw(some if shortest else st.one_of(st.just(0), some)) for _ in range(batch))

    kind = draw(st.sampled_from(["dense", "dense", "used", "packed", "paged", "packed pages"]))
    if "packed" in kind:
        options["lengths_q"] = lengths(largest, 1)
        options["seqlen_q"] = max(options["lengths_q"])
    if kind == "packed":
        options["lengths_k"] = lengths(2 * largest, 1)
        options["seqlen_k"] = max(options["lengths_k"])
    if "page" in kind:
        options["page_size"] = draw(st.integers(1, 16))
    keys = options["seqlen_k"]
    if draw(st.booleans()):
        options["prefix"] = lengths(keys)
    if kind != "dense" and kind != "packed":
        options["used_k"] = lengths(keys)
        if "packed" not in kind and draw(st.booleans()):
            options["leftpad"] = tuple(draw(st.integers(0, n)) for n in options["used_k"])
            if draw(st.booleans()):  # what attention_with_kv_cache takes
                options |= {"offset": None, "dropout_p": 0.0}
    return Case("drawn", **options)


def spare_rows_of_few_keys(i: Inputs) -> Inputs:
    """No gradient comes from rows that see fewer than 8 keys.

    With one key, dP - delta is the difference of two equal sums, all rounding, but for autograd, which happens to take
    both in one order: naive is then exact, and the rule asks for the same.
    """
    offset = i.case.offset
    if offset is None:
        lengths = i.lengths["seqlens_q"], i.lengths["seqlens_k"]
        offset = reference.diagonals(i.case.seqlen_q, i.case.seqlen_k, *lengths)
    rest = {name: i.shaping[name] for name in ("q_segments", "k_segments", "prefix_lens")}
    window = combine_window(i.case.causal, i.case.window)
    visible = reference.visible_keys(
        i.case.seqlen_q, i.case.seqlen_k, window, offset, i.mask, i.bias, **rest, **i.lengths
    ).expand(i.case.batch, i.case.heads_q, -1, -1)
    many = visible.sum(-1) >= 8
    grad_lse = None if i.grad_lse is None else torch.where(many, i.grad_lse, 0)
    return replace(i, grad_out=torch.where(many[..., None], i.grad_out, 0), grad_lse=grad_lse)


@pytest.mark.parametrize("backend", DRAWN)
def test_whole_calls(backend: str) -> None:
    """Any call, each on a few draws that are held to the rule as one."""
    if device_of(backend) != "cpu":
        pytest.skip(
            "on a GPU nearly every draw would compile kernels for features of its own; there the case list stands in"
        )
    examples, draws = DRAWN[backend]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, *[torch.float64] * (backend != "triton")]

    @given(case=drawn_cases(33 if backend == "triton" else 80), dtype=st.sampled_from(dtypes))
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def run(case: Case, dtype: torch.dtype) -> None:
        inputs = [spare_rows_of_few_keys(case.make(dtype, seed=seed)) for seed in range(draws)]
        runs = [(i.run(fastattn.attention, backend=backend), i.naive(), i.oracle()) for i in inputs]
        for name in runs[0][0]:
            assert_close_to_oracle(*(torch.stack([run[kind][name] for run in runs]) for kind in range(3)), name)

    run()


def by_loops(i: Any) -> tuple[Tensor, Tensor]:
    """out and lse entry by entry, in Python's floats: the definition once more, sharing nothing with the reference."""
    c, s = i.case, i.shaping
    scale = c.head_dim_qk**-0.5
    left, right = c.window or (None, None)
    right = 0 if c.causal else right
    out = torch.zeros(c.batch, c.heads_q, c.seqlen_q, c.head_dim_v, dtype=torch.float64)
    lse = torch.full(out.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(c.batch):
        n = c.seqlen_k if c.used_k is None else c.used_k[b]
        offset = n - c.seqlen_q if c.offset is None else c.offset
        for h in range(c.heads_q):
            for row in range(c.seqlen_q):
                terms = []
                for j in range(n):
                    inside = (left is None or j >= row + offset - left) and (right is None or j <= row + offset + right)
                    inside = inside or (c.prefix is not None and j < c.prefix[b])
                    if not inside or (c.leftpad is not None and j < c.leftpad[b]):
                        continue
                    if c.segments and s["q_segments"][b % len(s["q_segments"]), row] != s["k_segments"][b, j]:
                        continue
                    k = i.k[b, h // (c.heads_q // c.heads_k), j]
                    t = scale * float(i.q[b, h, row] @ k)
                    t = c.softcap * math.tanh(t / c.softcap) if c.softcap else t
                    if c.alibi:
                        slope = s["alibi_slopes"][h] if c.alibi == "heads" else s["alibi_slopes"][b, h]
                        t -= float(slope) * abs(row + offset - j)
                    terms.append((t, i.v[b, h // (c.heads_q // c.heads_k), j]))
                total = sum(math.exp(t) for t, _ in terms)
                total += math.exp(float(i.sinks[h])) if c.sinks else 0.0
                if total:
                    lse[b, h, row] = math.log(total)
                    for t, v in terms:
                        out[b, h, row] += math.exp(t) / total * v
    return out, lse


LOOPS = [
    Case("causal_prefix", causal=True, prefix=(3, 0), softcap=1.0),
    Case("window_segments", window=(4, 1), segments="batch", sinks=True),
    Case("alibi_used", alibi="batch", used_k=(9, 4), causal=True, sinks=True),
    Case("leftpad", leftpad=(0, 5), used_k=(9, 7), window=(3, 0), alibi="heads"),
    Case("top_left", offset=0, causal=True, alibi="heads", softcap=0.5, prefix=(2, 6)),
]


@pytest.mark.parametrize("case", LOOPS, ids=lambda c: c.name)
def test_the_definition_in_loops(case: Case) -> None:
    i = replace(case, seqlen_q=7, seqlen_k=9, heads_q=4, head_dim_qk=3, head_dim_v=2).make(torch.float64)
    out, lse = by_loops(i)
    for got in (i.oracle(), i.run(fastattn.attention, backend="reference")):
        torch.testing.assert_close(got["out"], out, **FLOAT64)
        torch.testing.assert_close(got["lse"], lse, **FLOAT64)


def test_weights_and_statistics() -> None:
    i = Case(
        "s", heads_q=4, causal=True, softcap=1.0, alibi="batch", sinks=True, segments="batch", prefix=(5, 20)
    ).make(torch.float64)
    options = {"causal": True, "sinks": i.sinks, **i.shaping}
    out, lse = fastattn.attention(i.q, i.k, i.v, return_lse=True, **options)
    weights = fastattn.attention_weights(i.q, i.k, lse, **options)
    torch.testing.assert_close(weights @ i.v.repeat_interleave(2, 1), out, **FLOAT64)
    averaged = fastattn.attention_weights(i.q, i.k, lse, average_heads=True, **options)
    torch.testing.assert_close(averaged, weights.mean(1), **FLOAT64)
    found = fastattn.attention_statistics(i.q, i.k, lse, top_k=3, block=7, **options)
    torch.testing.assert_close(found.key_mass, weights.sum(2), **FLOAT64)
    torch.testing.assert_close(found.top_weights, weights.topk(3)[0], **FLOAT64)
    torch.testing.assert_close(weights.gather(-1, found.top_keys), found.top_weights, **FLOAT64)
    with pytest.raises(TypeError, match="does not take dropout_p"):
        fastattn.attention_statistics(i.q, i.k, lse, dropout_p=0.1)
