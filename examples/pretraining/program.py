"""What ``python -m examples.pretraining`` does: pre-train, fine-tune both ways, compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.common import checkpoint, logs, processes
from examples.common.batching import BatchPlan
from examples.common.errors import UserError, require
from examples.common.files import write_text
from examples.common.options import agree, given, plain, training_options
from examples.common.tokenizer import BOS, CLS, EOS, MASK, PAD, SEP, Tokenizer
from examples.common.training import FREE, Trainer
from examples.grammar import things
from examples.pretraining import data, finetune
from fastattn.transformer import (
    CausalLM,
    PretrainingModel,
    TransformerConfig,
    causal_lm_loss,
    cross_entropy,
    mask_tokens,
)

#: Sized for two CPU cores.
PRESET: dict[str, Any] = {
    "documents": 6000, "vocab_size": 1024, "max_length": 64,
    "d_model": 96, "heads": 4, "layers": 2, "feedforward": 256, "dropout": 0.1, "activation": "gelu", "norm": "pre",
    "steps": 1200, "max_tokens": 3072, "learning_rate": 2e-3, "warmup": 100, "cooldown": 0.33,
    "validate_every": 300, "checkpoint_every": 300, "report_every": 50,
}  # fmt: skip


class MaskedObjective(nn.Module):
    """Masked language modelling and next-sentence prediction, each a mean, added up (arXiv 1810.04805, A.2)."""

    def __init__(self, model: PretrainingModel) -> None:
        super().__init__()
        self.model = model
        self.generator: torch.Generator | None = None

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, segments, is_next = batch
        inputs, labels = mask_tokens(
            tokens, vocab_size=self.model.config.vocab_size, mask_id=MASK, special_ids=(PAD, BOS, EOS, CLS, SEP),
            generator=self.generator,
        )  # fmt: skip
        words, nexts = self.model(inputs, tokens == PAD, segments)
        count = (labels >= 0).sum()
        return cross_entropy(words, labels, reduction="sum") + count * cross_entropy(nexts, is_next), count


class CausalObjective(nn.Module):
    """Causal language modelling."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.generator: torch.Generator | None = None

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens = batch[0]
        return causal_lm_loss(self.model, tokens, reduction="sum"), (tokens[:, 1:] != PAD).sum()


