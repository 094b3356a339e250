"""Fine-tuning on a few labels, from pre-trained and from fresh weights, over seeds; a table and a plot of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common import processes
from examples.common.errors import require
from examples.common.tokenizer import Tokenizer
from examples.pretraining import data
from fastattn.transformer import SequenceClassifier, TransformerConfig

ARMS = ("pre-trained", "from scratch")


@dataclass(frozen=True)
class Recipe:
    """How every classifier is trained, pre-trained or not; the learning rate is the better one for each of the two."""

    steps: int = 200
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3)
    warmup: int = 20


class FineTuning:
    """One task, one pre-trained model, any number of runs.

    Args:
        folder: of the pre-trained model.
        config: of the classifiers: the pre-trained model's sizes.
    """

    def __init__(
        self, task: data.Task, tokenizer: Tokenizer, folder: Path, config: TransformerConfig, causal: bool,
        recipe: Recipe, device: torch.device,
    ) -> None:  # fmt: skip
        self.task, self.tokenizer, self.folder, self.config = task, tokenizer, folder, config
        self.causal, self.recipe, self.device = causal, recipe, device
        self.report = ""

    def accuracy(self, arm: str, size: int, seed: int, rate: float, held_out: data.Labelled) -> float:
        """Train on ``size`` labelled sentences; the percentage of ``held_out`` that is labelled rightly.

        Both arms see the same sentences in the same order, and start their new layers from the same values.
        """
        torch.manual_seed(seed)
        model = SequenceClassifier(self.config, len(self.task.labels), self.causal, self.device)
        if arm == "pre-trained":
            self.report = str(model.load_pretrained(self.folder))
        tokens, labels = self._tensors(data.draw(self.task, size, seed))
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
        recipe = self.recipe
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda i: min((i + 1) / recipe.warmup, (recipe.steps - i) / recipe.steps)
        )
        order = torch.Generator().manual_seed(seed)
        for _ in range(recipe.steps):
            rows = torch.randperm(len(labels), generator=order)[: recipe.batch]
            loss = F.cross_entropy(model(tokens[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return self._score(model, held_out)

    @torch.no_grad()
    def _score(self, model: SequenceClassifier, held_out: data.Labelled) -> float:
        tokens, labels = self._tensors(held_out)
        model.eval()
        right = sum(
            int((model(t).argmax(-1) == y).sum()) for t, y in zip(tokens.split(256), labels.split(256), strict=True)
        )
        return 100 * right / len(labels)

    def _tensors(self, labelled: data.Labelled) -> tuple[Tensor, Tensor]:
        limit = self.config.max_length or 10**9
        tokens = data.sentences_to_tokens([s for _, s in labelled], self.tokenizer, self.causal, limit)
        labels = torch.tensor([self.task.labels.index(label) for label, _ in labelled])
        return tokens.to(self.device), labels.to(self.device)

    def compare(self, sizes: list[int], seeds: int, say: Callable[[str], None]) -> dict[str, dict[int, list[float]]]:
        """Accuracies on the test set, by arm and size, one per seed. Processes share the runs."""
        middle = sorted(sizes)[len(sizes) // 2]
        rates = {}
        for arm in ARMS:  # chosen on the validation set, with a seed of its own
            tried = {r: self.accuracy(arm, middle, seeds, r, self.task.validation) for r in self.recipe.rates}
            rates[arm] = max(tried, key=tried.__getitem__)
            say(f"{arm}: learning rate {rates[arm]:g} (validation accuracy by rate, on {middle} labels: "
                f"{', '.join(f'{r:g}: {a:.1f}%' for r, a in tried.items())})")  # fmt: skip
        runs = [(arm, size, seed) for size in sizes for seed in range(seeds) for arm in ARMS]
        mine = runs[processes.rank() :: processes.world_size()]
        own = {run: self.accuracy(*run, rates[run[0]], self.task.test) for run in mine}
        found = {run: value for part in processes.gather(own) for run, value in part.items()}
        return {arm: {size: [found[arm, size, seed] for seed in range(seeds)] for size in sizes} for arm in ARMS}


def table(results: dict[str, dict[int, list[float]]]) -> str:
    """Mean accuracy and its spread over the seeds (standard deviation; least and greatest gain seed by seed)."""
    rows = [f"{'labels':>7}  {'pre-trained':>16}  {'from scratch':>16}  {'gain, least to greatest':>24}"]
    pretrained, scratch = (results[arm] for arm in ARMS)
    for size in pretrained:
        gains = [a - b for a, b in zip(pretrained[size], scratch[size], strict=True)]
        cells = [f"{mean(v):5.1f}% ± {stdev(v) if len(v) > 1 else 0:4.1f}" for v in (pretrained[size], scratch[size])]
        rows.append(f"{size:>7}  {cells[0]:>16}  {cells[1]:>16}  {min(gains):>+12.1f} to {max(gains):+.1f}")
    return "\n".join(rows)


def save(results: dict[str, dict[int, list[float]]], folder: Path, chance: float) -> None:
    """``results.json`` and ``results.png``."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for arm, marker in zip(ARMS, "os", strict=True):
        sizes = list(results[arm])
        values = [results[arm][size] for size in sizes]
        spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(sizes, [mean(v) for v in values], spread, marker=marker, capsize=4, label=arm)
        for v, size in zip(values, sizes, strict=True):
            axis.plot([size] * len(v), v, ".", color="grey", markersize=3, zorder=0)
    axis.axhline(chance, color="grey", linestyle=":", label="chance")
    axis.set(xscale="log", xlabel="labelled sentences", ylabel="accuracy on held-out sentences, %", ylim=(0, 102))
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(folder / "results.png", dpi=130)
    pyplot.close(figure)
