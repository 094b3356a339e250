"""Which backends the tests can run here, and on which device."""

from __future__ import annotations

import os

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
