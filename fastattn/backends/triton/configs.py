"""What a kernel is compiled for (:class:`Features`) and how it is cut into tiles (:class:`Config`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

#: Triton decides when a kernel is defined whether it is interpreted.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Width(int):
    """A head dim as one or two powers of two, at least 16 (the least a tensor core takes): 96 = 64 + 32.

    Padding it to one power of two would cost up to twice the registers, memory and products. An int, because that is
    what Triton 3.6 hands from one compile-time constant's field to the next function as a constant.
    """

    @property
    def DIM(self) -> int:
        return int(self)

    @property
    def MAIN(self) -> int:
        return self.padded if self.TAIL == 0 else self._power // 2

    @property
    def TAIL(self) -> int:
        half = self._power // 2
        rest = max(16, 1 << (self.DIM - half - 1).bit_length()) if half >= 16 else half
        return rest if rest < half else 0

    @property
    def _power(self) -> int:
        return max(16, 1 << (self.DIM - 1).bit_length())

    @property
    def padded(self) -> int:
        """MAIN + TAIL."""
        return self._power if self.TAIL == 0 else self._power // 2 + self.TAIL


@dataclass(frozen=True)
class Features:
    """The compile-time description of a call; sizes, other than head dims, are not part of it."""

    HEAD_DIM_QK: int
    HEAD_DIM_V: int
    HAS_LO: bool = False  #: the window hides keys on the left of the diagonal
    HAS_HI: bool = False  #: the window hides keys on the right of the diagonal
    MASK: str = "none"  #: "none", "key" (the same for all queries) or "full"
    BIAS: str = "none"  #: like MASK
    SOFTCAP: bool = False
    ALIBI: bool = False
    SINKS: bool = False
    SEGMENTS: bool = False
    PREFIX: bool = False  #: keys before a length are visible outside the window too
    CU_Q: bool = False  #: queries are packed
    CU_K: bool = False  #: keys are packed
    USED_K: bool = False  #: each batch entry uses a number of its keys
    LEFTPAD: bool = False  #: each batch entry begins behind a number of its keys
    PAGED: bool = False  #: keys lie in pages
    BOTTOM_RIGHT: bool = False  #: the diagonal of each sequence ends at its last query and key
    DROPOUT: bool = False
    NEGATE: bool = False  #: the softmax scale is negative
    PACK: bool = False  #: (forward) the query heads of a key head are rows of one tile
    PRECISION: str = "ieee"  #: of products of float32: "ieee" or "tf32"

    @property
    def QK(self) -> Width:
        return Width(self.HEAD_DIM_QK)

    @property
    def V(self) -> Width:
        return Width(self.HEAD_DIM_V)

    @property
    def RESTRICTED(self) -> bool:
        """Whether a key that exists may be invisible to some query."""
        return self.HAS_LO or self.HAS_HI or self.SEGMENTS or self.MASK != "none" or self.BIAS != "none"

    @property
    def HIDDEN(self) -> bool:
        """Whether a key may be invisible in a tile that is not an edge."""
        return self.MASK == "full" or self.BIAS != "none"

    @property
    def SHAPED(self) -> bool:
        """Whether scores are more than a multiple of q k^T, or some hidden, in a tile that is not an edge."""
        return self.HIDDEN or self.SOFTCAP or self.ALIBI

    @property
    def LEAN(self) -> bool:
        """Whether scores take registers that a plain or causal call does not."""
        return self.SHAPED or self.SEGMENTS or self.DROPOUT or self.MASK == "key"

    @property
    def EDGE_FIRST(self) -> bool:
        """Whether the tiles of keys that some query sees may begin with an edge."""
        return self.HAS_LO or self.LEFTPAD or self.SEGMENTS or self.MASK == "key"

    @property
    def EDGE_FIRST_QUERIES(self) -> bool:
        """The same of the tiles of queries that see some key."""
        return self.HAS_HI or self.SEGMENTS

    def describe(self) -> str:
        """What is on, in words. Not ``__str__``: Triton's cache tells kernels apart by the ``str`` of a constant."""
        on = [f.name.lower() for f in fields(self) if getattr(self, f.name) is True]
        on += [f"{name.lower()} by {getattr(self, name)}" for name in ("MASK", "BIAS") if getattr(self, name) != "none"]
        return ", ".join(on) or "plain"


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one kernel, and why."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    reason: str
    descriptors: bool = False  #: keys and values are read through tensor descriptors (TMA)
    specialize: bool = False  #: (forward) warps of their own read, multiply and take the softmax

    def __str__(self) -> str:
        extra = (", descriptors" if self.descriptors else "") + (", warp-specialised" if self.specialize else "")
        return f"{self.BLOCK_M}x{self.BLOCK_N}, {self.num_warps} warps, {self.num_stages} stages{extra}"


