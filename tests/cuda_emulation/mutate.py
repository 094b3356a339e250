"""Mutation testing of the CUDA kernels: drops each synchronisation, shifts each bound and constant, one at a time, and
runs checks under emulation. A mutant that nothing notices is a survivor.

    python -m tests.cuda_emulation.mutate csrc/cuda/sm80/dkdv.cu --bounds

All mutants of the sources wait in one library. First every check runs with none of them, which tells in which checks a
mutant makes a difference at all; then each is switched on and runs those until one fails. What the compiler must know,
as the sizes of tiles, is compiled for each mutant instead.

Survivors that are known, with the reason, are in ``survivors.txt``; others make the command fail.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda_emulation.build import HERE, ROOT, build
from tests.cuda_emulation.mutants import Mutant, mutants, survivors, with_switches
from tests.cuda_emulation.trial import NOT_BUILT, Check, Outcome, Trial, checks

KERNELS = [
    path for folder in ("", "sm80", "simt") for path in (ROOT / "csrc/cuda" / folder).iterdir() if path.is_file()
]
#: All but the host side, of which the emulation has its own.
SOURCES = sorted(str(path.relative_to(ROOT)) for path in KERNELS if path.stem not in ("launch", "attention"))
OBJECTS = "simt-.*-float|simt-dbias-BFloat16|sm80-.*-BFloat16"
#: Of those, the ones that a mutant which is compiled alone is tried in.
FEW = "-float-64|dbias|prepare|sm80-(forward|dkdv|dq)-BFloat16-(32|192)|BFloat16-64-true|general-BFloat16-64"
# An index past the end of an array in registers is a trap.
FLAGS = "-fsanitize=bounds-strict -fsanitize-undefined-trap-on-error"


def write(path: Path, text: str) -> None:
    """Leaves a file alone that says that already: ninja looks at the time."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Course:
    """The mutants of some sources, and the libraries that have them. ``folder`` keeps what can be used again."""

    def __init__(self, mutants: Sequence[Mutant], objects: str, few: str, folder: Path, part: int) -> None:
        self.mutants, self.objects, self.few, self.folder, self.part = mutants, objects, few, folder, part
        self.apart = set[int]()  # mutants that are compiled one by one
        self.before: dict[str, bytes] = {}

    def _copy(self, name: str, changed: dict[str, str]) -> Path:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        for path in sources:
            below = str(path.relative_to(ROOT / "csrc"))
            write(self.folder / name / below, changed.get(below) or path.read_text())
        return self.folder / name

    def with_all(self) -> Path:
        """A library in which the mutants wait, but for those that keep it from being compiled."""
        memory = self.folder / "apart.txt"
        keys = set(memory.read_text().splitlines()) if memory.exists() else set()
        self.apart = {n for n, mutant in enumerate(self.mutants) if mutant.key in keys}
        for _ in range(8):
            changed = {}
            for path in sorted({mutant.path for mutant in self.mutants}):
                numbered = [(n, m) for n, m in enumerate(self.mutants) if m.path == path]
                text, inside = with_switches(
                    (ROOT / "csrc" / path).read_text(), [(n, m) for n, m in numbered if n not in self.apart]
                )
                if inside:
                    changed[path] = text
                self.apart |= {n for n, _ in numbered} - inside
            csrc = self._copy("switched", changed)
            write(memory, "\n".join(sorted(keys | {self.mutants[n].key for n in self.apart})))
            try:
                switch = HERE / "mutation" / "switch.cpp"
                library = build(self.folder / "build", csrc, self.objects, f"{FLAGS} -Werror=vla", (switch,))
                mine = library.with_name(f"{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so")
                if not mine.exists():
                    shutil.copy(library, mine)  # the next process may build another
                return mine
            except RuntimeError as error:
                wrong = set(re.findall(rf"{csrc}/(\S+?):(\d+):\d+: error", str(error)))
                found = {n for n, m in enumerate(self.mutants) if (m.path, str(m.line)) in wrong} - self.apart
                if not found:
                    raise
                self.apart |= found
        raise RuntimeError("the mutants do not compile")

    def alone(self, mutant: Mutant) -> tuple[Path, bool] | None:
        """A library of this mutant, and whether its code is that of no mutant; None where it does not compile."""
        folder = self.folder / f"alone-{self.part}"
        stub = folder / "not_built.cpp"
        if not self.before:
            csrc = self._copy(f"one-{self.part}", {})
            write(stub, "")
            write(stub, stub_of(build(folder, csrc, self.few, FLAGS, (stub,))))
            build(folder, csrc, self.few, FLAGS, (stub,))
            self.before = {path.name: path.read_bytes() for path in folder.glob("*.o")}
        csrc = self._copy(f"one-{self.part}", {mutant.path: mutant.text})
        try:
            library = build(folder, csrc, self.few, FLAGS, (stub,))
        except RuntimeError:
            return None
        copy = library.with_name(f"mutant-{mutant.line}-{mutant.start}.so")  # the dynamic loader knows the others
        shutil.copy(library, copy)
        return copy, all(path.read_bytes() == self.before[path.name] for path in folder.glob("*.o"))


