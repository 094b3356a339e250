"""What a benchmark run leaves behind: rows, their machine, and the JSON file that holds both."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One contender on one case. A figure that is None is explained in ``blank``, under the figure's name."""

    suite: str  #: attention, module, transformer, calls or cpu
    case: str  #: the shape in words, the same for every contender
    direction: str  #: forward, backward or forward+backward
    dtype: str
    contender: str  #: "fastattn cpu", "torch sdpa", "naive", ...
    labels: dict[str, Any] = field(default_factory=dict)  #: numbers a plot is drawn from: seqlen, head_dim, causal
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    gflops: float | None = None  #: 1e9 floating-point operations per second, visible pairs only
    gbytes: float | None = None  #: least memory traffic, 1e9 bytes per second
    matmul_percent: float | None = None  #: of the matmul ceiling of the same machine and dtype
    copy_percent: float | None = None  #: of the copy ceiling of the same machine
    peak_memory_mib: float | None = None  #: allocated during the call beyond what was allocated before it
    max_error: float | None = None  #: largest error of output and gradients over the oracle's largest value
    errors: dict[str, list[float]] = field(default_factory=dict)  #: suite cpu: by tensor, largest error and rms error
    blank: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    """Rows of one run on one machine."""

    machine: dict[str, Any]  #: see machine.describe
    rows: list[Row]
    checks: list[dict[str, Any]] = field(default_factory=list)  #: see check.Verdict

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        data = json.loads(path.read_text())
        return Results(data["machine"], [Row(**row) for row in data["rows"]], data.get("checks", []))


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values in order of first appearance."""
    return list(dict.fromkeys(values))
