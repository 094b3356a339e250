"""What an attention case is: its sizes and features, the tensors that it draws, its oracle and its naive result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.call import combine_window, prepare, shaping
from fastattn.spec import AttentionSpec
from tests import ragged

Window = tuple[int | None, int | None]


def amid_nan(x: Tensor) -> Tensor:
    """``x`` as part of a larger tensor that is NaN around it: what is read from there shows."""
    return torch.nn.functional.pad(x, (3, 2, 2, 1), value=math.nan)[:, :, 2:-1, 3:-2]


@dataclass(frozen=True)
class Case:
    """What a call is made of; ``make`` draws its tensors."""

    name: str
    batch: int = 2
    heads_q: int = 2
    heads_k: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 47
    head_dim_qk: int = 32
    head_dim_v: int = 32
    causal: bool = False
    window: Window | None = None
    offset: int | None = None
    softmax_scale: float | None = None
    mask: tuple[int, int, int, int] | None = None  #: shape: 0 stands for the full size, 1 for broadcast
    bias: tuple[int, int, int, int] | None = None
    bias_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    blind_rows: bool = False  #: the mask (or, without one, the bias) hides every key from some queries
    #: bhsd, bshd, strided (last stride 2), sliced or shifted (amid NaN), padded, expanded (batch stride 0)
    layout: str = "bhsd"
    grad_layout: str = "dense"  #: or expanded (stride 0), strided, sliced
    grad_lse: bool = True
    magnitude: float = 1.0
    softcap: float = 0.0
    alibi: str = ""  #: "heads" or "batch": slopes (heads_q,) or (batch, heads_q)
    sinks: bool = False
    sinks_dtype: torch.dtype | None = None  #: None: the inputs'
    segments: str = ""  #: "shared" or "batch": segment ids (1, seq) or (batch, seq)
    prefix: tuple[int, ...] | None = None
    lengths_q: tuple[int, ...] | None = None  #: packed queries; the longest is seqlen_q
    lengths_k: tuple[int, ...] | None = None  #: packed keys
    used_k: tuple[int, ...] | None = None  #: seqused_k
    leftpad: tuple[int, ...] | None = None
    page_size: int | None = None
    num_splits: int = 0

    @property
    def ragged(self) -> bool:
        return any(x is not None for x in (self.lengths_q, self.used_k, self.leftpad, self.page_size))

    def _sizes(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        full = (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        return tuple(f if s == 0 else s for s, f in zip(shape, full, strict=True))

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh random tensors; the same for one seed, whatever the dtype, up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def place(x: Tensor, to: torch.dtype = dtype) -> Tensor:
            return x.to(to).to(device)

        def laid_out(batch: int, heads: int, seq: int, dim: int) -> Tensor:
            scale = self.magnitude
            match self.layout:
                case "bshd":
                    return place(draw(batch, seq, heads, dim) * scale).transpose(1, 2)
                case "strided":
                    return place(draw(batch, heads, seq, 2 * dim) * scale)[..., ::2]
                case "sliced":
                    return amid_nan(place(draw(batch, heads, seq, dim) * scale))
                case "padded":
                    return place(draw(batch, heads, seq, dim + 4) * scale)[..., :dim]
                case "shifted":  # chunks of 16 bytes from row to row, but half a chunk before the first
                    x = place(draw(batch, heads, seq, dim) * scale)
                    return torch.nn.functional.pad(x, (4, 4), value=math.nan)[..., 4:-4]
                case "expanded":
                    return place(draw(1, heads, seq, dim) * scale).expand(batch, -1, -1, -1)
                case "transposed":
                    return place(draw(batch, heads, dim, seq) * scale).transpose(2, 3)
            return place(draw(batch, heads, seq, dim) * scale)

        q = laid_out(self.batch, self.heads_q, self.seqlen_q, self.head_dim_qk)
        k = laid_out(self.batch, self.heads_k, self.seqlen_k, self.head_dim_qk)
        v = laid_out(self.batch, self.heads_k, self.seqlen_k, self.head_dim_v)
        mask = bias = None
        if self.mask is not None:
            mask = draw(*self._sizes(self.mask)) > -0.5
            if self.blind_rows:
                mask[:, :, ::3] = False
            mask = mask.to(device)
        if self.bias is not None:
            bias = draw(*self._sizes(self.bias))
            if self.blind_rows and self.mask is None:
                bias[:, :, ::3] = -math.inf
            bias = place(bias, self.bias_dtype or dtype)
        out_shape = (self.batch, self.heads_q, self.seqlen_q, self.head_dim_v)
        match self.grad_layout:
            case "expanded":
                grad_out = place(draw(*out_shape[:2], 1, 1)).expand(out_shape)
            case "strided":
                grad_out = place(draw(*out_shape[:3], 2 * self.head_dim_v))[..., ::2]
            case "sliced":
                grad_out = amid_nan(place(draw(*out_shape)))
            case _:
                grad_out = place(draw(*out_shape))
        grad_lse = None
        if self.grad_lse:
            lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
            grad_lse = place(draw(*out_shape[:3]), lse_dtype)
        if self.lengths_q is not None:  # there are no outputs behind the end of a sequence
            real = torch.arange(self.seqlen_q) < torch.tensor(self.lengths_q)[:, None, None]
            grad_out = torch.where(real[..., None].to(device), grad_out, 0)
            grad_lse = None if grad_lse is None else torch.where(real.to(device), grad_lse, 0)
        slopes = sinks = of_q = of_k = None
        if self.alibi:
            shape = (self.batch, self.heads_q)[self.alibi == "heads" :]
            slopes = place(draw(*shape).abs() / 10, torch.float32)
        if self.sinks:
            sinks = place(draw(self.heads_q), self.sinks_dtype or dtype)
        if self.segments:
            rows = 1 if self.segments == "shared" else self.batch
            of_q, of_k = (
                torch.randint(0, 3, (rows, n), generator=generator, dtype=torch.int32).sort()[0].to(device)
                for n in (self.seqlen_q, self.seqlen_k)
            )

        def integers(x: tuple[int, ...] | None) -> Tensor | None:
            return None if x is None else torch.tensor(x, dtype=torch.int32, device=device)

        shaping = {
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            "q_segments": of_q,
            "k_segments": of_k,
            "prefix_lens": integers(self.prefix),
        }
        keys = self.lengths_k if self.used_k is None else self.used_k
        lengths = {
            "seqlens_q": integers(self.lengths_q),
            "seqlens_k": integers(keys),
            "leftpad_k": integers(self.leftpad),
        }
        seed_tensor = torch.tensor([seed * 2654435761 + 12345678901], device=device) if self.dropout_p else None
        return Inputs(self, q, k, v, mask, bias, seed_tensor, grad_out, grad_lse, sinks, shaping, lengths)


@dataclass
class Inputs:
    """The tensors of one case; those of packed and paged sequences are padded here."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dropout_seed: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None
    sinks: Tensor | None
    shaping: dict[str, Any]
    lengths: dict[str, Tensor | None]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype (lse gradients in its lse dtype)."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        grad_lse = None if self.grad_lse is None else self.grad_lse.to(lse_dtype)
        return replace(
            self,
            q=self.q.to(dtype),
            k=self.k.to(dtype),
            v=self.v.to(dtype),
            bias=cast(self.bias),
            sinks=None if self.sinks is None else self.sinks.to(dtype),
            grad_out=self.grad_out.to(dtype),
            grad_lse=grad_lse,
        )

    def run(self, function: Callable[..., tuple[Tensor, Tensor]], **options: object) -> dict[str, Tensor]:
        """out, lse and all gradients of ``function``, which takes the arguments of ``fastattn.attention``."""
        case = self.case
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        bias, sinks = (None if x is None else x.detach().requires_grad_() for x in (self.bias, self.sinks))
        common = {
            "mask": self.mask,
            "bias": bias,
            "sinks": sinks,
            "softmax_scale": case.softmax_scale,
            "dropout_p": case.dropout_p,
            "dropout_seed": self.dropout_seed,
            **self.shaping,
            **options,
        }
        wanted = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dsinks": sinks}
        wanted = {name: x for name, x in wanted.items() if x is not None}
        if function is reference.attention or not case.ragged:
            lengths = self.lengths if function is reference.attention else {}
            window = {"causal": case.causal, "window": case.window, "offset": case.offset}
            out, lse = function(q, k, v, **window, **common, **lengths, return_lse=True)
        else:
            with torch.set_grad_enabled(case.page_size is None):
                out, lse = ragged.attend(self, q, k, v, **common)
        if case.lengths_q is not None:
            real = torch.arange(case.seqlen_q, device=q.device) < self.lengths["seqlens_q"][:, None, None]
            out, lse = torch.where(real[..., None], out, 0), torch.where(real, lse, 0)
        if case.page_size is not None:
            return {"out": out.detach(), "lse": lse.detach()}
        outputs, gradients = [out], [self.grad_out]
        if self.grad_lse is not None:
            outputs.append(lse)
            gradients.append(self.grad_lse.to(lse.dtype))
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, found, strict=True))}

    def spec(self) -> AttentionSpec:
        """What a backend is asked whether it can run."""
        case, leaves = self.case, {"bias": self.bias, "sinks": self.sinks}
        q, k, v = (x.detach().requires_grad_(case.page_size is None) for x in (self.q, self.k, self.v))
        common = {**self.shaping, "mask": self.mask, "dropout_p": case.dropout_p, "dropout_seed": self.dropout_seed}
        for name, x in leaves.items():
            common[name] = None if x is None else x.detach().requires_grad_(case.page_size is None)
        if case.ragged:
            return ragged.arguments(self, q, k, v, softmax_scale=case.softmax_scale, **common).spec()
        window = combine_window(case.causal, case.window)
        rest = (window, case.offset, case.softmax_scale, case.dropout_p, self.dropout_seed, None)
        shaped = shaping(sinks=common["sinks"], **self.shaping)
        return prepare(q, k, v, common["mask"], common["bias"], *rest, shaped)[0].spec()

    def oracle(self) -> dict[str, Tensor]:
        """The definition in float64."""
        return self.to(torch.float64).run(reference.attention)  # type: ignore[arg-type]

    def naive(self) -> dict[str, Tensor]:
        """The definition in the inputs' own dtype.

        In float64 that is the oracle itself, so its error is taken from float32's, in proportion to the epsilons.
        """
        if self.q.dtype is not torch.float64:
            return self.run(reference.attention)  # type: ignore[arg-type]
        oracle, single = self.oracle(), self.to(torch.float32).run(reference.attention)  # type: ignore[arg-type]
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return {
            name: torch.where(value.isfinite(), value + (single[name].double() - value) * ratio, value)
            for name, value in oracle.items()
        }


def packed(name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...] | None, **options: Any) -> Case:
    """A case of packed sequences of these lengths; paged keys have ``used_k`` instead of ``lengths_k``."""
    keys = max(options["used_k"] if lengths_k is None else lengths_k)
    sizes = {"batch": len(lengths_q), "seqlen_q": max(lengths_q), "seqlen_k": keys}
    return Case(name, lengths_q=lengths_q, lengths_k=lengths_k, **{**sizes, **options})
