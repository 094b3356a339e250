"""The training loop: accumulation, clipping, mixed precision, several processes, checkpoints and exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.common import checkpoint, processes
from examples.common.batching import BatchPlan
from examples.common.errors import UserError
from examples.common.logs import Log, Progress

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
#: Options that may differ between a run and its resumption: they do not change the curve up to where it stands.
FREE = ("steps", "validate_every", "checkpoint_every", "report_every", "logs")


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        max_tokens: of a batch, padding included, per process.
        accumulate: batches per step and process, whose gradients are added up.
        learning_rate: the highest, reached after ``warmup`` steps and then falling as the inverse square root of the
            step (arXiv 1706.03762, 5.3).
        cooldown: over this last part of the steps, a fraction, it falls linearly to 0 on top of that.
        clip: the gradient's norm is cut to it; 0 leaves it.
        precision: float32, or bfloat16: autocast with float32 weights.
        seed: of dropout and of the order of the batches.
        validate_every, checkpoint_every, report_every: in steps.
        logs: of csv and tensorboard.
    """

    steps: int
    max_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 400
    cooldown: float = 0.0
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 0
    validate_every: int = 500
    checkpoint_every: int = 500
    report_every: int = 50
    logs: tuple[str, ...] = ("csv",)


def learning_rate_at(step: int, options: Options) -> float:
    """``peak · min(step / warmup, sqrt(warmup / step))``, times the cooldown; steps count from 1."""
    rate = options.learning_rate * min(step / options.warmup, (options.warmup / step) ** 0.5)
    last = options.cooldown * options.steps
    return rate * min(1.0, (options.steps - step + 1) / last) if last else rate


