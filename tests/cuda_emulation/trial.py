"""Mutants on trial: the checks that may notice one, each in one order of threads, and a process for each mutant."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cases import CASES, Case
from tests.cuda_emulation.backend import EmulatedBackend, Emulator, Statistics
from tests.cuda_emulation.build import load
from tests.cuda_emulation.shapes import SHAPES, SIMT_SHAPES
from tests.cuda_emulation.visibility import EDGES, check_edge
from tests.tolerance import assert_close_to_oracle

NOT_BUILT = "the kernel has not been built"
HANGS = 60  # seconds for one check, which needs a few at most
#: How much longer a check may become, in turns of threads. The Hopper kernels compute rows anew that have become NaN:
#: what makes them NaN may show in the work alone.
LONGER = 1.25


@dataclass(frozen=True)
class Check:
    """``run(backend)`` raises where something is wrong; under order ``seed``, dQ in one order or by additions.

    ``sharp``: made for bounds of tiles and of what is visible, so that it comes early.
    """

    name: str
    seed: int
    deterministic: bool
    run: Callable[[EmulatedBackend], None]
    sharp: bool = False


class CaseCheck:
    """A case against its oracle, which is computed here, once for all mutants."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.inputs = case.make(dtype)
        self.naive, self.oracle = self.inputs.naive(), self.inputs.oracle()

    def __call__(self, backend: EmulatedBackend) -> None:
        if backend.unsupported_reasons(self.inputs.spec()):
            return
        for key, value in self.results().items():
            assert_close_to_oracle(value, self.naive[key], self.oracle[key], f"{self.inputs.case.name} {key}")
        self.check_statistics(backend.emulator.statistics())

    def check_statistics(self, counts: Statistics) -> None:
        assert counts.ldmatrix_conflicts == 0, "bank conflicts"

    def results(self) -> dict[str, Tensor]:
        return self.inputs.run(fastattn.attention, backend="cuda")


def check_containment(dtype: torch.dtype) -> None:
    """NaN in keys that no query sees changes nothing; some warps have no row that could tell them of it."""
    generator = torch.Generator().manual_seed(0)
    q, grad, k, v = (torch.randn(1, 2, n, 32, generator=generator).to(dtype) for n in (20, 20, 70, 70))
    mask = torch.arange(70)[None, None, None] < 66
    for options in ({"mask": mask}, {"causal": True, "offset": 46}):
        outcomes = []
        for poison in (0.0, torch.nan):
            keys, values = (torch.where(mask[0, 0, 0, :, None], x, poison) for x in (k, v))
            leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
            out = fastattn.attention(*leaves, **options, backend="cuda")  # type: ignore[arg-type]
            outcomes.append([out, *torch.autograd.grad(out, leaves, grad)])
        for clean, poisoned in zip(*outcomes, strict=True):
            assert torch.equal(clean, poisoned), "NaN of invisible keys got through"


def checks(dtypes: Sequence[torch.dtype], seeds: Sequence[int], only: Sequence[str] = ()) -> list[Check]:
    """Those of the test suite, or the ones with these names: the case list, every tile, and who sees whom."""

    def wanted(name: str) -> bool:
        return not only or name in only

    found: list[tuple[str, Callable[[EmulatedBackend], None]]] = []
    for dtype in dtypes:
        shapes = SIMT_SHAPES if dtype is torch.float32 else SHAPES
        label = str(dtype).removeprefix("torch.")
        cases = [case for case in [*CASES, *shapes] if wanted(case.name)]
        found += [(f"{label} {case.name}", CaseCheck(case, dtype)) for case in cases]
        if wanted("containment"):
            found.append((f"{label} containment", lambda _, dtype=dtype: check_containment(dtype)))
        edges = [edge for edge in EDGES if wanted(edge.name)]
        for edge, general in itertools.product(edges, (False, True)):
            name = f"{label} {edge.name}{' general' * general}"
            found.append((name, lambda _, e=edge, d=dtype, g=general: check_edge(e, d, g)))
    sharp = {case.name for case in [*SHAPES, *SIMT_SHAPES]} | {edge.name for edge in EDGES}
    return [Check(name, seed, seed == 0, run, name.split()[1] in sharp) for name, run in found for seed in seeds]


