"""Attention on e4m3 tensors: quantisation, the contract where no kernel multiplies e4m3, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.cases import CASES, Case
from tests.devices import BACKENDS, device_of, device_or_skip
from tests.fp8 import Quantised
from tests.tolerance import assert_close_to_oracle

FP8 = torch.float8_e4m3fn
NAMES = (
    "one_query",
    "head_dim_17_v_5",
    "head_dim_192_v_128",
    "causal_more_queries",
    "window",
    "mqa_causal",
    "scale_negative",
    "mask_blind_rows",
    "bias_float32",
    "dropout_causal_gqa",
    "layout_bshd_gqa_causal",
    "layout_strided",
    "layout_expanded",
    "many",
)
INTERPRETED = ("causal_more_queries", "layout_strided")  # enough there: the kernels are those of test_contract.py
WIDENED = [
    pytest.param(backend, case, id=f"{backend}-{case.name}")
    for backend in BACKENDS
    for case in CASES
    if backend != "cuda"
    and case.name in (INTERPRETED if backend == "triton" and device_of(backend) != "cuda" else NAMES)
]
EIGHT = torch.randn(2, 4, 6, 16).to(FP8)


@pytest.mark.parametrize(("backend", "case"), WIDENED)
def test_widened(backend: str, case: Case) -> None:
    """The ordinary kernels on what the e4m3 tensors stand for: the weights are in no narrower type than ever."""
    device = device_or_skip(backend)
    call = Quantised.of(case.make(torch.bfloat16, device))
    actual, naive, oracle = call.run(backend=backend), call.naive(), call.oracle()
    for name, value in actual.items():
        for head in range(case.batch * case.heads_q):  # each by itself: values of one may be 100 times another's
            of = f"{backend} {case.name} {name} of head {head}"
            assert_close_to_oracle(*(x.flatten(0, 1)[head] for x in (value, naive[name], oracle[name])), of)


def test_quantised_tensors_and_their_scales() -> None:
    x = torch.randn(3, 6, 50, 20, dtype=torch.float64) * torch.logspace(-5, 5, 6).view(-1, 1, 1)
    eight, descale = fastattn.quantize_fp8(x, heads=3)
    assert eight.dtype is FP8 and eight.shape == x.shape
    assert descale.dtype is torch.float32 and descale.shape == (3, 3)
    largest = x.unflatten(1, (3, 2)).abs().amax((2, 3, 4))
    assert torch.equal(descale, largest.float() / 448)
    unit = descale.double().repeat_interleave(2, 1)[..., None, None]
    error = (eight.double() * unit - x).abs()
    bound = torch.maximum(x.abs() / 16, unit / 1024) * (1 + 2**-20)  # the quotient is rounded to float32 before
    assert (error <= bound).all() and (error > bound / 2).any()
    assert (eight.double().abs().amax((2, 3)).unflatten(1, (3, 2)).amax(2) == 448).all()

    zeros, descale = fastattn.quantize_fp8(torch.zeros(2, 5, 4).half())
    assert not zeros.float().any() and (descale > 0).all()
    assert fastattn.quantize_fp8(torch.zeros(1, 2, 0, 4))[1].shape == (1, 2)
    for wrong, error in ((torch.zeros(3, 4), "at least 3 dimensions"), (torch.zeros(1, 3, 4, 4), "must divide the 3")):
        with pytest.raises(ValueError, match=error):
            fastattn.quantize_fp8(wrong, heads=2)
    with pytest.raises(TypeError, match="floating"):
        fastattn.quantize_fp8(torch.zeros(1, 2, 3, 4, dtype=torch.int8))
    for heads in ("2", 2.0, True):
        with pytest.raises(TypeError, match="heads must be an int"):
            fastattn.quantize_fp8(torch.zeros(1, 2, 3, 4), heads=heads)
    for wrong in (torch.zeros(1, 2, 3, 4).to_sparse(), torch.nested.nested_tensor([torch.zeros(2, 3, 4)])):
        with pytest.raises(TypeError, match="x must be a dense"):
            fastattn.quantize_fp8(wrong)


def test_scales_broadcast() -> None:
    """One for all, of any shape; none, for 1; and leading dimensions as the tensors have them."""
    scale = torch.tensor(0.25)
    whole = fastattn.attention_fp8(EIGHT, EIGHT, EIGHT, q_descale=scale, v_descale=scale.view(1, 1))
    of_heads = scale.expand(2, 4)
    assert torch.equal(whole, fastattn.attention_fp8(EIGHT, EIGHT, EIGHT, q_descale=of_heads, v_descale=of_heads))
    one = torch.ones(1)
    assert torch.equal(
        fastattn.attention_fp8(EIGHT, EIGHT, EIGHT),
        fastattn.attention_fp8(EIGHT, EIGHT, EIGHT, q_descale=one, k_descale=one, v_descale=one),
    )
    shared = torch.rand(1, 4)  # of a key and value that the whole batch has in common
    assert torch.equal(
        fastattn.attention_fp8(EIGHT, EIGHT[:1], EIGHT[:1], k_descale=shared, v_descale=shared[0]),
        fastattn.attention_fp8(
            EIGHT, EIGHT[:1], EIGHT[:1], k_descale=shared.repeat(2, 1), v_descale=shared.repeat(2, 1)
        ),
    )
    scales = torch.rand(2, 4)
    expected = fastattn.attention_fp8(EIGHT, EIGHT, EIGHT, k_descale=scales)
    folded = [EIGHT.view(2, 1, 4, 6, 16)] * 3
    assert torch.equal(fastattn.attention_fp8(*folded, k_descale=scales.view(2, 1, 4)), expected.view(2, 1, 4, 6, 16))
    out, lse = fastattn.attention_fp8(*[EIGHT[1]] * 3, k_descale=scales[1], return_lse=True)
    assert torch.equal(out, expected[1]) and lse.shape == (4, 6)
    flat = fastattn.attention_fp8(*[EIGHT[1, 2]] * 3, k_descale=scales[1, 2])
    assert torch.equal(flat, expected[1, 2])


def test_empty_and_compiled() -> None:
    out, lse = fastattn.attention_fp8(EIGHT, EIGHT[:, :, :0], EIGHT[:, :, :0], return_lse=True)
    assert out.dtype is torch.bfloat16 and not out.any() and lse.isneginf().all()
    call: Callable[..., Tensor] = lambda *x: fastattn.attention_fp8(*x, causal=True)  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(EIGHT, EIGHT, EIGHT), call(EIGHT, EIGHT, EIGHT))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(EIGHT, EIGHT, EIGHT), compiled(EIGHT, EIGHT, EIGHT))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"key": EIGHT.half()}, TypeError, "share one dtype of float8_e4m3fn; got query float8_e4m3fn, key float16"),
        ({"query": EIGHT.to(torch.float8_e5m2)}, TypeError, "one dtype of float8_e4m3fn; got query float8_e5m2"),
        ({"q_descale": 0.5}, TypeError, "q_descale must be a torch.Tensor, got float"),
        ({"k_descale": torch.ones(2, 4).half()}, TypeError, "k_descale must be float32, got float16"),
        ({"v_descale": torch.ones(2)}, ValueError, r"broadcast to \(\.\.\., heads_k\) = \(2, 4\), got shape \(2,\)"),
        ({"v_descale": torch.ones(2, 4).requires_grad_()}, RuntimeError, "no gradient, and v_descale requires one"),
        ({"value": EIGHT.clone().requires_grad_()}, RuntimeError, "no gradient, and value requires one"),
        ({"bias": torch.zeros(6, 6, requires_grad=True)}, RuntimeError, "no gradient, and bias requires one"),
        ({"cu_seqlens": None}, TypeError, "attention_fp8 does not take cu_seqlens"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.attention_fp8(**{"query": EIGHT, "key": EIGHT, "value": EIGHT, **changed})


def test_operators_refuse_a_gradient() -> None:
    wants = EIGHT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no backend runs this call .*: cpu: a gradient of float8_e4m3fn inputs"):
        torch.ops.fastattn.attention_forward(
            wants, EIGHT, EIGHT, None, None, [], 0.25, None, None, 0, 0.0, True, False, ""
        )


def test_other_functions_point_here() -> None:
    with pytest.raises(TypeError, match="attention_fp8 takes float8_e4m3fn"):
        fastattn.attention(EIGHT, EIGHT, EIGHT)
    with pytest.raises(TypeError, match="attention_fp8 takes float8_e4m3fn, dense and uncached"):
        fastattn.attention_with_kv_cache(EIGHT, EIGHT, EIGHT)
    fastattn.attention_fp8(EIGHT, EIGHT, EIGHT)  # a call like it does not make the other one known
    with pytest.raises(TypeError, match="attention_fp8 takes float8_e4m3fn"):
        fastattn.attention(EIGHT, EIGHT, EIGHT)


def test_scales_are_checked_where_asked_for() -> None:
    scales = torch.ones(2, 4)
    scales[1, 2] = 0
    with fastattn.debug_checks(), pytest.raises(ValueError, match=r"k_descale\[1, 2\] is 0.0: must be positive"):
        fastattn.attention_fp8(EIGHT, EIGHT, EIGHT, k_descale=scales)


def test_the_table_of_errors_tells_the_kernel_from_the_naive() -> None:
    """Of values around 1, which sums that are cut lose most of: a model of tensor cores, not a measurement."""
    pytest.importorskip("rich")
    from benchmarks import e4m3

    assert e4m3.cut(torch.tensor([1 + 2**-13, -1 - 2**-14])).tolist() == [1 + 2**-13, -1.0]
    names = ("bfloat16", "widened", "weights", "short", "long", "naive")
    found = dict(zip(names, e4m3.errors(e4m3.KINDS[2], 2048).values(), strict=True))
    assert found["bfloat16"] < found["weights"] <= found["short"] < found["long"] < found["naive"]
    made = e4m3.table((256,))
    assert len(made.headers) == 4 and len(made.rows) == 6


def test_what_runs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    fastattn.explain(fastattn.attention_fp8, EIGHT, EIGHT, EIGHT, causal=True)
    text = capsys.readouterr().out
    assert "float8_e4m3fn on cpu" in text
    assert "cpu        RUNS: widened to float32 first (dtype float8_e4m3fn): tiled C++ kernel" in text
