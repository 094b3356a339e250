"""The Triton kernels against a naive attention in float64 with autograd, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from fastattn.backends.base import Tensors
from fastattn.backends.triton import TritonBackend
from fastattn.spec import AttentionSpec

BACKEND = TritonBackend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

pytestmark = pytest.mark.skipif(BACKEND.unavailable_reason() is not None, reason=str(BACKEND.unavailable_reason()))


def philox_word(seed: int, i: np.ndarray, j: np.ndarray, bh: int) -> np.ndarray:
    """Word j % 4 of Philox4x32-10 with the key ``seed`` and the counter (j // 4, i, bh, 0)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.broadcast_to(x, np.broadcast(i, j).shape).astype(np.uint64) for x in (j // 4, i, bh, 0)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.choose(np.broadcast_to(j % 4, c[0].shape), c)


def keep_mask(spec: AttentionSpec, seed: int) -> Tensor:
    i, j = np.arange(spec.seqlen_q)[:, None], np.arange(spec.seqlen_k)[None, :]
    words = [philox_word(seed, i, j, bh) for bh in range(spec.batch * spec.heads_q)]
    kept = np.stack(words) >= int(spec.dropout_p * 2**32)
    return torch.from_numpy(kept.reshape(spec.batch, spec.heads_q, spec.seqlen_q, spec.seqlen_k))


def visibility(spec: AttentionSpec, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    i, j = torch.arange(spec.seqlen_q)[:, None], torch.arange(spec.seqlen_k)[None, :]
    left, right = spec.window
    seen = torch.ones(spec.batch, spec.heads_q, spec.seqlen_q, spec.seqlen_k, dtype=torch.bool)
    if left is not None:
        seen &= j >= i + spec.offset - left
    if right is not None:
        seen &= j <= i + spec.offset + right
    if mask is not None:
        seen &= mask.cpu()
    if bias is not None:
        seen &= bias.detach().cpu() != -math.inf
    return seen


def naive(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """out and lse as the definition has them, differentiable, in the type of its inputs."""
    seen = visibility(spec, mask, bias)
    k, v = (x.repeat_interleave(spec.group_size, 1) for x in (k, v))
    s = spec.softmax_scale * q @ k.mT
    if bias is not None:
        s = s + torch.where(bias == -math.inf, 0.0, bias)
    s = s.masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(empty, 0.0), -1, keepdim=True)
    p = torch.exp(s - lse).masked_fill(~seen, 0.0)
    if spec.dropout_p:
        scale = 1 / (1 - spec.dropout_p) if spec.dropout_p < 1 else 0.0
        p = p * keep_mask(spec, seed) * scale
    return p @ v, lse.masked_fill(empty, -math.inf).squeeze(-1)


def strided(x: Tensor, how: str) -> Tensor:
    match how:
        case "bshd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "last":
            return x.mT.contiguous().mT
        case "sliced":
            return torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1].copy_(x)
    return x.contiguous()


CASES: dict[str, dict] = {
    "plain": {},
    "long": {"seqlen_q": 70, "seqlen_k": 66},
    "one_query": {"seqlen_q": 1, "seqlen_k": 37, "window": (None, 0), "offset": 36},
    "one_key": {"seqlen_q": 5, "seqlen_k": 1},
    "causal": {"window": (None, 0)},
    "causal_rows_see_nothing": {"seqlen_q": 50, "seqlen_k": 20, "window": (None, 0), "offset": -30},
    "causal_more_keys": {"seqlen_q": 33, "seqlen_k": 70, "window": (None, 0), "offset": 37},
    "window": {"seqlen_q": 70, "seqlen_k": 75, "window": (9, 4), "offset": 3},
    "window_left": {"seqlen_q": 80, "seqlen_k": 60, "window": (20, None)},
    "window_wide": {"seqlen_q": 70, "seqlen_k": 70, "window": (40, 17)},
    "window_far": {"window": (3, 3), "offset": 10_000_000_000},
    "gqa": {"heads_q": 6, "heads_k": 2, "window": (None, 0), "seqlen_q": 20},
    "mqa": {"heads_q": 3, "heads_k": 1, "seqlen_q": 20},
    "head_dims": {"head_dim_qk": 20, "head_dim_v": 7},
    "head_dims_wide": {"head_dim_qk": 3, "head_dim_v": 129, "batch": 1, "heads_q": 1, "heads_k": 1},
    "scale_negative": {"softmax_scale": -0.4},
    "scale_zero": {"softmax_scale": 0.0, "window": (None, 0)},
    "mask": {"mask": (2, 2, 37, 41)},
    "mask_keys": {"mask": (2, 1, 1, 41)},
    "mask_queries": {"mask": (1, 2, 37, 1)},
    "mask_causal": {"mask": (1, 1, 37, 41), "window": (None, 0), "heads_q": 4},
    "bias": {"bias": (2, 2, 37, 41)},
    "bias_batch": {"bias": (1, 2, 37, 41), "window": (None, 0)},
    "bias_keys": {"bias": (2, 1, 1, 41)},
    "bias_queries": {"bias": (1, 2, 37, 1), "mask": (2, 1, 1, 41)},
    "bias_scalar": {"bias": (1, 1, 1, 1), "window": (11, 5)},
    "dropout": {"dropout_p": 0.3},
    "dropout_causal_bias": {"dropout_p": 0.6, "window": (None, 0), "bias": (1, 2, 37, 41), "heads_k": 1},
    "dropout_all": {"dropout_p": 1.0},
    "bshd": {"layout": "bshd"},
    "last_stride": {"layout": "last"},
    "sliced": {"layout": "sliced", "bias": (1, 1, 37, 41), "mask": (2, 1, 1, 41)},
}


def build(
    dtype: torch.dtype, layout: str = "", **changes
) -> tuple[AttentionSpec, list[Tensor], Tensor | None, Tensor | None]:
    sizes = {
        "batch": 2,
        "heads_q": 2,
        "heads_k": 2,
        "seqlen_q": 37,
        "seqlen_k": 41,
        "head_dim_qk": 16,
        "head_dim_v": 16,
    }
    fields = {**sizes, "softmax_scale": 0.3, "dtype": dtype, "device": DEVICE, "needs_grad": True, **changes}
    if "heads_q" in changes and "heads_k" not in changes:
        fields["heads_k"] = 2
    if fields.get("bias"):
        fields.update(bias_dtype=dtype, needs_bias_grad=True)
    spec = AttentionSpec(**fields)
    torch.manual_seed(len(str(changes)))
    q = torch.randn(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_qk)
    k = torch.randn(spec.batch, spec.heads_k, spec.seqlen_k, spec.head_dim_qk)
    v = torch.randn(spec.batch, spec.heads_k, spec.seqlen_k, spec.head_dim_v)
    tensors = [strided(x.to(DEVICE, dtype), layout) for x in (q, k, v)]
    mask = torch.rand(spec.mask) < 0.6 if spec.mask else None
    bias = torch.randn(spec.bias) if spec.bias else None
    if bias is not None and bias.numel() > 10:
        bias[torch.rand(bias.shape) < 0.1] = -math.inf
    return spec, tensors, None if mask is None else mask.to(DEVICE), None if bias is None else bias.to(DEVICE, dtype)


def run(spec, tensors, mask, bias, grad_out, grad_lse, seed=0x1234_5678_9ABC):
    seed_tensor = torch.tensor([seed], device=DEVICE) if spec.dropout_p else None
    t = Tensors(*tensors, bias=bias, mask=mask, dropout_seed=seed_tensor)
    out, lse = BACKEND.forward(spec, t)
    return out, lse, *BACKEND.backward(spec, t, grad_out, grad_lse, out, lse)


def expected(spec, tensors, mask, bias, grad_out, grad_lse, dtype, seed=0x1234_5678_9ABC):
    leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in tensors]
    if bias is not None:
        bias = bias.cpu().to(dtype).requires_grad_()
    out, lse = naive(spec, *leaves, mask, bias, seed)
    seen = lse != -math.inf
    loss = (out * grad_out.cpu().to(dtype)).sum() + (lse[seen] * grad_lse.cpu().to(dtype)[seen]).sum()
    grads = torch.autograd.grad(loss, [*leaves, bias] if bias is not None else leaves)
    return out.detach(), lse.detach(), *grads


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(CASES))
def test_matches_naive(case: str, dtype: str) -> None:
    spec, tensors, mask, bias = build(DTYPES[dtype], **CASES[case])
    assert not BACKEND.unsupported_reasons(spec)
    grad_out = torch.randn(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_v, device=DEVICE).to(spec.dtype)
    grad_lse = torch.randn(spec.batch, spec.heads_q, spec.seqlen_q, device=DEVICE)
    got = run(spec, tensors, mask, bias, grad_out, grad_lse)
    exact = expected(spec, tensors, mask, bias, grad_out, grad_lse, torch.float64)
    rough = expected(spec, tensors, mask, bias, grad_out, grad_lse, spec.dtype)
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    for name, have, want, low in zip(names, got, exact, rough, strict=False):
        have, low = have.cpu().double(), low.double()
        assert torch.equal(have.isinf(), want.isinf()), name
        want, have, low = (x.masked_fill(want.isinf(), 0.0) for x in (want, have, low))
        unit = torch.finfo(torch.float32).eps if name == "lse" else ROUNDING[spec.dtype]
        bound = 2 * (low - want).abs().max() + 4 * unit * max(1.0, want.abs().max())
        assert (have - want).abs().max() <= bound, f"{name}: {(have - want).abs().max():.3g} > {bound:.3g}"


