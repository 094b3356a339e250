"""The mutants of a source: what each changes, and a text in which all of them wait to be switched on.

A mutant drops or weakens one synchronisation, or shifts one bound, constant or operator. ``survivors.txt`` and
``survivors_sm90.txt`` name those that nothing notices, with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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
    (r"\bmin32\((?!int)", "max32("),
    (r"\bmax32\((?!int)", "min32("),
    (r" \^ ", " + "),
    (r"(?<=\w) && (?=\w)", " || "),
)
#: How many of them are about synchronisation.
SYNCHRONISATION_CHANGES = 6
COMPARISONS = {" < ": "less", " <= ": "less_equal", " >= ": "greater_equal", " > ": "greater", " == ": "equal"}


@dataclass(frozen=True)
class Mutant:
    path: str  # below csrc
    line: int
    before: str
    after: str
    text: str  # of the whole file
    occurrence: int  # of this change of such a line in the file, from 1 on
    start: int  # of what is changed, in the text before
    end: int
    about_order: bool  # of threads: synchronisation

    @property
    def key(self) -> str:
        return f"{self.path}: {self.before} => {self.after} #{self.occurrence}"


def code_of(text: str) -> str:
    """``text`` with spaces where nothing is changed: comments, preprocessor, template heads, static assertions."""
    skipped = r"//[^\n]*|^\s*#[^\n]*|^\s*(?:template|static_assert)[^\n]*"
    return re.sub(skipped, lambda m: " " * len(m[0]), text, flags=re.M)


def mutants(path: str, text: str, changes: Iterable[tuple[str, str]] = CHANGES) -> Iterator[Mutant]:
    code = code_of(text)
    seen = Counter[tuple[str, str]]()
    order = {pattern for pattern, _ in CHANGES[:SYNCHRONISATION_CHANGES]}
    for pattern, replacement in changes:
        for found in re.finditer(pattern, code):
            changed = text[: found.start()] + replacement + text[found.end() :]
            line = text.count("\n", 0, found.start())
            before, after = (" ".join(x.split("\n")[line].split()) for x in (text, changed))
            seen[before, after] += 1
            yield Mutant(
                path, line + 1, before, after, changed, seen[before, after], *found.span(), about_order=pattern in order
            )


def survivors(path: Path) -> dict[str, str]:
    """Mutant -> why nothing can notice it: blocks of 'key' and '    reason' lines."""
    found: dict[str, str] = {}
    key = ""
    for line in path.read_text().splitlines():
        if line.startswith("    "):
            found[key] = " ".join([found[key], line.strip()]).strip()
        elif line and not line.startswith("#"):
            key = line.strip()
            if key in found:
                raise ValueError(f"{path.name} lists twice: {key}")
            found[key] = ""
    return found


def constant_spans(code: str) -> list[tuple[int, int]]:
    """Where everything must be known to the compiler: constexpr variables, functions and conditions, types, arrays."""
    spans = []
    for found in re.finditer(r"if constexpr \(|\bconstexpr\b|\busing\b|<[\w:, ]*[-+*/%] \d+[\w:, ]*>", code):
        at = found.end()
        if found[0].startswith("if"):
            at = closing(code, at)
        elif not found[0].startswith("<"):
            at = next(n for n in range(at, len(code)) if code[n] in ";{")
            if code[at] == "{":
                at = closing(code, at + 1)
        spans.append((found.start(), at))
    return spans


def closing(code: str, at: int) -> int:
    """The position of what closes the bracket that was opened before ``at``."""
    depth = 1
    while depth:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(code[at], 0)
        at += 1
    return at - 1


def operands(code: str, start: int, end: int) -> tuple[int, int]:
    """Where the left operand of the && at [start, end) begins and the right one ends."""
    ends, depth, left = re.compile(r"[,;?{}]|(?<![=<>!]) = |(?<!:):(?!:)|\|\||\breturn\b"), 0, start
    while left > 0:
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(code[left - 1], 0)
        if depth < 0 or (depth == 0 and (ends.match(code, left - 1) or code[left - 7 : left] == "return ")):
            break
        left -= 1
    while code[left] in " =\n":
        left += 1
    right, depth = end, 0
    while right < len(code):
        depth += {")": -1, "]": -1, "(": 1, "[": 1}.get(code[right], 0)
        if depth < 0 or (depth == 0 and (ends.match(code, right) or code.startswith(" &&", right))):
            break
        right += 1
    while code[right - 1] in " \n":
        right -= 1
    return left, right


Edit = tuple[int, int, int, str]  # start, rank among those that start there, end, text


def switched(mutant: Mutant, number: int, text: str, code: str) -> list[Edit] | None:
    """The edits of ``text`` that put the mutant beside what it changes; None where that cannot be done."""
    start, end, inner = mutant.start, mutant.end, "::fastattn::mutation::"
    if any(a <= start < b for a, b in constant_spans(code)):
        return None
    was = text[start:end]
    if was in COMPARISONS:
        operator = "==" if was == " == " else "<"
        return [(start, 3, end, f" {operator} {inner}{COMPARISONS[was]}<{number}> {'==' if was == ' == ' else '>'} ")]
    if was == " ^ ":
        return [(start, 3, end, f" ^ {inner}exclusive_or<{number}> ^ ")]
    if was == " && ":
        left, right = operands(code, start, end)
        return [
            (left, left - right, left, f"{inner}both({number}, bool("),
            (start, 3, end, "), [&] { return bool("),
            (right, 2, right, "); })"),
        ]
    if was.endswith("("):
        return [(start, 3, end, f"{inner}{was}{number}, ")]
    if was.endswith(";"):
        return [(start, 0, start, f"{{ if (!{inner}on({number})) "), (end, 1, end, " }")]
    if was.endswith(">"):
        if not code.startswith("();", end):
            return None
        weaker = re.sub(r"\d", lambda m: str(int(m[0]) + 1), was)
        return [(start, 1, start, f"if ({inner}on({number})) {weaker}(); else ")]
    suffix = re.match(r"[.\w]*", code[end:])
    assert suffix is not None
    becomes = "2" if was == "1" else "64"
    return [(start, 3, end + len(suffix[0]), f"({inner}literal({number}, {was}{suffix[0]}, {becomes}{suffix[0]}))")]


def with_switches(text: str, numbered: Iterable[tuple[int, Mutant]]) -> tuple[str, set[int]]:
    """``text`` with all of these mutants waiting in it, but for those that cannot; and the numbers of those that do."""
    code, edits, inside = code_of(text), list[Edit](), set()
    for number, mutant in numbered:
        found = switched(mutant, number, text, code)
        if found is not None:
            edits += found
            inside.add(number)
    for start, _, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return '#include "mutation/switch.h"\n#line 1\n' + text, inside
