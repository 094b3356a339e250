"""The Hopper kernels (TMA, mbarrier, wgmma), compiled as ordinary C++ and run on the CPU. No GPU takes part."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastattn
from fastattn import reference
from tests.cases import Case
from tests.tolerance import assert_close_to_oracle

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("CUDA kernels are compiled for the emulator: no C++ compiler here", allow_module_level=True)

from tests.cuda_emulation import sanitize
from tests.cuda_emulation.backend import EmulatedBackend
from tests.cuda_emulation.hopper_borders import BORDERS, LAYOUTS, Border, Layout, check_layout, check_variants
from tests.cuda_emulation.hopper_cases import CASES, DECODE, TURNS, decode, packed, spoil_unused_keys
from tests.cuda_emulation.hopper_cases import case as make_case

pytestmark = pytest.mark.usefixtures("hopper")

WIDTHS = [64, 128, (192, 128), 256]  # of queries, and of values where they differ
DTYPES = {c.name: (torch.bfloat16, torch.float16)[n % 2] for n, c in enumerate(CASES + DECODE)}


def tensor_dims(dims: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """Of q, k, v and the output's gradient."""
    wide, narrow = dims if isinstance(dims, tuple) else (dims, dims)
    return wide, wide, narrow, narrow


@contextmanager
def one_order(deterministic: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(case: Case, deterministic: bool) -> dict[str, torch.Tensor]:
    with one_order(deterministic):
        return case.make(DTYPES[case.name]).run(fastattn.attention, backend="cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case, emulated: EmulatedBackend) -> None:
    inputs = case.make(DTYPES[case.name])
    naive, oracle = inputs.naive(), inputs.oracle()
    first: dict[str, torch.Tensor] = {}
    for seed in (0, 1, 2):
        emulated.emulator.configure(seed=seed)
        emulated.emulator.statistics()
        actual = run(case, deterministic=seed == 2)
        used = emulated.emulator.statistics()
        assert used.wgmma > 0, "another forward ran"
        assert used.mma == 0, "another backward ran"
        assert used.switches < TURNS * used.wgmma, "rows were computed anew"
        for name, value in actual.items():
            assert_close_to_oracle(value, naive[name], oracle[name], f"{case.name} {name}, order {seed}")
        first = first or actual
        for name in ("out", "lse", "dk", "dv"):
            assert torch.equal(first[name], actual[name]), f"{name} depends on the order of threads"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_dq_in_one_order(case: Case, emulated: EmulatedBackend) -> None:
    """test_case holds it to the oracle; here it is the same in any order of threads."""
    first: dict[str, torch.Tensor] = {}
    for seed in (0, 1, 2):
        emulated.emulator.configure(seed=seed)
        for name, value in run(case, deterministic=True).items():
            assert torch.equal(first.setdefault(name, value), value), f"{name} depends on the order of threads"


@pytest.mark.parametrize("dim", [64, 192, 256])
def test_tiles_that_see_nothing_do_not_overtake_the_loads(dim: int, emulated: EmulatedBackend) -> None:
    """Several in a row to a persistent block, which waits for no copy in them: a deadlock under some orders, once."""
    q, k, v = (torch.randn(1, 3, n, d).bfloat16() for n, d in ((700, dim), (40, dim), (40, min(dim, 128))))
    want = reference.attention(q, k, v, causal=True)
    for seed in range(8):
        emulated.emulator.configure(seed)
        out = fastattn.attention(q, k, v, causal=True, backend="cuda")
        assert_close_to_oracle(out, want, want.double(), f"order {seed}")


@pytest.mark.parametrize("case", DECODE, ids=lambda c: c.name)
def test_decode(case: Case, emulated: EmulatedBackend) -> None:
    inputs = case.make(DTYPES[case.name])
    naive, oracle = inputs.naive(), inputs.oracle()
    spoil_unused_keys(inputs)
    first: dict[str, torch.Tensor] = {}
    for seed in (0, 1, 2):
        emulated.emulator.configure(seed=seed)
        emulated.emulator.statistics()
        actual = decode(inputs)
        used = emulated.emulator.statistics()
        assert used.bulk_copies > 0 and used.wgmma == 0 and used.ldmatrix_conflicts == 0
        assert used.switches < TURNS * used.mma, "rows were computed anew"
        for name in ("out", "lse"):
            assert_close_to_oracle(actual[name], naive[name], oracle[name], f"{case.name} {name}, order {seed}")
            assert torch.equal(first.setdefault(name, actual[name]), actual[name]), f"{name} depends on the order"


@pytest.mark.parametrize(("dim", "keys"), [(64, 300), (256, 300), (64, 4 * 64 + 1)])  # the last tile is of one query
def test_a_broken_key_reaches_the_decoded_queries_that_see_it(dim: int, keys: int, emulated: EmulatedBackend) -> None:
    q, k, v = (torch.randn(1, heads, n, dim).half() for heads, n in ((3, 4), (1, keys), (1, keys)))
    v[0, 0, -2, 3], k[0, 0, -1] = math.inf, math.nan
    out, lse = fastattn.attention(q, k, v, causal=True, backend="cuda", return_lse=True)
    assert emulated.emulator.statistics().bulk_copies > 0
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    assert out[:, :, 2, 3].isinf().all()
    out[:, :, 2, 3] = 0
    assert out[:, :, :3].isfinite().all() and lse[:, :, :3].isfinite().all()
    part = reference.attention(q[:, :, :2], k[:, :, :-2], v[:, :, :-2], causal=True)
    assert_close_to_oracle(out[:, :, :2], part, part.double(), "the queries before")


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
@pytest.mark.parametrize(("poison", "deterministic"), [(math.nan, False), (math.inf, False), (math.nan, True)])
def test_invisible_keys_reach_nothing(dims: int | tuple[int, int], poison: float, deterministic: bool) -> None:
    """NaN and infinity in keys and values that no query sees leave output and gradients as good as they were."""
    q, k, v, grad = (torch.randn(1, 1, 200, dim).bfloat16() for dim in tensor_dims(dims))

    def results() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with one_order(deterministic):
            out = fastattn.attention(*leaves, causal=True, offset=-40, backend="cuda")
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    clean = results()
    k[:, :, 160:], v[:, :, 160:] = poison, poison
    for before, after in zip(clean, results(), strict=True):
        assert_close_to_oracle(after, before, before.double(), "poisoned")


@pytest.mark.parametrize("dim", [64, 56, 96])  # what the kernels have room for, less; rows of no whole 64
def test_a_broken_key_reaches_who_sees_it(dim: int) -> None:
    q, k, v, grad = (torch.randn(1, 1, 150, dim).bfloat16() for _ in range(4))
    v[0, 0, 70, 3] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, causal=True, backend="cuda")
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    out = out.detach()
    assert out[0, 0, 70:, 3].isnan().all()
    out[0, 0, 70:, 3] = 0
    assert out.isfinite().all()
    assert dq[0, 0, 70:].isnan().all() and dq[0, 0, :70].isfinite().all()
    assert dk.isnan().all() and dv.isfinite().all()  # every key is seen by some query of which delta is NaN


def test_a_tile_of_keys_for_the_last_query_alone() -> None:
    """None of the other 191 queries of its tile sees it."""
    q, k, v = (torch.randn(1, 1, n, 64).bfloat16() for n in (192, 129, 129))
    v[0, 0, 128, 3] = math.nan
    out = fastattn.attention(q, k, v, causal=True, backend="cuda")
    assert out[0, 0, 191, 3].isnan()
    out[0, 0, 191, 3] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_what_lies_behind_the_last_key_has_no_effect(
    dims: int | tuple[int, int], deterministic: bool, emulated: EmulatedBackend
) -> None:
    """Not on one bit, and so not on the time either: nothing is computed anew."""
    padded = make_case("padded", dims, (100, 300), batch=2, used_k=(260, 70), causal=True)
    side_by_side = packed("packed", dims, (60, 70), (200, 150), used_k=(131, 40))
    for each in (padded, side_by_side):
        inputs = each.make(torch.bfloat16)
        with one_order(deterministic):
            clean = inputs.run(fastattn.attention, backend="cuda")
            spoil_unused_keys(inputs)
            spoiled = inputs.run(fastattn.attention, backend="cuda")
        assert emulated.emulator.statistics().wgmma > 0
        for name, value in spoiled.items():
            assert torch.equal(value, clean[name]), f"{each.name}: {name}"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_a_broken_sequence_leaves_its_neighbours_alone(dims: int | tuple[int, int], deterministic: bool) -> None:
    """Its rows share their tiles, and every tile of theirs that is not full is computed with rows of it."""
    lengths = (70, 65, 140)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v, grad = (torch.randn(sum(lengths), 1, dim).bfloat16() for dim in tensor_dims(dims))

    def results() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with one_order(deterministic):
            out = fastattn.attention_varlen(*leaves, cu_seqlens, backend="cuda")
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]  # type: ignore[union-attr, arg-type]

    clean = results()
    for x, poison in ((q, math.nan), (k, math.nan), (v, math.inf), (grad, math.inf)):
        x[lengths[0] : sum(lengths[:2])] = poison
    for before, after in zip(clean, results(), strict=True):
        for part, of in zip(after.split(lengths)[::2], before.split(lengths)[::2], strict=True):
            assert_close_to_oracle(part, of, of.double(), "beside a broken sequence")
        assert not after.split(lengths)[1].isfinite().any()


