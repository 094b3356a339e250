"""python -m examples.pretraining: pre-train on plain text, fine-tune on few labels, compare with training from scratch.

python -m examples.pretraining                       masked tokens and next sentences, on generated text
python -m examples.pretraining --objective causal    the next token instead
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common import options
from examples.common.errors import run
from examples.common.tokenizer import SMALLEST


def parser() -> argparse.ArgumentParser:
    main = options.Parser(prog="python -m examples.pretraining", description=__doc__.splitlines()[0])
    main.add_argument("--out", type=Path, default=Path("runs/pretraining"), help="the run (default: %(default)s)")
    main.add_argument("--objective", choices=("mlm", "causal"), default="mlm", help="mlm: with next sentences")
    main.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if any")
    group = main.add_argument_group("data")
    group.add_argument("--text", type=Path, nargs="+", help="plain text to pre-train on (default: generated)")
    group.add_argument("--documents", type=options.at_least(2), help="how many to generate")
    group.add_argument("--labelled", type=Path, help="label, tab, sentence on each line (default: generated)")
    group.add_argument("--vocab-size", type=options.at_least(SMALLEST, 50_000))
    group.add_argument("--max-length", type=options.at_least(8), help="in tokens; what is longer is cut")
    group = main.add_argument_group("fine-tuning")
    group.add_argument("--sizes", type=options.POSITIVE, nargs="+", default=[24, 96, 384], help="of the labelled sets")
    group.add_argument("--seeds", type=options.POSITIVE, default=5)
    group.add_argument("--tuning-steps", type=options.POSITIVE, default=200)
    options.add_device(main)
    options.add_attention(main)
    options.add_model(main)
    options.add_training(main)
    return main


def main() -> None:
    args = parser().parse_args()
    from examples.pretraining import program

    program.main(args)


if __name__ == "__main__":
    run(main)
