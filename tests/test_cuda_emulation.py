"""The CUDA kernels, compiled as ordinary C++ and run on the CPU, over the one case list. No GPU takes part."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from tests.cases import CASES, Case, Inputs
from tests.tolerance import assert_close_to_oracle

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("CUDA kernels are compiled for the emulator: no C++ compiler here", allow_module_level=True)

from tests.cuda_emulation.backend import EmulatedBackend
from tests.cuda_emulation.shapes import SHAPES, SIMT_SHAPES
from tests.cuda_emulation.visibility import EDGES, Edge, check_edge

# Each case runs in one dtype, in turn, and its backward as well.
DTYPES = {case.name: (torch.float32, torch.bfloat16, torch.float16)[n % 3] for n, case in enumerate(CASES)}


@pytest.fixture(autouse=True)
def use_emulation(emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = dispatch.get_backend
    monkeypatch.setattr(dispatch, "get_backend", lambda name: emulated if name == "cuda" else real(name))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    emulated.emulator.configure()
    yield
    emulated.emulator.configure()
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, emulated: EmulatedBackend) -> None:
    inputs = case.make(DTYPES[case.name])
    if reasons := emulated.unsupported_reasons(inputs.spec()):
        with pytest.raises(RuntimeError, match=re.escape(reasons[0])):
            inputs.run(fastattn.attention, backend="cuda")
        return
    actual, naive, oracle = inputs.run(fastattn.attention, backend="cuda"), inputs.naive(), inputs.oracle()
    for name, value in actual.items():
        assert_close_to_oracle(value, naive[name], oracle[name], f"{case.name} {name}")
    for seed in (1, 2):
        emulated.emulator.configure(seed)
        for name, value in inputs.run(fastattn.attention, backend="cuda").items():
            assert torch.equal(actual[name], value), f"{name} depends on the order of threads"


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_tensor_core_tiles(case: Case, emulated: EmulatedBackend) -> None:
    """Three orders of warps and blocks, dQ by atomics and in one order; no bank conflicts of ldmatrix."""
    emulated.emulator.statistics()  # counts from here on
    runs = ((torch.bfloat16, 0, True), (torch.float16, 1, False), (torch.bfloat16, 3, False))
    for dtype, seed, deterministic in runs:
        check_tiles(case.make(dtype), emulated, seed, deterministic)
    assert emulated.emulator.statistics().ldmatrix_conflicts == 0


@pytest.mark.parametrize("case", SIMT_SHAPES, ids=lambda c: c.name)
def test_simt_tiles(case: Case, emulated: EmulatedBackend) -> None:
    for seed in (0, 1, 3):
        check_tiles(case.make(torch.float32), emulated, seed, True)


def check_tiles(inputs: Inputs, emulated: EmulatedBackend, seed: int, deterministic: bool) -> None:
    emulated.emulator.configure(seed=seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    actual, naive, oracle = inputs.run(fastattn.attention, backend="cuda"), inputs.naive(), inputs.oracle()
    for name, value in actual.items():
        assert_close_to_oracle(value, naive[name], oracle[name], f"{inputs.case.name} {name}, seed {seed}")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("hidden_by", ["mask", "causal", "bias"])
def test_invisible_keys_reach_nothing(hidden_by: str, poison: float, dtype: torch.dtype) -> None:
    """NaN and infinity in keys and values that no query sees leave out and all gradients as they were."""
    dim = 20 if dtype is torch.float32 else 32
    q, k, v, grad = (torch.randn(1, 2, 70, dim, dtype=dtype) for _ in range(4))
    mask, bias = None, None
    if hidden_by == "mask":
        mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
        mask[..., 66:] = False
    if hidden_by == "bias":
        bias = torch.zeros(1, 1, 1, 70)
        bias[..., 66:] = -math.inf
    offset = -4 if hidden_by == "causal" else None

    def run(k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(
            *leaves, mask=mask, bias=bias, causal=hidden_by == "causal", offset=offset, backend="cuda"
        )
        return [out, *torch.autograd.grad(out, leaves, grad)]

    clean = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 66:], v[:, :, 66:] = poison, poison
    for before, after in zip(clean, run(k, v), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_value_reaches_the_queries_that_see_it(poison: float) -> None:
    """On the diagonal tile, where half of the queries see the poisoned key and half do not."""
    q, k, v, grad = (torch.randn(1, 1, 70, 32, dtype=torch.float16) for _ in range(4))

    def run(v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, causal=True, backend="cuda")
        return [out, torch.autograd.grad(out, leaves, grad)[0]]

    clean = run(v)
    v = v.clone()
    v[0, 0, 40, 3] = poison
    for before, after in zip(clean, run(v), strict=True):
        assert torch.equal(before[0, 0, :40], after[0, 0, :40])
    out = run(v)[0][0, 0, 40:]
    assert torch.equal(out[:, 3].nan_to_num(nan=7.0), torch.full_like(out[:, 3], poison).nan_to_num(nan=7.0))
    assert torch.equal(out[:, 4:], clean[0][0, 0, 40:, 4:])


def test_a_nan_query_stays_in_its_row() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    q[0, 0, 5] = math.nan
    out = fastattn.attention(q, k, v, backend="cuda")
    assert out[0, 0, 5].isnan().all()
    assert out[0, 0, torch.arange(70) != 5].isfinite().all()


@pytest.mark.parametrize("kernels", ["float32", "bfloat16", "bfloat16_general"])
@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.name)
def test_nan_shows_where_it_is_seen(edge: Edge, kernels: str) -> None:
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        dtype = torch.float32 if kernels == "float32" else torch.bfloat16
        check_edge(edge, dtype, general=kernels.endswith("general"))


def test_bias_of_the_smallest_float_gives_the_mean() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    bias = torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, v, bias=bias, backend="cuda")
    naive, oracle = (x.mean(2, keepdim=True).expand_as(out) for x in (v, v.double()))
    assert_close_to_oracle(out, naive, oracle)
