"""Every kernel inside the reference transformer, on real text: outputs and all parameter gradients against the oracle.

The text is tokenised byte by byte. The naive run that sets the limit is the same model on the reference backend in the
same dtype; the oracle is the same model, with the same (rounded) parameters, on the reference backend in float64.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks.check import compare, worst
from fastattn import dispatch
from fastattn.transformer import CausalLM, Seq2SeqTransformer, TransformerConfig

PADDING = 0  # byte b is token b + 1


@dataclass(frozen=True)
class Size:
    """Of a checked model and its batch. Query heads share key heads two by two in the language model."""

    batch: int
    length: int
    d_model: int
    nhead: int
    layers: int

    def config(self, num_kv_heads: int | None = None) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=257,
            padding_id=PADDING,
            d_model=self.d_model,
            nhead=self.nhead,
            num_kv_heads=num_kv_heads,
            num_encoder_layers=self.layers,
            num_decoder_layers=self.layers,
            dim_feedforward=2 * self.d_model,
            dropout=0.0,
            activation="gelu",  # relu's kink turns a rounding error into a missing gradient now and then
        )

    def __str__(self) -> str:
        return f"B{self.batch} S{self.length} E{self.d_model} H{self.nhead} L{self.layers}"


TINY = Size(batch=2, length=40, d_model=32, nhead=2, layers=1)
CPU = Size(batch=2, length=192, d_model=128, nhead=4, layers=2)
GPU = Size(batch=4, length=1024, d_model=512, nhead=8, layers=4)


@dataclass(frozen=True)
class Verdict:
    """One backend in one model. Errors and limits are fractions of the oracle's largest value."""

    model: str
    size: str
    backend: str
    dtype: str
    output_error: float | None
    output_limit: float | None
    gradient: str | None  #: the parameter nearest to its limit, or furthest beyond it
    gradient_error: float | None
    gradient_limit: float | None
    gradients: int  #: how many parameters were checked
    verdict: str  #: "passed", "FAILED", "FAILED: exception", "not run: reason"

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")

    @property
    def complaint(self) -> str:
        if self.output_error is None or self.output_limit is None:
            return self.verdict
        what = "output" if not self.output_error <= self.output_limit else f"gradient of {self.gradient}"
        return f"{what} is off by more than its limit"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_text(path: Path | None) -> bytes:
    """The bytes of a file; by default the project's own documentation, one page after another."""
    if path is not None:
        data = path.read_bytes()
    else:
        root = Path(__file__).resolve().parent.parent
        pages = [*sorted(root.glob("*.md")), *sorted(root.glob("docs/*.md"))]
        data = b"\n".join(page.read_bytes() for page in pages)
    if len(data) < 2:
        raise SystemExit(f"the text to check on has {len(data)} bytes; at least 2 are needed (--text names a file)")
    return data


def tokenise(text: bytes, batch: int, length: int) -> Tensor:
    """``(batch, length)`` consecutive pieces of the text, each shorter than the one before, padded at the end.

    The last piece has half the length. A short text is repeated.
    """
    lengths = [max(2, length - i * (length // 2) // max(1, batch - 1)) for i in range(batch)]
    text = text * (sum(lengths) // len(text) + 1)
    tokens = torch.full((batch, length), PADDING)
    start = 0
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = torch.frombuffer(bytearray(text[start : start + n]), dtype=torch.uint8).long() + 1
        start += n
    return tokens


@dataclass(frozen=True)
class Checked:
    """A model with the text it is run on."""

    name: str
    size: str
    model: nn.Module  #: in float32
    inputs: tuple[Tensor, ...]
    labels: Tensor

    def run(self, backend: str, dtype: torch.dtype, weights: torch.dtype) -> dict[str, Tensor]:
        """Logits and parameter gradients, computed in ``dtype`` from parameters rounded to ``weights``."""
        model = copy.deepcopy(self.model).to(weights).to(dtype)
        with fastattn.use_backend(backend), warnings.catch_warnings():
            # The interpreter computes with NumPy, which warns of the inf and NaN of masked entries.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
            logits = model(*self.inputs)
            # A sum, in float64: neither the loss nor a small mean adds an error of its own.
            loss = F.cross_entropy(
                logits.double().flatten(0, 1), self.labels.flatten(), ignore_index=PADDING, reduction="sum"
            )
            names, parameters = zip(*model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters)
        return {"output": logits.detach(), **dict(zip(names, gradients, strict=True))}


def models(text: bytes, size: Size, device: torch.device) -> list[Checked]:
    """A language model with grouped key heads (causal), and an encoder with a decoder (padding, causal, cross)."""
    torch.manual_seed(0)
    tokens = tokenise(text, 2 * size.batch, size.length).to(device)
    source, target = tokens[::2], tokens[1::2]
    language = CausalLM(size.config(num_kv_heads=size.nhead // 2)).to(device)
    translation = Seq2SeqTransformer(size.config()).to(device)
    return [
        Checked("CausalLM", str(size), language, (source[:, :-1],), source[:, 1:]),
        Checked("Seq2SeqTransformer", str(size), translation, (source, target[:, :-1]), target[:, 1:]),
    ]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def judge(checked: Checked, backends: Sequence[str], dtype: torch.dtype) -> Iterator[Verdict]:
    """The naive run and each backend's, against the oracle."""
    name = str(dtype).removeprefix("torch.")
    oracle = checked.run("reference", torch.float64, weights=dtype)
    naive = checked.run("reference", dtype, weights=dtype)
    for backend in ("reference", *backends):
        try:
            found = compare(checked.run(backend, dtype, weights=dtype), oracle, naive, dtype)
        except Exception as error:  # whatever a kernel raises is its failure, and the others go on
            verdict = f"FAILED: {_short(error)}"
            if isinstance(error, RuntimeError) and "cannot run this call" in str(error):
                verdict = f"not run: {str(error).rsplit('): ', 1)[-1]}"
            yield Verdict(checked.name, checked.size, backend, name, None, None, None, None, None, 0, verdict)
            continue
        output, gradient = found[0], worst(found[1:])
        passed = all(each.passed for each in found)
        verdict = "yardstick" if backend == "reference" else "passed" if passed else "FAILED"
        yield Verdict(
            checked.name,
            checked.size,
            backend,
            name,
            output.error,
            output.limit,
            gradient.name,
            gradient.error,
            gradient.limit,
            len(found) - 1,
            verdict,
        )


def interpreted(backend: str) -> bool:
    """Whether the backend runs in Triton's interpreter, some thousand times slower than compiled."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def check_text(text: bytes, device: torch.device, quick: bool = False) -> Iterator[Verdict]:
    """Verdicts on every backend that can run here, in models of a size that it can run in seconds.

    On a machine with a GPU the CPU kernels are checked too, on the CPU.
    """
    able = [
        name
        for name, backend in dispatch.backends().items()
        if name != "reference" and backend.unavailable_reason() is None
    ]
    slow = [name for name in able if interpreted(name)]
    elsewhere = ["cpu"] if device.type != "cpu" and "cpu" in able else []
    here = [name for name in able if name not in (*slow, *elsewhere)]
    cpu = torch.device("cpu")
    groups = [(GPU if device.type == "cuda" else CPU, device, here), (CPU, cpu, elsewhere), (TINY, cpu, slow)]
    for size, place, names in groups:
        if not names:
            continue
        dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if place.type == "cuda" else [])
        for checked in models(text, TINY if quick else size, place):
            for dtype in dtypes:
                yield from judge(checked, names, dtype)
