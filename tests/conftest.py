"""Test processes that share the machine keep to a thread each; tests about threads set their own number."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastattn
from fastattn import modules

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
