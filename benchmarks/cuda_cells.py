"""The cells of ``python -m benchmarks cuda``, who is timed in each, and the check before the timing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks import fa3
from benchmarks.check import compare, worst
from benchmarks.peers import Case
from fastattn import dispatch
from fastattn.backends import cuda
from fastattn.backends.native import pack_call
from fastattn.spec import FP8, AttentionSpec

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, the output's gradient
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Gradients = Callable[[], tuple[Tensor, ...]]

TOKENS, WIDTH = 16384, 2048  # of a batch; heads times head_dim
LENGTHS = (4096, 1024, 16384, 2048, 8192, 512, 32768)  # a run that is cut short has seen the range
HEAD_DIMS = (128, 64, 256)
GRADIENTS = ("dq", "dk", "dv")
E4M3_LENGTHS = (4096, 16384)
DECODE_KEYS = (16384, 1024, 131072, 4096, 65536)


@dataclass(frozen=True)
class Cell:
    """One comparison: a call and its direction."""

    case: Case
    direction: str = "forward"  #: or backward
    deterministic: bool = False  #: under torch.use_deterministic_algorithms
    e4m3: bool = False  #: inputs that e4m3 holds: 8-bit contenders take them as such, the others in 16 bits

    def __str__(self) -> str:
        kind = f"{' deterministic' if self.deterministic else ''}{' e4m3' if self.e4m3 else ''}"
        return f"{self.case} {self.direction}{kind}"

    def labels(self) -> dict[str, Any]:
        own = {"deterministic": self.deterministic, "decode": self.case.seqlen_q == 1, "e4m3": self.e4m3}
        found = {**self.case.labels(), **own}
        return {**found, "plain": found["plain"] and not self.e4m3}

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """In memory as ``(batch, seq, heads, head_dim)``, which is what projections give and all contenders take."""
        q, k, v, _, grad = self.case.inputs(dtype, device)
        q, k, v, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
        if self.e4m3:
            q, k, v = (x.to(FP8).to(dtype) for x in (q, k, v))
        return q, k, v, grad


@dataclass(frozen=True)
class Contender:
    """Who is timed. ``backward(q, k, v, grad)`` gives the call to be timed; None: by autograd through ``forward``.

    ``e4m3``: it takes q, k and v as 8-bit floats, which they are before its time is taken.
    """

    name: str
    forward: Forward
    environment: Mapping[str, str] = field(default_factory=dict)  #: while it is called
    blank: str | None = None  #: why it is not run
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Gradients] | None = None
    e4m3: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastattn")


def cells(quick: bool = False) -> list[Cell]:
    """In the order in which they are run: what matters most first, should the time not suffice for all."""
    if quick:
        small = Case(1, 4, 70, 70, 32, causal=True, heads_k=2)
        decode = Case(1, 4, 1, 90, 32, heads_k=2)
        return [
            Cell(small),
            Cell(small, "backward"),
            Cell(small, "backward", True),
            Cell(decode),
            Cell(small, e4m3=True),
        ]
    found = []
    kinds = (("forward", False), ("backward", False), ("backward", True))
    for length in LENGTHS:
        for direction, deterministic in kinds:
            for dim in HEAD_DIMS:
                for causal in (False, True):
                    case = Case(max(1, TOKENS // length), WIDTH // dim, length, length, dim, causal)
                    found.append(Cell(case, direction, deterministic))
        if length == LENGTHS[0]:
            found += [Cell(Case(1, 64, 1, keys, 128, heads_k=8)) for keys in DECODE_KEYS]
        if length in E4M3_LENGTHS:
            found += [Cell(c.case, e4m3=True) for c in found if c.case.seqlen_q == length and c.direction == "forward"]
    return found


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The kernels' choice reads these variables at every call; libraries see what ``os.environ`` sets."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def contenders(cell: Cell, device: torch.device) -> list[Contender]:
    """fastattn's kernels, each variant of the Hopper forward among them, and torch's and FA3 beside them."""
    case = cell.case
    spec = case.spec(torch.bfloat16, device)
    eight = replace(spec, dtype=FP8, needs_grad=False)
    found = []

    def ours(name: str, backend: str, reason: str | None = None, e4m3: bool = False, **values: str) -> None:
        asked = eight if e4m3 else spec
        reasons = [reason] if reason else dispatch.reasons_against(dispatch.taker(backend, asked), asked)
        function: Forward = fastattn.attention_fp8 if e4m3 else fastattn.attention  # type: ignore[assignment]
        call = partial(function, causal=case.causal, backend=backend)
        found.append(Contender(f"fastattn {name}", call, values, "; ".join(reasons) or None, e4m3=e4m3))

    def sdpa(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"is_causal": case.causal, "enable_gqa": case.heads_k is not None}
        if kernel is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, **options)

    if device.type == "cpu":
        ours("cpu", "cpu")
        if cell.e4m3:
            ours("cpu e4m3", "cpu", e4m3=True)
        return [*found, Contender("torch sdpa", partial(sdpa, None))]
    ours("cuda", "cuda")
    if cell.e4m3:
        ours("cuda e4m3", "cuda", e4m3=True)
        for name, reason, values in _cuda_kernels(cell, eight):
            ours(f"cuda e4m3 {name}", "cuda", reason, True, **values)
        found.append(replace(_fa3(cell), name="FA3 e4m3", e4m3=True))
    else:
        for name, reason, values in _cuda_kernels(cell, spec):
            ours(f"cuda {name}", "cuda", reason, **values)
        found += _packed(cell, device)
    ours("triton", "triton")
    found.append(Contender("torch cudnn", partial(sdpa, SDPBackend.CUDNN_ATTENTION)))
    found.append(Contender("torch flash", partial(sdpa, SDPBackend.FLASH_ATTENTION)))
    found.append(_fa3(cell))
    return found


def _cuda_kernels(cell: Cell, spec: AttentionSpec) -> Iterator[tuple[str, str | None, dict[str, str]]]:
    """Name, reason against it and environment of sm80 and of each Hopper variant that is not the default."""
    if dispatch.get_backend("cuda").unavailable_reason() is not None:
        return
    call = pack_call(spec)

    def text(**values: str) -> str:
        with environment(values):
            return str(cuda._C.cuda_configuration(call, [], cell.direction == "backward"))

    default = text()
    if default != text(FASTATTN_CUDA_KERNELS="sm80"):
        yield "sm80", None, {"FASTATTN_CUDA_KERNELS": "sm80"}
    if cell.direction == "backward" or cell.case.seqlen_q == 1 or not default.startswith("Hopper"):
        return
    known = {default}
    for variant in range(64):
        values = {"FASTATTN_SM90_VARIANT": str(variant)}
        try:
            what = text(**values)
        except RuntimeError:  # past the last
            return
        if what not in known:
            known.add(what)
            yield f"sm90 v{variant} ({what.split('forward, tiles of ')[-1]})", None, values


def packed_forward(case: Case, backend: str) -> Forward:
    """The case's batch as packed sequences of one length, which is how it lies in memory."""
    lengths = (case.seqlen_q, case.seqlen_k)

    @cache
    def starts(device: torch.device) -> list[Tensor]:
        return [torch.arange(0, (case.batch + 1) * n, n, dtype=torch.int32, device=device) for n in lengths]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = fastattn.attention_varlen(q, k, v, *starts(q.device), *lengths, causal=case.causal, backend=backend)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (case.batch, case.seqlen_q)).transpose(1, 2)

    return forward


