"""What fastattn is put beside: the same call, module or transformer, computed by torch or the naive way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import dispatch, reference
from fastattn.spec import AttentionSpec
from fastattn.transformer import Transformer

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

INTERPRETED = "interpreted: not timed"


@dataclass(frozen=True)
class Case:
    """An attention call to be timed."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    heads_k: int | None = None
    masked: bool = False  #: a boolean mask (batch, 1, 1, seqlen_k): padding that leaves from half of the keys to all
    head_dim_v: int | None = None
    window: tuple[int, int] | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads_k is None else f"{self.heads}/{self.heads_k}"
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q} on {self.seqlen_k}"
        dims = f"{self.head_dim}" if self.head_dim_v is None else f"{self.head_dim}/{self.head_dim_v}"
        kind = "causal" if self.causal else "padded" if self.masked else "full"
        kind = kind if self.window is None else f"window {self.window[0]}, {self.window[1]}"
        kind += f" dropout {self.dropout_p}" if self.dropout_p else ""
        return f"B{self.batch} H{heads} S{lengths} D{dims} {kind}"

    def labels(self) -> dict[str, object]:
        plain = self == Case(self.batch, self.heads, self.seqlen_k, self.seqlen_k, self.head_dim, self.causal)
        return {"seqlen": self.seqlen_k, "head_dim": self.head_dim, "causal": self.causal, "plain": plain}

    def spec(self, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        return AttentionSpec(
            batch=self.batch,
            heads_q=self.heads,
            heads_k=self.heads_k or self.heads,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            head_dim_qk=self.head_dim,
            head_dim_v=self.head_dim_v or self.head_dim,
            dtype=dtype,
            device=device.type,
            softmax_scale=self.head_dim**-0.5,
            window=(None, 0) if self.causal else self.window or (None, None),
            dropout_p=self.dropout_p,
            offset=self.seqlen_k - self.seqlen_q,
            mask=(self.batch, 1, 1, self.seqlen_k) if self.masked else None,
            needs_grad=True,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Random ``q, k, v``, the mask or None, and a random output gradient."""
        torch.manual_seed(self.seqlen_k)
        heads_k = self.heads_k or self.heads
        of_q, of_k = (self.batch, self.heads, self.seqlen_q), (self.batch, heads_k, self.seqlen_k)
        dim_v = self.head_dim_v or self.head_dim
        shapes = [(*of_q, self.head_dim), (*of_k, self.head_dim), (*of_k, dim_v), (*of_q, dim_v)]
        q, k, v, grad = (torch.randn(s, device=device).to(dtype) for s in shapes)
        mask = None
        if self.masked:
            lengths = torch.linspace(self.seqlen_k / 2, self.seqlen_k, self.batch, device=device).long()
            mask = (torch.arange(self.seqlen_k, device=device) < lengths[:, None])[:, None, None]
        return q, k, v, mask, grad

    @property
    def options(self) -> dict[str, Any]:
        """What fastattn's call takes beside q, k, v, the mask and ``causal``."""
        seed = torch.tensor([20]) if self.dropout_p else None
        return {"window": self.window, "dropout_p": self.dropout_p, "dropout_seed": seed}


@dataclass(frozen=True)
class Contender:
    """One implementation of what a case asks for; ``blank`` says why it is not run."""

    name: str
    attention: Attention | None = None
    blank: str | None = None
    backend: str | None = None  #: in a model: fastattn's module on that backend; None: torch's module


def backend_names(device: torch.device) -> dict[str, str | None]:
    """Every kernel backend (not the reference), with the reason why it is not timed on ``device``, or None."""
    names: dict[str, str | None] = {}
    for name, backend in dispatch.backends().items():
        if name == "reference":
            continue
        reason = backend.unavailable_reason()
        if reason is None and device.type == "cpu" and name == "triton":
            reason = INTERPRETED
        names[name] = f"unavailable: {reason}" if reason not in (None, INTERPRETED) else reason
    return names


def _ours(name: str, case: Case) -> Attention:
    options = {"causal": case.causal, "backend": name, **case.options}
    return lambda q, k, v, mask: fastattn.attention(q, k, v, mask=mask, **options)


def _sdpa(case: Case, kernel: nn.attention.SDPBackend | None = None) -> Attention:
    """torch's fused attention; its causal mask is drawn from the top left, so causal cases have equal lengths."""
    assert not case.causal or case.seqlen_q == case.seqlen_k
    gqa, band, dropout = case.heads_k is not None, None, case.dropout_p
    if case.window is not None:
        band = reference.visible_keys(case.seqlen_q, case.seqlen_k, case.window, case.seqlen_k - case.seqlen_q)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = band if mask is None else mask
        return F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=case.causal, enable_gqa=gqa)

    def isolated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with nn.attention.sdpa_kernel(kernel):
            return call(q, k, v, mask)

    return isolated if kernel is not None else call


def _flex(case: Case, device: torch.device) -> Attention:
    """torch's flex_attention, compiled, with a block mask built once outside the timed call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # fullgraph: past the limit of compilations of one function torch would run it uncompiled, and only warn.
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # a backward that is timed is run more than once
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.seqlen_q, case.seqlen_k, device)
    gqa = case.heads_k is not None
    return lambda q, k, v, mask: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def attention_contenders(case: Case, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """fastattn's backends, torch's and the naive one, in the order of the table's columns."""
    found: list[Contender] = []
    spec = case.spec(dtype, device)
    for name, reason in backend_names(device).items():
        if reason is None:
            reasons = dispatch.backends()[name].unsupported_reasons(spec)
            reason = f"unsupported: {'; '.join(reasons)}" if reasons else None
        found.append(Contender(f"fastattn {name}", _ours(name, case), reason))
    if device.type == "cpu":
        found.append(Contender("torch sdpa", _sdpa(case)))
    else:
        kinds = nn.attention.SDPBackend
        kernels = {"flash": kinds.FLASH_ATTENTION, "cudnn": kinds.CUDNN_ATTENTION}
        kernels |= {"efficient": kinds.EFFICIENT_ATTENTION, "math": kinds.MATH}
        found.append(Contender("torch sdpa", _sdpa(case)))
        found += [Contender(f"torch sdpa {name}", _sdpa(case, kernel)) for name, kernel in kernels.items()]
        if case.masked:
            found.append(Contender("torch flex", None, "not set up for a padding mask"))
        else:
            found.append(Contender("torch flex", _flex(case, device)))
    found.append(Contender("naive", _ours("reference", case)))
    return found


def cpu_contenders(case: Case, dtype: torch.dtype) -> list[Contender]:
    """fastattn's CPU kernels and torch's attention; where its score matrix is small, its unfused one too."""
    backend = dispatch.backends()["cpu"]
    reason = backend.unavailable_reason() or "; ".join(
        backend.unsupported_reasons(case.spec(dtype, torch.device("cpu")))
    )
    found = [Contender("fastattn cpu", _ours("cpu", case), reason or None), Contender("torch sdpa", _sdpa(case))]
    if case.batch * case.heads * case.seqlen_q * case.seqlen_k <= 1 << 24:
        found.append(Contender("torch sdpa math", _sdpa(case, nn.attention.SDPBackend.MATH)))
    return found


@dataclass(frozen=True)
class ModelCase:
    """A module or transformer to be timed: torch's, and fastattn's with the same parameters."""

    suite: str
    title: str
    torch_name: str
    shapes: tuple[tuple[int, ...], ...]  #: of the inputs; the output has the shape of the last
    torch_model: Callable[[], nn.Module]
    our_model: Callable[[nn.Module], nn.Module]
    call_torch: Callable[..., Tensor]
    call_ours: Callable[..., Tensor]


def model_cases(suite: str, device: torch.device, quick: bool) -> list[ModelCase]:
    large = device.type == "cuda"
    batch, length, width, heads = (2, 64, 64, 2) if quick else (8, 2048, 1024, 16) if large else (4, 256, 256, 4)
    if suite == "module":
        return [_module_case(batch, length, width, heads, causal) for causal in (False, True)]
    return [_transformer_case(batch, length, width, heads, layers=1 if quick else 4 if large else 2)]


def _module_case(batch: int, length: int, width: int, heads: int, causal: bool) -> ModelCase:
    """Self-attention. torch's module demands a mask beside ``is_causal``; fastattn's does not."""

    def call_torch(model: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype) if causal else None
        out: Tensor = model(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]
        return out

    def call_ours(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x, x, x, need_weights=False, is_causal=causal)[0]
        return out

    return ModelCase(
        suite="module",
        title=f"B{batch} S{length} E{width} H{heads} {'causal' if causal else 'full'}",
        torch_name="torch nn.MultiheadAttention",
        shapes=((batch, length, width),),
        torch_model=lambda: nn.MultiheadAttention(width, heads, batch_first=True),
        our_model=lambda model: fastattn.MultiHeadAttention.from_torch(copy.deepcopy(model)),
        call_torch=call_torch,
        call_ours=call_ours,
    )


def _transformer_case(batch: int, length: int, width: int, heads: int, layers: int) -> ModelCase:
    """Encoder and decoder, the decoder causal."""
    arguments = {
        "d_model": width,
        "nhead": heads,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
        "dim_feedforward": 4 * width,
        "batch_first": True,
    }

    def our_model(model: nn.Module) -> nn.Module:
        ours = Transformer(**arguments).to(next(model.parameters()))
        ours.load_state_dict(model.state_dict())
        return ours.eval()

    def call_torch(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(length, source.device, source.dtype)
        out: Tensor = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        return out

    def call_ours(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        out: Tensor = model(source, target, tgt_is_causal=True)
        return out

    return ModelCase(
        suite="transformer",
        title=f"B{batch} S{length} E{width} H{heads} {layers}+{layers} layers",
        torch_name="torch nn.Transformer",
        shapes=((batch, length, width), (batch, length, width)),
        torch_model=lambda: nn.Transformer(**arguments),
        our_model=our_model,
        call_torch=call_torch,
        call_ours=call_ours,
    )


def model_contenders(case: ModelCase, device: torch.device) -> list[Contender]:
    """fastattn's model on each backend, torch's, and fastattn's on the naive (reference) backend."""
    ours = [Contender(f"fastattn {name}", blank=why, backend=name) for name, why in backend_names(device).items()]
    return [*ours, Contender(case.torch_name), Contender("naive", backend="reference")]
