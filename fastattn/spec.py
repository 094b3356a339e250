"""The one description of an attention call: validation, fake shapes, dispatch, FLOP and byte counts.

Everything that must agree about a call reads it from an :class:`AttentionSpec`: the backends decide
on it whether they can run, the tests draw their cases from it, the benchmarks count its work.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

Shape4 = tuple[int, int, int, int]
Window = tuple[int | None, int | None]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Of ``attention_fp8``: 4 exponent and 3 mantissa bits, largest value 448, NaN but no infinity.
FP8 = torch.float8_e4m3fn

#: What an unbounded side of a window becomes in a kernel: larger than any sequence, small enough to add to.
UNBOUNDED = 1 << 40
LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class AttentionSpec:
    """One attention call without its data.

    With ``q (batch, heads_q, seqlen_q, head_dim_qk)``, ``k (batch, heads_k, seqlen_k, head_dim_qk)`` and
    ``v (batch, heads_k, seqlen_k, head_dim_v)``, query head ``h`` reads key head ``h // group_size``, and key ``j``
    is visible to query ``i`` iff

    - it exists: ``leftpad_k[b] <= j < n_b``, the sequence's number of keys (``seqlen_k`` unless given per sequence);
    - ``i + offset_b - left <= j <= i + offset_b + right`` (None: unbounded), or ``j < prefix_lens[b]``;
    - ``q_segments[b, i] == k_segments[b, j]``, the boolean mask is True there and the bias is not -inf there.

    Packed sequences: q is ``(1, heads_q, total_q, head_dim_qk)``, sequence ``b`` its rows ``cu_seqlens_q[b]`` to
    ``cu_seqlens_q[b + 1]``; k and v likewise, unless they are paged. ``i`` and ``j`` count within the sequence, and
    ``seqlen_q`` and ``seqlen_k`` are those of the longest. Paged keys: k and v are ``(num_pages, heads_k, page_size,
    head_dim)``, and key ``j`` is row ``j % page_size`` of page ``block_table[b, j // page_size]``.
    """

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim_qk: int
    head_dim_v: int
    dtype: torch.dtype
    device: str
    softmax_scale: float
    window: Window = (None, None)
    offset: int = 0
    mask: Shape4 | None = None  #: shape of the boolean mask, 1 where it is broadcast
    bias: Shape4 | None = None  #: shape of the additive bias, 1 where it is broadcast
    bias_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    needs_grad: bool = False
    needs_bias_grad: bool = False
    softcap: float = 0.0  #: scores become softcap · tanh(scores / softcap); 0: as they are
    alibi: tuple[int, ...] | None = None  #: shape of the slopes: (heads_q,) or (batch, heads_q)
    sinks: bool = False  #: a logit per query head that takes part in the softmax's denominator only
    segments: bool = False
    prefix: bool = False
    packed: bool = False
    total_q: int = 0  #: rows of packed q; 0 when not packed
    total_k: int = 0  #: rows of packed k and v; 0 when not packed, or paged
    seqused_k: bool = False  #: the number of keys is given per sequence, n_b = seqused_k[b]
    leftpad_k: bool = False
    page_size: int | None = None
    num_pages: int = 0  #: of k and v, those that no sequence uses too; 0 when not paged
    num_splits: int = 0  #: parts that the keys are split into; 0: the kernel chooses
    relative_offset: bool = False  #: offset_b = offset + n_b - m_b (keys less queries of the sequence), else offset

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # kept: caches of kernels and packed arguments ask for it at every call
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.heads_q // self.heads_k if self.heads_k else 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of scores, softmax and accumulation: float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def lse_dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def out_dtype(self) -> torch.dtype:
        return out_dtype(self.dtype)

    @property
    def is_empty(self) -> bool:
        """No output element, or no key to attend to: nothing for a kernel to do."""
        if self.packed and (self.total_q == 0 or (self.total_k == 0 and self.page_size is None)):
            return True
        if self.page_size is not None and self.num_pages == 0:
            return True
        return 0 in (self.batch, self.heads_q, self.heads_k, self.seqlen_q, self.seqlen_k, self.head_dim_v)

    @property
    def restricts_visibility(self) -> bool:
        """Whether some key may be invisible to some query."""
        hides = self.mask is not None or self.bias is not None or self.segments or self.leftpad_k
        return hides or self.window != (None, None) or self.ragged

    @property
    def ragged(self) -> bool:
        """Whether sequences of one call may differ in their numbers of queries or keys."""
        return self.packed or self.seqused_k

    def features(self) -> list[str]:
        """What this call asks for beyond windows, mask, bias and dropout, which every backend has."""
        asked = {
            "softcap": self.softcap != 0.0,
            "alibi_slopes": self.alibi is not None,
            "sinks": self.sinks,
            "segments": self.segments,
            "prefix_lens": self.prefix,
            "packed sequences": self.packed,
            "seqused_k": self.seqused_k,
            "leftpad_k": self.leftpad_k,
            "paged keys": self.page_size is not None,
            "num_splits": self.num_splits > 1,
        }
        return [name for name, wanted in asked.items() if wanted]

    @cached_property
    def has_tables(self) -> bool:
        """Whether the call may have tensors beside q, k, v, mask, bias and dropout's seed."""
        rows = self.segments or self.prefix or self.seqused_k or self.leftpad_k or self.dtype is FP8
        return rows or self.alibi is not None or self.sinks or self.packed or self.page_size is not None

    def key_range(self, i: int) -> tuple[int, int]:
        """The keys ``[lo, hi)`` that the window leaves to query ``i``; empty when ``lo >= hi``.

        Of a sequence with ``seqlen_q`` queries and ``seqlen_k`` keys, the longest there can be.
        """
        left, right = self.window
        diagonal = i + self.offset + (self.seqlen_k - self.seqlen_q if self.relative_offset else 0)
        lo = 0 if left is None else max(0, diagonal - left)
        hi = self.seqlen_k if right is None else min(self.seqlen_k, diagonal + right + 1)
        return lo, hi

    def visible_pairs(self) -> int:
        """(query, key) pairs inside the window, for one head of one batch entry.

        What only the data say is not counted: masks, segments, prefixes; every sequence counts as the longest one.
        """
        if self.window == (None, None):
            return self.seqlen_q * self.seqlen_k
        ranges = (self.key_range(i) for i in range(self.seqlen_q))
        return sum(max(0, hi - lo) for lo, hi in ranges)

    def flops(self, direction: str = "forward") -> int:
        """Floating-point operations of the products: 2 per multiply-add, visible pairs only.

        forward: QKᵀ and PV. backward: dV, dP, dQ, dK and S once more, 2.5 times the forward when head dims are equal.
        """
        pairs = self.batch * self.heads_q * self.visible_pairs()
        forward = 2 * pairs * (self.head_dim_qk + self.head_dim_v)
        if direction == "forward":
            return forward
        backward = 2 * pairs * (3 * self.head_dim_qk + 2 * self.head_dim_v)
        if direction == "backward":
            return backward
        if direction == "forward+backward":
            return forward + backward
        raise ValueError(f"direction must be 'forward', 'backward' or 'forward+backward', not {direction!r}")

    def bytes(self, direction: str = "forward") -> int:
        """The least memory traffic: every input read once, every output written once (without mask and bias)."""
        size = self.dtype.itemsize
        q = self.heads_q * (self.total_q if self.packed else self.batch * self.seqlen_q)
        k = self.heads_k * (self.total_k or self.batch * self.seqlen_k)
        qo, kv = q * (self.head_dim_qk + self.head_dim_v) * size, k * (self.head_dim_qk + self.head_dim_v) * size
        lse = q * (8 if self.dtype is torch.float64 else 4)
        wider = q * self.head_dim_v * (self.out_dtype.itemsize - size)
        forward, backward = qo + kv + lse + wider, 2 * (qo + kv) + q * self.head_dim_v * size + 2 * lse
        match direction:
            case "forward":
                return forward
            case "backward":
                return backward
            case "forward+backward":
                return forward + backward
        raise ValueError(f"direction must be 'forward', 'backward' or 'forward+backward', not {direction!r}")

    def __str__(self) -> str:
        heads = f"{self.heads_q}" if self.heads_q == self.heads_k else f"{self.heads_q}/{self.heads_k}"
        dims = f"{self.head_dim_qk}" if self.head_dim_qk == self.head_dim_v else f"{self.head_dim_qk}/{self.head_dim_v}"
        parts = [
            f"batch {self.batch}, heads {heads}, queries {self.seqlen_q}, keys {self.seqlen_k}, head_dim {dims}",
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
        ]
        if self.window == (None, 0):
            parts.append(f"causal (offset {self.offset})")
        elif self.window != (None, None):
            parts.append(f"window {self.window} (offset {self.offset})")
        if self.mask is not None:
            parts.append(f"mask {self.mask}")
        if self.bias is not None:
            parts.append(f"bias {self.bias}{' with gradient' if self.needs_bias_grad else ''}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p}")
        parts += [self._describe(feature) for feature in self.features()]
        parts.append("forward and backward" if self.needs_grad or self.needs_bias_grad else "forward")
        return ", ".join(parts)

    def _describe(self, feature: str) -> str:
        details = {
            "softcap": self.softcap,
            "alibi_slopes": self.alibi,
            "packed sequences": f"({self.total_q} queries, {self.total_k} keys)",
            "paged keys": f"({self.page_size} to a page)",
            "num_splits": self.num_splits,
        }
        return f"{feature} {details[feature]}" if feature in details else feature


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The output's type for queries of that type: the same, bfloat16 for e4m3."""
    return torch.bfloat16 if dtype is FP8 else dtype


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtypes: tuple[torch.dtype, ...] = SUPPORTED_DTYPES,
    names: tuple[str, str, str] = ("query", "key", "value"),
) -> None:
    """Raise on what no backend accepts in ``query``, ``key``, ``value``, or as the caller names them: kind, type,
    device, rank.

    Shapes are checked by :func:`check_shapes`, once all three are four-dimensional.
    """
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_quantized:
            kind = "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{name} must be a dense (strided) tensor, got a {kind} one")
    if q.dtype not in dtypes or q.dtype != k.dtype or q.dtype != v.dtype:
        got = f"query {q.dtype}, key {k.dtype}, value {v.dtype}".replace("torch.", "")
        hint = "; attention_fp8 takes float8_e4m3fn, dense and uncached" if q.dtype is FP8 and FP8 not in dtypes else ""
        raise TypeError(f"query, key and value must share one dtype of {dtype_names(dtypes)}; got {got}{hint}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(
            f"query, key and value must be on one device; got query {q.device}, key {k.device}, value {v.device}"
        )
    for name, x in zip(names, (q, k, v), strict=True):
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions (..., seq, head_dim), got shape {tuple(x.shape)}")


