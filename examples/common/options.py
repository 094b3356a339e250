"""Command-line arguments that both programs take."""

from __future__ import annotations

import argparse
from typing import Any

from examples.common.processes import ATTENTION
from examples.common.training import PRECISIONS, Options


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--attention``."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--attention", default="auto", choices=ATTENTION, help="backend of every attention; naive: plain torch"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model; what is not given comes from the preset."""
    group = parser.add_argument_group("model (default: the preset's)")
    for name in ("d-model", "heads", "layers", "feedforward"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--dropout", type=float)
    group.add_argument("--activation", choices=("relu", "gelu"))
    group.add_argument("--norm", choices=("pre", "post"))


def add_training(parser: argparse.ArgumentParser) -> None:
    """Everything of :class:`Options`; what is not given comes from the preset."""
    group = parser.add_argument_group("training (default: the preset's)")
    group.add_argument("--steps", type=int, help="optimiser steps in all")
    group.add_argument("--max-tokens", type=int, help="per batch and process, padding included")
    group.add_argument("--accumulate", type=int, help="batches per step")
    group.add_argument("--learning-rate", type=float, help="the highest, reached after --warmup steps")
    group.add_argument("--warmup", type=int, help="steps; then the inverse square root")
    group.add_argument("--cooldown", type=float, help="last part of the steps, in which the rate falls to 0")
    group.add_argument("--clip", type=float, help="largest norm of the gradient; 0: any")
    group.add_argument("--precision", choices=tuple(PRECISIONS))
    group.add_argument("--seed", type=int)
    group.add_argument("--validate-every", type=int)
    group.add_argument("--checkpoint-every", type=int)
    group.add_argument("--report-every", type=int)
    group.add_argument("--log", action="append", choices=("csv", "tensorboard"), help="may be given twice")


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
