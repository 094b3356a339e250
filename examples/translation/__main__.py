"""python -m examples.translation prepare | train | evaluate | translate | compare: an encoder-decoder from end to end.

python -m examples.translation train --data numbers
python -m examples.translation evaluate
python -m examples.translation translate "three hundred and forty-five"
python -m examples.translation compare --attentions cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common import options
from examples.common.errors import run
from examples.common.processes import ATTENTION
from examples.common.tokenizer import SMALLEST


def parser() -> argparse.ArgumentParser:
    main = options.Parser(prog="python -m examples.translation", description=__doc__.splitlines()[0])
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--out", type=Path, default=Path("runs/translation"), help="the run (default: %(default)s)")
        return sub

    for name, text in (
        ("prepare", "read the pairs, learn the tokenizer"),
        ("train", "train; prepares if need be"),
        ("compare", "train some steps on several attention backends, compare the losses"),
    ):
        sub = command(name, text)
        group = sub.add_argument_group("data")
        group.add_argument(
            "--data", choices=("numbers", "files", "wmt14"), help="default: what is prepared, or numbers"
        )
        group.add_argument("--src", type=Path, help="--data files: source sentences, one a line")
        group.add_argument("--tgt", type=Path, help="--data files: their translations, line by line")
        group.add_argument("--wmt14", help="--data wmt14: its name (default: wmt/wmt14), or a folder with a copy")
        group.add_argument("--limit", type=options.POSITIVE, help="--data wmt14: so many training pairs only")
        group.add_argument("--train-pairs", type=options.POSITIVE, help="--data numbers: how many")
        group.add_argument("--held-out", type=options.POSITIVE, help="pairs each for validation and test")
        group.add_argument(
            "--vocab-size", type=options.at_least(SMALLEST, 50_000), help="of the tokenizer that both languages share"
        )
        group.add_argument("--max-length", type=options.POSITIVE, help="longer pairs, in tokens, are left out")
        group.add_argument("--preset", choices=("numbers", "demo", "base"), help="default: that of the data")
        if name == "train":
            sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if any")
            sub.add_argument("--stop-at", type=options.POSITIVE, help=argparse.SUPPRESS)
            options.add_attention(sub)
        if name == "compare":
            sub.add_argument("--attentions", nargs="+", choices=ATTENTION, default=["auto"], help="beside naive")
            sub.set_defaults(steps=20)
        if name != "prepare":
            sub.add_argument("--label-smoothing", type=options.finite(0, 1, but=1))
            options.add_device(sub)
            options.add_model(sub)
            options.add_training(sub)

    for name, text in (
        ("evaluate", "BLEU and exact match on held-out pairs"),
        ("translate", "translate sentences, from the command line or standard input"),
    ):
        sub = command(name, text)
        sub.add_argument("--beams", type=options.POSITIVE, default=4, help="1: greedy (default: %(default)s)")
        sub.add_argument("--length-penalty", type=options.finite(), default=0.6)
        options.add_device(sub)
        options.add_attention(sub)
        if name == "evaluate":
            sub.add_argument("--split", choices=("validation", "test"), default="test")
            sub.add_argument("--limit", type=options.POSITIVE, help="the first so many pairs only")
        else:
            sub.add_argument("sentences", nargs="*")
            sub.add_argument("--n-best", type=options.POSITIVE, default=1, help="so many translations of each")
    return main


def main() -> None:
    args = parser().parse_args()
    from examples.translation import program

    getattr(program, args.command)(args)


if __name__ == "__main__":
    run(main)
