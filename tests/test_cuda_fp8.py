"""The Hopper forward on e4m3 (TMA, wgmma of 8-bit operands), run on the emulator. No GPU takes part."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn import dispatch
from tests.cases import Case
from tests.fp8 import Quantised
from tests.tolerance import assert_close_to_oracle

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from tests.cuda_emulation.backend import EmulatedBackend, emulated_backend
from tests.cuda_emulation.hopper_cases import FP8 as CASES


@pytest.fixture(scope="session")
def emulated() -> EmulatedBackend:
    return emulated_backend()


@pytest.fixture(autouse=True)
def hopper(emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = dispatch.get_backend
    monkeypatch.setattr(dispatch, "get_backend", lambda name: emulated if name == "cuda" else real(name))
    monkeypatch.setenv("FASTATTN_EMULATED_CAPABILITY", "90")
    emulated.emulator.configure()
    emulated.emulator.statistics()
    yield
    emulated.emulator.configure()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, emulated: EmulatedBackend) -> None:
    """Weights are rounded to e4m3 before the second product, and so they are in the naive implementation."""
    call = Quantised.of(case.make(torch.bfloat16))
    naive, oracle = call.naive_e4m3(), call.oracle()
    first: dict[str, torch.Tensor] = {}
    for seed in (0, 1, 2):
        emulated.emulator.configure(seed=seed)
        emulated.emulator.statistics()
        actual = call.run(backend="cuda")
        assert emulated.emulator.statistics().wgmma > 0, "another forward ran"
        for name, value in actual.items():
            for head in range(case.heads_q):  # each by itself: values of one head are 100 times those of another
                of = f"{case.name} {name} of head {head}, order {seed}"
                assert_close_to_oracle(value[:, head], naive[name][:, head], oracle[name][:, head], of)
            assert torch.equal(first.setdefault(name, value), value), f"{name} depends on the order of threads"
