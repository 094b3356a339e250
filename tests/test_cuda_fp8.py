"""The Hopper forward on e4m3 (TMA, wgmma of 8-bit operands), run on the emulator. No GPU takes part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch

import fastattn
from fastattn import dispatch, reference
from fastattn.backends import cuda
from fastattn.backends.widened import Widened
from tests.cases import Case
from tests.fp8 import Quantised
from tests.tolerance import assert_close_to_oracle, assert_rms_explained

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("CUDA kernels are compiled for the emulator: no C++ compiler here", allow_module_level=True)

from tests.cuda_emulation.backend import EmulatedBackend
from tests.cuda_emulation.hopper_borders import REFUSED, Layout, check_refused
from tests.cuda_emulation.hopper_cases import FP8 as CASES
from tests.cuda_emulation.hopper_cases import TURNS

pytestmark = pytest.mark.usefixtures("hopper")

T = TypeVar("T")


def run_e4m3(
    emulated: EmulatedBackend, function: Callable[..., T], *tensors: torch.Tensor, anew: bool = False, **options: Any
) -> T:
    """``function`` on the CUDA backend, which would otherwise widen in silence what its e4m3 kernel does not take."""
    emulated.emulator.statistics()
    found = function(*tensors, backend="cuda", **options)
    used = emulated.emulator.statistics()
    assert used.wgmma > 0, "another forward ran"
    if not anew:
        assert used.switches < TURNS * used.wgmma, "rows were computed anew, as the kernel does where one is NaN"
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, emulated: EmulatedBackend) -> None:
    """The rule of 16-bit calls, though weights are rounded to e4m3 before the second product; and on average no further
    from the oracle than that rounding explains."""
    call = Quantised.of(case.make(torch.bfloat16))
    naive, rounded, oracle = call.naive(), call.naive_e4m3(), call.oracle()
    first: dict[str, torch.Tensor] = {}
    for seed in (0, 1, 2):
        emulated.emulator.configure(seed=seed)
        for name, value in run_e4m3(emulated, call.run).items():
            for head in range(case.batch * case.heads_q):  # each by itself: values of one may be 100 times another's
                of = f"{case.name} {name} of head {head}, order {seed}"
                found, close, model, true = (
                    x.flatten(0, 1)[head] for x in (value, naive[name], rounded[name], oracle[name])
                )
                assert_close_to_oracle(found, close, true, of)
                assert_rms_explained(found, model, true, of)
            assert torch.equal(first.setdefault(name, value), value), f"{name} depends on the order of threads"


@pytest.mark.parametrize("dim", [64, 256])
def test_tiles_that_see_nothing_do_not_overtake_the_loads(dim: int, emulated: EmulatedBackend) -> None:
    case = Case("blind", 1, 3, 3, 700, 40, dim, dim, causal=True)
    call = Quantised.of(case.make(torch.bfloat16))
    naive, oracle = call.naive(), call.oracle()
    for seed in range(4):
        emulated.emulator.configure(seed)
        for name, value in run_e4m3(emulated, call.run).items():
            assert_close_to_oracle(value, naive[name], oracle[name], f"{name}, order {seed}")


@pytest.mark.parametrize("dim", [64, 128])
def test_a_broken_key_reaches_the_queries_that_see_it_alone(dim: int, emulated: EmulatedBackend) -> None:
    """NaN in a key, and one element of a value: e4m3 has no infinity."""
    call = Quantised.of(Case("broken", 1, 2, 1, 200, 200, dim, dim, causal=True, offset=-40).make(torch.bfloat16))
    naive, oracle = call.naive(), call.oracle()
    call.v.view(torch.uint8)[0, 0, 70, 3], call.k.view(torch.uint8)[0, 0, 150] = 0x7F, 0x7F
    out, lse = run_e4m3(emulated, call.run, anew=True).values()
    broken = torch.zeros(200, dim, dtype=torch.bool)
    broken[110:, 3], broken[190:] = True, True
    assert torch.equal(out.isnan(), broken.expand_as(out)) and torch.equal(lse.isnan(), broken[:, 0].expand_as(lse))
    out[broken.expand_as(out)] = naive["out"][broken.expand_as(out)]
    for head in range(2):
        assert_close_to_oracle(out[:, head], naive["out"][:, head], oracle["out"][:, head], f"head {head}")


def test_scales_that_vanish_together(emulated: EmulatedBackend) -> None:
    """A head of zeros has the smallest scale there is; two of them multiply to 0, and every key counts the same."""
    (q, q_descale), (v, v_descale) = (
        fastattn.quantize_fp8(x) for x in (torch.zeros(1, 1, 20, 64), torch.randn(1, 1, 20, 64))
    )
    scales = {"q_descale": q_descale, "k_descale": q_descale, "v_descale": v_descale}
    out, lse = run_e4m3(emulated, fastattn.attention_fp8, q, q, v, **scales, causal=True, return_lse=True)
    mean = (v.double() * v_descale.double()[..., None, None]).cumsum(2) / torch.arange(1, 21)[:, None]
    assert_close_to_oracle(out, mean.bfloat16(), mean)
    assert_close_to_oracle(lse, mean[..., 0].float(), torch.arange(1.0, 21).double().log().view(1, 1, -1))


def test_many_small_weights_count_beside_a_large_one(emulated: EmulatedBackend) -> None:
    """800 keys of weight 2^-10.1 beside one of weight 1: e4m3 has no number below 2^-9, but 2^8 times them is in it."""
    q, k = (torch.zeros(1, 1, n, 64) for n in (1, 801))
    q[..., 0], k[:, :, 0, 0] = 8, 7
    v = 1 + torch.rand(1, 1, 801, 64)
    v[:, :, 0] = -1
    eight = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    wide = [x.double() for x in eight]
    want = reference.attention(*wide, softmax_scale=1 / 8)
    assert want.min() > 0, "without the small ones it is -1"
    found = run_e4m3(emulated, fastattn.attention_fp8, *eight, softmax_scale=1 / 8)
    assert_close_to_oracle(found, want.bfloat16(), want)


def test_other_layouts_are_copied(emulated: EmulatedBackend) -> None:
    """Strides that TMA cannot step along, a start that is no multiple of 16 bytes, a broadcast batch."""
    whole = torch.randn(2, 40, 2, 65).to(torch.float8_e4m3fn)
    q, k = whole[..., 1:].transpose(1, 2), whole[:1, ..., :64].transpose(1, 2)
    v = torch.randn(2, 2, 64, 40).to(torch.float8_e4m3fn).mT
    actual = run_e4m3(emulated, fastattn.attention_fp8, q, k.expand(2, -1, -1, -1), v)
    dense = [x.contiguous() for x in (q, k.expand(2, -1, -1, -1), v)]
    assert torch.equal(actual, run_e4m3(emulated, fastattn.attention_fp8, *dense))
    assert actual.stride(1) < actual.stride(2)


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.name)
def test_the_kernel_refuses_what_it_could_not_read(layout: Layout) -> None:
    check_refused(layout)


def test_what_runs_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], emulated: EmulatedBackend
) -> None:
    def said(dim: int = 64, **options: Any) -> str:
        eight = torch.randn(1, 1, 33, dim).to(torch.float8_e4m3fn)
        fastattn.explain(fastattn.attention_fp8, eight, eight, eight, backend="cuda", **options)
        text = capsys.readouterr().out
        assert "not yet run on a GPU" in text
        return text

    assert "cuda       RUNS: Hopper (sm_90a: TMA, wgmma of e4m3), forward, tiles of 128 queries x 128 keys" in said()
    assert "persistent, summed in float32" in said(causal=True)
    masked = said(mask=torch.ones(33, 33, dtype=torch.bool), softcap=2.0)
    assert "widened to float32 first (a mask with float8_e4m3fn; softcap with float8_e4m3fn): general SIMT" in masked
    assert "widened to float32 first (head_dim_qk 72: must be a multiple of 16, at most 256)" in said(72)
    assert "widened to float32 first (softmax_scale -1: must be positive)" in said(softmax_scale=-1.0)
    monkeypatch.setenv("FASTATTN_EMULATED_CAPABILITY", "80")
    assert "widened to float32 first (compute capability is not 9.0, which the e4m3 kernel is for)" in said(48)


def test_on_a_gpu_the_kernel_for_e4m3_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order for other calls; and where it has a reason against a call, that order again."""
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    made = Case("any", head_dim_qk=64, head_dim_v=64).make(torch.bfloat16).spec()
    spec = replace(made, dtype=torch.float8_e4m3fn, needs_grad=False, device="cuda")
    usual = tuple(name for name in dispatch.ORDER["cuda"] if name != "cuda")
    assert dispatch.order(spec) == ("cuda", *usual)
    assert isinstance(dispatch.taker("cuda", spec), EmulatedBackend)
    for other in (replace(spec, mask=(1, 1, 1, 1)), replace(spec, softcap=1.0), replace(spec, head_dim_v=40)):
        assert dispatch.order(other) == dispatch.ORDER["cuda"]
        assert isinstance(dispatch.taker("cuda", other), Widened)
