"""Which backend runs a call, and why: ``select`` decides, ``describe`` tells."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from fastattn.backends.base import Backend
from fastattn.spec import AttentionSpec

_CLASSES = {
    "cpu": ("fastattn.backends.cpu", "CpuBackend"),
    "triton": ("fastattn.backends.triton", "TritonBackend"),
    "cuda": ("fastattn.backends.cuda", "CudaBackend"),
    "reference": ("fastattn.backends.reference", "ReferenceBackend"),
}

#: Who is asked first, per device type. Triton stands before the CUDA kernels; neither has run on a GPU yet, so this
#: order has not been measured. On the CPU `benchmarks/` shows the C++ kernels ahead of the reference in every row;
#: Triton there is the interpreter, for checking only.
ORDER = {
    "cpu": ("cpu", "reference", "triton"),
    "cuda": ("triton", "cuda", "reference"),
}

_chosen: ContextVar[str] = ContextVar("fastattn_backend", default="")
_chosen_when_tracing = ""  # torch.compile cannot read a ContextVar; it reads this, and guards on it


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name, made (and its kernels' module imported) when first asked for.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in _CLASSES:
        raise ValueError(f"backend must be one of {', '.join(_CLASSES)}, got {name!r}")
    module, cls = _CLASSES[name]
    backend: Backend = getattr(importlib.import_module(module), cls)()
    return backend


def backends() -> dict[str, Backend]:
    """Every backend by name, whether or not it can run on this machine (``backend.unavailable_reason()``)."""
    return {name: get_backend(name) for name in _CLASSES}


def reasons_against(backend: Backend, spec: AttentionSpec) -> list[str]:
    """Why this backend cannot run this call here; empty when it can."""
    unavailable = backend.unavailable_reason()
    return [unavailable] if unavailable else backend.unsupported_reasons(spec)


def select(spec: AttentionSpec, backend: str = "") -> Backend:
    """The backend that runs this call: the one named, or the first of the device's order that has no reason against it.

    Raises:
        RuntimeError: a backend was named and cannot run the call; the message gives its reasons. There is no fallback.
        ValueError: no backend has that name.
    """
    if backend:
        chosen = get_backend(backend)
        if reasons := reasons_against(chosen, spec):
            raise RuntimeError(f"backend {backend!r} cannot run this call ({spec}): {'; '.join(reasons)}")
        return chosen
    for name in ORDER.get(spec.device, ("reference",)):
        if not reasons_against(get_backend(name), spec):
            return get_backend(name)
    raise AssertionError("the reference backend runs everything")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, run every attention call on the named backend, forward and backward; never fall back.

    Args:
        name: "cpu", "triton", "cuda" or "reference"; None returns to automatic choice.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: (from a call inside the block) the backend cannot run that call; the message says why.
    """
    if name:
        get_backend(name)
    global _chosen_when_tracing
    token, before = _chosen.set(name or ""), _chosen_when_tracing
    _chosen_when_tracing = name or ""
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_when_tracing = before


def chosen_backend() -> str:
    """The name that the innermost ``use_backend`` gave, or ""."""
    return _chosen_when_tracing if torch.compiler.is_compiling() else _chosen.get()


def describe(spec: AttentionSpec | None, backend: str = "") -> str:
    """The text of :func:`fastattn.explain`: what runs, how it is configured, and why the others do not."""
    if spec is None:
        lines = ["backends on this machine"]
        for name, candidate in backends().items():
            lines.append(f"  {name:<10} {candidate.unavailable_reason() or 'available'}")
        return "\n".join(lines)
    lines = [f"attention: {spec}"]
    if spec.is_empty:
        return "\n".join([*lines, "  runs nothing: a size is 0, the output is empty or zero"])
    order = [backend] if backend else list(ORDER.get(spec.device, ("reference",)))
    runs = None
    for name in [*order, *(n for n in _CLASSES if n not in order)]:
        candidate = get_backend(name)
        reasons = reasons_against(candidate, spec)
        if reasons:
            text = f"no: {'; '.join(reasons)}"
        elif runs is None and name in order:
            runs, text = name, f"RUNS: {candidate.configuration(spec)}"
        else:
            text = f"could: {candidate.configuration(spec)}"
        lines.append(f"  {name:<10} {text}")
    if runs is None:
        lines.append(f"  nothing runs: backend {backend!r} was asked for and has reasons against it")
    return "\n".join(lines)
