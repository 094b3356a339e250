"""What is timed: attention, module, transformer, and the cost of a call. Each case is checked, then timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks import peers
from benchmarks.check import compare, run_attention, run_naive, worst
from benchmarks.peers import Case, Contender, ModelCase
from benchmarks.rows import Row
from benchmarks.timing import peak_memory_mib, time_calls


@dataclass(frozen=True)
class Job:
    """One case of a suite, not yet run."""

    title: str
    run: Callable[[Bench], Iterator[Row]]


@dataclass
class Bench:
    """Where a suite runs: the device, its ceilings, how long a case may take; and what went wrong."""

    device: torch.device
    ceilings: Mapping[str, float]
    quick: bool = False
    failures: list[str] = field(default_factory=list)

    def matmul_ceiling(self, dtype: str) -> float:
        """GFLOP/s of a large matmul in ``dtype``, or in float32 where that is faster (a CPU without bfloat16)."""
        return max(self.ceilings.get("matmul " + name, 0.0) for name in (dtype, "float32"))

    @property
    def budget_s(self) -> float:
        return 0.05 if self.quick else 0.4 if self.device.type == "cpu" else 0.25

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "forward+backward") if self.device.type == "cpu" else ("forward", "backward")


def timed_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)


def attention_cases(device: torch.device, quick: bool) -> Iterator[tuple[Case, torch.dtype]]:
    """A grid of full and causal self-attention at a constant number of tokens, then padding, GQA and decoding."""
    if quick:
        yield Case(1, 2, 64, 64, 32, causal=True), torch.float32
        return
    dtypes = timed_dtypes(device)
    if device.type == "cpu":
        tokens, heads, lengths = 2048, 2, (128, 512, 2048)
    else:
        tokens, heads, lengths = 16384, 16, (512, 1024, 2048, 4096, 8192)
    for dtype in dtypes:
        for head_dim in (64, 128) if dtype is dtypes[0] else (64,):
            for causal in (False, True):
                for length in lengths:
                    yield Case(tokens // length, heads, length, length, head_dim, causal), dtype
    scale = 1 if device.type == "cpu" else 4
    yield Case(4 * scale, 2 * scale, 512, 512, 64, masked=True), dtypes[0]
    yield Case(2 * scale, 8 * scale, 512, 512, 64, causal=True, heads_k=2 * scale), dtypes[0]
    for dtype in dtypes:
        yield Case(1, 8 * scale, 1, 8192 * scale, 128, heads_k=2 * scale), dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def timed_calls(run: Callable[[], Tensor], wanted: Sequence[Tensor], grad: Tensor, direction: str) -> Callable:
    """The call to time. ``backward`` keeps one graph; ``forward`` builds none."""
    if direction == "forward":
        return torch.no_grad()(run)
    if direction == "backward":
        out = run()
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)
    return lambda: torch.autograd.grad(run(), wanted, grad)


@dataclass
class Entry:
    """A contender made ready: what to call, and the tensors whose gradients are asked for."""

    name: str
    run: Callable[[], Tensor] | None
    wanted: Sequence[Tensor] = ()
    blank: str | None = None
    max_error: float | None = None
    errors: dict[str, list[float]] = field(default_factory=dict)
    names: Sequence[str] = ()  #: of the wanted tensors

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastattn")


def _failure(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]}"


def time_entries(
    bench: Bench, base: Row, entries: Sequence[Entry], grad: Tensor, work: Callable[[str], tuple[int, int]] | None
) -> Iterator[Row]:
    """A row per direction and entry. ``work(direction)`` gives FLOPs and bytes, None where they are not counted."""
    for direction in bench.directions:
        calls: dict[str, Callable] = {}
        blank = {e.name: e.blank for e in entries if e.blank}
        peaks: dict[str, float | None] = {}
        for e in entries:
            if e.run is None or e.blank:
                continue
            try:
                call = timed_calls(e.run, e.wanted, grad, direction)
                peaks[e.name] = peak_memory_mib(call, bench.device)
                calls[e.name] = call
            except (RuntimeError, NotImplementedError) as error:  # out of memory among them
                blank[e.name] = _failure(error)
        samples = time_calls(calls, bench.device, bench.budget_s) if calls else {}
        for e in entries:
            row = Row(base.suite, base.case, direction, base.dtype, e.name, dict(base.labels), max_error=e.max_error)
            if e.name not in samples:
                row.blank = {"median_ms": blank[e.name]}
            else:
                sample = samples[e.name]
                row.median_ms, row.p20_ms, row.p80_ms = sample.median_ms, sample.p20_ms, sample.p80_ms
                row.samples = sample.count
                row.peak_memory_mib = peaks[e.name]
                if row.peak_memory_mib is None:
                    row.blank["peak_memory_mib"] = "not measured: the CPU allocator keeps no peak"
                _add_rates(row, bench, work)
            yield row


def _add_rates(row: Row, bench: Bench, work: Callable[[str], tuple[int, int]] | None) -> None:
    assert row.median_ms is not None
    if work is None:
        row.blank["gflops"] = row.blank["gbytes"] = f"not counted for a {row.suite}"
        return
    flops, traffic = work(row.direction)
    row.gflops, row.gbytes = flops / row.median_ms / 1e6, traffic / row.median_ms / 1e6
    row.matmul_percent = 100 * row.gflops / bench.matmul_ceiling(row.dtype)
    row.copy_percent = 100 * row.gbytes / bench.ceilings["copy"]


def attention_jobs(device: torch.device, quick: bool) -> Iterator[Job]:
    for case, dtype in attention_cases(device, quick):
        yield Job(f"attention {case} {_name(dtype)}", partial(_attention_case, case=case, dtype=dtype))


def _attention_case(bench: Bench, case: Case, dtype: torch.dtype) -> Iterator[Row]:
    q, k, v, mask, grad = case.inputs(dtype, bench.device)
    truth = tuple(run_naive(q, k, v, mask, grad, case.causal, wide) for wide in (torch.float64, dtype))
    entries = []
    for contender in peers.attention_contenders(case, dtype, bench.device):
        entry = Entry(contender.name, None, blank=contender.blank)
        if contender.attention is not None and not contender.blank:
            attention = contender.attention
            leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
            entry.wanted, entry.run = leaves, partial(attention, *leaves, mask)
            check = partial(run_attention, attention, q, k, v, mask, grad)
            judge(bench, entry, check, truth, f"{case} {_name(dtype)}", dtype)
        entries.append(entry)
    del truth
    spec = case.spec(dtype, bench.device)
    base = Row("attention", str(case), "", _name(dtype), "", case.labels())
    yield from time_entries(bench, base, entries, grad, lambda d: (spec.flops(d), spec.bytes(d)))


def judge(
    bench: Bench,
    entry: Entry,
    outcome: Callable[[], Mapping[str, Tensor]],
    truth: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    case: str,
    dtype: torch.dtype,
) -> None:
    """Note the entry's error; a kernel of ours outside the limit is a failure, and is not timed.

    torch's are timed whatever their error: it stands beside the time.
    """
    try:
        found = compare(outcome(), *truth, dtype)
    except (RuntimeError, NotImplementedError) as error:
        entry.blank = _failure(error)
    else:
        entry.max_error = max(each.error for each in found)
        entry.errors = {each.name: [each.error, each.rms] for each in found}
        bad = worst(found)
        if entry.ours and not bad.passed:
            entry.blank = f"wrong: {bad.name} error {bad.error:.1e}, limit {bad.limit:.1e}"
    if entry.ours and entry.blank:
        bench.failures.append(f"{entry.name}, {case}: {entry.blank}")


def model_jobs(suite: str, device: torch.device, quick: bool) -> Iterator[Job]:
    dtype = timed_dtypes(device)[0]
    for case in peers.model_cases(suite, device, quick):
        yield Job(f"{suite} {case.title} {_name(dtype)}", partial(_model_case, case=case, dtype=dtype))


def _model_case(bench: Bench, case: ModelCase, dtype: torch.dtype) -> Iterator[Row]:
    """fastattn's model on each backend beside torch's model with the same parameters."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=bench.device).to(dtype) for shape in case.shapes]
    theirs = case.torch_model().eval().to(bench.device, dtype)
    grad = torch.randn(case.shapes[-1], device=bench.device).to(dtype)

    def outcome(contender: Contender, wide: torch.dtype) -> dict[str, Tensor]:
        entry = _model_entry(case, contender, theirs, inputs, wide)
        assert entry.run is not None
        out = entry.run()
        gradients = torch.autograd.grad(out, entry.wanted, grad.to(wide))
        return {"output": out.detach(), **dict(zip(entry.names, gradients, strict=True))}

    reference = Contender("naive", backend="reference")
    truth = outcome(reference, torch.float64), outcome(reference, dtype)
    entries = []
    for contender in peers.model_contenders(case, bench.device):
        entry = Entry(contender.name, None, blank=contender.blank)
        if not contender.blank:
            entry = _model_entry(case, contender, theirs, inputs, dtype)
            judge(bench, entry, lambda c=contender: outcome(c, dtype), truth, f"{case.title} {_name(dtype)}", dtype)
        entries.append(entry)
    base = Row(case.suite, case.title, "", _name(dtype), "")
    yield from time_entries(bench, base, entries, grad, None)


