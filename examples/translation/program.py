"""What the four commands of ``python -m examples.translation`` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from examples.common import checkpoint, logs, processes
from examples.common.batching import BatchPlan
from examples.common.errors import UserError, require
from examples.common.files import write_text
from examples.common.options import agree, given, plain, training_options
from examples.common.tokenizer import PAD
from examples.common.training import Options, Trainer
from examples.translation import data, model
from examples.translation.compare import Losses, losses, table
from examples.translation.presets import PRESETS
from fastattn.transformer import Seq2SeqTransformer, TransformerConfig

VALIDATION_SENTENCES = 200


def preset_of(args: argparse.Namespace, made_with: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and values of the preset that was named, now or for ``prepare``; else of the one for the data."""
    kind = args.data or made_with.get("data", "numbers")
    name = args.preset or made_with.get("preset") or ("numbers" if kind == "numbers" else "base")
    return name, {"train_pairs": PRESETS["numbers"]["train_pairs"]} | PRESETS[name]


#: The arguments that say what the data are, by kind.
DATA_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "numbers": ("train_pairs", "held_out"), "files": ("src", "tgt", "held_out"), "wmt14": ("wmt14", "limit"),
}  # fmt: skip


def prepare(args: argparse.Namespace) -> data.Corpus:
    """Read or generate the pairs, learn the tokenizer, write ``OUT/data``."""
    kind = args.data or "numbers"
    for name in {n for names in DATA_ARGUMENTS.values() for n in names} - {*DATA_ARGUMENTS[kind]}:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is not for --data {kind}")
    preset, values = preset_of(args, {})
    sizes = given(args, values)
    folder = args.out / "data"
    used = {name: plain(sizes.get(name, getattr(args, name))) for name in DATA_ARGUMENTS[kind]}
    made_with = {"data": kind, "preset": preset, **used} | {n: sizes[n] for n in ("vocab_size", "max_length")}
    if (path := checkpoint.find(args.out)) and _made_with(folder) not in (None, made_with):
        raise UserError(f"{path} was trained on the data in {folder}: other data need another --out")
    meta = data.prepare(_source(args, kind, sizes), folder, made_with)
    pairs, left_out = meta["pairs"], sum(meta["left_out"].values())
    print(
        f"{folder}: {pairs['train']:,} training, {pairs['validation']:,} validation and {pairs['test']:,} test pairs, "
        f"{meta['vocab_size']:,} tokens" + (f"; {left_out:,} too long and left out" if left_out else ""), flush=True,
    )  # fmt: skip
    return data.Corpus(folder)


def _made_with(folder: Path) -> dict[str, Any] | None:
    """How the data in ``folder`` were asked for; None where there are none, or damaged ones."""
    try:
        made_with: dict[str, Any] = data.Corpus(folder).meta["made_with"]
    except UserError:
        return None
    return made_with


def _source(args: argparse.Namespace, kind: str, sizes: dict[str, Any]) -> dict[str, Iterable[data.Text]]:
    if kind == "numbers":
        try:
            return data.numbers_source(sizes["train_pairs"], sizes["held_out"])
        except RuntimeError as error:
            raise UserError(f"--train-pairs or --held-out is too large: {error}") from error
    if kind == "files":
        if not args.src or not args.tgt:
            raise UserError("--data files needs --src FILE and --tgt FILE")
        return data.files_source(args.src, args.tgt, sizes["held_out"])
    return data.wmt14_source(args.wmt14 or "wmt/wmt14", args.limit)


def new_model(sizes: dict[str, Any], meta: dict[str, Any], device: torch.device) -> Seq2SeqTransformer:
    """An untrained model; sequences may be longer than those trained on, up to four times."""
    try:
        config = TransformerConfig(
            vocab_size=meta["vocab_size"], padding_id=PAD, max_length=4 * meta["max_length"],
            d_model=sizes["d_model"], nhead=sizes["heads"], dim_feedforward=sizes["feedforward"],
            num_encoder_layers=sizes["layers"], num_decoder_layers=sizes["layers"], dropout=sizes["dropout"],
            activation=sizes["activation"], norm_first=sizes["norm"] == "pre",
        )  # fmt: skip
        return Seq2SeqTransformer(config, device)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(str(error)) from error


def _start(
    args: argparse.Namespace, device: torch.device
) -> tuple[data.Corpus, Seq2SeqTransformer, dict[str, Any], Options]:
    """Data, prepared if need be; an untrained model; its sizes; how to train it."""
    if processes.rank() == 0 and not (args.out / "data" / "meta.json").exists():
        prepare(args)
    processes.barrier()
    corpus = data.Corpus(args.out / "data")
    made_with = corpus.meta["made_with"]
    agree(args, {name: was for name, was in made_with.items() if name != "preset"}, corpus.folder)
    _, preset = preset_of(args, made_with)
    options, sizes = training_options(args, preset), given(args, preset)
    torch.manual_seed(options.seed)
    return corpus, new_model(sizes, corpus.meta, device), sizes, options