def _packed(cell: Cell, device: torch.device) -> Iterator[Contender]:
    """The CUDA kernels for packed sequences and their variants, where there are several sequences."""
    case = cell.case
    if case.batch == 1 or case.seqlen_q == 1:
        return
    totals = {"total_q": case.batch * case.seqlen_q, "total_k": case.batch * case.seqlen_k}
    spec = replace(case.spec(torch.bfloat16, device), packed=True, relative_offset=True, offset=0, **totals)
    blank = "; ".join(dispatch.reasons_against(dispatch.get_backend("cuda"), spec)) or None
    forward = packed_forward(case, "cuda")
    yield Contender("fastattn cuda packed", forward, blank=blank)
    for name, reason, values in _cuda_kernels(cell, spec):
        yield Contender(f"fastattn cuda packed {name}", forward, values, reason or blank)


def _fa3(cell: Cell) -> Contender:
    causal, deterministic = cell.case.causal, cell.deterministic

    def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Gradients:
        out, lse = fa3.forward(q, k, v, causal)
        return lambda: fa3.backward(grad, q, k, v, out, lse, causal, deterministic)

    forward = lambda q, k, v: fa3.forward(q, k, v, causal)[0]  # noqa: E731
    return Contender("FA3", forward, {}, fa3.unavailable_reason(), backward)