class Trainer:
    """Trains an objective on batches of a plan.

    Args:
        objective: a module that makes of a batch ``(loss summed over what counts, how much counted)``.
        collate: makes a batch of example numbers, on the device.
        plan: which examples stand in which batch. Process r of n takes every n-th batch from the r-th on.
        options: how to train.
        folder: for log and checkpoints.
        validate: called on every process after each ``validate_every`` steps, returns figures for the log
            (``validation_loss``, ``score``); those of the first process are reported.
    """

    def __init__(
        self,
        objective: nn.Module,
        collate: Callable[[Sequence[int]], Any],
        plan: BatchPlan,
        options: Options,
        folder: Path,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.objective, self.collate, self.plan, self.options = objective, collate, plan, options
        self.folder, self.validate = folder, validate
        self.device = next(objective.parameters()).device
        self.optimiser = torch.optim.Adam(objective.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)
        self.step = 0
        self.first = processes.rank() == 0

    def run(self, resume: bool = False, stop_at: int | None = None) -> list[float]:
        """Train up to ``options.steps`` (or ``stop_at``); the loss per token of every step that was run.

        Raises:
            UserError: ``resume`` with a damaged checkpoint, one of other options or number of processes.
        """
        options = self.options
        torch.manual_seed(options.seed + processes.rank())
        path = checkpoint.find(self.folder) if resume else None
        if path:
            self._restore(checkpoint.load(path), path)
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        log = Log(self.folder, options.logs if self.first else (), self.step)
        progress = Progress("training", options.steps, self.step, self.first)
        if path:
            progress.say(f"resumed after step {self.step} from {path}")
        try:
            return self._loop(log, progress, min(options.steps, stop_at or options.steps))
        finally:
            progress.close()
            log.close()

    def _loop(self, log: Log, progress: Progress, last: int) -> list[float]:
        options, losses = self.options, []
        module = self.objective
        if processes.world_size() > 1:
            module = DistributedDataParallel(module, [self.device] if self.device.type == "cuda" else None)
        began, tokens = time.perf_counter(), 0.0
        batches = self._batches()
        while self.step < last:
            self.objective.train()
            epoch, loss, norm, count = self._step(module, list(islice(batches, options.accumulate)))
            losses.append(loss)
            tokens += count
            progress.advance()
            validated = self.step % options.validate_every == 0 or self.step == options.steps
            row: dict[str, Any] = {}
            if validated and self.validate:
                row = self.validate()
            if row or self.step % options.report_every == 0 or self.step in (1, last):
                row |= {
                    "step": self.step, "epoch": epoch, "loss": loss, "gradient_norm": norm,
                    "learning_rate": learning_rate_at(self.step, options),
                    "tokens_per_second": tokens / (time.perf_counter() - began),
                }  # fmt: skip
                log.write(**row)
                progress.say(_line(row))
                began, tokens = time.perf_counter(), 0.0
            if self.step % options.checkpoint_every == 0 or self.step == options.steps:
                self._save()
        return losses

    def _batches(self) -> Iterator[tuple[int, list[int]]]:
        """This process's batches from the next step on."""
        world, rank = processes.world_size(), processes.rank()
        everyones = self.plan.batches(self.step * self.options.accumulate * world)
        return islice(everyones, rank, None, world)

    def _step(self, module: nn.Module, batches: list[tuple[int, list[int]]]) -> tuple[int, float, float, float]:
        """One optimiser step; epoch, loss per token, gradient norm and number of tokens, over all processes.

        Losses are summed, and the gradient divided by all that counted in all batches of all processes: how the
        examples are dealt out makes no difference.
        """
        options = self.options
        dtype = PRECISIONS[options.precision]
        sums = torch.zeros(2, dtype=torch.float64)
        for i, (_, batch) in enumerate(batches):
            inner = isinstance(module, DistributedDataParallel) and i + 1 < len(batches)
            with module.no_sync() if inner else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
                    loss, count = module(self.collate(batch))
                loss.backward()
            sums += torch.tensor([float(loss.detach()), float(count)], dtype=torch.float64)
        loss_sum, count_sum = processes.total(sums.to(self.device) if self.device.type == "cuda" else sums).tolist()
        # DistributedDataParallel has averaged over the processes.
        scale = processes.world_size() / max(count_sum, 1.0)
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale)
        norm = float(nn.utils.clip_grad_norm_(parameters, options.clip or float("inf")))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient of step {self.step + 1} is not finite (loss {loss_sum / max(count_sum, 1.0):g}): lower "
                f"--learning-rate; the last checkpoint in {self.folder} is as it was"
            )
        self.step += 1
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, options)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return batches[-1][0], loss_sum / max(count_sum, 1.0), norm, count_sum

    def _save(self) -> None:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        randoms = processes.gather(random)
        if self.first:
            checkpoint.save(
                self.folder,
                {
                    "step": self.step,
                    "model": self.objective.state_dict(),
                    "optimiser": self.optimiser.state_dict(),
                    "random": randoms,
                    "data": self.plan.fingerprint(),
                    "options": {k: v for k, v in asdict(self.options).items() if k not in FREE},
                },
            )
        processes.barrier()

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        if state["data"] != self.plan.fingerprint():
            raise UserError(f"{path} was trained on other data: resume with the same, or start anew with another --out")
        for name, value in state["options"].items():
            if getattr(self.options, name) != value:
                raise UserError(
                    f"{path} was trained with {name} = {value}, not {getattr(self.options, name)}: "
                    f"resume with the same options, or start anew with another --out"
                )
        if len(state["random"]) != processes.world_size():
            raise UserError(f"{path} is of {len(state['random'])} processes, not {processes.world_size()}")
        try:
            self.objective.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{path} is of a model of other sizes: {str(error).splitlines()[0]}") from error
        random: dict[str, Tensor] = state["random"][processes.rank()]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.step = state["step"]


def _line(row: dict[str, Any]) -> str:
    parts = [f"step {row['step']:>6}  epoch {row['epoch']:>3}  loss {row['loss']:.4f}"]
    if "validation_loss" in row:
        parts.append(f"validation {row['validation_loss']:.4f}")
    if "score" in row:
        parts.append(f"score {row['score']:.1f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
