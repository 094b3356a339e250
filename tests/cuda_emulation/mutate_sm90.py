"""Mutation testing of the Hopper kernels: what ``mutate`` does, with cases that those kernels take.

    python -m tests.cuda_emulation.mutate_sm90 csrc/cuda/sm90/forward.h csrc/cuda/sm90/backward.h

Each case runs under three orders of threads, the backward with sums of dQ by bulk additions and without; then once more
with NaN in keys, values and queries that the band makes invisible.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cases import Case
from tests.cuda_emulation import mutate
from tests.cuda_emulation.backend import EmulatedBackend, Emulator
from tests.cuda_emulation.build import load
from tests.tolerance import assert_close_to_oracle

OBJECTS = r"sm90-(dispatch|(forward|backward)-BFloat16-64|backward-BFloat16-128|forward-BFloat16-128)\.o"
OBJECTS += r"|sm80-(prepare-BFloat16|dq-BFloat16-(64|128)-false)\.o"


def case(name: str, dim: int, seq: tuple[int, int], heads: tuple[int, int], **more: object) -> Case:
    sizes = {"seqlen_q": seq[0], "seqlen_k": seq[1], "heads_q": heads[0], "heads_k": heads[1], "batch": 1}
    return Case(name, head_dim_qk=dim, head_dim_v=dim, layout="bshd", **{**sizes, **more})  # type: ignore[arg-type]


# Two stages each: more tiles of keys than go round twice, several tiles of queries to a persistent block.
CASES = (
    case("band", 64, (200, 150), (4, 2), window=(60, 30), batch=2),
    case("wraps", 64, (70, 4 * 128 + 1), (2, 1)),
    case("causal", 64, (330, 129), (2, 1), causal=True),
    case("wide", 128, (150, 190), (2, 1), causal=True),
)


class Trial(mutate.Trial):
    def __init__(self, names: list[str], dtype: torch.dtype) -> None:
        made = [(c.name, c.make(dtype)) for c in CASES if c.name in names]
        self.cases = [(name, inputs, inputs.naive(), inputs.oracle()) for name, inputs in made]

    def _run(self, library: Path) -> None:
        sys.setdlopenflags(os.RTLD_LAZY)  # not every kernel has been built
        os.environ["FASTATTN_EMULATED_CAPABILITY"] = "90"
        module = load(library)
        cuda._C = module
        backend = EmulatedBackend(Emulator(module))
        dispatch.get_backend = lambda name: backend  # type: ignore[assignment]
        for seed, deterministic in ((0, True), (1, False), (2, False)):
            backend.emulator.configure(seed)
            torch.use_deterministic_algorithms(deterministic)
            for name, inputs, naive, oracle in self.cases:
                for key, value in inputs.run(fastattn.attention, backend="cuda").items():
                    assert_close_to_oracle(value, naive[key], oracle[key], f"{name} {key}, seed {seed}")
            if not backend.emulator.statistics().wgmma:
                raise AssertionError("other kernels ran")
        torch.use_deterministic_algorithms(False)
        for dim in (64, 128):
            self._run_poisoned(dim)

    def _run_poisoned(self, dim: int) -> None:
        """Keys from 150 on are seen by no query, queries before 20 see no key; what they hold must not matter."""
        generator = torch.Generator().manual_seed(dim)
        q, k, v, grad = (torch.randn(1, 1, 170, dim, generator=generator).bfloat16() for _ in range(4))

        def results() -> list[torch.Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = fastattn.attention(*leaves, causal=True, offset=-20, backend="cuda")
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        clean = results()
        k[:, :, 150:], v[:, :, 150:] = float("nan"), float("inf")
        for before, after in zip(clean, results(), strict=True):
            assert_close_to_oracle(after, before, before.double(), f"poisoned, head_dim {dim}")


def main() -> None:
    mutate.Trial = Trial  # type: ignore[misc]
    arguments = sys.argv[1:]
    if "--objects" not in arguments:
        arguments += ["--objects", OBJECTS]
    if "--cases" not in arguments:
        arguments += ["--cases", *(c.name for c in CASES)]
    sys.argv[1:] = arguments
    mutate.main()


if __name__ == "__main__":
    main()
