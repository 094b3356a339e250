"""Where sentence pairs come from, and the prepared form that training reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.errors import UserError, require
from examples.common.tokenizer import Tokenizer
from examples.grammar import numbers

SPLITS = ("train", "validation", "test")
Text = tuple[str, str]
CHUNK = 10_000


def numbers_source(train: int, held_out: int, seed: int = 0) -> dict[str, Iterable[Text]]:
    """Pairs of the grammar of ``examples/grammar/numbers.py``; held-out ones share no number with training."""
    counts = {"train": train, "validation": held_out, "test": held_out}
    return {split: [p[:2] for p in numbers.generate(split, count, seed)] for split, count in counts.items()}


def files_source(src: Path, tgt: Path, held_out: int, seed: int = 0) -> dict[str, Iterable[Text]]:
    """Two files whose lines correspond. Lines empty on either side are left out; ``held_out`` lines each, chosen by
    ``seed``, are validation and test, and no pair is in two splits."""
    sides = []
    for path in (src, tgt):
        try:
            sides.append(path.read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if sides[-1][-1] == "":
            sides[-1].pop()
        if not sides[-1]:
            raise UserError(f"{path} is empty")
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"line i of {src} must be the translation of line i of {tgt}, but they have {len(sides[0])} and "
            f"{len(sides[1])} lines"
        )
    pairs = [(a.strip(), b.strip()) for a, b in zip(*sides, strict=True)]
    pairs = list(dict.fromkeys(p for p in pairs if all(p)))
    if len(pairs) < 2 * held_out + 1:
        raise UserError(
            f"{src} and {tgt} hold {len(pairs)} different pairs, but --held-out {held_out} takes {2 * held_out} of "
            f"them for validation and test and at least one must remain for training"
        )
    random.Random(seed).shuffle(pairs)
    return {
        "validation": pairs[:held_out], "test": pairs[held_out : 2 * held_out], "train": pairs[2 * held_out :]
    }  # fmt: skip


def wmt14_source(path: str, limit: int | None, src: str = "en", tgt: str = "de") -> dict[str, Iterable[Text]]:
    """WMT'14 German-English by the ``datasets`` library, with its own splits.

    Args:
        path: the data set's name, or a folder with a copy of it.
        limit: only the first so many training pairs.
    """
    datasets = require("datasets")
    try:
        data = datasets.load_dataset(path, "de-en")
    except Exception as error:  # network, files, layout: the library has many types
        raise UserError(f"datasets could not load {path!r} (de-en): {error}") from error
    if missing := [split for split in SPLITS if split not in data]:
        raise UserError(f"{path!r} has no split {', '.join(missing)}, only {', '.join(data)}")

    def pairs(split: str) -> Iterator[Text]:
        rows = data[split]
        if split == "train" and limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        for row in rows:
            pair = row["translation"]
            if pair[src].strip() and pair[tgt].strip():
                yield pair[src].strip(), pair[tgt].strip()

    return {split: _Repeatable(pairs, split) for split in SPLITS}


class _Repeatable:
    """An iterable that starts anew each time: the pairs are read once for the tokenizer and once to be encoded."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self.make, self.arguments = make, arguments

    def __iter__(self) -> Iterator[Text]:
        return iter(self.make(*self.arguments))


def prepare(source: dict[str, Iterable[Text]], folder: Path, vocab_size: int, max_length: int) -> dict[str, Any]:
    """Learn the tokenizer from the training pairs, encode every split, and write all of it into ``folder``.

    Pairs of more than ``max_length`` tokens on a side are left out of training and validation; the test stays whole.

    Returns:
        What ``meta.json`` holds: sizes and what was left out.
    """
    save_file = require("safetensors.torch").save_file
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {"max_length": max_length, "pairs": {}, "left_out": {}}
    tokenizer = Tokenizer.train((text for pair in source["train"] for text in pair), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    for split in SPLITS:
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs, left_out = iter(source[split]), 0
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as lines:
            while chunk := list(islice(pairs, CHUNK)):
                sources, targets = (tokenizer.encode(side) for side in zip(*chunk, strict=True))
                encoded = zip(sources, targets, strict=True)
                for pair, ids in zip(chunk, encoded, strict=True):
                    if split != "test" and max(map(len, ids)) > max_length:
                        left_out += 1
                        continue
                    for side, row in zip(sides, ids, strict=True):
                        side.append(torch.tensor(row, dtype=torch.int32))
                    if split != "train":
                        lines.write(json.dumps(pair, ensure_ascii=False) + "\n")
        if not sides[0]:
            raise UserError(f"no {split} pair is left of {left_out}: raise --max-length {max_length}")
        tensors = {}
        for name, side in zip(("src", "tgt"), sides, strict=True):
            tensors[name] = torch.cat(side)
            tensors[f"{name}_ends"] = torch.tensor([len(row) for row in side]).cumsum(0)
        save_file(tensors, str(folder / f"{split}.safetensors"))
        meta["pairs"][split], meta["left_out"][split] = len(sides[0]), left_out
    (folder / "train.jsonl").unlink()
    meta["vocab_size"] = len(tokenizer)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")  # last: it says that all is there
    return meta


class Corpus:
    """A prepared folder: the tokenizer, sizes, and the pairs of each split."""

    def __init__(self, folder: Path) -> None:
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no prepared data: run prepare first ({error})") from error
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")

    def pairs(self, split: str) -> Pairs:
        """The token ids of a split."""
        load_file = require("safetensors.torch").load_file
        path = self.folder / f"{split}.safetensors"
        try:
            return Pairs(load_file(str(path)))
        except Exception as error:
            raise UserError(f"{path} is damaged, run prepare again: {error}") from error

    def texts(self, split: str) -> list[Text]:
        """The sentences of validation or test."""
        lines = (self.folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [tuple(json.loads(line)) for line in lines]


class Pairs(Sequence[tuple[Tensor, Tensor]]):
    """Token ids of sentence pairs, held as two flat tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.flat = {name: tensors[name] for name in ("src", "tgt")}
        self.bounds = {name: [0, *tensors[f"{name}_ends"].tolist()] for name in ("src", "tgt")}

    def __len__(self) -> int:
        return len(self.bounds["src"]) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        src, tgt = (self.flat[name][self.bounds[name][i] : self.bounds[name][i + 1]] for name in ("src", "tgt"))
        return src, tgt

    def lengths(self) -> list[tuple[int, ...]]:
        """Source and target lengths of every pair, with the end and begin tokens that training adds."""
        a, b = self.bounds["src"], self.bounds["tgt"]
        return [(a[i + 1] - a[i] + 1, b[i + 1] - b[i] + 1) for i in range(len(self))]
