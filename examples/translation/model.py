"""The translating model: what it is trained on, how it answers, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.common.batching import pad
from examples.common.errors import UserError
from examples.common.tokenizer import BOS, EOS, PAD, Tokenizer
from fastattn.transformer import Seq2SeqTransformer, generate_beam, generate_greedy, seq2seq_loss


class Objective(nn.Module):
    """Teacher forcing with label smoothing; a batch is ``(src, tgt)``."""

    def __init__(self, model: Seq2SeqTransformer, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        src, tgt = batch
        loss = seq2seq_loss(self.model, src, tgt, self.label_smoothing, reduction="sum")
        return loss, (tgt[:, 1:] != PAD).sum()


def collate(
    pairs: Sequence[tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """``src (batch, S)``: the source and the end; ``tgt (batch, T)``: the begin, the target and the end."""
    src = pad([[*map(int, a), EOS] for a, _ in pairs], PAD)
    tgt = pad([[BOS, *map(int, b), EOS] for _, b in pairs], PAD)
    return src.to(device), tgt.to(device)


@torch.no_grad()
def mean_loss(objective: Objective, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Cross-entropy per target token, without smoothing or dropout."""
    training, smoothing = objective.training, objective.label_smoothing
    objective.eval()
    objective.label_smoothing = 0.0
    loss, count = map(sum, zip(*(map(float, objective(batch)) for batch in batches), strict=True))
    objective.train(training)
    objective.label_smoothing = smoothing
    return loss / max(count, 1.0)


class Translator:
    """Sentences in, sentences out.

    Args:
        max_length: longest source, in tokens.
        num_beams: 1 is greedy.
        batch_size: sentences that are translated at once, sorted by length.
    """

    def __init__(
        self, model: Seq2SeqTransformer, tokenizer: Tokenizer, num_beams: int = 4, length_penalty: float = 0.6,
        batch_size: int = 64,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.num_beams, self.length_penalty, self.batch_size = num_beams, length_penalty, batch_size

    def __call__(self, sentences: Sequence[str], advance: Callable[[int], None] = lambda n: None) -> list[str]:
        """The best translation of each sentence. ``advance`` is told how many more are done."""
        return [best[0] for best in self.n_best(sentences, 1, advance)]

    def n_best(
        self, sentences: Sequence[str], count: int, advance: Callable[[int], None] = lambda n: None
    ) -> list[list[str]]:
        """The ``count`` best translations of each sentence, best first.

        Raises:
            UserError: a sentence is empty or longer than the model accepts; none is translated then.
        """
        if count > self.num_beams:
            raise UserError(f"--n-best {count} needs at least as many beams, got --beams {self.num_beams}")
        sources = self.tokenizer.encode(sentences)
        limit = self.model.config.max_length
        for i, (sentence, ids) in enumerate(zip(sentences, sources, strict=True)):
            if not sentence.strip():
                raise UserError(f"sentence {i + 1} is empty")
            if limit is not None and len(ids) + 1 > limit:
                raise UserError(
                    f"sentence {i + 1} has {len(ids)} tokens, the model accepts {limit - 1}: {sentence[:60]!r}..."
                )
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        results: list[list[str]] = [[] for _ in sources]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for i, tokens in zip(rows, self._generate([sources[i] for i in rows], count), strict=True):
                results[i] = self.tokenizer.decode(tokens)
            advance(len(rows))
        return results

    def _generate(self, sources: Sequence[Sequence[int]], count: int) -> list[list[list[int]]]:
        device = self.model.head.weight.device
        src, prompt = collate([(ids, []) for ids in sources], device)
        prompt = prompt[:, :1]
        room = 2 * src.shape[1] + 20
        if self.model.config.max_length is not None:
            room = min(room, self.model.config.max_length - 1)
        if self.num_beams == 1:
            tokens = generate_greedy(self.model, prompt, max_new_tokens=room, src=src, eos_id=EOS)[:, None]
        else:
            tokens, _ = generate_beam(
                self.model, prompt, max_new_tokens=room, src=src, eos_id=EOS, num_beams=self.num_beams,
                length_penalty=self.length_penalty, num_return=count,
            )  # fmt: skip
        result: list[list[list[int]]] = tokens.tolist()
        return result


def save(model: Seq2SeqTransformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything that translating needs, in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    model.save_pretrained(folder)


def load(folder: Path, device: torch.device) -> tuple[Seq2SeqTransformer, Tokenizer]:
    """What :func:`save` wrote.

    Raises:
        UserError: there is no model, or a file is damaged.
    """
    try:
        model = Seq2SeqTransformer.from_pretrained(folder, device)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no trained model: run train first") from error
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(str(error)) from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"tokenizer.json of {folder} has {len(tokenizer)} tokens, the model beside it {model.config.vocab_size}: "
            f"they are not of the same run"
        )
    return model.eval(), tokenizer
