"""The one list of attention cases. Every backend runs all of them that it does not give a reason against."""

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


MANY: dict[str, Any] = {
    "seqlen_q": 30, "seqlen_k": 70, "heads_q": 4, "head_dim_v": 20, "softmax_scale": 0.25, "softcap": 3.0,
    "alibi": "batch", "sinks": True, "segments": "batch",
}  # fmt: skip
MANY_PACKED: dict[str, Any] = {**MANY, "dropout_p": 0.2, "offset": 25}
MANY_FEW: dict[str, Any] = {**MANY, "dropout_p": 0.2, "seqlen_q": 2}

SINGLE: dict[str, Any] = {"batch": 1, "heads_q": 1, "heads_k": 1}

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
    Case("head_dim_512", head_dim_qk=512, head_dim_v=512, seqlen_q=9, causal=True, **SINGLE),
    Case("head_dim_576_v_512", head_dim_qk=576, head_dim_v=512, page_size=16, heads_q=4, heads_k=1, seqlen_q=2),
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
    Case("layout_sliced", layout="sliced", grad_layout="sliced"),
    Case("layout_expanded", layout="expanded"),
    Case("layout_transposed", layout="transposed"),
    Case("grad_expanded", grad_layout="expanded", grad_lse=False),
    Case("grad_strided", grad_layout="strided", causal=True),
    Case("no_grad_lse", grad_lse=False, causal=True),
    Case("softcap", softcap=1.5, magnitude=2.0),
    Case("softcap_causal_bias", softcap=2.0, causal=True, bias=(1, 0, 0, 0), heads_q=4),
    Case("softcap_negative_scale", softcap=0.7, softmax_scale=-0.3),
    Case("alibi", alibi="heads"),
    Case("alibi_batch_causal_gqa", alibi="batch", causal=True, heads_q=4),
    Case("alibi_softcap_top_left", alibi="heads", softcap=3.0, offset=0, window=(20, None)),
    Case("sinks", sinks=True),
    Case("sinks_float32", sinks=True, sinks_dtype=torch.float32, heads_q=8),
    Case("sinks_window_gqa", sinks=True, window=(5, 0), heads_q=4, seqlen_q=70, seqlen_k=70),
    Case("sinks_blind_rows", sinks=True, mask=(0, 1, 0, 0), blind_rows=True),
    Case("sinks_dropout_softcap", sinks=True, dropout_p=0.3, softcap=2.0),
    Case("segments", segments="batch"),
    Case("segments_shared_causal", segments="shared", causal=True, seqlen_q=70, seqlen_k=70),
    Case("segments_window_sinks", segments="batch", window=(9, 9), sinks=True, seqlen_q=70, seqlen_k=70),
    Case("segments_long", segments="batch", batch=1, heads_q=1, heads_k=1, seqlen_q=300, seqlen_k=330),
    Case("prefix_causal", prefix=(11, 0), causal=True),
    Case("prefix_window", prefix=(40, 3), window=(6, 2), seqlen_q=70, seqlen_k=70),
    # Keys of the prefix where the window has none: behind all keys, and of another segment.
    Case("prefix_before_windows", prefix=(10,), window=(2, None), offset=0, seqlen_q=150, seqlen_k=20, **SINGLE),
    Case("prefix_of_a_segment", prefix=(30,), window=(3, 0), segments="batch", offset=40, seqlen_q=220, **SINGLE),
    Case("prefix_segments_mask", prefix=(9, 20), causal=True, segments="batch", mask=(0, 1, 1, 0)),
    Case("prefix_alibi_bias", prefix=(9, 47), causal=True, alibi="heads", bias=(1, 0, 0, 0)),
    packed("packed", (33, 7, 20), (33, 7, 20)),
    packed("packed_causal", (33, 1, 70), (40, 30, 70), causal=True),
    packed("packed_causal_more_queries", (33, 20), (5, 20), causal=True),
    packed("packed_empty_sequences", (0, 12, 5, 0), (7, 12, 0, 0), causal=True),
    packed("packed_window_gqa", (50, 9), (50, 30), window=(7, 3), heads_q=4),
    packed("packed_top_left", (20, 9), (30, 30), causal=True, offset=0),
    packed("packed_used", (20, 9, 4), (30, 30, 11), used_k=(17, 30, 0), causal=True),
    packed("packed_dropout_bias", (20, 9), (30, 21), dropout_p=0.3, bias=(1, 0, 0, 0)),
    packed("packed_softcap_alibi_sinks", (20, 9), (30, 21), softcap=2.0, alibi="batch", sinks=True, causal=True),
    packed("packed_prefix_segments", (20, 9), (30, 21), prefix=(12, 3), segments="batch", causal=True),
    packed("packed_mask", (20, 9), (30, 21), mask=(0, 1, 0, 0), blind_rows=True),
    Case("used", used_k=(47, 20)),
    Case("used_causal_sinks", used_k=(40, 11), causal=True, sinks=True, seqlen_q=5),
    Case("used_none", used_k=(0, 5), causal=True, seqlen_q=3),
    Case("leftpad", leftpad=(0, 13)),
    Case("leftpad_used_causal", leftpad=(3, 9), used_k=(47, 31), causal=True, seqlen_q=4, alibi="heads"),
    Case("leftpad_window_dropout", leftpad=(5, 46), window=(20, 3), dropout_p=0.2),
    Case("paged", page_size=16),
    Case("paged_used_causal", page_size=7, used_k=(47, 12), causal=True, seqlen_q=3, heads_q=4),
    Case("paged_one_query", page_size=1, used_k=(41, 6), seqlen_q=1, softcap=2.0, sinks=True),
    Case("paged_leftpad_alibi", page_size=8, leftpad=(2, 20), used_k=(47, 30), alibi="batch", causal=True, seqlen_q=2),
    Case("paged_window", page_size=16, used_k=(150, 90), seqlen_k=150, window=(40, 0), seqlen_q=5),
    packed("paged_packed", (5, 1, 12), None, used_k=(20, 33, 12), page_size=8, causal=True, heads_q=4),
    Case("few_queries", causal=True, dropout_p=0.2, batch=1, seqlen_q=3, seqlen_k=140, heads_q=4, head_dim_qk=64),
    Case("few_queries_bias", bias=(0, 0, 0, 0), mask=(0, 1, 1, 0), seqlen_q=2, seqlen_k=90, heads_q=4),
    Case("splits", num_splits=3, used_k=(300, 170), seqlen_q=2, seqlen_k=300, causal=True, heads_q=4),
    Case("splits_paged", num_splits=4, used_k=(200, 3), seqlen_q=1, seqlen_k=208, page_size=16),
    # Many features together, so that every pair of them is in some case: tests/test_pairs.py counts.
    Case("many", offset=30, causal=True, mask=(0, 1, 0, 0), bias=(1, 0, 0, 0), prefix=(25, 40), **MANY),
    Case("many_strided", offset=30, window=(30, 9), bias=(0, 1, 0, 0), dropout_p=0.2, layout="strided", **MANY),
    Case("many_dropped", offset=25, causal=True, mask=(0, 1, 1, 0), prefix=(30, 20), dropout_p=0.2, **MANY),
    Case("many_used", used_k=(70, 55), leftpad=(4, 9), bias=(1, 0, 0, 0), prefix=(30, 40), num_splits=2, **MANY),
    Case("many_split", used_k=(61, 70), mask=(0, 0, 0, 0), window=(40, 2), layout="bshd", num_splits=3, **MANY),
    Case("many_padded", leftpad=(7, 2), mask=(0, 1, 1, 0), offset=35, prefix=(60, 30), layout="bshd", **MANY),
    Case("many_pages", page_size=7, used_k=(70, 45), leftpad=(3, 0), causal=True, mask=(0, 1, 0, 0), **MANY),
    Case("many_split_pages", page_size=16, prefix=(40, 30), bias=(1, 0, 0, 0), window=(40, 5), num_splits=2, **MANY),
    Case("many_few", used_k=(70, 55), leftpad=(4, 9), mask=(0, 1, 0, 0), prefix=(30, 0), window=(20, 2), **MANY_FEW),
    packed("many_few_packed", (2, 1, 0), (70, 50, 3), used_k=(66, 41, 3), causal=True, **MANY_FEW),
    packed("many_packed", (30, 19), (70, 50), causal=True, mask=(0, 1, 0, 0), bias=(1, 0, 0, 0), **MANY_PACKED),
    packed("many_packed_used", (30, 11), (70, 60), used_k=(66, 41), prefix=(30, 20), window=(40, 3), **MANY_PACKED),
    packed("many_packed_pages", (30, 6), None, used_k=(66, 50), page_size=8, num_splits=2, causal=True, **MANY_PACKED),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