def test_what_runs_is_said_and_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], emulated: EmulatedBackend
) -> None:
    q, k, v = (torch.randn(1, 1, 64, 64).half().requires_grad_() for _ in range(3))

    def said(*tensors: torch.Tensor, **options: Any) -> str:
        fastattn.explain(*tensors, backend="cuda", **options)
        text = capsys.readouterr().out
        assert "not yet run on a GPU" in text
        return text

    assert "Hopper (sm_90a: TMA, wgmma), forward, tiles of 192 queries x 128 keys" in said(q, k, v)
    assert "not the Hopper forward (a mask) but" in said(q, k, v, mask=torch.ones(64, 64, dtype=torch.bool))
    assert "Hopper (sm_90a: TMA), decoding, tiles of 16 rows x 64 keys, 6 stages" in said(q[:, :, :1], k, v)
    with_sinks = said(q, k, v, sinks=torch.zeros(1))
    assert "not the Hopper forward (sinks) but tensor cores (sm_80), general forward" in with_sinks
    used = {"cache_seqlens": torch.tensor([40]), "causal": True, "backend": "cuda"}
    fastattn.explain(fastattn.attention_with_kv_cache, q, k, v, **used)
    assert "forward, tiles of 192 queries x 128 keys, 2 stages, ping-pong;" in capsys.readouterr().out
    many = (q[:, :, :6].expand(1, 3, 6, 64), k, v)
    assert "not the Hopper forward (seqlen_q 6: with 3 heads to a head of keys 18 rows, at most 16" in said(*many)
    for dim, keys in ((96, 128), (192, 64), (256, 64)):
        wide = (torch.randn(1, 1, 64, dim).half().requires_grad_() for _ in range(3))
        assert f"Hopper (sm_90a: TMA, wgmma), backward, tiles of 64 queries x {keys} keys" in said(*wide)
    rows, pages = (torch.randn(n, *sizes).half() for n, sizes in ((64, (1, 64)), (4, (16, 1, 64))))
    lengths = torch.tensor([0, 40, 64], dtype=torch.int32)
    fastattn.explain(fastattn.attention_varlen, rows, rows, rows, lengths, backend="cuda")
    assert "forward, tiles of 192 queries x 128 keys, 2 stages, ping-pong, packed sequences" in capsys.readouterr().out
    table = torch.arange(4, dtype=torch.int32).view(2, 2)
    fastattn.explain(fastattn.attention_varlen, rows, pages, pages, lengths, lengths, block_table=table, backend="cuda")
    assert "not the Hopper forward (paged keys: for at most 16 queries)" in capsys.readouterr().out
    monkeypatch.setenv("FASTATTN_CUDA_KERNELS", "sm80")
    assert "Hopper" not in said(q, k, v)
    fastattn.attention(q, k, v, backend="cuda")
    assert emulated.emulator.statistics().wgmma == 0