def main(args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Everything, one after the other; returns the accuracies by arm and size."""
    sizes = sorted(args.sizes)
    device = processes.choose_device(args.device)
    for library in ("matplotlib", "safetensors"):  # before the training, not after it
        require(library)
    task = data.task_from_file(args.labelled, sizes[-1]) if args.labelled else data.default_task(sizes[-1])
    with processes.process_group(device), processes.attention(args.attention):
        tokenizer, config = pretrain(args, device)
        causal = args.objective == "causal"
        tuning = finetune.FineTuning(
            task, tokenizer, args.out / "model", config, causal, finetune.Recipe(steps=args.tuning_steps), device
        )
        say = print if processes.rank() == 0 else (lambda text: None)
        results = tuning.compare(sizes, args.seeds, say)
        if processes.rank() == 0:
            chance = 100 * max(sum(label == y for label, _ in task.test) for y in task.labels) / len(task.test)
            print(f"weights taken over: {tuning.report}")
            print(f"accuracy on {len(task.test)} held-out sentences, {len(task.labels)} labels, {args.seeds} seeds")
            print(finetune.table(results))
            finetune.save(results, args.out, chance)
            print(f"written: {args.out / 'results.json'}, {args.out / 'results.png'}")
    return results


def pretrain(args: argparse.Namespace, device: torch.device) -> tuple[Tokenizer, TransformerConfig]:
    """Tokenizer and model in ``OUT/model``, trained unless they are there already."""
    folder = args.out / "model"
    options, sizes = training_options(args, PRESET), given(args, PRESET)
    if args.resume and (folder / "done.json").exists():
        return _pretrained(args, folder)
    begun = checkpoint.find(args.out)
    if not args.resume and (begun or (folder / "done.json").exists()):
        raise UserError(f"{args.out} holds a run: --resume goes on with it, another --out starts a new one")
    processes.barrier()
    documents = data.read_documents(args.text) if args.text else things.documents(sizes["documents"])
    if processes.rank() == 0 and not begun:
        folder.mkdir(parents=True, exist_ok=True)
        Tokenizer.train((s for d in documents for s in d), sizes["vocab_size"]).save(folder / "tokenizer.json")
    processes.barrier()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if processes.rank() == 0:
        print(f"{sum(map(len, documents)):,} sentences in {len(documents):,} documents, {len(tokenizer):,} tokens")
    held = max(1, len(documents) // 50) if len(documents) > 3 else 0
    train, validation = (
        _examples(args.objective, part, tokenizer, sizes["max_length"])
        for part in (documents[held:], documents[:held] if held > 1 else documents)
    )
    torch.manual_seed(options.seed)
    objective = new_objective(args.objective, sizes, len(tokenizer), device)
    trainer = Trainer(
        objective,
        lambda batch: data.collate([train[i] for i in batch], device),
        BatchPlan([(len(e.tokens),) for e in train], options.max_tokens, options.seed),
        options,
        args.out,
        lambda: {"validation_loss": mean_loss(objective, validation, options.max_tokens, device)},
    )
    trainer.run(args.resume)
    if processes.rank() == 0:
        objective.model.save_pretrained(folder)
        made_with = {"objective": args.objective, "text": plain(args.text), **asdict(options), **sizes}
        made_with = {name: value for name, value in made_with.items() if name == "steps" or name not in FREE}
        write_text(folder / "done.json", json.dumps(made_with, indent=2) + "\n")
        if (args.out / "log.csv").exists():
            logs.plot(args.out / "log.csv", args.out / "curves.png", "")
    processes.barrier()
    return tokenizer, objective.model.config


def _pretrained(args: argparse.Namespace, folder: Path) -> tuple[Tokenizer, TransformerConfig]:
    """What an earlier run has left in ``folder``, if it was asked for the same."""
    kind = PretrainingModel if args.objective == "mlm" else CausalLM
    try:
        agree(args, json.loads((folder / "done.json").read_text()), folder)
        return Tokenizer.load(folder / "tokenizer.json"), kind.from_pretrained(folder).config
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{error}; start anew with another --out") from error


def new_objective(
    name: str, sizes: dict[str, Any], vocab_size: int, device: torch.device
) -> MaskedObjective | CausalObjective:
    """An objective on an untrained model."""
    try:
        config = TransformerConfig(
            vocab_size=vocab_size, padding_id=PAD, max_length=sizes["max_length"],
            num_segments=2 if name == "mlm" else 0, d_model=sizes["d_model"], nhead=sizes["heads"],
            num_encoder_layers=sizes["layers"], num_decoder_layers=sizes["layers"],
            dim_feedforward=sizes["feedforward"], dropout=sizes["dropout"], activation=sizes["activation"],
            norm_first=sizes["norm"] == "pre",
        )  # fmt: skip
        if name == "mlm":
            return MaskedObjective(PretrainingModel(config, device))
        return CausalObjective(CausalLM(config, device))
    except ValueError as error:
        raise UserError(str(error)) from error


def _examples(objective: str, documents: list[list[str]], tokenizer: Tokenizer, max_length: int) -> list[data.Example]:
    if objective == "mlm":
        return data.masked_examples(documents, tokenizer, max_length, seed=0)
    return data.causal_examples(documents, tokenizer, max_length)


@torch.no_grad()
def mean_loss(
    objective: MaskedObjective | CausalObjective, examples: Sequence[data.Example], max_tokens: int,
    device: torch.device,
) -> float:  # fmt: skip
    """Loss per predicted token without dropout, on the same masks every time."""
    objective.eval()
    objective.generator = torch.Generator(device).manual_seed(0)
    loss = count = 0.0
    for batch in BatchPlan([(len(e.tokens),) for e in examples], max_tokens, seed=0).epoch(0):
        part, counted = objective(data.collate([examples[i] for i in batch], device))
        loss, count = loss + float(part), count + float(counted)
    objective.generator = None
    objective.train()
    return loss / max(count, 1.0)
