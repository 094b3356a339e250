"""What a run tells: rows in a CSV file and in TensorBoard, lines or a progress bar on the terminal, a plot."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.common.errors import require
from examples.common.files import write_text

FIELDS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "validation_loss", "score")


class Log:
    """Rows of figures, one per reported step; resumed, it forgets what came after the checkpoint.

    Args:
        folder: where ``log.csv`` and ``tensorboard/`` go.
        kinds: of ``"csv"`` and ``"tensorboard"``.
        step: the last step to keep of an earlier run; 0 starts anew.
    """

    def __init__(self, folder: Path, kinds: Iterable[str], step: int = 0) -> None:
        self.path = folder / "log.csv"
        self.file: Any = None
        self.board: Any = None
        kinds = set(kinds)
        if "tensorboard" in kinds:
            require("tensorboard")
            writer = require("torch.utils.tensorboard").SummaryWriter
            self.board = writer(str(folder / "tensorboard"), purge_step=step + 1)
        if "csv" in kinds:
            kept = [row for row in read(self.path) if int(row["step"]) <= step] if step else []
            text = io.StringIO()
            rows = csv.DictWriter(text, FIELDS)
            rows.writeheader()
            rows.writerows(kept)
            write_text(self.path, text.getvalue())
            self.file = open(self.path, "a", newline="")  # noqa: SIM115  closed by close()
            self.rows = csv.DictWriter(self.file, FIELDS)

    def write(self, **row: Any) -> None:
        """Add one row; a figure that was not measured is left out."""
        if self.file:
            self.rows.writerow(row)
            self.file.flush()
        if self.board:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a ``log.csv``, without a last line that a kill cut short; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row["step"].isdigit()]


class Progress:
    """A progress bar on a terminal; elsewhere a plain line for every message."""

    def __init__(self, what: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.bar: Any = None
        self.shown = shown
        if shown and sys.stdout.isatty():
            rich = require("rich.progress")
            self.bar = rich.Progress(
                rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(), rich.TimeRemainingColumn(),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=done)

    def advance(self, steps: int = 1) -> None:
        if self.bar:
            self.bar.advance(self.task, steps)

    def say(self, message: str) -> None:
        if self.bar:
            self.bar.console.print(message, highlight=False)
        elif self.shown:
            print(message, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def plot(log: Path, image: Path, score: str) -> None:
    """Training and validation loss over the steps, and the score on an axis of its own."""
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot")
    rows = read(log)

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        return [x for x, _ in points], [y for _, y in points]

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(*series("loss"), color="tab:blue", linewidth=1, label="training loss")
    axis.plot(*series("validation_loss"), color="tab:orange", marker="o", markersize=3, label="validation loss")
    axis.set(xlabel="step", ylabel="loss per token")
    if series("score")[0]:
        other = axis.twinx()
        other.plot(*series("score"), color="tab:green", marker="s", markersize=3, label=score)
        other.set_ylabel(score)
        other.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(image, dpi=130)
    pyplot.close(figure)