@pytest.mark.parametrize("border", BORDERS, ids=lambda b: f"{b.case.name}-{b.case.head_dim_qk}-{b.said[-40:]}")
def test_who_runs_a_call_at_the_border(border: Border, emulated: EmulatedBackend) -> None:
    border.check(emulated)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts(layout: Layout, deterministic: bool, emulated: EmulatedBackend) -> None:
    with one_order(deterministic):
        check_layout(layout, emulated)


def test_variants() -> None:
    check_variants()


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.bfloat16, ["plain", "d96-window", "decode-pages"]),
        (torch.float16, ["packed-d64-causal"]),
        (torch.float32, ["plain"]),
        (torch.float8_e4m3fn, ["plain", "e4m3-one-query"]),
    ],
)
def test_what_compute_sanitizer_is_to_watch_runs(
    dtype: torch.dtype, names: list[str], monkeypatch: pytest.MonkeyPatch, emulated: EmulatedBackend
) -> None:
    """Both the Hopper kernels and those before, where a type has both."""
    monkeypatch.setenv("FASTATTN_CUDA_KERNELS", "")
    try:
        sanitize.run_cases(dtype, names, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    used = emulated.emulator.statistics()
    assert (used.wgmma > 0) == (dtype is not torch.float32)
    assert (used.mma > 0) == (dtype in (torch.bfloat16, torch.float16))
