"""The one tolerance rule: no result may be much further from the float64 oracle than the naive one is."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_oracle(actual: Tensor, naive: Tensor, oracle: Tensor, name: str = "result") -> None:
    """``max|actual - oracle| <= 2 max|naive - oracle| + 8 eps max|oracle|``, eps being that of ``actual``'s dtype.

    ``naive`` is the naive implementation in the dtype of ``actual``, ``oracle`` the same in float64. Infinities must
    stand where the oracle has them; a NaN is an error unless the oracle has it too.
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
    limit = 2 * naive_error + 8 * torch.finfo(actual.dtype).eps * wide.abs().max().item()
    assert error <= limit, f"{name}: error {error:.3e} exceeds {limit:.3e} (naive: {naive_error:.3e})"