class Library:
    """A module with kernels in a process of its own, which is this one."""

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        sys.setdlopenflags(os.RTLD_LAZY)  # not every kernel has been built
        os.environ.update(environment)
        module = load(path)
        cuda._C = module
        self.backend = EmulatedBackend(Emulator(module))
        self.turns, ask = 0, self.backend.emulator.statistics

        def statistics() -> Statistics:
            counts = ask()
            self.turns += counts.switches
            return counts

        self.backend.emulator.statistics = statistics  # type: ignore[method-assign]
        dispatch.get_backend = lambda name: self.backend  # type: ignore[assignment]
        self._library = ctypes.CDLL(str(path))

    def run(self, check: Check) -> int:
        """How many turns threads took."""
        self.backend.emulator.statistics()
        self.turns = 0
        self.backend.emulator.configure(check.seed)
        # With the first order torch.empty gives NaN, and the kernel for dQ in one order runs instead of additions.
        torch.use_deterministic_algorithms(check.deterministic, warn_only=True)
        check.run(self.backend)
        self.backend.emulator.statistics()
        return self.turns

    def activate(self, mutant: int) -> None:
        self._library.fastattn_mutation_activate(mutant)

    def what_matters(self, count: int) -> set[int]:
        flags = (ctypes.c_ubyte * count)()
        self._library.fastattn_mutation_matters(flags, count)
        return {n for n, flag in enumerate(flags) if flag}


def in_a_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a process of its own; an exception as its text, a signal as its name."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "wb") as to:
            try:
                pickle.dump((True, work()), to)
            except BaseException as error:
                lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
                pickle.dump((False, " ".join(lines[:2])[:300]), to)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        data = said.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return False, "runs for ever" if name == "SIGALRM" else name
    return pickle.loads(data) if data else (False, f"ended with {os.WEXITSTATUS(status)}")


@dataclass(frozen=True)
class Outcome:
    noticed: str  # what was said, or nothing
    by: str
    ran: int  # checks
    of: int  # checks in which the mutant makes a difference


class Trial:
    """The checks, how long each takes, and in which of them a mutant that waits in ``library`` makes a difference."""

    def __init__(
        self, checks: Sequence[Check], library: Path, count: int, seconds: float, environment: dict[str, str]
    ) -> None:
        self.checks, self.library, self.seconds, self.environment = checks, library, seconds, environment
        self.seconds_of: list[float] = []
        self.turns: list[int] = []
        self.matters: list[set[int]] = []
        self.noticed_by = Counter[int]()
        for seconds_of, turns, matters in self._measured(count):
            self.seconds_of.append(seconds_of)
            self.turns.append(turns)
            self.matters.append(matters)

    def _measured(self, count: int) -> list[tuple[float, int, set[int]]]:
        """As _measure, in a process of its own; kept beside the library, for the next process."""
        what = repr([(check.name, check.seed) for check in self.checks]).encode() + self.library.read_bytes()
        memory = self.library.with_name(f"measured-{hashlib.sha256(what).hexdigest()[:16]}.pickle")
        if memory.exists():
            return pickle.loads(memory.read_bytes())  # type: ignore[no-any-return]
        good, said = in_a_child(lambda: self._measure(count))
        if not good:
            raise SystemExit(f"the kernels fail as they are: {said}")
        memory.write_bytes(pickle.dumps(said))
        return said  # type: ignore[no-any-return]

    def _measure(self, count: int) -> list[tuple[float, int, set[int]]]:
        library = Library(self.library, self.environment)
        found = []
        for check in self.checks:
            start = time.process_time()
            try:
                turns = library.run(check)
            except Exception as error:
                raise RuntimeError(f"{check.name}, seed {check.seed}: {error}") from error
            found.append((time.process_time() - start, turns, library.what_matters(count)))
        return found

    def those_with(self, mutants: Iterable[int]) -> list[int]:
        """The checks in which one of these makes a difference, the quick and successful first."""
        wanted = set(mutants)
        found = [n for n, matters in enumerate(self.matters) if wanted & matters]
        return sorted(found, key=self.rank)

    def rank(self, check: int) -> float:
        return self.seconds_of[check] / (1 + self.noticed_by[check]) / (4 if self.checks[check].sharp else 1)

    def of(self, order: Sequence[int], mutant: int | None, library: Path | None = None) -> Outcome:
        """Runs checks in this order until one notices the mutant, or the time is over."""

        def work() -> tuple[int, str, int]:
            child = Library(library or self.library, self.environment)
            if mutant is not None:
                child.activate(mutant)
            start = time.process_time()
            for ran, n in enumerate(order):
                signal.alarm(HANGS)
                os.pwrite(where, n.to_bytes(4, "little"), 0)
                try:
                    turns = child.run(self.checks[n])
                    if turns > LONGER * self.turns[n]:
                        raise RuntimeError(f"{turns} turns of threads instead of {self.turns[n]}")
                except BaseException as error:
                    if NOT_BUILT in str(error):
                        continue
                    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
                    return ran + 1, " ".join(lines[:2])[:300], n
                if time.process_time() - start > self.seconds:
                    return ran + 1, "", n
            return len(order), "", 0

        where = os.memfd_create("check")
        good, said = in_a_child(work)
        last = int.from_bytes(os.pread(where, 4, 0), "little")
        os.close(where)
        if not good:
            ran, message, by = 1, said, last
        else:
            ran, message, by = said
        if message:
            self.noticed_by[by] += 1
            check = self.checks[by]
            return Outcome(message, f"{check.name}, seed {check.seed}", ran, len(order))
        return Outcome("", "", ran, len(order))
