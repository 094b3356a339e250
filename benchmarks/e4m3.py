"""``python -m benchmarks e4m3``: how far attention on e4m3 tensors is from attention on what they were made from.

On the CPU: ``attention_fp8`` as it runs here, and models in torch of what tensor cores do. Weights of the second
product are rounded to e4m3; its sums are cut to 13 bits of mantissa every 32 keys, as Hopper is said to do (DeepSeek,
"DeepSeek-V3 Technical Report", 2024, section 3.3.2), over all keys, or over 128 at a time, which are then added up in
float32. One head of 128; inputs are normal, normal with outliers (those of the FlashAttention-3 paper: to one in 1000,
10 times as much is added), or normal with 1 added to the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fastattn
from benchmarks.table import Table

DIM, ROWS, STEP, TILE = 128, 64, 32, 128
E4M3 = torch.float8_e4m3fn
LENGTHS = (1024, 8192, 32768)
KINDS = ("normal", "outliers", "values around 1")


def draw(kind: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 ``q (1, 1, ROWS, DIM)`` and ``k, v (1, 1, length, DIM)``."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(1, 1, n, DIM) for n in (ROWS, length, length))
    if kind == "outliers":
        q, k, v = (x + 10 * torch.randn_like(x) * (torch.rand_like(x) < 0.001) for x in (q, k, v))
    return q, k, v + 1 if kind == "values around 1" else v


def rounded_weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The operand of the second product, ``2^8 exp(s - max)`` in e4m3, as float32; and the sum of it not rounded."""
    scores = (q @ k.mT) * DIM**-0.5
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.to(E4M3).float(), weights.sum(-1, keepdim=True)


def cut(x: Tensor) -> Tensor:
    """float32 without the last 10 of its 23 bits of mantissa."""
    return (x.contiguous().view(torch.int32) & -1024).view(torch.float32)


def product(weights: Tensor, v: Tensor, tile: int) -> Tensor:
    """``weights @ v`` with sums over ``tile`` keys cut at every step, and added up in float32."""
    total = torch.zeros(*weights.shape[:-1], v.shape[-1])
    for first in range(0, v.shape[-2], tile):
        part = torch.zeros_like(total)
        for j in range(first, min(first + tile, v.shape[-2]), STEP):
            part = cut(part + weights[..., j : j + STEP] @ v[..., j : j + STEP, :])
        total += part
    return total


def errors(kind: str, length: int) -> dict[str, float]:
    """Root mean square of the error over that of the result in float64, of the tensors before they were rounded."""
    q, k, v = draw(kind, length)
    exact = fastattn.reference.attention(q.double(), k.double(), v.double())
    (q8, qs), (k8, ks), (v8, vs) = (fastattn.quantize_fp8(x) for x in (q, k, v))
    wide = [x.float() * s[..., None, None] for x, s in ((q8, qs), (k8, ks), (v8, vs))]
    weights, total = rounded_weights(wide[0], wide[1])
    normalised = ((wide[0] @ wide[1].mT) * DIM**-0.5).softmax(-1)
    found = {
        "bfloat16, naive": fastattn.reference.attention(*(x.bfloat16() for x in (q, k, v))),
        "e4m3: attention_fp8, widened": fastattn.attention_fp8(
            q8, k8, v8, q_descale=qs, k_descale=ks, v_descale=vs, backend="cpu"
        ),
        "and weights 2^8 exp(s - max) in e4m3": weights @ wide[2] / total,
        "and sums of 128 keys cut": product(weights, wide[2], TILE) / total,
        "or sums of all keys cut": product(weights, wide[2], length) / total,
        "e4m3, naive: weights that sum to 1 in e4m3": normalised.to(E4M3).float() @ wide[2],
    }
    scale = exact.square().mean().sqrt()
    return {name: float((x.double() - exact).square().mean().sqrt() / scale) for name, x in found.items()}


def table(lengths: tuple[int, ...] = LENGTHS) -> Table:
    columns = {f"{kind}, {n}": errors(kind, n) for kind in KINDS for n in lengths}
    names = next(iter(columns.values()))
    body = [[name, *(f"{100 * column[name]:.3g}%" for column in columns.values())] for name in names]
    return Table("Relative RMS error; kind of inputs, number of keys", ["", *columns], body)


def run(quick: bool) -> int:
    made = table((256,) if quick else LENGTHS)
    print(made.markdown())
    return 0 if all(math.isfinite(float(cell[:-1])) for row in made.rows for cell in row[1:]) else 1
