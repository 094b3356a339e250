"""Mutation testing of the Hopper kernels: what ``mutate`` does, with checks that those kernels take.

    python -m tests.cuda_emulation.mutate_sm90 csrc/cuda/sm90/forward.h --synchronisation

The backward runs with sums of dQ by bulk additions and in one order; NaN in keys and values that the band makes
invisible must not matter. Survivors: ``survivors_sm90.txt``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import fastattn
from tests.cases import Case
from tests.cuda_emulation import mutate
from tests.cuda_emulation.backend import EmulatedBackend, Statistics
from tests.cuda_emulation.hopper_cases import DECODE, case, decode, spoil_unused_keys
from tests.cuda_emulation.trial import CaseCheck, Check
from tests.tolerance import assert_close_to_oracle

OBJECTS = (
    r"sm90-dispatch\.o|sm90-(forward|backward|dq)-BFloat16-(64|128|192|256)\.o|"
    r"sm90-decode-BFloat16-(64|128|256)\.o|sm80-prepare-BFloat16\.o"
)

# Two stages each: more tiles of keys than go round twice, several tiles of queries to a persistent block.
CASES = (
    case("band", 64, (200, 150), (4, 2), window=(60, 30), batch=2),
    case("wraps", 64, (70, 4 * 128 + 1), (2, 1)),
    case("causal", 64, (330, 129), (2, 1), causal=True),
    case("wide", 128, (150, 190), (2, 1), causal=True),
    case("wider", (192, 128), (330, 64), (2, 1), causal=True),
    case("widest", 256, (330, 64), (2, 1)),
    case("used", 256, (70, 130), used_k=(100,), causal=True),
    *DECODE,
)


class HopperCheck(CaseCheck):
    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__(case, dtype)
        spoil_unused_keys(self.inputs)

    def check_statistics(self, counts: Statistics) -> None:
        assert counts.bulk_copies > 0, "other kernels ran"

    def results(self) -> dict[str, Tensor]:
        if self.inputs.case.seqlen_q <= 16:
            return decode(self.inputs)
        return super().results()


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


def checks(seeds: Sequence[int], names: Sequence[str]) -> list[Check]:
    found = [(c.name, HopperCheck(c, torch.bfloat16)) for c in CASES if not names or c.name in names]
    found += [  # type: ignore[misc]
        (f"containment-{dim}", functools.partial(check_containment, dim))
        for dim in (64, 128, 256)
        if not names or f"containment-{dim}" in names
    ]
    return [Check(name, seed, seed == 0, run) for name, run in found for seed in seeds]


if __name__ == "__main__":
    mutate.main(
        mutate.Subject(
            sorted(str(path.relative_to(mutate.ROOT)) for path in (mutate.ROOT / "csrc/cuda/sm90").iterdir()),
            OBJECTS,
            OBJECTS,
            mutate.HERE / "survivors_sm90.txt",
            checks,
            {"FASTATTN_EMULATED_CAPABILITY": "90"},
        )
    )
