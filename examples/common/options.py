"""Command-line arguments that both programs take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from examples.common.errors import UserError
from examples.common.processes import ATTENTION
from examples.common.training import PRECISIONS, Options


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists what {self.prog} takes)")


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is an integer, ``low`` or more and ``high`` or less."""

    def integer(text: str) -> int:
        if int(text) < low or (high is not None and int(text) > high):
            range_ = f"at least {low}" if high is None else f"from {low} to {high:,}"
            raise argparse.ArgumentTypeError(f"must be {range_}, got {text}")
        return int(text)

    return integer


def finite(low: float = -math.inf, high: float = math.inf, but: float | None = None) -> Callable[[str], float]:
    """The type of an argument that is a finite number from ``low`` to ``high``, but not ``but``."""

    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high and value != but):
            exception = "" if but is None else f" and not {but:g}"
            raise argparse.ArgumentTypeError(f"must be finite, from {low:g} to {high:g}{exception}, got {text}")
        return value

    return number


POSITIVE = at_least(1)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """``--attention``."""
    parser.add_argument(
        "--attention", default="auto", choices=ATTENTION, help="backend of every attention; naive: plain torch"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model; what is not given comes from the preset."""
    group = parser.add_argument_group("model (default: the preset's)")
    for name in ("d-model", "heads", "layers", "feedforward"):
        group.add_argument(f"--{name}", type=POSITIVE)
    group.add_argument("--dropout", type=finite(0, 1))
    group.add_argument("--activation", choices=("relu", "gelu"))
    group.add_argument("--norm", choices=("pre", "post"))


def add_training(parser: argparse.ArgumentParser) -> None:
    """Everything of :class:`Options`; what is not given comes from the preset."""
    group = parser.add_argument_group("training (default: the preset's)")
    group.add_argument("--steps", type=POSITIVE, help="optimiser steps in all")
    group.add_argument("--max-tokens", type=POSITIVE, help="per batch and process, padding included")
    group.add_argument("--accumulate", type=POSITIVE, help="batches per step")
    group.add_argument("--learning-rate", type=finite(0, but=0), help="the highest, reached after --warmup steps")
    group.add_argument("--warmup", type=POSITIVE, help="steps; then the inverse square root")
    group.add_argument("--cooldown", type=finite(0, 1), help="last part of the steps, in which the rate falls to 0")
    group.add_argument("--clip", type=finite(0), help="largest norm of the gradient; 0: any")
    group.add_argument("--precision", choices=tuple(PRECISIONS))
    group.add_argument("--seed", type=int)
    group.add_argument("--validate-every", type=POSITIVE)
    group.add_argument("--checkpoint-every", type=POSITIVE)
    group.add_argument("--report-every", type=POSITIVE)
    group.add_argument("--log", action="append", choices=("csv", "tensorboard"), help="may be given twice")


def plain(value: Any) -> Any:
    """An argument's value as JSON can hold it; a path is the same from every folder."""
    if isinstance(value, Path):
        return str(value.resolve())
    return [plain(v) for v in value] if isinstance(value, list) else value


def agree(args: argparse.Namespace, made_with: dict[str, Any], where: Path) -> None:
    """Raise :class:`UserError` where an argument is given that is not what ``where`` was made with."""
    for name, was in made_with.items():
        now = plain(getattr(args, name, None))
        if now is not None and now != was:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{where} was made with {option} {was}, not {now}: give that, or another --out")


def given(args: argparse.Namespace, preset: dict[str, Any]) -> dict[str, Any]:
    """The preset with what was given on the command line."""
    return {name: value if getattr(args, name, None) is None else getattr(args, name) for name, value in preset.items()}


def training_options(args: argparse.Namespace, preset: dict[str, Any]) -> Options:
    """:class:`Options` from the preset and the command line."""
    names = Options.__dataclass_fields__
    values = {k: v for k, v in preset.items() if k in names}
    values |= {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    if args.log:
        values["logs"] = tuple(args.log)
    return Options(**values)