def _model_entry(
    case: ModelCase, contender: Contender, theirs: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype
) -> Entry:
    """A copy of the model for one contender, in ``dtype``, with gradients of the inputs and of every parameter."""
    model = copy.deepcopy(theirs) if contender.backend is None else case.our_model(theirs)
    model.to(dtype)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    call = case.call_torch if contender.backend is None else case.call_ours

    def run() -> Tensor:
        with fastattn.use_backend(contender.backend):
            return call(model, *leaves)

    names, parameters = zip(*model.named_parameters(), strict=True)
    names = (*(f"input {i}" for i in range(len(leaves))), *names)
    return Entry(contender.name, run, (*leaves, *parameters), names=names)


def calls_jobs(device: torch.device, quick: bool) -> Iterator[Job]:
    yield Job("calls", _calls)


def _calls(bench: Bench) -> Iterator[Row]:
    """The cost of a call whose arithmetic is nothing: 1 x 1 x 8 x 64 on the CPU, fastattn beside torch."""
    cpu = torch.device("cpu")
    case = Case(1, 1, 8, 8, 64)
    q, k, v, _, grad = case.inputs(torch.float32, cpu)
    functions: dict[str, Callable[..., Tensor]] = {
        "fastattn attention": fastattn.attention,
        "fastattn sdpa": fastattn.scaled_dot_product_attention,
        "torch sdpa": F.scaled_dot_product_attention,
    }
    for direction in ("forward", "forward+backward"):
        wanted = tuple(x.detach().requires_grad_() for x in (q, k, v))
        calls = {name: timed_calls(partial(f, *wanted), wanted, grad, direction) for name, f in functions.items()}
        for name, sample in time_calls(calls, cpu, bench.budget_s).items():
            row = Row("calls", str(case), direction, "float32", name, samples=sample.count)
            row.median_ms, row.p20_ms, row.p80_ms = sample.median_ms, sample.p20_ms, sample.p80_ms
            row.blank = dict.fromkeys(("gflops", "gbytes", "peak_memory_mib", "max_error"), "call cost only")
            yield row


SUITES: dict[str, Callable[[torch.device, bool], Iterator[Job]]] = {
    "attention": attention_jobs,
    "module": partial(model_jobs, "module"),
    "transformer": partial(model_jobs, "transformer"),
    "calls": calls_jobs,
}
