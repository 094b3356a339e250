"""What a kernel is compiled for (:class:`Features`) and how it is cut into tiles (:class:`Config`)."""

from __future__ import annotations

import os
from dataclasses import dataclass

#: Triton decides when a kernel is defined whether it is interpreted.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Features:
    """The compile-time description of a call; sizes, other than head dims, are not part of it."""

    HEAD_DIM_QK: int
    HEAD_DIM_V: int
    HAS_LO: bool = False  #: the window hides keys on the left of the diagonal
    HAS_HI: bool = False  #: the window hides keys on the right of the diagonal
    MASK: str = "none"  #: "none", "key" (the same for all queries) or "full"
    BIAS: str = "none"  #: like MASK
    DROPOUT: bool = False
    NEGATE: bool = False  #: the softmax scale is negative
    PRECISION: str = "ieee"  #: of products of float32: "ieee" or "tf32"

    @property
    def BLOCK_DQK(self) -> int:
        return block_dim(self.HEAD_DIM_QK)

    @property
    def BLOCK_DV(self) -> int:
        return block_dim(self.HEAD_DIM_V)

    @property
    def RESTRICTED(self) -> bool:
        """Whether a key that exists may be invisible to some query."""
        return self.HAS_LO or self.HAS_HI or self.MASK != "none" or self.BIAS != "none"

    @property
    def WHOLE(self) -> bool:
        """Whether tiles that are not edges lie inside the sequence in both directions, for a mask's loads."""
        return self.MASK == "full" or self.BIAS == "full"

    def describe(self) -> str:
        """What is on, in words. Not ``__str__``: Triton's cache tells kernels apart by the ``str`` of a constant."""
        on = [name.lower() for name in ("HAS_LO", "HAS_HI", "DROPOUT", "NEGATE") if getattr(self, name)]
        on += [f"{name.lower()} by {getattr(self, name)}" for name in ("MASK", "BIAS") if getattr(self, name) != "none"]
        return ", ".join(on) or "plain"


def block_dim(head_dim: int) -> int:
    """The power of two >= 16 (the least a tensor core takes) that holds ``head_dim``."""
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of one kernel, and why."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    reason: str

    def __str__(self) -> str:
        return f"{self.BLOCK_M}x{self.BLOCK_N}, {self.num_warps} warps, {self.num_stages} stages"


#: No config has fewer rows in a tile.
SMALLEST_BLOCK = 16

KERNELS = ("forward", "dkdv", "dq", "dbias")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

Table = dict[tuple[str, int, int], dict[str, Config]]

_FP32 = "float32 products run on the plain units: a thread holds its part of the tiles in registers, so they are small"
_FEW = "the accumulator takes most of the registers"


def _fp32(arch: str) -> Table:
    few, many = (4, 8)
    return {
        (arch, 32, 64): {
            "forward": Config(64, 32, few, 2, _FP32),
            "dkdv": Config(32, 32, few, 1, _FP32),
            "dq": Config(32, 32, few, 1, _FP32),
        },
        (arch, 32, 128): {
            "forward": Config(32, 32, few, 2, _FP32),
            "dkdv": Config(32, 32, many, 1, _FP32),
            "dq": Config(32, 32, many, 1, _FP32),
        },
        (arch, 32, 256): {
            "forward": Config(32, 16, many, 1, _FP32),
            "dkdv": Config(16, 16, many, 1, _FP32),
            "dq": Config(16, 16, many, 1, _FP32),
        },
    }


#: (architecture, bits of the inputs, the larger head dim, rounded up) -> kernel -> config.
TABLE: Table = {
    ("sm_80", 16, 64): {
        "forward": Config(128, 64, 4, 3, "128 rows per 4 warps read K and V once per 128 queries"),
        "dkdv": Config(64, 64, 4, 2, "two accumulators of 64x64"),
        "dq": Config(64, 64, 4, 2, "Q, dO and the accumulator"),
    },
    ("sm_80", 16, 128): {
        "forward": Config(64, 64, 4, 2, ""),
        "dkdv": Config(32, 64, 4, 2, ""),
        "dq": Config(64, 32, 4, 2, ""),
    },
    ("sm_80", 16, 256): {
        "forward": Config(64, 32, 8, 2, ""),
        "dkdv": Config(32, 32, 8, 1, ""),
        "dq": Config(32, 32, 8, 1, ""),
    },
    ("sm_90", 16, 64): {
        "forward": Config(128, 64, 4, 3, ""),
        "dkdv": Config(64, 64, 4, 2, ""),
        "dq": Config(64, 64, 4, 2, ""),
    },
    ("sm_90", 16, 128): {
        "forward": Config(128, 64, 8, 3, ""),
        "dkdv": Config(64, 64, 8, 2, ""),
        "dq": Config(64, 64, 8, 2, ""),
    },
    ("sm_90", 16, 256): {
        "forward": Config(64, 64, 8, 2, ""),
        "dkdv": Config(64, 32, 8, 1, ""),
        "dq": Config(64, 32, 8, 1, ""),
    },
    ("sm_100", 16, 64): {
        "forward": Config(128, 64, 4, 3, ""),
        "dkdv": Config(64, 64, 4, 2, ""),
        "dq": Config(64, 64, 4, 2, ""),
    },
    ("sm_100", 16, 128): {
        "forward": Config(128, 64, 8, 3, ""),
        "dkdv": Config(64, 64, 8, 2, ""),
        "dq": Config(64, 64, 8, 2, ""),
    },
    ("sm_100", 16, 256): {
        "forward": Config(64, 64, 8, 2, ""),
        "dkdv": Config(64, 32, 8, 1, ""),
        "dq": Config(64, 32, 8, 1, ""),
    },
    ("gfx942", 16, 64): {
        "forward": Config(128, 64, 4, 1, ""),
        "dkdv": Config(64, 64, 4, 1, ""),
        "dq": Config(64, 64, 4, 1, ""),
    },
    ("gfx942", 16, 128): {
        "forward": Config(128, 32, 4, 1, ""),
        "dkdv": Config(32, 64, 4, 1, ""),
        "dq": Config(64, 32, 4, 1, ""),
    },
    ("gfx942", 16, 256): {
        "forward": Config(64, 32, 4, 1, ""),
        "dkdv": Config(32, 32, 4, 1, ""),
        "dq": Config(32, 32, 4, 1, ""),
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
    bucket = max(64, features.BLOCK_DQK, features.BLOCK_DV)
    return TABLE[arch, bits, bucket]["dq" if kernel == "dbias" else kernel]


def careful_config(features: Features) -> Config:
    """The config of a second launch that redoes broken tiles row by row; its blocks divide those of every config."""
    if INTERPRET:
        return Config(16, 16, 1, 1, "interpreter")
    return Config(16, 16, 4, 1, "rarely does anything; small, so that it never spills")