#: No config has fewer rows in a tile.
SMALLEST_BLOCK = 16

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
BUCKETS = (64, 128, 256, 576)  #: of head dims: the larger of the two, padded, falls into the first that holds it

#: Shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

Table = dict[tuple[str, int, int], dict[str, Config]]

_FP32 = "products of float32 run on the plain units, each thread holding its part of the tiles"
_DECODE = "rows as many as there are, up to BLOCK_M: reading keys and values is what takes the time"


def _fp32(arch: str) -> Table:
    warps = 4 if arch == "gfx942" else 8  # 8 waves have 256 registers each, and spill
    sizes = {
        64: ((64, 32, 4, 2), (16, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 8, 2), (16, 32, 4, 2), (32, 32, warps, 1), (16, 32, warps, 1)),
        256: ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        576: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    }
    names = ("forward", "decode", "dkdv", "dq")
    return {
        (arch, 32, bucket): {name: Config(*size, _FP32) for name, size in zip(names, row, strict=True)}
        for bucket, row in sizes.items()
    }


# NOT YET MEASURED ON A GPU. The sizes are those with which none of the kernels spills registers when compiled ahead of
# time (ptxas of Triton 3.9, AMD's LLVM), plain, causal, and with softcap, ALiBi, segments, a bias or dropout, and their
# shared memory lets at least one program run; among those, the larger tile. ``python -m benchmarks tune`` times them
# beside others.
#: (architecture, bits of the inputs, bucket of head dims) -> kernel -> config.
TABLE: Table = {
    ("sm_80", 16, 64): {
        "forward": Config(128, 64, 4, 3, "K and V are read once per 128 queries; 254 registers"),
        "decode": Config(64, 64, 4, 3, _DECODE),
        "dkdv": Config(64, 64, 8, 2, "two accumulators of 64x64; 4 warps spill with a mask and a bias"),
        "dq": Config(64, 64, 4, 2, "Q, dO and the accumulator; 254 registers"),
        "dbias": Config(64, 64, 8, 2, "like dq, and the bias's own tile: 4 warps spill (Triton 3.8)"),
    },
    ("sm_80", 16, 128): {
        "forward": Config(64, 64, 4, 2, "an accumulator of 64x128 is 64 registers; 128 rows spill with 4 warps"),
        "decode": Config(64, 64, 4, 2, _DECODE),
        "dkdv": Config(64, 64, 8, 2, "181 registers; 4 warps spill"),
        "dq": Config(64, 32, 4, 2, "218 registers"),
    },
    ("sm_80", 16, 256): {
        "forward": Config(64, 32, 8, 2, "212 registers"),
        "decode": Config(32, 64, 8, 2, _DECODE),
        "dkdv": Config(32, 32, 8, 1, "K, V, Q and dO take 64 KiB; a second stage leaves one program a multiprocessor"),
        "dq": Config(32, 32, 8, 1, "like dkdv"),
    },
    ("sm_80", 16, 576): {
        "forward": Config(32, 16, 8, 1, "248 registers; 64 rows spill"),
        "decode": Config(16, 32, 8, 1, _DECODE),
        "dkdv": Config(16, 16, 8, 1, "two accumulators of 16 rows are 64 registers; 84 KiB"),
        "dq": Config(16, 16, 8, 1, "224 registers"),
    },
    ("sm_90", 16, 64): {
        "forward": Config(128, 64, 4, 3, "two wgmma of 64 rows for one warpgroup; 222 registers"),
        "decode": Config(64, 64, 4, 3, _DECODE),
        "dkdv": Config(64, 64, 4, 2, "234 registers"),
        "dq": Config(64, 64, 4, 2, "150 registers"),
    },
    ("sm_90", 16, 128): {
        "forward": Config(128, 64, 8, 3, "64 rows for each of two warpgroups; 194 registers, 128 KiB"),
        "decode": Config(64, 64, 4, 2, _DECODE),
        "dkdv": Config(32, 128, 8, 2, "64 keys for each of two warpgroups; 64 queries spill"),
        "dq": Config(64, 64, 8, 2, "193 registers"),
    },
    ("sm_90", 16, 256): {
        "forward": Config(64, 64, 8, 2, "the warpgroups share 64 rows, half the columns each"),
        "decode": Config(32, 64, 8, 2, _DECODE),
        "dkdv": Config(64, 32, 8, 1, "64 queries: a wgmma's rows of S^T's transpose; 1 stage: 2 would take the memory"),
        "dq": Config(64, 32, 8, 2, "238 registers, 128 KiB; spills with 1 stage"),
    },
    ("sm_90", 16, 576): {
        "forward": Config(32, 32, 8, 1, "233 registers; 64 rows spill"),
        "decode": Config(16, 32, 8, 1, _DECODE),
        "dkdv": Config(16, 16, 8, 1, "235 registers; 32 keys spill"),
        "dq": Config(16, 16, 8, 1, "like dkdv"),
    },
    ("sm_100", 16, 64): {
        "forward": Config(128, 64, 8, 3, "203 registers; 4 warps spill"),
        "decode": Config(64, 64, 4, 3, _DECODE),
        "dkdv": Config(64, 64, 4, 2, "247 registers"),
        "dq": Config(64, 64, 4, 2, "126 registers"),
    },
    ("sm_100", 16, 128): {
        "forward": Config(128, 64, 8, 3, "183 registers, 128 KiB; 4 warps spill"),
        "decode": Config(64, 64, 4, 2, _DECODE),
        "dkdv": Config(64, 64, 8, 2, "187 registers, 128 KiB; 128 queries spill"),
        "dq": Config(64, 64, 8, 2, "like dkdv"),
    },
    ("sm_100", 16, 256): {
        "forward": Config(64, 64, 8, 2, "128 KiB of K and V"),
        "decode": Config(32, 64, 8, 2, _DECODE),
        "dkdv": Config(64, 32, 8, 1, "one stage: 2 would take the memory"),
        "dq": Config(64, 32, 8, 1, "like dkdv"),
    },
    ("sm_100", 16, 576): {
        "forward": Config(32, 32, 8, 1, "233 registers; 64 rows spill"),
        "decode": Config(16, 32, 8, 1, _DECODE),
        "dkdv": Config(16, 16, 8, 1, "238 registers; 32 keys spill"),
        "dq": Config(16, 16, 8, 1, "like dkdv"),
    },
    ("gfx942", 16, 64): {
        "forward": Config(128, 64, 4, 1, "32 rows a wave; K and V go through 16 KiB"),
        "decode": Config(64, 64, 4, 1, _DECODE),
        "dkdv": Config(64, 64, 4, 1, "327 of 512 registers"),
        "dq": Config(64, 64, 4, 1, "260 registers"),
    },
    ("gfx942", 16, 128): {
        "forward": Config(128, 32, 4, 1, "219 registers"),
        "decode": Config(64, 64, 4, 1, _DECODE),
        "dkdv": Config(32, 64, 4, 1, "310 registers"),
        "dq": Config(64, 32, 4, 1, "220 registers"),
    },
    ("gfx942", 16, 256): {
        "forward": Config(64, 32, 4, 1, "K and V fit in 64 KiB once"),
        "decode": Config(32, 32, 4, 1, _DECODE),
        "dkdv": Config(32, 32, 4, 1, "like forward"),
        "dq": Config(32, 32, 4, 1, "like forward"),
    },
    ("gfx942", 16, 576): {
        "forward": Config(16, 16, 4, 1, "190 registers"),
        "decode": Config(16, 16, 4, 1, _DECODE),
        "dkdv": Config(16, 16, 4, 1, "381 registers"),
        "dq": Config(16, 16, 4, 1, "297 registers"),
    },
    **_fp32("sm_80"),
    **_fp32("sm_90"),
    **_fp32("sm_100"),
    **_fp32("gfx942"),
}

