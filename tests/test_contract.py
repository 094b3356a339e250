"""Every backend against the float64 definition: forward, log-sum-exp and every gradient, over the one case list."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.dispatch import get_backend, reasons_against
from tests.cases import CASES, DTYPES, Case
from tests.devices import BACKENDS, device_or_skip
from tests.tolerance import assert_close_to_oracle

# The interpreter takes seconds where a kernel takes microseconds: it runs each case in one dtype, in turn.
SLOW_DTYPES = {case.name: (torch.float32, torch.bfloat16, torch.float16)[n % 3] for n, case in enumerate(CASES)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In deterministic mode torch fills what ``torch.empty`` gives with NaN: an element not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(backend: str, case: Case, dtype: torch.dtype) -> None:
    device = device_or_skip(backend)
    if backend == "triton" and device == "cpu" and dtype is not SLOW_DTYPES[case.name]:
        pytest.skip("interpreted: another dtype runs this case")
    inputs = case.make(dtype, device)
    if reasons := reasons_against(get_backend(backend), inputs.spec()):
        pytest.skip("; ".join(reasons))
    actual, naive, oracle = inputs.run(fastattn.attention, backend=backend), inputs.naive(), inputs.oracle()
    for name, value in actual.items():
        assert_close_to_oracle(value, naive[name], oracle[name], f"{backend} {case.name} {name}")
    again = inputs.run(fastattn.attention, backend=backend)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