def prepare(contender: Contender, cell: Cell, inputs: Inputs) -> Callable[[], Any]:
    """The call that is timed: returns the output, or the three gradients."""
    q, k, v, grad = inputs
    if contender.e4m3:
        q, k, v = (x.to(FP8) for x in (q, k, v))
    if cell.direction == "forward":
        return torch.no_grad()(lambda: contender.forward(q, k, v))
    if contender.backward is not None:
        return contender.backward(q, k, v, grad)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = contender.forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def one_head(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, causal: bool, rows: int = 1024) -> dict[str, Tensor]:
    """Attention of q ``(group, seq_q, dim)`` on one head of keys ``(seq_k, dim)``, O(rows x seq_k) memory.

    The formulas of docs/architecture.md, "Backward", in the inputs' type.
    """
    scale, offset = q.shape[-1] ** -0.5, k.shape[0] - q.shape[1]
    out, dq = torch.empty_like(q[..., : v.shape[-1]]), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q.shape[1], rows):
        part = q[:, i : i + rows]
        end = i + part.shape[1] + offset if causal else k.shape[0]
        s = scale * (part @ k[:end].T)
        if causal:
            i_plus = torch.arange(i, i + part.shape[1], device=q.device)[:, None] + offset
            s.masked_fill_(torch.arange(end, device=q.device) > i_plus, -torch.inf)
        p = s.softmax(-1)
        out[:, i : i + rows] = o = p @ v[:end]
        if grad is None:
            continue
        g = grad[:, i : i + rows]
        ds = p * (g @ v[:end].T - (g * o).sum(-1, keepdim=True))
        dq[:, i : i + rows] = scale * (ds @ k[:end])
        dk[:end] += scale * (ds.mT @ part).sum(0)
        dv[:end] += (p.mT @ g).sum(0)
    return {"output": out} if grad is None else {"dq": dq, "dk": dk, "dv": dv}


@dataclass(frozen=True)
class Truth:
    """The first and the last head of keys, with its queries: the float64 oracle, and what float32 makes of it."""

    cell: Cell
    heads: tuple[tuple[int, int], ...]
    oracle: dict[str, Tensor]
    naive: dict[str, Tensor]

    @staticmethod
    def of(cell: Cell, inputs: Inputs) -> Truth:
        q, k, v, grad = inputs
        heads = tuple(dict.fromkeys([(0, 0), (k.shape[0] - 1, k.shape[1] - 1)]))
        found: list[dict[str, Tensor]] = [{}, {}]
        for b, h in heads:
            group = _queries(cell, h)
            for wide, to in zip((torch.float64, torch.float32), found, strict=True):
                gradient = grad[b, group].to(wide) if cell.direction == "backward" else None
                part = one_head(q[b, group].to(wide), k[b, h].to(wide), v[b, h].to(wide), gradient, cell.case.causal)
                to.update({f"{name} of head {b}, {h}": x for name, x in part.items()})
        oracle, naive = found
        return Truth(cell, heads, oracle, {name: x.to(q.dtype) for name, x in naive.items()})

    def complaint(self, result: Any, dtype: torch.dtype) -> tuple[float, str | None]:
        """The largest error of what a prepared call returned; why it fails the check, or None."""
        tensors = {"output": result} if self.cell.direction == "forward" else dict(zip(GRADIENTS, result, strict=True))
        parts = {
            f"{name} of head {b}, {h}": x[b, h] if name in ("dk", "dv") else x[b, _queries(self.cell, h)]
            for name, x in tensors.items()
            for b, h in self.heads
        }
        found = compare(parts, self.oracle, self.naive, dtype)
        bad = worst(found)
        if not bad.passed:
            return bad.error, f"wrong: {bad.name} error {bad.error:.1e}, limit {bad.limit:.1e}"
        if strange := [name for name, x in tensors.items() if not x.isfinite().all()]:
            return bad.error, f"wrong: {strange[0]} is not finite everywhere"
        return max(each.error for each in found), None


def _queries(cell: Cell, head: int) -> slice:
    group = cell.case.heads // (cell.case.heads_k or cell.case.heads)
    return slice(head * group, (head + 1) * group)