def check_shapes(q: Tensor, k: Tensor, v: Tensor, gqa_hint: str | None = None) -> None:
    """Raise unless three 4-D tensors fit together; ``gqa_hint`` is what to do about differing head counts.

    With a hint, differing head counts are refused; without one, ``heads_q`` must be a multiple of ``heads_k``.
    """
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"key and value must have the same batch (or number of pages); got {_shapes(q, k, v)}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"key and value must have the same sequence length; got {_shapes(q, k, v)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have the same head_dim; got {_shapes(q, k, v)}")
    if q.shape[3] == 0:
        raise ValueError(f"head_dim of query and key must be at least 1; got {_shapes(q, k, v)}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"key and value must have the same number of heads; got {_shapes(q, k, v)}")
    if q.shape[1] == k.shape[1]:
        return
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads; got {_shapes(q, k, v)}"
        )
    if gqa_hint is not None:
        raise ValueError(f"query and key have different numbers of heads; {gqa_hint}. Got {_shapes(q, k, v)}")


def check_scale(scale: float | None) -> None:
    """Raise unless the softmax scale is None or a finite number."""
    if scale is None:
        return
    if isinstance(scale, (Tensor, bool)) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"softmax scale must be a float or None, got {type(scale).__name__}")
    if not abs(scale) <= LARGEST:  # NaN and integers that no float holds, too
        raise ValueError(f"softmax scale must be finite, got {scale}")


