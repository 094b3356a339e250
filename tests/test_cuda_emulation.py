"""The CUDA kernels, compiled as ordinary C++ and run on the CPU, over the one case list. No GPU takes part."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from tests.cases import CASES, Case
from tests.tolerance import assert_close_to_oracle

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from tests.cuda_emulation.backend import EmulatedBackend, emulated_backend

# Each case runs in one dtype, in turn, and its backward as well.
DTYPES = {case.name: (torch.float32, torch.bfloat16, torch.float16)[n % 3] for n, case in enumerate(CASES)}


@pytest.fixture(scope="session")
def emulated() -> EmulatedBackend:
    return emulated_backend()


@pytest.fixture(autouse=True)
def use_emulation(emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = dispatch.get_backend
    monkeypatch.setattr(dispatch, "get_backend", lambda name: emulated if name == "cuda" else real(name))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    emulated.emulator.configure()
    yield
    emulated.emulator.configure()
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, emulated: EmulatedBackend) -> None:
    inputs = case.make(DTYPES[case.name])
    if reasons := emulated.unsupported_reasons(inputs.spec()):
        with pytest.raises(RuntimeError, match=re.escape(reasons[0])):
            inputs.run(fastattn.attention, backend="cuda")
        return
    actual, naive, oracle = inputs.run(fastattn.attention, backend="cuda"), inputs.naive(), inputs.oracle()
    for name, value in actual.items():
        assert_close_to_oracle(value, naive[name], oracle[name], f"{case.name} {name}")
    emulated.emulator.configure(seed=1)
    for name, value in inputs.run(fastattn.attention, backend="cuda").items():
        assert torch.equal(actual[name], value), f"{name} depends on the order of threads"


# More key tiles than stages, a key more and a key less than whole tiles, fewer keys than queries, every bucket.
SHAPES = [
    Case("d32", head_dim_qk=32, head_dim_v=32, batch=1, heads_q=1, heads_k=1, seqlen_q=130, seqlen_k=257, causal=True),
    Case("d64", head_dim_qk=64, head_dim_v=64, batch=1, heads_k=1, seqlen_q=70, seqlen_k=319, window=(90, 20)),
    Case("d96", head_dim_qk=96, head_dim_v=88, batch=1, heads_q=1, heads_k=1, seqlen_q=140, seqlen_k=70, causal=True),
    Case("d128", head_dim_qk=128, head_dim_v=128, batch=1, heads_q=1, heads_k=1, seqlen_q=70, seqlen_k=193),
    Case("d192", head_dim_qk=192, head_dim_v=128, batch=1, heads_q=1, heads_k=1, seqlen_q=70, seqlen_k=95, causal=True),
    Case("d256", head_dim_qk=256, head_dim_v=256, batch=1, heads_q=1, heads_k=1, seqlen_q=70, seqlen_k=97, causal=True),
    Case("decode", head_dim_qk=64, head_dim_v=64, batch=1, heads_q=6, heads_k=2, seqlen_q=3, seqlen_k=590, causal=True),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_tensor_core_tiles(case: Case, emulated: EmulatedBackend) -> None:
    """Every bucket of head dimensions under several orders of warps and blocks, dQ by atomics and in one order."""
    for dtype, seed, deterministic in ((torch.bfloat16, 0, True), (torch.float16, 3, False)):
        inputs = case.make(dtype)
        emulated.emulator.configure(seed=seed)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        actual, naive, oracle = inputs.run(fastattn.attention, backend="cuda"), inputs.naive(), inputs.oracle()
        for name, value in actual.items():
            assert_close_to_oracle(value, naive[name], oracle[name], f"{case.name} {dtype} {name}")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("hidden_by", ["mask", "causal", "bias"])
def test_invisible_keys_reach_nothing(hidden_by: str, poison: float, dtype: torch.dtype) -> None:
    """NaN and infinity in keys and values that no query sees leave out and all gradients as they were."""
    dim = 20 if dtype is torch.float32 else 32
    q, k, v, grad = (torch.randn(1, 2, 70, dim, dtype=dtype) for _ in range(4))
    mask, bias = None, None
    if hidden_by == "mask":
        mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
        mask[..., 66:] = False
    if hidden_by == "bias":
        bias = torch.zeros(1, 1, 1, 70)
        bias[..., 66:] = -math.inf
    offset = -4 if hidden_by == "causal" else None

    def run(k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(
            *leaves, mask=mask, bias=bias, causal=hidden_by == "causal", offset=offset, backend="cuda"
        )
        return [out, *torch.autograd.grad(out, leaves, grad)]

    clean = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 66:], v[:, :, 66:] = poison, poison
    for before, after in zip(clean, run(k, v), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_value_reaches_the_queries_that_see_it(poison: float) -> None:
    """On the diagonal tile, where half of the queries see the poisoned key and half do not."""
    q, k, v, grad = (torch.randn(1, 1, 70, 32, dtype=torch.float16) for _ in range(4))

    def run(v: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, causal=True, backend="cuda")
        return [out, torch.autograd.grad(out, leaves, grad)[0]]

    clean = run(v)
    v = v.clone()
    v[0, 0, 40, 3] = poison
    for before, after in zip(clean, run(v), strict=True):
        assert torch.equal(before[0, 0, :40], after[0, 0, :40])
    out = run(v)[0][0, 0, 40:]
    assert torch.equal(out[:, 3].nan_to_num(nan=7.0), torch.full_like(out[:, 3], poison).nan_to_num(nan=7.0))
    assert torch.equal(out[:, 4:], clean[0][0, 0, 40:, 4:])


def test_a_nan_query_stays_in_its_row() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    q[0, 0, 5] = math.nan
    out = fastattn.attention(q, k, v, backend="cuda")
    assert out[0, 0, 5].isnan().all()
    assert out[0, 0, torch.arange(70) != 5].isfinite().all()


def test_bias_of_the_smallest_float_gives_the_mean() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    bias = torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, v, bias=bias, backend="cuda")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
