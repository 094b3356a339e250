"""What the four commands of ``python -m examples.translation`` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.common import logs, processes
from examples.common.batching import BatchPlan
from examples.common.errors import UserError, require
from examples.common.options import given, training_options
from examples.common.tokenizer import PAD
from examples.common.training import Trainer
from examples.translation import data, model
from examples.translation.presets import PRESETS
from fastattn.transformer import Seq2SeqTransformer, TransformerConfig

VALIDATION_SENTENCES = 200


def preset_of(args: argparse.Namespace) -> dict[str, Any]:
    """The preset that was named, or else the one for the data."""
    name = args.preset or ("numbers" if args.data == "numbers" else "base")
    preset = PRESETS[name]
    if args.data == "numbers" and "train_pairs" not in preset:
        preset = {"train_pairs": PRESETS["numbers"]["train_pairs"]} | preset
    return preset


def prepare(args: argparse.Namespace) -> data.Corpus:
    """Read or generate the pairs, learn the tokenizer, write ``OUT/data``."""
    sizes = given(args, preset_of(args))
    if not 1 <= sizes["vocab_size"] <= 50_000:
        raise UserError(f"--vocab-size must be at most 50,000, got {sizes['vocab_size']}")
    for name in ("held_out", "max_length"):
        if sizes[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {sizes[name]}")
    if args.data == "numbers":
        try:
            source = data.numbers_source(sizes["train_pairs"], sizes["held_out"])
        except RuntimeError as error:
            raise UserError(f"--train-pairs or --held-out is too large: {error}") from error
    elif args.data == "files":
        if not args.src or not args.tgt:
            raise UserError("--data files needs --src FILE and --tgt FILE")
        source = data.files_source(args.src, args.tgt, sizes["held_out"])
    else:
        source = data.wmt14_source(args.wmt14, args.limit)
    folder = args.out / "data"
    meta = data.prepare(source, folder, sizes["vocab_size"], sizes["max_length"])
    pairs, left_out = meta["pairs"], sum(meta["left_out"].values())
    print(
        f"{folder}: {pairs['train']:,} training, {pairs['validation']:,} validation and {pairs['test']:,} test pairs, "
        f"{meta['vocab_size']:,} tokens" + (f"; {left_out:,} too long and left out" if left_out else ""), flush=True,
    )  # fmt: skip
    return data.Corpus(folder)


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


def train(args: argparse.Namespace) -> list[float]:
    """Prepare if need be, train, keep the best model by validation BLEU, draw the curves."""
    device = processes.choose_device(args.device)
    preset = preset_of(args)
    options, sizes = training_options(args, preset), given(args, preset)
    with processes.process_group(device), processes.attention(args.attention):
        if processes.rank() == 0 and not (args.out / "data" / "meta.json").exists():
            prepare(args)
        processes.barrier()
        corpus = data.Corpus(args.out / "data")
        if not args.resume and (args.out / "checkpoint.pt").exists():
            raise UserError(f"{args.out} holds a run: --resume goes on with it, another --out starts a new one")
        torch.manual_seed(options.seed)
        seq2seq = new_model(sizes, corpus.meta, device)
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
        losses = trainer.run(args.resume, args.stop_at)
        if processes.rank() == 0 and (args.out / "log.csv").exists():
            logs.plot(args.out / "log.csv", args.out / "curves.png", "validation BLEU")
    return losses


class Validation:
    """Loss on all, greedy BLEU on some of the validation pairs; the best model so far goes to ``OUT/model``."""

    def __init__(self, corpus: data.Corpus, objective: model.Objective, max_tokens: int, out: Path) -> None:
        self.corpus, self.objective, self.out = corpus, objective, out
        self.pairs = corpus.pairs("validation")
        self.plan = BatchPlan(self.pairs.lengths(), max_tokens, seed=0)
        self.texts = corpus.texts("validation")[:VALIDATION_SENTENCES]

    def __call__(self) -> dict[str, float]:
        if processes.rank():
            processes.barrier()
            return {}
        device = next(self.objective.parameters()).device
        batches = [model.collate([self.pairs[i] for i in batch], device) for batch in self.plan.epoch(0)]
        loss = model.mean_loss(self.objective, batches)
        translator = model.Translator(self.objective.model, self.corpus.tokenizer, num_beams=1)
        bleu = score([b for _, b in self.texts], translator([a for a, _ in self.texts]))["bleu"]
        best = self.out / "model" / "score.json"
        if not best.exists() or bleu >= json.loads(best.read_text())["bleu"]:
            model.save(self.objective.model, self.corpus.tokenizer, self.out / "model")
            best.write_text(json.dumps({"bleu": bleu, "validation_loss": loss}) + "\n")
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
    if args.beams < 1:
        raise UserError(f"--beams must be at least 1, got {args.beams}")
    return model.Translator(*model.load(args.out / "model", device), args.beams, args.length_penalty)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Translate a split, score it, write the translations beside the references."""
    corpus = data.Corpus(args.out / "data")
    texts = corpus.texts(args.split)[: args.limit]
    translator = translator_of(args)
    progress = logs.Progress(len(texts), 0)
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
            _show(translator, [line for line in sys.stdin.read().splitlines() if line.strip()], args.n_best)
        else:
            print("Type a sentence; an empty line ends.")
            while sentence := input("> ").strip():
                try:
                    _show(translator, [sentence], args.n_best)
                except UserError as error:
                    print(f"error: {error}")


def _show(translator: model.Translator, sentences: Sequence[str], count: int) -> None:
    for sentence, answers in zip(sentences, translator.n_best(sentences, count), strict=True):
        if len(sentences) > 1:
            print(f"{sentence}\t{answers[0]}")
        else:
            print(answers[0])
        for other in answers[1:]:
            print(f"\t{other}")
