"""Test processes that share the machine keep to a thread each; tests about threads set their own number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fastattn
from fastattn import dispatch, modules

if TYPE_CHECKING:
    from tests.cuda_emulation.backend import EmulatedBackend

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every attention call that MultiHeadAttention makes."""
    seen: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return fastattn.attention(*args, **kwargs)

    monkeypatch.setattr(modules, "attention", spy)
    return seen


@pytest.fixture(scope="session")
def emulated() -> EmulatedBackend:
    """The CUDA backend on the emulator, built on first use: needs pybind11, ninja and a C++ compiler."""
    from tests.cuda_emulation.backend import emulated_backend

    return emulated_backend()


@pytest.fixture
def hopper(emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="cuda"`` is the emulated one, of compute capability 9.0."""
    real = dispatch.get_backend
    monkeypatch.setattr(dispatch, "get_backend", lambda name: emulated if name == "cuda" else real(name))
    monkeypatch.setenv("FASTATTN_EMULATED_CAPABILITY", "90")
    emulated.emulator.configure()
    emulated.emulator.statistics()
    yield
    emulated.emulator.configure()