def stub_of(library: Path) -> str:
    """A source that defines what the library lacks: kernels that have not been built."""
    listed = subprocess.run(["nm", "-u", str(library)], capture_output=True, text=True, check=True).stdout
    names = [name for name in re.findall(r"\bU (\S+)", listed) if "fastattn" in name]
    return f'#include <stdexcept>\nstatic void none() {{ throw std::runtime_error("{NOT_BUILT}"); }}\n' + "".join(
        f'extern "C" void {name}() {{ none(); }}\n' for name in names
    )


def said_of(outcome: Outcome) -> str:
    if outcome.noticed:
        return f"{outcome.noticed} [{outcome.by}]"
    if outcome.of == 0:
        return "SURVIVED: makes no difference in any check"
    return f"SURVIVED {outcome.ran} of {outcome.of} checks in which it makes a difference"


def judge(course: Course, trial: Trial, number: int) -> str:
    mutant = course.mutants[number]
    if number not in course.apart:
        return said_of(trial.of(trial.those_with([number]), number))
    found = course.alone(mutant)
    if found is None:
        return "does not compile"
    library, same = found
    try:
        if same:
            return "the compiler makes the same code of it"
        others = [n for n, m in enumerate(course.mutants) if m.path == mutant.path and n not in course.apart]
        order = trial.those_with(others) if others else range(len(trial.checks))
        return said_of(trial.of(sorted(order, key=trial.rank), None, library))
    finally:
        library.unlink()


@dataclass(frozen=True)
class Subject:
    """What is mutated, and what may notice it."""

    sources: Sequence[str]
    objects: str
    few: str
    survivors: Path
    checks: Callable[[Sequence[int], Sequence[str]], list[Check]]  # seeds, names
    environment: dict[str, str]


def before_hopper(seeds: Sequence[int], names: Sequence[str]) -> list[Check]:
    return checks((torch.bfloat16, torch.float32), seeds, names)


def main(subject: Subject) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sources", nargs="*", default=subject.sources, help="files below csrc/ to change: all")
    parser.add_argument("--checks", nargs="*", default=[], metavar="NAME", help="names of cases and edges: all")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="every Nth mutant")
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), metavar=("I", "N"), help="for N processes at once")
    parser.add_argument("--only", default="", help="regular expression: mutants, as they are listed")
    parser.add_argument("--seconds", type=float, default=20, help="of checks for a mutant")
    parser.add_argument("--alone", default=subject.few, help="objects of what is compiled for each mutant")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--synchronisation", action="store_true", help="only drop and weaken synchronisation")
    kind.add_argument("--bounds", action="store_true", help="all but synchronisation: bounds, constants, operators")
    options = parser.parse_args()

    torch.set_num_threads(1)
    found: list[Mutant] = []
    for source in options.sources:
        path = str(Path(source).resolve().relative_to(ROOT / "csrc"))
        found += mutants(path, (ROOT / "csrc" / path).read_text())
    wanted = [n for n, m in enumerate(found) if re.search(options.only, m.key)]
    if options.synchronisation or options.bounds:
        wanted = [n for n in wanted if found[n].about_order == options.synchronisation]
    course = Course(found, subject.objects, options.alone, options.folder.resolve(), options.part[0])
    library = course.with_all()
    all_checks = subject.checks((0, 1) if options.bounds else (0, 1, 2), options.checks)
    trial = Trial(all_checks, library, len(found), options.seconds, subject.environment)
    wanted = wanted[:: options.sample][options.part[0] - 1 :: options.part[1]]
    print(
        f"{len(wanted)} mutants, {len(course.apart & set(wanted))} of them compiled one by one; "
        f"{len(all_checks)} checks, {sum(trial.seconds_of):.0f} s",
        flush=True,
    )
    known, results, unknown = survivors(subject.survivors), Counter[str](), []
    for number in wanted:
        mutant, outcome = found[number], judge(course, trial, number)
        kind_of = outcome
        if outcome.startswith("SURVIVED"):
            kind_of = "survived, listed" if mutant.key in known else "survived"
            unknown += [] if mutant.key in known else [mutant]
        elif outcome.endswith("]"):
            kind_of = "noticed"
        results[kind_of] += 1
        listed = " (listed)" if kind_of.endswith("listed") else ""
        print(f"{mutant.path}:{mutant.line}: {mutant.before} => {mutant.after}\n    {outcome}{listed}", flush=True)
    for text, count in results.most_common():
        print(f"{count:5} {text}")
    for mutant in unknown:
        print(f"UNKNOWN SURVIVOR, line {mutant.line}\n{mutant.key}")
    raise SystemExit(1 if unknown else 0)


if __name__ == "__main__":
    main(Subject(SOURCES, OBJECTS, FEW, HERE / "survivors.txt", before_hopper, {}))
