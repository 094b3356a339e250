"""``python -m benchmarks order results.json ...``: rows of committed results become ``fastattn/measured.py``.

A cell is one architecture, direction, kind of call, head_dim and number of keys; its winner is the backend with the
smallest median among those that were right. A cell counts where every backend that calls may get was timed or found
wrong. Of several files that hold a cell the last one counts.
"""

from __future__ import annotations

import pprint
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Results, Row
from fastattn import dispatch, measured

Cell = tuple[str, str, str, int, int]  # architecture, direction, kind, head_dim, keys


def cell_of(row: Row, architecture: str) -> Cell | None:
    """None for rows that say nothing about the order: masks, grouped heads, deterministic mode, both directions."""
    labels = row.labels
    decode = bool(labels.get("decode"))
    if row.direction not in ("forward", "backward") or row.dtype not in ("float16", "bfloat16"):
        return None
    if labels.get("deterministic") or not (labels.get("plain") or decode):
        return None
    kind = "decode" if decode else "causal" if labels["causal"] else "full"
    return architecture, row.direction, kind, labels["head_dim"], labels["seqlen"]


def winners(results: Sequence[Results]) -> dict[Cell, str]:
    """Cell -> the fastest correct backend."""
    candidates = [name for name in dispatch.ORDER["cuda"] if name != "reference"]
    found: dict[Cell, str] = {}
    for each in results:
        capability = each.machine.get("capability")
        if each.machine.get("device_type") != "cuda" or not capability:
            continue
        cells: dict[Cell, dict[str, Row]] = {}
        for row in each.rows:
            name = row.contender.removeprefix("fastattn ")
            cell = cell_of(row, f"sm_{capability.replace('.', '')}")
            if cell is not None and row.contender.startswith("fastattn ") and name in candidates:
                cells.setdefault(cell, {})[name] = row
        for cell, rows in cells.items():
            judged = [r for r in rows.values() if r.median_ms or r.blank["median_ms"].startswith(("wrong", "failed"))]
            timed = {name: row.median_ms for name, row in rows.items() if row.median_ms}
            if len(judged) == len(candidates) and timed:
                found[cell] = min(timed, key=lambda name: timed[name])
    return found


def table(found: dict[Cell, str]) -> dict[str, dict[tuple[str, str], dict[int, tuple[tuple[int, str], ...]]]]:
    """In the form of ``measured.FASTEST``: only the lengths at which the winner changes."""
    made: dict[str, dict[tuple[str, str], dict[int, tuple[tuple[int, str], ...]]]] = {}
    for (architecture, direction, kind, head_dim, keys), name in sorted(found.items()):
        by_dim = made.setdefault(architecture, {}).setdefault((direction, kind), {})
        steps = by_dim.get(head_dim, ())
        if not steps or steps[-1][1] != name:
            by_dim[head_dim] = (*steps, (keys, name))
    return made


def source(made: dict, names: Sequence[str]) -> str:
    """The text of ``fastattn/measured.py``."""
    before = Path(measured.__file__).read_text()
    head, rest = before.split("FASTEST: ", 1)
    kind = rest.split(" = ", 1)[0]
    body = pprint.pformat(made, width=118, sort_dicts=False).replace("'", '"')
    middle = "\n\n#: The files of rows that it was made from.\n"
    sources = f"SOURCES: tuple[str, ...] = ({''.join(f'{name!r}, ' for name in names).replace(chr(39), chr(34))})\n"
    return f"{head}FASTEST: {kind} = {body}\n{middle}{sources}".replace("\n\n\n", "\n\n").replace(", )", ",)")


def run(paths: Sequence[Path], target: Path | None = None) -> int:
    """Writes the table; 1 where the files hold no cell, and nothing is written."""
    found = winners([Results.load(path) for path in paths])
    if not found:
        print("no cell in which every backend was judged on a GPU: fastattn/measured.py is left as it is")
        return 1
    made = table(found)
    target = target or Path(measured.__file__)
    target.write_text(source(made, [str(path) for path in paths]))
    print(f"written: {target}, {len(found)} cells of {', '.join(made)}; ruff format it, and run the tests")
    return 0
