"""Which backend runs a call, and why: ``select`` decides, ``describe`` tells."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from fastattn import measured
from fastattn.backends.base import Backend
from fastattn.backends.widened import Widened
from fastattn.spec import FP8, AttentionSpec

_CLASSES = {
    "cpu": ("fastattn.backends.cpu", "CpuBackend"),
    "triton": ("fastattn.backends.triton", "TritonBackend"),
    "cuda": ("fastattn.backends.cuda", "CudaBackend"),
    "reference": ("fastattn.backends.reference", "ReferenceBackend"),
}

#: Who is asked first, per device type, where ``measured.FASTEST`` says nothing about the call. Triton stands before the
#: CUDA kernels; neither has run on a GPU yet, so this order has not been measured. On the CPU `benchmarks/` shows the
#: C++ kernels ahead of the reference in every row; Triton there is the interpreter, for checking only.
ORDER = {
    "cpu": ("cpu", "reference", "triton"),
    "cuda": ("triton", "cuda", "reference"),
}

_chosen: ContextVar[str] = ContextVar("fastattn_backend", default="")
_chosen_when_tracing = ""  # torch.compile cannot read a ContextVar; it reads this, and guards on it
_open_blocks: list[list[str]] = []  # of `use_backend`, in all threads; a list is told from others by identity


def get_backend(name: str) -> Backend:
    """The backend of that name, made (and its kernels' module imported) when first asked for.

    Raises:
        ValueError: no backend has that name.
    """
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"backend must be one of {', '.join(_CLASSES)}, got {name!r}")
    return _make(name)


@cache
def _make(name: str) -> Backend:
    module, cls = _CLASSES[name]
    backend: Backend = getattr(importlib.import_module(module), cls)()
    return backend


def backends() -> dict[str, Backend]:
    """Every backend by name, whether or not it can run on this machine (``backend.unavailable_reason()``)."""
    return {name: get_backend(name) for name in _CLASSES}


@cache
def _architecture() -> str:
    """The current GPU, as ``measured.FASTEST`` names it; "" for none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _fastest(spec: AttentionSpec, direction: str) -> str | None:
    """What was measured to be fastest for such calls, None where nothing was: at the next larger head_dim (or the
    largest), and at the next smaller number of keys (or the smallest)."""
    if spec.dtype is FP8:  # the only kernel that multiplies e4m3: elsewhere the tensors are widened first
        return "cuda" if spec.device == "cuda" and not reasons_against(get_backend("cuda"), spec) else None
    if spec.device != "cuda" or not measured.FASTEST or spec.dtype not in (torch.float16, torch.bfloat16):
        return None
    if spec.mask or spec.bias or spec.dropout_p or spec.features():
        return None
    kind = "decode" if spec.seqlen_q <= 16 else "full" if spec.window == (None, None) else "causal"
    by_dim = measured.FASTEST.get(_architecture(), {}).get((direction, kind))
    if not by_dim:
        return None
    asked = max(spec.head_dim_qk, spec.head_dim_v)
    steps = by_dim[min((dim for dim in by_dim if dim >= asked), default=max(by_dim))]
    return next((name for keys, name in reversed(steps) if keys <= spec.seqlen_k), steps[0][1])


def order(spec: AttentionSpec, direction: str = "forward") -> tuple[str, ...]:
    """Who is asked, in turn, for this direction of the call."""
    stated = ORDER.get(spec.device, ("reference",))
    first = _fastest(spec, direction)
    return stated if first is None else (first, *(name for name in stated if name != first))


def reasons_against(backend: Backend, spec: AttentionSpec) -> list[str]:
    """Why this backend cannot run this call here; empty when it can."""
    unavailable = backend.unavailable_reason()
    return [unavailable] if unavailable else backend.unsupported_reasons(spec)


def taker(name: str, spec: AttentionSpec) -> Backend:
    """The backend of that name as it takes this call: e4m3 tensors are widened where it has no kernel for them."""
    backend = get_backend(name)
    if spec.dtype is FP8 and (reasons := reasons_against(backend, spec)):
        return Widened(backend, reasons)
    return backend


def select(spec: AttentionSpec, backend: str = "", direction: str = "forward") -> Backend:
    """The backend that runs this direction of the call: the one named, or the first of :func:`order` that has no reason
    against it.

    Raises:
        RuntimeError: a backend was named and cannot run the call; the message gives its reasons. There is no fallback.
            Or none can: a gradient of e4m3 tensors, which :func:`fastattn.attention_fp8` refuses before.
        ValueError: no backend has that name.
    """
    if backend:
        chosen = taker(backend, spec)
        if reasons := reasons_against(chosen, spec):
            raise RuntimeError(f"backend {backend!r} cannot run this call ({spec}): {'; '.join(reasons)}")
        return chosen
    against = []
    for name in order(spec, direction):
        chosen = taker(name, spec)
        if not (reasons := reasons_against(chosen, spec)):
            return chosen
        against.append(f"{name}: {', '.join(reasons)}")
    raise RuntimeError(f"no backend runs this call ({spec}): {'; '.join(against)}")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, run every attention call on the named backend, forward and backward; never fall back.

    Where that backend has no kernel for e4m3 tensors, it takes them widened: see :func:`fastattn.attention_fp8`.

    Args:
        name: "cpu", "triton", "cuda" or "reference"; None returns to automatic choice.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: (from a call inside the block) the backend cannot run that call; the message says why.
    """
    if name is not None:
        get_backend(name)
    global _chosen_when_tracing
    block = [name or ""]
    token = _chosen.set(block[0])
    _open_blocks.append(block)
    _chosen_when_tracing = block[0]
    try:
        yield
    finally:
        _chosen.reset(token)
        _open_blocks[:] = [other for other in _open_blocks if other is not block]  # threads end in any order
        _chosen_when_tracing = _open_blocks[-1][0] if _open_blocks else ""


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
    asked = [backend] if backend else list(order(spec))
    back = "" if backend or not (spec.needs_grad or spec.needs_bias_grad) else select(spec, "", "backward").name
    runs = None
    for name in [*asked, *(n for n in _CLASSES if n not in asked)]:
        candidate = taker(name, spec)
        reasons = reasons_against(candidate, spec)
        if reasons:
            text = f"no: {'; '.join(reasons)}"
        elif runs is None and name in asked:
            runs = name
            part = "RUNS" if back in ("", name) else "RUNS the forward"
            text = f"{part}: {candidate.configuration(spec)}"
        elif name == back:
            text = f"RUNS the backward: {candidate.configuration(spec)}"
        else:
            text = f"could: {candidate.configuration(spec)}"
        lines.append(f"  {name:<10} {text}")
    if runs is None:
        lines.append(f"  nothing runs: backend {backend!r} was asked for and has reasons against it")
    return "\n".join(lines)
