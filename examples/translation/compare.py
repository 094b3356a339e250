"""The same training on several attention backends: how far the losses are from each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from examples.common import processes
from examples.common.batching import BatchPlan
from examples.common.training import Options, Trainer
from examples.translation import data, model
from fastattn.transformer import Seq2SeqTransformer

Losses = dict[str, list[float]]


def losses(
    corpus: data.Corpus, start: Seq2SeqTransformer, label_smoothing: float, options: Options, attentions: list[str]
) -> Losses:
    """The loss of every step: ``"float64"`` on the naive attention in float64, then ``"naive"`` and ``attentions`` in
    float32, each from a copy of ``start`` on the same batches with the same dropout."""
    device, pairs = next(start.parameters()).device, corpus.pairs("train")
    plan = BatchPlan(pairs.lengths(), options.max_tokens, options.seed)
    found: Losses = {}
    for name in dict.fromkeys(("float64", "naive", *attentions)):
        dtype = torch.float64 if name == "float64" else torch.float32
        twin = Seq2SeqTransformer(start.config, device, dtype)
        twin.load_state_dict(start.state_dict())
        objective = model.Objective(twin, label_smoothing)
        print(f"{name}:", flush=True)
        with TemporaryDirectory() as folder, processes.attention("naive" if name == "float64" else name):
            trainer = Trainer(
                objective,
                lambda batch: model.collate([pairs[i] for i in batch], device),
                plan,
                replace(options, logs=(), report_every=options.steps),
                Path(folder),
            )
            found[name] = trainer.run()
    return found


def table(found: Losses) -> str:
    """Per backend the greatest error of any step's loss against float64, beside what the tolerance rule allows:
    twice the naive attention's error and 8 eps of the greatest loss (docs/architecture.md, Proof)."""
    exact = found["float64"]
    errors = {name: max(abs(a - b) for a, b in zip(v, exact, strict=True)) for name, v in found.items()}
    allowed = 2 * errors["naive"] + 8 * torch.finfo(torch.float32).eps * max(exact)
    rows = [f"{'attention':>9}  {'loss of step 1':>15}  {f'of step {len(exact)}':>15}  {'greatest error':>14}  allowed"]
    for name, values in found.items():
        limit = f"{allowed:.1e}" if name not in ("float64", "naive") else ""
        rows.append(f"{name:>9}  {values[0]:>15.9f}  {values[-1]:>15.9f}  {errors[name]:>14.1e}  {limit}".rstrip())
    return "\n".join(rows)
