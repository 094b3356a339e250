"""The one tolerance rule: no result may be much further from the float64 oracle than the naive one is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn import reference

if TYPE_CHECKING:
    from tests.inputs import Inputs


#: For two float64 results of the same mathematics, where there is no better oracle: their sums are of fewer than 1000
#: terms of size 1, whose rounding is below 1000 eps = 2e-13; what is wrong is wrong in the first digits.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def assert_close_to_oracle(
    actual: Tensor, naive: Tensor, oracle: Tensor, name: str = "result", size: Tensor | None = None
) -> None:
    """``max|actual - oracle| <= 2 max|naive - oracle| + 8 eps max|oracle|``, eps being that of ``actual``'s dtype.

    ``naive`` is the naive implementation in the dtype of ``actual``, ``oracle`` the same in float64. Infinities must
    stand where the oracle has them; a NaN is an error unless the oracle has it too.

    ``size``, where given, stands in for ``max|oracle|`` if it is larger: see :func:`gradient_sizes`.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    finite = oracle.isfinite()
    strange = actual.double()[~finite]
    assert torch.equal(strange.nan_to_num(nan=7.0), oracle.double()[~finite].nan_to_num(nan=7.0)), (
        f"{name}: {strange} where the oracle has {oracle[~finite]}"
    )
    if not finite.any():
        return
    wide = oracle.double()[finite]
    error = (actual.double()[finite] - wide).abs().max().item()
    naive_error = (naive.double()[finite] - wide).abs().max().item()
    unit = max(wide.abs().max().item(), 0.0 if size is None else size.max().item())
    limit = 2 * naive_error + 8 * torch.finfo(actual.dtype).eps * unit
    assert error <= limit, f"{name}: error {error:.3e} exceeds {limit:.3e} (naive: {naive_error:.3e})"


def assert_rounded_alike(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """The rule where ``expected`` is both naive and oracle: ``max|actual - expected| <= 8 eps max|expected|``.

    For one computation done twice, whose sums may be in another order.
    """
    assert actual.dtype is expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert_close_to_oracle(actual, expected, expected.double(), name)


def assert_rms_explained(actual: Tensor, rounded: Tensor, oracle: Tensor, name: str = "result") -> None:
    """``rms(actual - oracle) <= 1.1 rms(rounded - oracle) + 8 eps max|oracle|``, eps being float32's: a second rule.

    For kernels that round an operand on purpose, weights to e4m3 or weights and dS to bfloat16, of which ``rounded`` is
    a model: the first rule's 8 eps of a bfloat16 result are 1/16 of its size, and would hide a rounding too many. The
    kernel rounds the same weights up to its running maximum, so the two errors are samples of one distribution and not
    equal; the RMS of n of them strays by 1 / sqrt(2 n) of itself, and n is in the hundreds where there are several
    tiles: 1.1 is two or more of that. Sums are in float32 in both, hence its eps.
    """
    finite = oracle.isfinite()
    wide = oracle.double()[finite]
    error, model = ((x.double()[finite] - wide).square().mean().sqrt().item() for x in (actual, rounded))
    limit = 1.1 * model + 8 * torch.finfo(torch.float32).eps * wide.abs().max().item()
    assert error <= limit, f"{name}: RMS error {error:.3e} exceeds {limit:.3e} (the model's: {model:.3e})"


def gradient_sizes(inputs: Inputs, out: Tensor) -> dict[str, Tensor]:
    """How large the terms are that dq, dk, dv and dbias are sums of: the root of the sum of their squares, in float64.

    For calls of few keys or queries. dS = P (dP - delta + dlse) with delta = dO · O, and where P is nearly 1, dP and
    delta are nearly equal: dS is 0 for one key without dlse, and P (1 - P) (dP_0 - dP_1) for two. The backward pass
    knows O only as rounded to its dtype, so delta only to eps / 2 of the terms of dO · O, whatever is done with it
    afterwards; the naive one takes delta from the dP's themselves, and is spared that. Nor has a single element, such
    as dv of one key, a larger neighbour where a sum comes out near 0. Where there are many keys and rows, these sizes
    are those of the gradients' largest elements, and the rule is the same.
    """
    case, wide = inputs.case, inputs.to(torch.float64)
    q, k, v, grad = wide.q, wide.k, wide.v, wide.grad_out.square()
    k, v = (reference.repeat_heads(x, case.heads_q) for x in (k, v))
    weights = partial(
        reference.attention,
        q,
        k,
        torch.eye(case.seqlen_k, dtype=torch.float64).expand(case.batch, case.heads_q, -1, -1),
        mask=wide.mask,
        bias=wide.bias,
        sinks=wide.sinks,
        causal=case.causal,
        window=case.window,
        offset=case.offset,
        softmax_scale=case.softmax_scale,
        **wide.shaping,
    )
    p, dropped = weights(), weights(dropout_p=case.dropout_p, dropout_seed=wide.dropout_seed)
    delta = (grad * out.double().square()).sum(-1, keepdim=True)
    dlse = 0.0 if wide.grad_lse is None else wide.grad_lse.square()[..., None]
    ds = dropped.square() * (grad @ v.square().mT) + p.square() * (delta + dlse)
    scale = case.head_dim_qk**-0.5 if case.softmax_scale is None else case.softmax_scale
    slope = 1 - (scale / case.softcap * (q @ k.mT)).tanh().square() if case.softcap else 1.0
    raw = ds * (scale * slope) ** 2  # of the gradient of q · k
    dk, dv = raw.mT @ q.square(), dropped.square().mT @ grad
    squares = {"dq": raw @ k.square()}
    squares |= {name: x.unflatten(1, (case.heads_k, -1)).sum(2) for name, x in (("dk", dk), ("dv", dv))}
    if wide.bias is not None:
        squares["dbias"] = ds.sum_to_size(wide.bias.shape)
    return {name: x.sqrt() for name, x in squares.items()}
