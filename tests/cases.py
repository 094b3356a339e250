"""The one list of attention cases. Every backend runs all of them that it does not give a reason against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastattn import reference

Window = tuple[int | None, int | None]


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
    layout: str = "bhsd"  #: or bshd, strided (last stride 2), sliced, expanded (batch stride 0)
    grad_layout: str = "dense"  #: or expanded (stride 0), strided
    grad_lse: bool = True
    magnitude: float = 1.0

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
                    return place(draw(batch, heads, seq + 3, dim + 5) * scale)[:, :, 2:-1, 3:-2]
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
            case _:
                grad_out = place(draw(*out_shape))
        grad_lse = None
        if self.grad_lse:
            lse_dtype = torch.float64 if dtype is torch.float64 else torch.float32
            grad_lse = place(draw(*out_shape[:3]), lse_dtype)
        seed_tensor = torch.tensor([seed * 2654435761 + 12345678901], device=device) if self.dropout_p else None
        return Inputs(self, q, k, v, mask, bias, seed_tensor, grad_out, grad_lse)


@dataclass
class Inputs:
    """The tensors of one case."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dropout_seed: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None
    results: dict[str, Tensor] = field(default_factory=dict)

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
            grad_out=self.grad_out.to(dtype),
            grad_lse=grad_lse,
        )

    def run(self, function: Callable[..., tuple[Tensor, Tensor]], **options: object) -> dict[str, Tensor]:
        """out, lse and all gradients of ``function``, which takes the arguments of ``fastattn.attention``."""
        case = self.case
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        out, lse = function(
            q,
            k,
            v,
            mask=self.mask,
            bias=bias,
            causal=case.causal,
            window=case.window,
            offset=case.offset,
            softmax_scale=case.softmax_scale,
            dropout_p=case.dropout_p,
            dropout_seed=self.dropout_seed,
            return_lse=True,
            **options,
        )
        outputs, gradients = [out], [self.grad_out]
        if self.grad_lse is not None:
            outputs.append(lse)
            gradients.append(self.grad_lse.to(lse.dtype))
        wanted = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"dbias": bias})
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, found, strict=True))}

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


CASES = [
    Case("plain"),
    Case("one_by_one", batch=1, heads_q=1, heads_k=1, seqlen_q=1, seqlen_k=1),
    Case("one_query", seqlen_q=1, seqlen_k=130),
    Case("one_key", seqlen_q=70, seqlen_k=1),
    Case("tile_edges", seqlen_q=97, seqlen_k=129, batch=1),
    Case("longer_than_tiles", seqlen_q=200, seqlen_k=530, batch=1, heads_q=1, heads_k=1),
    Case("head_dim_1", head_dim_qk=1, head_dim_v=1),
    Case("head_dim_17_v_5", head_dim_qk=17, head_dim_v=5),
    Case("head_dim_64", head_dim_qk=64, head_dim_v=64),
    Case("head_dim_80_v_128", head_dim_qk=80, head_dim_v=128, seqlen_q=20),
    Case("head_dim_192_v_128", head_dim_qk=192, head_dim_v=128, seqlen_q=20, batch=1),
    Case("head_dim_256", head_dim_qk=256, head_dim_v=256, seqlen_q=20, batch=1),
    Case("head_dim_300", head_dim_qk=300, head_dim_v=300, seqlen_q=20, batch=1),
    Case("causal_square", causal=True, seqlen_q=65, seqlen_k=65),
    Case("causal_top_left", causal=True, offset=0),
    Case("causal_bottom_right", causal=True, seqlen_q=20, seqlen_k=70),
    Case("causal_more_queries", causal=True, seqlen_q=70, seqlen_k=20),
    Case("causal_offset_away", causal=True, offset=-40),
    Case("causal_long", causal=True, seqlen_q=290, seqlen_k=290, batch=1, heads_q=1, heads_k=1),
    Case("window", window=(7, 3), seqlen_q=80, seqlen_k=80),
    Case("window_left", window=(9, None), offset=0, seqlen_q=80),
    Case("window_causal", window=(20, None), causal=True, seqlen_q=150, seqlen_k=150, batch=1),
    Case("window_zero", window=(0, 0), seqlen_q=40, seqlen_k=40),
    Case("gqa", heads_q=6, heads_k=2),
    Case("mqa_causal", heads_q=4, heads_k=1, causal=True),
    Case("scale", softmax_scale=0.3),
    Case("scale_negative", softmax_scale=-0.2),
    Case("scale_zero", softmax_scale=0.0),
    # Scores up to 30. Beyond, recomputing P from a float32 lse, as every fused backward does, costs the gradients a
    # digit that the naive one keeps.
    Case("large_logits", magnitude=2.5),
    Case("mask_full", mask=(0, 0, 0, 0)),
    Case("mask_keys", mask=(0, 1, 1, 0)),
    Case("mask_shared_heads", mask=(0, 1, 0, 0), heads_q=4, heads_k=2),
    Case("mask_rows", mask=(1, 0, 0, 1)),
    Case("mask_scalar", mask=(1, 1, 1, 1)),
    Case("mask_blind_rows", mask=(0, 1, 0, 0), blind_rows=True),
    Case("mask_causal_window", mask=(0, 1, 1, 0), causal=True, window=(15, 0), seqlen_q=47),
    Case("bias_full", bias=(0, 0, 0, 0)),
    Case("bias_shared_batch", bias=(1, 0, 0, 0)),
    Case("bias_shared_heads", bias=(0, 1, 0, 0), heads_q=4, heads_k=2),
    Case("bias_shared_all", bias=(1, 1, 0, 0)),
    Case("bias_keys", bias=(0, 1, 1, 0)),
    Case("bias_keys_shared", bias=(1, 1, 1, 0), seqlen_q=130, seqlen_k=130),
    Case("bias_rows", bias=(0, 0, 0, 1)),
    Case("bias_heads", bias=(1, 0, 1, 1)),
    Case("bias_scalar", bias=(1, 1, 1, 1), seqlen_k=300),
    Case("bias_blind_rows", bias=(1, 0, 0, 0), blind_rows=True),
    Case("bias_float32", bias=(1, 0, 0, 0), bias_dtype=torch.float32),
    Case("bias_mask_causal", bias=(1, 0, 0, 0), mask=(0, 1, 1, 0), causal=True, heads_q=4, heads_k=2),
    Case("dropout", dropout_p=0.3),
    Case("dropout_causal_gqa", dropout_p=0.1, causal=True, heads_q=4, heads_k=2, seqlen_q=70, seqlen_k=70),
    Case("dropout_bias", dropout_p=0.5, bias=(1, 0, 0, 0)),
    Case("dropout_all", dropout_p=1.0),
    Case("layout_bshd", layout="bshd"),
    Case("layout_bshd_gqa_causal", layout="bshd", heads_q=4, heads_k=2, causal=True),
    Case("layout_strided", layout="strided", grad_layout="strided"),
    Case("layout_sliced", layout="sliced"),
    Case("layout_expanded", layout="expanded"),
    Case("layout_transposed", layout="transposed"),
    Case("grad_expanded", grad_layout="expanded", grad_lse=False),
    Case("grad_strided", grad_layout="strided", causal=True),
    Case("no_grad_lse", grad_lse=False, causal=True),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