def check_dropout(p: float) -> None:
    """Raise unless the dropout probability lies in [0, 1]."""
    if isinstance(p, (Tensor, bool)) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {p}")


def check_window(window: Window | None) -> None:
    """Raise unless the window is None or a pair of None or non-negative integers."""
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    for side, width in zip(("left", "right"), window, strict=True):
        if width is None:
            continue
        if isinstance(width, bool) or not isinstance(width, (int, torch.SymInt)):
            raise TypeError(f"window's {side} width must be None or an int, got {width!r}")
        if width < 0:
            raise ValueError(f"window's {side} width must be None (unbounded) or at least 0, got {width}")


def check_mask_like(name: str, x: Tensor, q: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless ``x`` (a mask or bias) is dense, on the query's device, and broadcasts to ``expected``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the query's device {q.device}, got {x.device}")
    fits = x.dim() <= len(expected)
    if fits:
        for have, want in zip(reversed(x.shape), reversed(expected), strict=False):
            if have != want and have != 1:
                fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {expected} (..., seq_q, seq_k), got shape {tuple(x.shape)}")


def check_mask(mask: Tensor, q: Tensor, expected: tuple[int, ...], name: str = "mask") -> None:
    """Raise unless ``mask`` is boolean and broadcasts to ``expected``."""
    check_mask_like(name, mask, q, expected)
    if mask.dtype is not torch.bool:
        raise TypeError(f"{name} must be boolean (True = may attend), got {mask.dtype}; an additive mask is a bias")


def check_bias(bias: Tensor, q: Tensor, expected: tuple[int, ...], name: str = "bias") -> None:
    """Raise unless ``bias`` is of a type the scores hold exactly and broadcasts to ``expected``."""
    check_mask_like(name, bias, q, expected)
    accepted = SUPPORTED_DTYPES if q.dtype is torch.float64 else SUPPORTED_DTYPES[:3]
    if bias.dtype not in accepted:
        raise TypeError(
            f"{name} must be of dtype {dtype_names(accepted)} when query is {str(q.dtype).removeprefix('torch.')}, "
            f"got {str(bias.dtype).removeprefix('torch.')}"
        )
