"""Cases for the Hopper kernels: shapes that wrap their rings, end one key before, at and after a tile, and leave tiles
without a visible key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import ragged
from tests.cases import Case, Inputs


def case(
    name: str, dims: int | tuple[int, int], seq: tuple[int, int], heads: tuple[int, int] = (1, 1), **more: Any
) -> Case:
    sizes = dict(zip(("seqlen_q", "seqlen_k", "heads_q", "heads_k"), (*seq, *heads), strict=True))
    dims = dims if isinstance(dims, tuple) else (dims, dims)
    options = {"batch": 1, "layout": "bshd", **sizes, **more}
    return Case(name, head_dim_qk=dims[0], head_dim_v=dims[1], **options)


# Tiles of keys: 128 at head_dim 64 and 96; 176 at 128, 128 with a band; 112 at 192; 80 at 256.
CASES = [
    case("d64-wraps", 64, (193, 5 * 128), (4, 2)),
    case("d64-causal", 64, (200, 391), (2, 1), batch=2, causal=True),
    case("d64-more-queries-than-keys", 64, (300, 129), causal=True),
    case("d96-one-short", 96, (70, 2 * 128 - 1)),
    case("d96-window", 96, (190, 330), window=(70, 20), offset=60),
    case("d128-one-over", 128, (130, 2 * 176 + 1), (2, 1)),
    case("d128-wraps", (128, 120), (65, 5 * 176)),
    case("d128-causal-top-left", 128, (310, 310), (2, 2), causal=True, offset=0),
    case("d128-more-queries-than-keys", 128, (400, 77), causal=True),
    case("d128-narrow", (72, 104), (90, 200), layout="bhsd"),
    case("d192-causal", (192, 128), (140, 337), causal=True),
    case("d256-wraps", 256, (66, 401), layout="bhsd"),
    case("d256-causal", 256, (150, 161), (2, 1), causal=True),
]
# Up to 16 rows of queries and heads. Tiles of 64 keys; six stages at head_dim 64, else three; the emulated device has
# room for eight blocks, four at head_dim 256, among which the keys are split.
DECODE = [
    case("decode-d64-wraps", 64, (1, 13 * 64 + 1), (4, 2), batch=2, used_k=(833, 300), num_splits=1),
    case("decode-d64-split", 64, (1, 9 * 64 - 1), (8, 1), used_k=(575,)),
    case("decode-d128-causal", 128, (3, 450), (10, 2), used_k=(450,), causal=True),
    case("decode-d128-empty-splits", (120, 104), (16, 130), batch=2, used_k=(1, 130), num_splits=5),
    case("decode-d256-window", (200, 256), (2, 350), (6, 1), used_k=(333,), window=(150, 0), num_splits=3),
    case("decode-more-queries-than-keys", 64, (12, 70), used_k=(9,), causal=True),
]
# On e4m3: tiles of 128 keys, three stages, two at head_dim 256.
FP8 = [
    case("e4m3-d64-wraps", 64, (70, 7 * 128 - 1), (2, 1)),
    case("e4m3-d64-causal", (48, 64), (200, 391), (2, 2), batch=2, causal=True),
    case("e4m3-d128-wraps", 128, (65, 6 * 128 + 1), layout="bhsd"),
    case("e4m3-d128-window", (112, 128), (190, 330), (4, 2), window=(70, 20), offset=60),
    case("e4m3-d128-more-queries-than-keys", 128, (400, 77), (2, 1), causal=True),
    case("e4m3-d256-causal", (256, 144), (150, 4 * 128 + 33), causal=True),
    case("e4m3-one-query", (16, 32), (1, 33), (3, 1)),
]


def spoil_unused_keys(inputs: Inputs) -> None:
    """What lies behind the last key of a cache may be anything."""
    for b, n in enumerate(inputs.case.used_k or ()):
        inputs.k[b, :, n:], inputs.v[b, :, n:] = math.nan, math.inf


def decode(inputs: Inputs) -> dict[str, Tensor]:
    """out and lse of a case with key lengths, on the CUDA backend."""
    nothing = dict.fromkeys(("mask", "bias", "sinks", "softmax_scale", "dropout_seed"))
    with torch.no_grad():
        options = {**nothing, "dropout_p": 0.0, **inputs.shaping, "backend": "cuda"}
        out, lse = ragged.attend(inputs, inputs.q, inputs.k, inputs.v, **options)
    return {"out": out, "lse": lse}