def train(args: argparse.Namespace) -> list[float]:
    """Prepare if need be, train, keep the best model by validation BLEU, draw the curves."""
    device = processes.choose_device(args.device)
    for library in ("matplotlib", "sacrebleu"):  # before the training, not after it
        require(library)
    with processes.process_group(device), processes.attention(args.attention):
        if not args.resume and checkpoint.find(args.out):
            raise UserError(f"{args.out} holds a run: --resume goes on with it, another --out starts a new one")
        corpus, seq2seq, sizes, options = _start(args, device)
        objective = model.Objective(seq2seq, sizes["label_smoothing"])
        pairs = corpus.pairs("train")
        if processes.rank() == 0:
            count = sum(p.numel() for p in seq2seq.parameters())
            print(f"{count:,} parameters on {device}, attention: {args.attention}", flush=True)
        trainer = Trainer(
            objective,
            lambda batch: model.collate([pairs[i] for i in batch], device),
            BatchPlan(pairs.lengths(), options.max_tokens, options.seed),
            options,
            args.out,
            Validation(corpus, objective, options.max_tokens, args.out),
        )
        curve = trainer.run(args.resume, args.stop_at)
        if processes.rank() == 0 and (args.out / "log.csv").exists():
            logs.plot(args.out / "log.csv", args.out / "curves.png", "validation BLEU")
    return curve


def compare(args: argparse.Namespace) -> Losses:
    """Train some steps on each attention of ``args.attentions`` and the naive one; print how far apart they are."""
    device = processes.choose_device(args.device)
    corpus, seq2seq, sizes, options = _start(args, device)
    found = losses(corpus, seq2seq, sizes["label_smoothing"], options, args.attentions)
    print(f"{options.steps} steps of batches of {options.max_tokens} tokens, torch {torch.__version__} on {device}")
    print(table(found))
    return found


class Validation:
    """Loss on all, greedy BLEU on some of the validation pairs; the best model so far goes to ``OUT/model``."""

    def __init__(self, corpus: data.Corpus, objective: model.Objective, max_tokens: int, out: Path) -> None:
        self.corpus, self.objective = corpus, objective
        self.pairs = corpus.pairs("validation")
        self.plan = BatchPlan(self.pairs.lengths(), max_tokens, seed=0)
        self.texts = corpus.texts("validation")[:VALIDATION_SENTENCES]
        self.best_file = out / "model" / "score.json"
        self.best = -1.0
        if self.best_file.exists():
            try:
                self.best = float(json.loads(self.best_file.read_text())["bleu"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.best_file} is damaged ({error}): move it away, and the next model takes its place"
                ) from error

    def __call__(self) -> dict[str, float]:
        if processes.rank():
            processes.barrier()
            return {}
        device = next(self.objective.parameters()).device
        batches = [model.collate([self.pairs[i] for i in batch], device) for batch in self.plan.epoch(0)]
        loss = model.mean_loss(self.objective, batches)
        translator = model.Translator(self.objective.model, self.corpus.tokenizer, num_beams=1)
        bleu = score([b for _, b in self.texts], translator([a for a, _ in self.texts]))["bleu"]
        if bleu >= self.best:
            model.save(self.objective.model, self.corpus.tokenizer, self.best_file.parent)
            write_text(self.best_file, json.dumps({"bleu": bleu, "validation_loss": loss}) + "\n")
            self.best = bleu
        processes.barrier()
        return {"validation_loss": loss, "score": bleu}


def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """BLEU with sacrebleu's signature, and the percentage of sentences that are the reference exactly."""
    bleu = require("sacrebleu.metrics").BLEU()
    result = bleu.corpus_score(list(hypotheses), [list(references)])
    exact = sum(a == b for a, b in zip(references, hypotheses, strict=True))
    return {
        "bleu": result.score, "exact": 100 * exact / max(1, len(references)), "signature": str(bleu.get_signature())
    }  # fmt: skip


def translator_of(args: argparse.Namespace) -> model.Translator:
    device = processes.choose_device(args.device)
    return model.Translator(*model.load(args.out / "model", device), args.beams, args.length_penalty)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Translate a split, score it, write the translations beside the references."""
    corpus = data.Corpus(args.out / "data")
    texts = corpus.texts(args.split)[: args.limit]
    translator = translator_of(args)
    progress = logs.Progress("translating", len(texts))
    with processes.attention(args.attention):
        try:
            hypotheses = translator([a for a, _ in texts], progress.advance)
        finally:
            progress.close()
    result = score([b for _, b in texts], hypotheses)
    with open(args.out / f"{args.split}.translations.tsv", "w", encoding="utf-8") as file:
        file.writelines(f"{a}\t{b}\t{h}\n" for (a, b), h in zip(texts, hypotheses, strict=True))
    print(f"{len(texts)} {args.split} pairs: BLEU {result['bleu']:.2f}, exact match {result['exact']:.1f}%")
    print(f"sacrebleu: {result['signature']}")
    return result


def translate(args: argparse.Namespace) -> None:
    """Translate the sentences given, or the lines of standard input; on a terminal one after the other."""
    translator = translator_of(args)
    with processes.attention(args.attention):
        if args.sentences:
            _show(translator, args.sentences, args.n_best)
        elif not sys.stdin.isatty():
            _show(translator, [line for line in _standard_input().splitlines() if line.strip()], args.n_best)
        else:
            print("Type a sentence; an empty line ends.")
            with suppress(EOFError):  # Ctrl-D
                while sentence := input("> ").strip():
                    try:
                        _show(translator, [sentence], args.n_best)
                    except UserError as error:
                        print(f"error: {error}")


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error}") from error


def _show(translator: model.Translator, sentences: Sequence[str], count: int) -> None:
    for sentence, answers in zip(sentences, translator.n_best(sentences, count), strict=True):
        if len(sentences) > 1:
            print(f"{sentence}\t{answers[0]}")
        else:
            print(answers[0])
        for other in answers[1:]:
            print(f"\t{other}")
