"""python -m examples.translation prepare | train | evaluate | translate: an encoder-decoder, from text to translation.

python -m examples.translation train --data numbers
python -m examples.translation evaluate
python -m examples.translation translate "three hundred and forty-five"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common import options
from examples.common.errors import run


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m examples.translation", description=__doc__.splitlines()[0])
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--out", type=Path, default=Path("runs/translation"), help="the run (default: %(default)s)")
        return sub

    for name, text in (("prepare", "read the pairs, learn the tokenizer"), ("train", "train; prepares if need be")):
        sub = command(name, text)
        group = sub.add_argument_group("data")
        group.add_argument("--data", choices=("numbers", "files", "wmt14"), default="numbers")
        group.add_argument("--src", type=Path, help="--data files: source sentences, one a line")
        group.add_argument("--tgt", type=Path, help="--data files: their translations, line by line")
        group.add_argument("--wmt14", default="wmt/wmt14", help="--data wmt14: its name, or a folder with a copy")
        group.add_argument("--limit", type=int, help="--data wmt14: so many training pairs only")
        group.add_argument("--train-pairs", type=int, help="--data numbers: how many")
        group.add_argument("--held-out", type=int, help="pairs each for validation and test")
        group.add_argument("--vocab-size", type=int, help="at most 50,000, shared by both languages")
        group.add_argument("--max-length", type=int, help="longer pairs, in tokens, are left out")
        group.add_argument("--preset", choices=("numbers", "demo", "base"), help="default: numbers, or base")
        if name == "train":
            sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if any")
            sub.add_argument("--stop-at", type=int, help=argparse.SUPPRESS)
            sub.add_argument("--label-smoothing", type=float)
            options.add_device(sub)
            options.add_model(sub)
            options.add_training(sub)

    for name, text in (
        ("evaluate", "BLEU and exact match on held-out pairs"),
        ("translate", "translate sentences, from the command line or standard input"),
    ):
        sub = command(name, text)
        sub.add_argument("--beams", type=int, default=4, help="1: greedy (default: %(default)s)")
        sub.add_argument("--length-penalty", type=float, default=0.6)
        options.add_device(sub)
        if name == "evaluate":
            sub.add_argument("--split", choices=("validation", "test"), default="test")
            sub.add_argument("--limit", type=int, help="the first so many pairs only")
        else:
            sub.add_argument("sentences", nargs="*")
            sub.add_argument("--n-best", type=int, default=1, help="so many translations of each")
    return main


def main() -> None:
    args = parser().parse_args()
    from examples.translation import program

    getattr(program, args.command)(args)


if __name__ == "__main__":
    run(main)
