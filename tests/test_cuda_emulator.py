"""The emulator: what each wrapper computes, and that it notices what it says it notices."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from tests.cuda_emulation import probe as probing
from tests.cuda_emulation.backend import Emulator, emulated_backend
from tests.cuda_emulation.probe import Probe

PROBES = probing.probes()


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return emulated_backend().emulator


def emulate(emulator: Emulator, probe: Probe) -> torch.Tensor:
    out = torch.full_like(probe.expected, -1)
    emulator.forget()
    emulator.register(probe.words, "in")
    emulator.register(out, "out", writable=True, initialised=False)
    try:
        probing.run(probing.declare(emulator.library), probe, out)
    finally:
        emulator.forget()
    return out


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_wrapper(probe: Probe, emulator: Emulator) -> None:
    """What a wrapper computes under emulation, against its definition written in torch."""
    probe.check(emulate(emulator, probe), probe.expected, "its definition")
