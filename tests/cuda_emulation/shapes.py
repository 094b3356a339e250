"""Calls that between them reach every kernel of the CUDA backend and every row of its tables of tiles."""

from __future__ import annotations

from typing import Any

from tests.cases import Case


def shape(name: str, dim: int, seqlen_q: int, seqlen_k: int, **options: Any) -> Case:
    sizes = {"batch": 1, "heads_q": 1, "heads_k": 1, "head_dim_qk": dim, "head_dim_v": dim}
    return Case(name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{**sizes, **options})


# Every bucket of head dimensions of every kernel: more key tiles than stages, a key more and a key less than whole
# tiles, fewer keys than queries. "general": the kernels that look at single entries.
RULES = {"softcap": 2.0, "dropout_p": 0.2, "mask": (1, 1, 0, 0), "alibi": "heads"}
SPLITS = {"num_splits": 3, "used_k": (300,), "softmax_scale": -25.0}
SHAPES = [
    shape("d32", 32, 130, 257, causal=True),
    shape("d64", 64, 70, 319, heads_q=2, window=(90, 20)),
    shape("d96", 96, 140, 70, head_dim_v=88, causal=True),
    shape("d128", 128, 70, 193),
    shape("d192", 192, 70, 95, head_dim_v=128, causal=True),
    shape("d256", 256, 70, 97, causal=True),
    shape("general_64", 64, 70, 133, **RULES),
    shape("general_128", 128, 33, 130, causal=True, **RULES),
    shape("general_256", 256, 33, 66, **RULES),
    shape("decode", 64, 3, 590, heads_q=6, heads_k=2, causal=True),
    # The partial outputs are of odd rows; one of five has an lse of -326, one sees nothing.
    shape("splits", 64, 5, 300, head_dim_v=37, window=(0, None), offset=296, **SPLITS),
    # Some lse are below -100: with them, a key that does not exist would have an infinite weight.
    shape("steep", 32, 40, 20, heads_q=4, window=(3, 0), offset=0, softmax_scale=30.0),
    shape("prefix", 64, 65, 65, causal=True, prefix=(65,)),  # a key and a query more than whole tiles
    shape("padded", 64, 20, 40, layout="padded"),  # rows of whole chunks of 16 bytes that are not aligned
    shape("cut_chunk", 20, 20, 40, layout="padded"),  # aligned rows, of which the last chunk is not all there
    shape("shifted", 32, 20, 40, layout="shifted"),  # aligned from row to row, but the first is not
    shape("one_more", 32, 129, 40),  # a query more than a tile of the forward has
    shape("last_page", 64, 3, 48, page_size=16, used_k=(48,)),
    shape("pairs", 6, 43, 20),  # 129 pairs of elements: one more than a block of prepare.cu has threads
]
SIMT_SHAPES = [
    shape("d64", 64, 70, 130, causal=True),
    shape("d128", 128, 33, 65, bias=(0, 0, 1, 0), **RULES),
    shape("d256", 256, 33, 65, causal=True),
    shape("bias_tiles", 8, 65, 65, bias=(0, 0, 0, 0)),  # several tiles of the gradient of a bias
]
