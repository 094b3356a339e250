"""Cases for the Hopper kernels: shapes that wrap their rings, end one key before, at and after a tile, and leave tiles
without a visible key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import cases, ragged
from tests.cases import Case, Inputs

#: Of threads to a product, at most, in calls without NaN. To compute rows anew, as kernels do where one is NaN, takes
#: thousands.
TURNS = 1000


def case(
    name: str, dims: int | tuple[int, int], seq: tuple[int, int], heads: tuple[int, int] = (1, 1), **more: Any
) -> Case:
    sizes = dict(zip(("seqlen_q", "seqlen_k", "heads_q", "heads_k"), (*seq, *heads), strict=True))
    dims = dims if isinstance(dims, tuple) else (dims, dims)
    options = {"batch": 1, "layout": "bshd", **sizes, **more}
    return Case(name, head_dim_qk=dims[0], head_dim_v=dims[1], **options)


def packed(
    name: str, dims: int | tuple[int, int], queries: tuple[int, ...], keys: tuple[int, ...] | None, **more: Any
) -> Case:
    """Packed sequences of these lengths; without ``keys`` paged ones, of ``used_k``."""
    dims = dims if isinstance(dims, tuple) else (dims, dims)
    sizes = {"heads_q": 1, "heads_k": 1, "layout": "bshd", **more}
    return cases.packed(name, queries, keys, head_dim_qk=dims[0], head_dim_v=dims[1], **sizes)


# Tiles of keys: 128 at head_dim 64 and 96; 176 at 128, 128 with a band; 112 at 192; 80 at 256.
CASES = [
    case("d64-wraps", 64, (193, 5 * 128), (4, 2)),
    case("d64-causal", 64, (200, 391), (2, 1), batch=2, causal=True),
    case("d64-more-queries-than-keys", 64, (300, 129), causal=True),
    case("d64-last-key-has-a-tile-of-queries", 64, (129, 130), window=(1, 0), offset=0),  # key 127, seen by query 128
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
    # The backward of wide heads: tiles of 64 queries and 64 keys, two stages.
    case("d192-wraps", (192, 128), (5 * 64 + 1, 63), (4, 2)),
    case("d192-window", (136, 128), (140, 190), window=(70, 20), offset=50, layout="bhsd"),
    case("d256-one-over", (256, 248), (5 * 64 - 1, 65), (4, 2)),
    case("d256-window", (160, 176), (150, 330), window=(70, 20), offset=60, batch=2),
    case("d256-causal-top-left", (136, 256), (200, 200), (2, 2), causal=True, offset=0),
    case("d256-more-queries-than-keys", 256, (270, 77), causal=True),
    # One warpgroup's half of the columns of dK or dV is not there at all.
    case("d192-few-values", (192, 64), (70, 130)),
    case("d256-few-values", (256, 64), (70, 130), causal=True),
    case("d256-few-keys-columns", (64, 256), (130, 70)),
    # Sequences of their own lengths: whole tiles, a row more and less, none; the ends of tiles in the next sequence.
    packed("packed-d64-wraps", 64, (130, 1, 70), (5 * 128 + 1, 40, 127), heads_q=2),
    packed("packed-d64-causal", 64, (200, 0, 65, 33, 192), (391, 20, 64, 0, 256), causal=True),
    packed("packed-d64-used", 64, (90, 140), (200, 150), heads_q=2, heads_k=2, used_k=(131, 150), window=(70, 20)),
    packed("packed-d96-top-left", 96, (0, 129, 64), (30, 129, 200), causal=True, offset=0),
    packed("packed-d128-causal", (128, 120), (150, 64, 3), (190, 200, 3), heads_q=2, causal=True),
    packed("packed-d192", (192, 128), (70, 129), (337, 12)),
    packed("packed-d192-causal", (192, 128), (70, 0, 64, 33), (90, 20, 64, 0), heads_q=2, causal=True),
    packed("packed-d256-causal", 256, (20, 130), (30, 161), causal=True),
    packed("packed-d256-few-values", (256, 64), (20, 90), (30, 70)),
    packed("packed-d256-few-keys-columns", (64, 256), (20, 90), (30, 70)),
    packed("packed-d256-wraps", (256, 200), (330, 1, 70), (65, 40, 127), heads_q=2, used_k=(65, 3, 100)),
    case("used-d256-causal", 256, (100, 200), batch=2, used_k=(130, 0), causal=True),
    case("used-d128-causal", 128, (100, 300), batch=2, used_k=(260, 0), causal=True),
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
    case("decode-more-edges-than-a-split", 64, (2, 350), (2, 1), used_k=(333,), window=(150, 0), num_splits=5),
    # A sum of weights is no maximum of scores, which are near 0 here: exp(-8 * 125) is 0.
    case("decode-flat", 64, (1, 500), (2, 1), num_splits=1, used_k=(500,), magnitude=0.01, softmax_scale=8.0),
    packed("decode-packed", 64, (5, 0, 1, 3), (300, 20, 64, 70), heads_q=3, used_k=(300, 20, 50, 2), causal=True),
    packed("decode-pages", 64, (5, 0, 1, 3), None, heads_q=3, used_k=(20, 64, 2, 304), page_size=16, causal=True),
    case("decode-pages-split", 128, (1, 600), (8, 1), batch=2, used_k=(600, 77), page_size=128, num_splits=3),
    case("decode-pages-window", 256, (2, 200), (8, 2), batch=2, used_k=(190, 77), page_size=24, window=(100, 0)),
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
    case("e4m3-more-tiles-than-multiprocessors", (16, 32), (20, 33), (3, 1), batch=2),
]


def spoil_unused_keys(inputs: Inputs) -> None:
    """What lies behind the last key of a cache may be anything."""
    for b, n in enumerate(inputs.case.used_k or ()):
        inputs.k[b, :, n:], inputs.v[b, :, n:] = math.nan, math.inf


def decode(inputs: Inputs) -> dict[str, Tensor]:
    """out and lse of a case with key lengths, on the CUDA backend; 0 for queries behind the end of a sequence."""
    nothing = dict.fromkeys(("mask", "bias", "sinks", "dropout_seed"))
    with torch.no_grad():
        given = {"dropout_p": 0.0, "softmax_scale": inputs.case.softmax_scale, "backend": "cuda"}
        options = {**nothing, **given, **inputs.shaping}
        out, lse = ragged.attend(inputs, inputs.q, inputs.k, inputs.v, **options)
    if (lengths := inputs.lengths["seqlens_q"]) is not None:
        real = torch.arange(inputs.case.seqlen_q) < lengths[:, None, None]
        out, lse = torch.where(real[..., None], out, 0), torch.where(real, lse, 0)
    return {"out": out, "lse": lse}
