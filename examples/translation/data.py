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
from examples.common.files import read_text, write_text
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
    sides = [read_text(path).removesuffix("\n").split("\n") for path in (src, tgt)]
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


def prepare(source: dict[str, Iterable[Text]], folder: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """Learn the tokenizer from the training pairs, encode every split, and write all of it into ``folder``.

    Pairs of more than ``max_length`` tokens on a side are left out of training and validation; the test stays whole.

    Args:
        made_with: how the data are asked for, written down; of it, ``vocab_size`` and ``max_length`` are used.

    Returns:
        What ``meta.json`` holds: sizes and what was left out.
    """
    save_file = require("safetensors.torch").save_file
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # it says that all is there, and of what
    max_length = made_with["max_length"]
    meta: dict[str, Any] = {"made_with": made_with, "max_length": max_length, "pairs": {}, "left_out": {}}
    tokenizer = Tokenizer.train((text for pair in source["train"] for text in pair), made_with["vocab_size"])
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
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


class Corpus:
    """A prepared folder: the tokenizer, sizes, and the pairs of each split."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.meta = {name: meta[name] for name in ("made_with", "pairs", "max_length", "vocab_size")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no prepared data: run prepare first ({error!r})") from error
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")

    def pairs(self, split: str) -> Pairs:
        """The token ids of a split."""
        load_file = require("safetensors.torch").load_file
        path = self.folder / f"{split}.safetensors"
        try:
            pairs = Pairs(load_file(str(path)))
        except Exception as error:  # safetensors raises its own type, or none in particular
            raise UserError(f"{path} is damaged, prepare again: {error}") from error
        lowest, highest = pairs.ids()
        if len(pairs) != self.meta["pairs"][split] or not 0 <= lowest <= highest < len(self.tokenizer):
            raise UserError(
                f"{path} does not fit the tokenizer and meta.json beside it, prepare again: {len(pairs)} pairs of "
                f"token ids in [{lowest}, {highest}], not {self.meta['pairs'][split]} in [0, {len(self.tokenizer)})"
            )
        return pairs

    def texts(self, split: str) -> list[Text]:
        """The sentences of validation or test."""
        path = self.folder / f"{split}.jsonl"
        try:
            texts: list[Text] = [(a, b) for a, b in map(json.loads, read_text(path).splitlines())]
            if len(texts) != self.meta["pairs"][split]:
                raise ValueError(f"{len(texts)} pairs, not {self.meta['pairs'][split]}")
        except ValueError as error:
            raise UserError(f"{path} is damaged, prepare again: {error}") from error
        return texts


class Pairs(Sequence[tuple[Tensor, Tensor]]):
    """Token ids of sentence pairs, held as two flat tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.flat = {name: tensors[name] for name in ("src", "tgt")}
        self.bounds = {name: [0, *tensors[f"{name}_ends"].tolist()] for name in ("src", "tgt")}
        for name, bounds in self.bounds.items():
            if bounds != sorted(bounds) or bounds[-1] != len(self.flat[name]) or len(bounds) != len(self) + 1:
                raise ValueError(f"{name}_ends does not part {name}")

    def __len__(self) -> int:
        return len(self.bounds["src"]) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        src, tgt = (self.flat[name][self.bounds[name][i] : self.bounds[name][i + 1]] for name in ("src", "tgt"))
        return src, tgt

    def ids(self) -> tuple[int, int]:
        """The least and the greatest token id."""
        least, greatest = zip(*(torch.aminmax(ids) for ids in self.flat.values()), strict=True)
        return int(min(least)), int(max(greatest))

    def lengths(self) -> list[tuple[int, ...]]:
        """Source and target lengths of every pair, with the end and begin tokens that training adds."""
        a, b = self.bounds["src"], self.bounds["tgt"]
        return [(a[i + 1] - a[i] + 1, b[i + 1] - b[i] + 1) for i in range(len(self))]
