"""python -m examples.pretraining: text in, a comparison out; and that the comparison compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for library in ("tokenizers", "safetensors", "matplotlib"):
    pytest.importorskip(library, reason="pip install 'fastattn[examples]'")

from examples.common import logs
from examples.common.errors import UserError
from examples.common.tokenizer import BOS, CLS, EOS, SEP, Tokenizer
from examples.common.training import Trainer
from examples.grammar import things
from examples.pretraining import __main__ as command
from examples.pretraining import data, finetune, program

ROOT = Path(__file__).parents[1]
TINY = (
    "--documents 60 --vocab-size 400 --d-model 32 --heads 2 --layers 1 --feedforward 32 --steps 6 --max-tokens 600 "
    "--warmup 2 --validate-every 3 --checkpoint-every 2 --report-every 1 --sizes 6 12 --seeds 2 --tuning-steps 3"
).split()


def run(*words: Any) -> Any:
    return program.main(command.parser().parse_args([str(w) for w in words]))


@pytest.mark.parametrize("objective", ["mlm", "causal"])
def test_whole_path_and_resume(objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*TINY, "--out", tmp_path / "run", "--objective", objective)
    results = run(*words)
    printed = capsys.readouterr().out
    assert set(results) == set(finetune.ARMS) and all(len(v) == 2 for arm in results.values() for v in arm.values())
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["pre-trained"]["12"] == results["pre-trained"][12]
    )
    assert (tmp_path / "run" / "results.png").stat().st_size > 1000
    assert "classifier.weight" in printed and "gain, least to greatest" in printed
    with pytest.raises(UserError, match="holds a run"):
        run(*words)
    assert run(*words, "--resume") == results  # the pre-trained model is there: only fine-tuned again


def test_a_broken_run_goes_on_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*TINY, "--dropout", 0.2, "--sizes", 6, "--seeds", 1)
    expected = run(*words, "--out", tmp_path / "unbroken")
    save = Trainer._save

    def save_and_die(self: Trainer) -> None:
        save(self)
        if self.step == 4:
            raise KeyboardInterrupt

    out = tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", save_and_die)
        run(*words, "--out", out)
    with pytest.raises(UserError, match="trained on other data"):
        run(*words, "--out", out, "--resume", "--documents", 50)
    assert run(*words, "--out", out, "--resume") == expected
    curves = [[float(r["loss"]) for r in logs.read(folder / "log.csv")] for folder in (out, tmp_path / "unbroken")]
    assert curves[0] == curves[1] and len(curves[0]) == 6
    with pytest.raises(UserError, match="made with --objective mlm, not causal"):
        run(*words, "--out", out, "--resume", "--objective", "causal")
    with pytest.raises(UserError, match="made with --d-model 32, not 48"):
        run(*words, "--out", out, "--resume", "--d-model", 48)


def test_two_processes_train_like_one_that_accumulates(tmp_path: Path) -> None:
    words = (*TINY, "--objective", "causal", "--dropout", 0, "--sizes", 6)
    alone = run(*words, "--out", tmp_path / "alone", "--accumulate", 2)
    command_line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "examples.pretraining", *words, "--out", tmp_path / "two", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command_line)), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    curves = [[float(r["loss"]) for r in logs.read(tmp_path / name / "log.csv")] for name in ("alone", "two")]
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], rel=1e-5)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert {arm: len(v["6"]) for arm, v in results.items()} == dict.fromkeys(alone, 2)


def test_losses_fall_and_text_files_are_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(d) for d in things.documents(80)))
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{k}\t{s}\n" for k, s in things.labelled(60)))
    out = tmp_path / "run"
    run(*TINY, "--out", out, "--text", text, "--labelled", labels, "--steps", 30, "--learning-rate", 0.01)
    rows = (out / "log.csv").read_text().splitlines()[1:]
    loss = [float(row.split(",")[2]) for row in rows]
    assert loss[-1] < loss[0] - 1


def test_sequences() -> None:
    documents = [["A cat. ", "A dog runs."], ["One.", "Two.", "Three."]]
    tokenizer = Tokenizer.train([s for d in documents for s in d], 300)
    for tokens, segments, _ in data.masked_examples(documents, tokenizer, 64, seed=0):
        end = tokens.index(SEP)
        assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
        assert segments == [0] * (end + 1) + [1] * (len(tokens) - end - 1)
    assert all(len(e.tokens) <= 10 for e in data.masked_examples(documents, tokenizer, 10, seed=0))
    pieces = data.causal_examples(documents, tokenizer, 6)
    whole = [t for ids in tokenizer.encode([" ".join(d) for d in documents]) for t in (BOS, *ids, EOS)]
    predicted = [t for piece in pieces for t in piece.tokens[1:]]
    assert sorted([*predicted, BOS, BOS]) == sorted(whole) and max(len(p.tokens) for p in pieces) == 6


def test_reading_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One two.  Three\nfour! Five?\n\n \nSix.\n")
    assert data.read_documents([path]) == [["One two.", "Three four!", "Five?"], ["Six."]]
    path.write_text("x. " * 45)
    assert [len(d) for d in data.read_documents([path])] == [20, 20, 5]


def test_both_arms_are_treated_alike(tmp_path: Path) -> None:
    """With the pre-trained weights being those that a fresh model of seed 0 has, the arms must come out the same."""
    task = data.default_task(24, held_out=60)
    tokenizer = Tokenizer.train([s for _, s in task.pool], 400)
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "nhead": 2, "dim_feedforward": 32, "max_length": 32}
    config = finetune.TransformerConfig(**sizes, padding_id=0, num_encoder_layers=1, dropout=0.1)
    torch.manual_seed(0)
    finetune.SequenceClassifier(config, 6).save_pretrained(tmp_path)
    tuning = finetune.FineTuning(
        task, tokenizer, tmp_path, config, False, finetune.Recipe(steps=4), torch.device("cpu")
    )  # fmt: skip
    results = [tuning.accuracy(arm, 24, 0, 1e-2, task.test) for arm in finetune.ARMS]
    assert results[0] == results[1]
    drawn = data.draw(task, 24, 1)
    assert drawn == data.draw(task, 24, 1) != data.draw(task, 24, 2)
    assert sorted(label for label, _ in drawn) == sorted(4 * task.labels)
    held_out = {s for _, s in task.test + task.validation}
    assert not held_out & {s for _, s in task.pool} and len(held_out) == 120


def test_table() -> None:
    results = {"pre-trained": {8: [90.0, 92.0]}, "from scratch": {8: [50.0, 60.0]}}
    row = finetune.table(results).splitlines()[1].split()
    assert row == ["8", "91.0%", "±", "1.4", "55.0%", "±", "7.1", "+32.0", "to", "+40.0"]


def test_bad_input(tmp_path: Path) -> None:
    empty, one, labels = tmp_path / "empty.txt", tmp_path / "one.txt", tmp_path / "labels.tsv"
    empty.write_text(" \n")
    one.write_text("A single paragraph.")
    labels.write_text("animal\tthe cat\nthe dog without a label\n")
    for words, message in (
        (("--text", empty), "empty.txt is empty"),
        (("--text", one), "two paragraphs"),
        (("--text", tmp_path / "none"), "cannot be read"),
        (("--labelled", labels), "line 2: expected a label"),
        (("--sizes", 0), "at least 1"),
        (("--vocab-size", 3), "262"),
    ):
        with pytest.raises(UserError, match=message):
            run(*TINY, "--out", tmp_path / f"run{message[:3]}", *words)
    labels.write_text("a\tb\nc\td\n" * 3)
    with pytest.raises(UserError, match="holds 2 different lines"):
        run(*TINY, "--out", tmp_path / "run", "--labelled", labels)
