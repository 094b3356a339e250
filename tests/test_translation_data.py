"""python -m examples.translation: where sentence pairs come from, and what is said where they cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for library in ("tokenizers", "safetensors", "sacrebleu", "datasets", "matplotlib"):
    pytest.importorskip(library, reason="pip install 'fastattn[examples]'")

from safetensors.torch import load_file, save_file
from test_translation_example import TINY, run

from examples.common.errors import UserError
from examples.common.tokenizer import Tokenizer
from examples.translation import data

# Sources


def test_files(tmp_path: Path) -> None:
    src, tgt = tmp_path / "a.en", tmp_path / "a.de"
    src.write_text("".join(f"line {i}\n" for i in range(40)) + "\nline 0\n")
    tgt.write_text("".join(f"Zeile {i}\n" for i in range(40)) + "leer\nZeile 0\n")
    run("prepare", "--out", tmp_path, "--data", "files", "--src", src, "--tgt", tgt, "--held-out", 4,
        "--vocab-size", 300, "--max-length", 30)  # fmt: skip
    corpus = data.Corpus(tmp_path / "data")
    assert corpus.meta["pairs"] == {"train": 32, "validation": 4, "test": 4}
    texts = corpus.texts("validation") + corpus.texts("test")
    for pair in corpus.pairs("train"):
        texts.append(tuple(corpus.tokenizer.decode([row.tolist() for row in pair])))
    assert sorted(texts) == sorted((f"line {i}", f"Zeile {i}") for i in range(40))


def test_wmt14(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local copy with the layout of the real one: parquet files in ``de-en``, a card that lists them."""
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    copy = tmp_path / "wmt14"
    (copy / "de-en").mkdir(parents=True)
    for split, n in (("train", 30), ("validation", 5), ("test", 6)):
        rows = [{"translation": {"de": f"{split} Satz {i}", "en": f"{split} sentence {i}"}} for i in range(n)]
        rows[1]["translation"]["de"] = " "
        pandas.DataFrame(rows).to_parquet(copy / "de-en" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: de-en/{s}-*\n" for s in ("train", "validation", "test"))
    (copy / "README.md").write_text(f"---\nconfigs:\n- config_name: de-en\n  data_files:\n{files}---\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run("prepare", "--out", tmp_path / "run", "--data", "wmt14", "--wmt14", copy, "--limit", 12, "--vocab-size", 300)
    corpus = data.Corpus(tmp_path / "run" / "data")
    assert corpus.meta["pairs"] == {"train": 11, "validation": 4, "test": 5}
    assert corpus.texts("test")[1] == ("test sentence 2", "test Satz 2")
    with pytest.raises(UserError, match="could not load"):
        run("prepare", "--out", tmp_path / "other", "--data", "wmt14", "--wmt14", tmp_path / "nowhere")


def test_tokenizer_round_trip() -> None:
    texts = ["dreihundertfünfundvierzig", "eine Million!", "naïve 東京 🙂", "  two  spaces"]
    tokenizer = Tokenizer.train(texts, 300)
    assert tokenizer.decode(tokenizer.encode(texts)) == [t.strip() for t in texts]
    assert max(i for row in tokenizer.encode(texts) for i in row) < len(tokenizer)


# Bad input


def lines(path: Path, n: int) -> Path:
    path.write_text("".join(f"{path.suffix} {i}\n" for i in range(n)))
    return path


BAD_DATA = {
    "line counts": (lambda d: (lines(d / "a.en", 9), lines(d / "a.de", 8)), "9 and 8 lines"),
    "empty": (lambda d: (lines(d / "a.en", 0), lines(d / "a.de", 0)), "a.en is empty"),
    "too few": (lambda d: (lines(d / "a.en", 5), lines(d / "a.de", 5)), "hold 5 different pairs"),
    "missing": (lambda d: (d / "a.en", lines(d / "a.de", 5)), "a.en cannot be read"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_files(name: str, tmp_path: Path) -> None:
    make, message = BAD_DATA[name]
    src, tgt = make(tmp_path)
    with pytest.raises(UserError, match=message):
        run("prepare", "--out", tmp_path / "run", "--data", "files", "--src", src, "--tgt", tgt, "--held-out", 3)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    run("prepare", "--out", out, "--train-pairs", 40, "--held-out", 4, "--vocab-size", 270)
    return out


def edit(change: Callable[[str], str]) -> Callable[[Path], int]:
    return lambda path: path.write_text(change(path.read_text()))


def foreign_token(path: Path) -> None:
    tensors = load_file(path)
    tensors["tgt"][3] = 270
    save_file(tensors, path)


DAMAGE = {
    "unknown token": ("train.safetensors", foreign_token, r"token ids in \[\d+, 270\], not 40 in \[0, 270\)"),
    "cut ids": ("train.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-50]), "train.safetensors is damaged"),
    "missing pairs": ("validation.jsonl", edit(lambda t: t[: t.index("\n") + 1]), "1 pairs, not 4"),
    "half a line": ("validation.jsonl", edit(lambda t: t[:-9]), "validation.jsonl is damaged"),
    "cut tokenizer": ("tokenizer.json", edit(lambda t: t[:-9]), "tokenizer.json cannot be read as a tokenizer"),
    "cut meta": ("meta.json", edit(lambda t: t[:-9]), "run prepare first"),
    "no meta": ("meta.json", edit(lambda t: "[]"), "run prepare first"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_are_told_and_left(name: str, prepared: Path, tmp_path: Path) -> None:
    file, damage, message = DAMAGE[name]
    shutil.copytree(prepared, tmp_path / "run")
    damage(tmp_path / "run" / "data" / file)
    left = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message):
        run("train", "--out", tmp_path / "run", *TINY)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == left


def test_what_was_prepared_is_what_is_trained_on(prepared: Path, tmp_path: Path) -> None:
    """Arguments for other data are refused, and the preset is the one of the data."""
    for words, message in (
        (("--train-pairs", 50), "made with --train-pairs 40, not 50"),
        (("--data", "files"), "made with --data numbers, not files"),
        (("--vocab-size", 300), "made with --vocab-size 270, not 300"),
    ):
        with pytest.raises(UserError, match=message):
            run("train", "--out", prepared, *TINY, *words)
    with pytest.raises(UserError, match="--src is not for --data numbers"):
        run("prepare", "--out", tmp_path / "none", "--src", "a.en")
    src, tgt = lines(tmp_path / "a.en", 9), lines(tmp_path / "a.de", 9)
    words = ("--out", tmp_path / "run", "--data", "files", "--src", src, "--tgt", tgt, "--held-out", 2)
    run("prepare", *words, "--vocab-size", 262)
    found = run("compare", "--out", tmp_path / "run", *TINY, "--steps", 1, "--layers", 1, "--attentions", "naive")
    base = data.Corpus(tmp_path / "run" / "data").meta
    assert base["made_with"]["preset"] == "base" and base["max_length"] == 256 and len(found["naive"]) == 1


def test_an_interrupted_preparation_leaves_nothing_that_looks_whole(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "run")

    def broken() -> Any:
        yield "one", "eins"
        raise KeyboardInterrupt

    source = {"train": [("two", "zwei")], "validation": broken(), "test": []}
    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, tmp_path / "run" / "data", {"vocab_size": 262, "max_length": 9})
    with pytest.raises(UserError, match="run prepare first"):
        data.Corpus(tmp_path / "run" / "data")