#: Tiles that ``python -m benchmarks tune`` times beside the table's, all of them with and without tensor descriptors
#: and warp specialisation, where a GPU has them: (architecture, bits, bucket, kernel) -> configs.
VARIANTS: dict[tuple[str, int, int, str], tuple[Config, ...]] = {
    ("sm_80", 16, 64, "forward"): (Config(64, 64, 4, 3, "more programs"), Config(128, 64, 8, 3, "fewer registers")),
    ("sm_80", 16, 128, "forward"): (Config(128, 64, 8, 2, "K and V once per 128 queries"), Config(64, 32, 4, 3, "")),
    ("sm_80", 16, 128, "dkdv"): (Config(32, 64, 8, 2, "less shared memory"), Config(64, 32, 4, 2, "fewer warps")),
    ("sm_80", 16, 128, "dq"): (Config(64, 64, 8, 2, "172 registers"),),
    ("sm_90", 16, 64, "forward"): (Config(128, 128, 8, 2, "fewer steps"),),
    ("sm_90", 16, 128, "forward"): (Config(128, 128, 8, 2, "248 registers"), Config(64, 64, 4, 3, "more programs")),
    ("sm_90", 16, 128, "dkdv"): (Config(32, 64, 4, 2, "252 registers"),),
    ("sm_90", 16, 128, "dq"): (Config(128, 64, 8, 2, "201 registers"),),
    ("sm_100", 16, 64, "forward"): (Config(128, 128, 8, 2, "fewer steps"),),
    ("sm_100", 16, 128, "forward"): (Config(128, 128, 8, 2, "fewer steps"),),
    ("sm_100", 16, 128, "dkdv"): (Config(64, 128, 8, 2, "255 registers"), Config(32, 64, 4, 2, "168 registers")),
    ("gfx942", 16, 128, "forward"): (Config(64, 64, 4, 1, "more programs"),),
}

