"""Mutation testing of the Hopper kernels: what ``mutate`` does, with checks that those kernels take.

    python -m tests.cuda_emulation.mutate_sm90 csrc/cuda/sm90/forward.h --synchronisation

The backward runs with sums of dQ by bulk additions and in one order; NaN in keys and values that the band makes
invisible must not matter. Survivors: ``survivors_sm90.txt``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fastattn
from tests import test_cuda_fp8, test_cuda_sm90
from tests.cases import Case
from tests.cuda_emulation import mutate
from tests.cuda_emulation.backend import EmulatedBackend, Statistics
from tests.cuda_emulation.hopper_borders import BORDERS, LAYOUTS, REFUSED, check_layout, check_refused, check_variants
from tests.cuda_emulation.hopper_cases import CASES, DECODE, FP8, case, decode, spoil_unused_keys
from tests.cuda_emulation.trial import CaseCheck, Check
from tests.fp8 import Quantised
from tests.tolerance import assert_close_to_oracle

OBJECTS = (
    r"sm90-dispatch\.o|sm90-(forward|backward|dq|decode|forward_fp8)-(BFloat16|E4M3)-\d+\.o|"
    r"sm90-decode-Half-(64|256)\.o|sm80-(prepare-BFloat16|dq-BFloat16-(64|96|128)-false)\.o|"
    r"sm80-(forward|forward_general|dkdv|dq)-BFloat16-64"
)
#: What is compiled for a mutant that the compiler must know.
FEW = r"sm90-dispatch\.o|sm90-\w+-(BFloat16|E4M3)-64|sm80-(prepare-BFloat16|dq-BFloat16-64-false)"

# Two stages each: more tiles of keys than go round twice, several tiles of queries to a persistent block.
MORE_CASES = (
    case("band", 64, (200, 150), (4, 2), window=(60, 30), batch=2),
    case("wraps", 64, (70, 4 * 128 + 1), (2, 1)),
    case("causal", 64, (330, 129), (2, 1), causal=True),
    case("wide", 128, (150, 190), (2, 1), causal=True),
    case("wider", (192, 128), (330, 64), (2, 1), causal=True),
    case("widest", 256, (330, 64), (2, 1)),
    case("used", 256, (70, 130), used_k=(100,), causal=True),
)


class HopperCheck(CaseCheck):
    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        spoil_unused_keys(self.inputs)

    def check_statistics(self, counts: Statistics) -> None:
        assert counts.bulk_copies > 0, "other kernels ran"

    def results(self) -> dict[str, Tensor]:
        case = self.inputs.case
        if case.seqlen_q > 16:
            return super().results()
        if case.ragged:
            return decode(self.inputs)
        with torch.no_grad():
            band = {"causal": case.causal, "window": case.window, "offset": case.offset}
            out, lse = fastattn.attention(
                self.inputs.q, self.inputs.k, self.inputs.v, **band, return_lse=True, backend="cuda"
            )
        return {"out": out, "lse": lse}


class E4M3Check:
    def __init__(self, case: Case) -> None:
        self.call = Quantised.of(case.make(torch.bfloat16))
        self.naive, self.oracle = self.call.naive(), self.call.oracle()

    def __call__(self, backend: EmulatedBackend) -> None:
        heads = self.call.q.shape[0] * self.call.q.shape[1]
        for name, value in self.call.run(backend="cuda").items():
            parts = [x.flatten(0, 1) for x in (value, self.naive[name], self.oracle[name])]
            for head in range(heads):
                assert_close_to_oracle(*(x[head] for x in parts), f"{self.call.inputs.case.name} {name}")
        assert backend.emulator.statistics().wgmma > 0, "another forward ran"


def check_containment(dim: int, backend: EmulatedBackend) -> None:
    """Keys from 150 on are seen by no query, queries before 20 see no key; what they hold must not matter."""
    generator = torch.Generator().manual_seed(dim)
    q, k, v, grad = (torch.randn(1, 1, 170, dim, generator=generator).bfloat16() for _ in range(4))

    def results() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, causal=True, offset=-20, backend="cuda")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    clean = results()
    k[:, :, 150:], v[:, :, 150:] = float("nan"), float("inf")
    for before, after in zip(clean, results(), strict=True):
        assert_close_to_oracle(after, before, before.double(), f"poisoned, head_dim {dim}")


def from_the_suite() -> list[tuple[str, Callable[[EmulatedBackend], None]]]:
    """Tests about what is broken and must reach some and nobody else."""
    found: list[tuple[str, Callable[[EmulatedBackend], None]]] = []
    for dim in (64, 128):
        broken = test_cuda_fp8.test_a_broken_key_reaches_the_queries_that_see_it_alone
        found.append((f"broken-e4m3-{dim}", functools.partial(broken, dim)))
    for dim, deterministic in ((64, False), (128, False), (256, False), (128, True)):
        behind = test_cuda_sm90.test_what_lies_behind_the_last_key_has_no_effect
        neighbours = functools.partial(
            test_cuda_sm90.test_a_broken_sequence_leaves_its_neighbours_alone, dim, deterministic
        )
        name = f"{dim}{'-deterministic' * deterministic}"
        found.append((f"behind-{name}", functools.partial(behind, dim, deterministic)))
        found.append((f"neighbours-{name}", lambda _, run=neighbours: run()))
    for dim in (64, 56, 96):
        found.append((f"broken-{dim}", lambda _, dim=dim: test_cuda_sm90.test_a_broken_key_reaches_who_sees_it(dim)))
    for dim, keys in ((64, 300), (256, 300), (64, 4 * 64 + 1)):
        decoded = test_cuda_sm90.test_a_broken_key_reaches_the_decoded_queries_that_see_it
        found.append((f"broken-decode-{dim}-{keys}", functools.partial(decoded, dim, keys)))
    return [
        *found,
        ("last-query", lambda _: test_cuda_sm90.test_a_tile_of_keys_for_the_last_query_alone()),
        ("small-weights", test_cuda_fp8.test_many_small_weights_count_beside_a_large_one),
        ("small-scales", test_cuda_fp8.test_scales_that_vanish_together),
    ]


def checks(seeds: Sequence[int], names: Sequence[str]) -> list[Check]:
    found: list[tuple[str, Callable[[EmulatedBackend], None]]] = []
    found += [(c.name, HopperCheck(c, torch.bfloat16)) for c in (*MORE_CASES, *CASES, *DECODE)]
    found += [(c.name, E4M3Check(c)) for c in FP8]
    found += [(f"containment-{dim}", functools.partial(check_containment, dim)) for dim in (64, 128, 256)]
    found += from_the_suite()
    found += [(f"layout: {x.name}", functools.partial(check_layout, x)) for x in LAYOUTS]
    run = [Check(name, seed, seed == 0, check, name.startswith("layout")) for name, check in found for seed in seeds]
    run += [Check(f"border {n}", 0, False, x.check, True) for n, x in enumerate(BORDERS)]
    run += [Check(f"refused: {x.name}", 0, False, lambda _, x=x: check_refused(x), True) for x in REFUSED]
    run.append(Check("variants", 0, False, lambda _: check_variants(), True))
    return [check for check in run if not names or check.name in names]


if __name__ == "__main__":
    mutate.main(
        mutate.Subject(
            sorted(str(path.relative_to(mutate.ROOT)) for path in (mutate.ROOT / "csrc/cuda/sm90").iterdir()),
            OBJECTS,
            FEW,
            mutate.HERE / "survivors_sm90.txt",
            checks,
            {"FASTATTN_EMULATED_CAPABILITY": "90"},
        )
    )
