"""What a kernel is compiled for (:class:`Features`) and how it is cut into tiles (:class:`Config`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

#: Triton decides when a kernel is defined whether it is interpreted.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Width:
    """A head dim as one or two powers of two, at least 16 (the least a tensor core takes): 96 = 64 + 32.

    Padding it to one power of two would cost up to twice the registers, memory and products.
    """

    DIM: int

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
        return self.SHAPED or self.SEGMENTS or self.DROPOUT

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

_FP32 = "float32 products run on the plain units: a thread holds its part of the tiles in registers, so they are small"


def _fp32(arch: str) -> Table:
    few, many = (4, 8)
    return {
        (arch, 32, 64): {
            "forward": Config(64, 32, few, 2, _FP32),
            "decode": Config(16, 32, few, 2, _FP32),
            "dkdv": Config(32, 32, few, 1, _FP32),
            "dq": Config(32, 32, few, 1, _FP32),
        },
        (arch, 32, 128): {
            "forward": Config(32, 32, few, 2, _FP32),
            "decode": Config(16, 32, few, 2, _FP32),
            "dkdv": Config(32, 32, many, 1, _FP32),
            "dq": Config(32, 32, many, 1, _FP32),
        },
        (arch, 32, 256): {
            "forward": Config(32, 16, many, 1, _FP32),
            "decode": Config(16, 16, many, 1, _FP32),
            "dkdv": Config(16, 16, many, 1, _FP32),
            "dq": Config(16, 16, many, 1, _FP32),
        },
        (arch, 32, 576): {
            "forward": Config(16, 16, many, 1, _FP32),
            "decode": Config(16, 16, many, 1, _FP32),
            "dkdv": Config(16, 16, many, 1, _FP32),
            "dq": Config(16, 16, many, 1, _FP32),
        },
    }


#: (architecture, bits of the inputs, bucket of head dims) -> kernel -> config.
TABLE: Table = {
    ("sm_80", 16, 64): {
        "forward": Config(128, 64, 4, 3, "128 rows per 4 warps read K and V once per 128 queries"),
        "decode": Config(64, 64, 4, 3, ""),
        "dkdv": Config(64, 64, 4, 2, "two accumulators of 64x64"),
        "dq": Config(64, 64, 4, 2, "Q, dO and the accumulator"),
    },
    ("sm_80", 16, 128): {
        "forward": Config(64, 64, 4, 2, ""),
        "decode": Config(64, 64, 4, 2, ""),
        "dkdv": Config(64, 64, 8, 2, ""),
        "dq": Config(64, 32, 4, 2, ""),
    },
    ("sm_80", 16, 256): {
        "forward": Config(64, 32, 8, 2, ""),
        "decode": Config(32, 64, 8, 2, ""),
        "dkdv": Config(32, 32, 8, 1, ""),
        "dq": Config(32, 32, 8, 1, ""),
    },
    ("sm_80", 16, 576): {
        "forward": Config(64, 16, 8, 1, ""),
        "decode": Config(16, 32, 8, 2, ""),
        "dkdv": Config(16, 16, 8, 1, ""),
        "dq": Config(16, 16, 8, 1, ""),
    },
    ("sm_90", 16, 64): {
        "forward": Config(128, 64, 4, 3, ""),
        "decode": Config(64, 64, 4, 3, ""),
        "dkdv": Config(64, 64, 4, 2, ""),
        "dq": Config(64, 64, 4, 2, ""),
    },
    ("sm_90", 16, 128): {
        "forward": Config(128, 64, 8, 3, ""),
        "decode": Config(64, 64, 4, 2, ""),
        "dkdv": Config(32, 128, 8, 2, ""),
        "dq": Config(64, 64, 8, 2, ""),
    },
    ("sm_90", 16, 256): {
        "forward": Config(64, 64, 8, 2, ""),
        "decode": Config(32, 64, 8, 2, ""),
        "dkdv": Config(64, 32, 8, 1, ""),
        "dq": Config(64, 32, 8, 1, ""),
    },
    ("sm_90", 16, 576): {
        "forward": Config(64, 32, 8, 1, ""),
        "decode": Config(16, 32, 8, 2, ""),
        "dkdv": Config(16, 32, 8, 1, ""),
        "dq": Config(32, 16, 8, 1, ""),
    },
    ("sm_100", 16, 64): {
        "forward": Config(128, 64, 4, 3, ""),
        "decode": Config(64, 64, 4, 3, ""),
        "dkdv": Config(64, 64, 4, 2, ""),
        "dq": Config(64, 64, 4, 2, ""),
    },
    ("sm_100", 16, 128): {
        "forward": Config(128, 64, 8, 3, ""),
        "decode": Config(64, 64, 4, 2, ""),
        "dkdv": Config(64, 64, 8, 2, ""),
        "dq": Config(64, 64, 8, 2, ""),
    },
    ("sm_100", 16, 256): {
        "forward": Config(64, 64, 8, 2, ""),
        "decode": Config(32, 64, 8, 2, ""),
        "dkdv": Config(64, 32, 8, 1, ""),
        "dq": Config(64, 32, 8, 1, ""),
    },
    ("sm_100", 16, 576): {
        "forward": Config(64, 32, 8, 1, ""),
        "decode": Config(16, 32, 8, 2, ""),
        "dkdv": Config(16, 32, 8, 1, ""),
        "dq": Config(32, 16, 8, 1, ""),
    },
    ("gfx942", 16, 64): {
        "forward": Config(128, 64, 4, 1, ""),
        "decode": Config(64, 64, 4, 1, ""),
        "dkdv": Config(64, 64, 4, 1, ""),
        "dq": Config(64, 64, 4, 1, ""),
    },
    ("gfx942", 16, 128): {
        "forward": Config(128, 32, 4, 1, ""),
        "decode": Config(64, 64, 4, 1, ""),
        "dkdv": Config(32, 64, 4, 1, ""),
        "dq": Config(64, 32, 4, 1, ""),
    },
    ("gfx942", 16, 256): {
        "forward": Config(64, 32, 4, 1, ""),
        "decode": Config(32, 32, 4, 1, ""),
        "dkdv": Config(32, 32, 4, 1, ""),
        "dq": Config(32, 32, 4, 1, ""),
    },
    ("gfx942", 16, 576): {
        "forward": Config(16, 16, 4, 1, ""),
        "decode": Config(16, 16, 4, 1, ""),
        "dkdv": Config(16, 16, 4, 1, ""),
        "dq": Config(16, 16, 4, 1, ""),
    },
    **_fp32("sm_80"),
    **_fp32("sm_90"),
    **_fp32("sm_100"),
    **_fp32("gfx942"),
}

#: Small tiles reach every loop of a kernel at sizes that the interpreter can bear.
INTERPRETER = Config(32, 16, 1, 1, "interpreter: small tiles reach every loop at small sizes")


def config(arch: str, bits: int, features: Features, kernel: str) -> Config:
    """The config of one of :data:`KERNELS` on one of :data:`ARCHITECTURES`, or in the ``"interpreter"``."""
    if arch == "interpreter":
        return INTERPRETER
    widest = max(features.QK.padded, features.V.padded)
    bucket = next(b for b in BUCKETS if widest <= b)
    c = TABLE[arch, bits, bucket]["dq" if kernel == "dbias" else kernel]
    return _lean(c, kernel) if features.LEAN else c


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
