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
from fastattn.backends import cuda
from tests.cases import CASES, Case
from tests.tolerance import assert_close_to_oracle

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from tests.cuda_emulation.backend import EmulatedBackend, emulated_backend

# Each case runs in one dtype, in turn, and its backward as well.
DTYPES = {case.name: (torch.float32, torch.bfloat16, torch.float16)[n % 3] for n, case in enumerate(CASES)}


@pytest.fixture(scope="session")
def emulated() -> EmulatedBackend:
    return emulated_backend()


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
    emulated.emulator.configure(seed=1)
    for name, value in inputs.run(fastattn.attention, backend="cuda").items():
        assert torch.equal(actual[name], value), f"{name} depends on the order of threads"


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("hidden_by", ["mask", "causal", "bias"])
def test_invisible_keys_reach_nothing(hidden_by: str, poison: float) -> None:
    """NaN and infinity in keys and values that no query sees leave out and all gradients as they were."""
    q, k, v, grad = (torch.randn(1, 2, 70, 20) for _ in range(4))
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


def test_a_nan_query_stays_in_its_row() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    q[0, 0, 5] = math.nan
    out = fastattn.attention(q, k, v, backend="cuda")
    assert out[0, 0, 5].isnan().all()
    assert out[0, 0, torch.arange(70) != 5].isfinite().all()


def test_bias_of_the_smallest_float_gives_the_mean() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    bias = torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, v, bias=bias, backend="cuda")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