#: Calls of small functions are what costs there, so programs are few; sizes of 70 still reach every loop of a kernel.
INTERPRETER = Config(64, 32, 1, 1, "interpreter: few programs, and still several tiles at small sizes")


def config(arch: str, bits: int, features: Features, kernel: str) -> Config:
    """The config of one of :data:`KERNELS` on one of :data:`ARCHITECTURES`, or in the ``"interpreter"``."""
    if arch == "interpreter":
        return INTERPRETER
    row = TABLE[arch, bits, bucket(features)]
    c = row["dq"] if kernel == "dbias" and kernel not in row else row[kernel]
    return _lean(c, kernel) if features.LEAN else c


def bucket(features: Features) -> int:
    widest = max(features.QK.padded, features.V.padded)
    return next(b for b in BUCKETS if widest <= b)


def _lean(c: Config, kernel: str) -> Config:
    """Half the tile: shaping scores and hiding some takes the registers that the other half would have had."""
    if kernel == "decode":
        return c
    m, n = c.BLOCK_M, c.BLOCK_N
    m, n = (m // 2, n) if kernel == "dkdv" or m > n else (m, n // 2)
    return replace(c, BLOCK_M=max(m, SMALLEST_BLOCK), BLOCK_N=max(n, SMALLEST_BLOCK))


def careful_config(arch: str) -> Config:
    """The config of a second launch that redoes broken tiles row by row; its blocks divide those of every config."""
    if arch == "interpreter":
        return Config(16, 16, 1, 1, "interpreter")
    return Config(16, 16, 4, 1, "rarely does anything; small, so that it never spills")
