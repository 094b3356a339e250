"""Which backends the tests can run here, and on which device."""

from __future__ import annotations

import os

import pytest
import torch

from fastattn.dispatch import get_backend

BACKENDS = ("reference", "cpu", "triton", "cuda")


def device_of(backend: str) -> str | None:
    """The device that a backend's tests use, or None where it cannot run at all."""
    if get_backend(backend).unavailable_reason():
        return None
    if backend in ("reference", "cpu"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1" else None


def device_or_skip(backend: str) -> str:
    device = device_of(backend)
    if device is None:
        reason = get_backend(backend).unavailable_reason() or "no GPU, and TRITON_INTERPRET=1 is not set"
        pytest.skip(f"{backend} cannot run here: {reason}")
    return device