@pytest.mark.parametrize("case", ["causal", "mask", "bias", "window", "dropout_causal_bias"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
def test_nonfinite_reaches_only_what_sees_it(case: str, poison: float, where: str) -> None:
    """One row is poisoned; whatever does not see it must be bitwise what it is without the poison."""
    spec, tensors, mask, bias = build(torch.float32, **CASES[case])
    grad_out = torch.randn(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_v, device=DEVICE)
    clean = run(spec, tensors, mask, bias, grad_out, None)
    victims = dict(zip("qkv", tensors, strict=True), grad_out=grad_out)
    victims[where][0, 0, 17, 3] = poison
    dirty = run(spec, tensors, mask, bias, grad_out, None)
    seen = visibility(spec, mask, bias)
    hit_rows = torch.zeros(spec.batch, spec.heads_q, spec.seqlen_q, dtype=torch.bool)
    if where in "kv":
        hit_rows[0, : spec.group_size] = seen[0, : spec.group_size, :, 17]
    else:
        hit_rows[0, 0, 17] = True
    # A row that is hit may hand anything on to all keys it sees.
    hit_keys = (hit_rows[..., None] & seen).any(2).unflatten(1, (spec.heads_k, spec.group_size)).any(2)
    hit_pairs = hit_rows[..., None] & seen
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), clean, dirty, strict=True):
        if a is None:
            continue
        if name == "dbias":
            fine = ~hit_pairs
            for dim, size in enumerate(a.shape):
                fine = fine.all(dim, keepdim=True) if size == 1 else fine
        else:
            fine = ~(hit_keys if name in ("dk", "dv") else hit_rows)
        if name == "out":
            assert b.cpu()[fine].isfinite().all()
            if where == "v":
                got = b.cpu()[0, : spec.group_size, :, 3][hit_rows[0, : spec.group_size]]
                same = got.isnan() if math.isnan(poison) else got == poison
                assert (same | (spec.dropout_p > 0)).all()
        torch.testing.assert_close(
            b.cpu()[fine], a.cpu()[fine], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bias_of_finfo_min_gives_mean_of_values() -> None:
    spec, tensors, _, bias = build(torch.float32, bias=(1, 1, 37, 41))
    bias.fill_(torch.finfo(torch.float32).min)
    out, lse = BACKEND.forward(spec, Tensors(*tensors, bias=bias))
    torch.testing.assert_close(out, tensors[2].mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)
    assert lse.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_bias_gives_nan_in_its_rows_only(value: float) -> None:
    spec, tensors, _, bias = build(torch.float32, bias=(1, 1, 37, 41))
    bias[0, 0, 5, 30] = value
    out, _ = BACKEND.forward(spec, Tensors(*tensors, bias=bias))
    assert out[:, :, 5].isnan().all()
    assert out[:, :, torch.arange(37) != 5].isfinite().all()


def test_expanded_gradient_and_output_layout() -> None:
    spec, tensors, _, _ = build(torch.float32, layout="bshd", window=(None, 0))
    grad_out = torch.tensor(1.0, device=DEVICE).expand(spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim_v)
    got = run(spec, tensors, None, None, grad_out, None)
    want = run(spec, tensors, None, None, grad_out.contiguous(), None)
    assert got[0].transpose(1, 2).is_contiguous() and got[2].transpose(1, 2).is_contiguous()
    for a, b in zip(got[:5], want[:5], strict=True):
        assert torch.equal(a, b)


def test_reasons() -> None:
    spec, *_ = build(torch.float64, head_dim_qk=300, head_dim_v=300)
    reasons = "\n".join(BACKEND.unsupported_reasons(spec))
    assert "float64" in reasons and "head_dim_qk 300" in reasons and "head_dim_v 300" in reasons


def test_configuration_is_one_line() -> None:
    spec, *_ = build(torch.bfloat16, window=(None, 0), bias=(1, 1, 1, 41))
    text = BACKEND.configuration(spec)
    assert "\n" not in text and "dkdv" in text and "dbias" in text
