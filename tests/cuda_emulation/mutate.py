"""Mutation testing of the CUDA kernels: drops each synchronisation, shifts each bound and constant, one at a time, and
runs small cases under emulation. A mutant that nothing notices is a survivor.

    python -m tests.cuda_emulation.mutate csrc/cuda/simt/tile.h --dtype float32 --objects 'simt-.*-float-64'

Survivors that are known, with the reason, are in ``survivors.txt``; others make the command fail. ``--objects`` are
those that are built (a regular expression); ``--sample`` takes every n-th mutant, ``--synchronisation`` the first kind,
``--bounds`` the others, under two orders instead of three. ``--within`` names the objects that get the mutant; the
others stay as they are, which saves compiling them.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cases import CASES, Inputs
from tests.cuda_emulation.backend import EmulatedBackend, Emulator
from tests.cuda_emulation.build import HERE, ROOT, build, load
from tests.cuda_emulation.shapes import SHAPES
from tests.cuda_emulation.visibility import EDGES, check_edge
from tests.tolerance import assert_close_to_oracle

SURVIVORS = HERE / "survivors.txt"
CASE_NAMES = (
    "plain tile_edges causal_bottom_right causal_more_queries window gqa mask_blind_rows bias_keys_shared "
    "dropout_causal_gqa layout_strided"
)
# An index past the end of an array in registers is a trap.
FLAGS = "-fsanitize=bounds -fsanitize-undefined-trap-on-error"
SECONDS = 120  # for all cases of a mutant; who takes longer hangs, which is noticed too
CPU_SECONDS = 20  # the cases need about 3

SYNCHRONISATION = (
    r"barrier|warp_barrier|named_barrier_sync|named_barrier_arrive|cp_async_commit|cp_async_wait|fence_\w+|"
    r"mbarrier_(?:init|arrive|arrive_expect_tx|wait)|bulk_commit|bulk_wait(?:_read)?|wgmma_(?:fence|commit|wait)|"
    r"setmaxnreg_\w+|wait_until_equal|reduce_add_release|store_release"
)
#: Pattern -> what takes its place.
CHANGES = (
    (rf"\b(?:{SYNCHRONISATION})(?:<[^;()]*>)?\([^;]*\);", "(void)0;"),
    (r"\bbarrier_or\(", "bool("),
    (r"cp_async_wait<0>", "cp_async_wait<1>"),
    (r"cp_async_wait<1>", "cp_async_wait<2>"),
    (r"wgmma_wait<0>", "wgmma_wait<1>"),
    (r"wgmma_wait<1>", "wgmma_wait<2>"),
    (r" < (?!\w+>)", " <= "),
    (r" <= ", " < "),
    (r" >= ", " > "),
    (r" > (?!\()", " >= "),
    (r" == ", " != "),
    (r"(?<=[+-] )1\b", "2"),
    (r"(?<=[*/%] )(?:2|4|8|16|32)\b", "64"),
    (r"\bmin64\(", "max64("),
    (r" \^ ", " + "),
    (r"(?<=\w) && (?=\w)", " || "),
)


@dataclass(frozen=True)
class Mutant:
    path: str  # below csrc
    line: int
    before: str
    after: str
    text: str  # of the whole file
    occurrence: int  # of this change of such a line in the file, from 1 on

    @property
    def key(self) -> str:
        return f"{self.path}: {self.before} => {self.after} #{self.occurrence}"


#: How many of them are about synchronisation.
SYNCHRONISATION_CHANGES = 6


def mutants(path: str, text: str, changes: tuple[tuple[str, str], ...] = CHANGES) -> Iterator[Mutant]:
    code = re.sub(
        r"//[^\n]*|^\s*#[^\n]*|^\s*(?:template|static_assert)[^\n]*", lambda m: " " * len(m[0]), text, flags=re.M
    )
    seen = Counter[tuple[str, str]]()
    for pattern, replacement in changes:
        for found in re.finditer(pattern, code):
            changed = text[: found.start()] + replacement + text[found.end() :]
            line = text.count("\n", 0, found.start())
            before, after = (" ".join(x.split("\n")[line].split()) for x in (text, changed))
            seen[before, after] += 1
            yield Mutant(path, line + 1, before, after, changed, seen[before, after])


def known_survivors() -> dict[str, str]:
    """Mutant -> why nothing can notice it: blocks of 'key' and '    reason' lines."""
    found: dict[str, str] = {}
    key = ""
    for line in SURVIVORS.read_text().splitlines() if SURVIVORS.exists() else []:
        if line.startswith("    "):
            found[key] = " ".join([found[key], line.strip()]).strip()
        elif line and not line.startswith("#"):
            key = line.strip()
            found[key] = ""
    return found


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


class Trial:
    """The cases with their expected results, and a child process for each mutant that runs them."""

    def __init__(
        self, names: list[str], dtype: torch.dtype, contains: bool, seeds: tuple[int, ...] = (0, 1, 2)
    ) -> None:
        self.dtype, self.contains, self.seeds = dtype, contains, seeds
        self.cases: list[tuple[str, Inputs, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        for case in [*CASES, *SHAPES]:
            if case.name in names:
                inputs = case.make(dtype)
                self.cases.append((case.name, inputs, inputs.naive(), inputs.oracle()))

    def _run(self, library: Path) -> None:
        sys.setdlopenflags(os.RTLD_LAZY)  # not every kernel has been built
        module = load(library)
        cuda._C = module
        backend = EmulatedBackend(Emulator(module))
        dispatch.get_backend = lambda name: backend  # type: ignore[assignment]
        for seed in self.seeds:
            backend.emulator.configure(seed)
            # Then torch.empty gives NaN, and the kernel for dQ in one order runs instead of additions.
            torch.use_deterministic_algorithms(seed == 0, warn_only=True)
            for name, inputs, naive, oracle in self.cases:
                for key, value in inputs.run(fastattn.attention, backend="cuda").items():
                    assert_close_to_oracle(value, naive[key], oracle[key], f"{name} {key}, seed {seed}")
            assert backend.emulator.statistics().ldmatrix_conflicts == 0, "bank conflicts"
            if self.contains:
                check_containment(self.dtype)
                for edge, general in product(EDGES, (False, True)):
                    check_edge(edge, self.dtype, general)

    def notice(self, library: Path) -> str | None:
        """What goes wrong, or None."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            try:
                self._run(library)
                os._exit(0)
            except BaseException as error:
                lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
                os.write(writer, " ".join(lines[:2])[:400].encode())
                os._exit(1)
        os.close(writer)
        end = time.monotonic() + SECONDS
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                os.close(reader)
                return "runs for ever"
            time.sleep(0.02)
        with os.fdopen(reader) as said:
            message = said.read()
        if os.WIFSIGNALED(status[1]):
            return f"signal {os.WTERMSIG(status[1])}"
        return None if status[1] == 0 else message or "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sources", nargs="+", help="files below csrc/ to change")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--objects", default="", help="regular expression: the kernels' objects that the cases need")
    parser.add_argument(
        "--within", default="", help="regular expression: the objects that are compiled from the mutant"
    )
    parser.add_argument("--cases", nargs="*", default=CASE_NAMES.split())
    parser.add_argument("--sample", type=int, default=1, metavar="N")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--synchronisation", action="store_true", help="only drop and weaken synchronisation")
    kind.add_argument("--bounds", action="store_true", help="all but synchronisation: bounds, constants, operators")
    parser.add_argument("--contains", action="store_true", help="also NaN in invisible keys, and at edges of windows")
    options = parser.parse_args()

    torch.set_num_threads(1)
    changes = CHANGES
    if options.synchronisation:
        changes = CHANGES[:SYNCHRONISATION_CHANGES]
    elif options.bounds:
        changes = CHANGES[SYNCHRONISATION_CHANGES:]
    seeds = (0, 1) if options.bounds else (0, 1, 2)
    trial = Trial(options.cases, getattr(torch, options.dtype), options.contains, seeds)
    known, results, unknown = known_survivors(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        csrc, folder = Path(scratch) / "csrc", Path(scratch) / "build"
        shutil.copytree(ROOT / "csrc", csrc)
        library = build(folder, csrc, options.objects, FLAGS, options.within)
        if (said := trial.notice(library)) is not None:
            raise SystemExit(f"the kernels fail as they are: {said}")
        todo = []
        for source in options.sources:
            path = str(Path(source).resolve().relative_to(ROOT / "csrc"))
            todo += list(mutants(path, (ROOT / "csrc" / path).read_text(), changes))
        for number, mutant in enumerate(todo[:: options.sample]):
            file = csrc / mutant.path
            original = file.read_text()
            file.write_text(mutant.text)
            # A library of another name: the dynamic loader knows the one before.
            try:
                shutil.copy(
                    build(folder, csrc, options.objects, FLAGS, options.within), copy := folder / f"mutant{number}.so"
                )
                outcome = trial.notice(copy) or "SURVIVED"
                copy.unlink()
            except RuntimeError:
                outcome = "does not compile"
            file.write_text(original)
            kind = outcome if outcome in ("SURVIVED", "does not compile") else "noticed"
            reason = known.get(mutant.key) if kind == "SURVIVED" else None
            results[f"survived, known: {reason}" if reason else kind] += 1
            if kind == "SURVIVED" and reason is None:
                unknown.append(mutant)
            print(f"{mutant.path}:{mutant.line}: {mutant.before} => {mutant.after}\n    {outcome}", flush=True)
    compiled = sum(results.values()) - results["does not compile"]
    print(f"\n{results['noticed']} of {compiled} mutants that compile were noticed")
    for kind, count in results.most_common():
        print(f"{count:5} {kind}")
    for mutant in unknown:
        print(f"UNKNOWN SURVIVOR, line {mutant.line}\n{mutant.key}")
    raise SystemExit(1 if unknown else 0)


if __name__ == "__main__":
    main()
