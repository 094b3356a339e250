"""Mutation testing of the Hopper kernels: what ``mutate`` does, with cases that those kernels take.

    python -m tests.cuda_emulation.mutate_sm90 csrc/cuda/sm90/forward.h csrc/cuda/sm90/backward.h
    python -m tests.cuda_emulation.mutate_sm90 csrc/cuda/sm90/decode.h --only decode

Each case runs under three orders of threads, the backward with sums of dQ by bulk additions and without; then once more
with NaN in keys and values that the band makes invisible. ``--only decode`` or ``long``: some kernels and their cases.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cuda_emulation import mutate
from tests.cuda_emulation.backend import EmulatedBackend, Emulator
from tests.cuda_emulation.build import load
from tests.cuda_emulation.hopper_cases import DECODE, case, decode, spoil_unused_keys
from tests.tolerance import assert_close_to_oracle

LONG = r"sm90-(forward|backward)-BFloat16-(64|128)\.o|sm80-(prepare-BFloat16|dq-BFloat16-(64|128)-false)\.o"
OBJECTS = {"long": LONG, "decode": r"sm90-decode-BFloat16-(64|128|256)\.o"}
OBJECTS[""] = "|".join(OBJECTS.values())


# Two stages each: more tiles of keys than go round twice, several tiles of queries to a persistent block.
CASES = (
    case("band", 64, (200, 150), (4, 2), window=(60, 30), batch=2),
    case("wraps", 64, (70, 4 * 128 + 1), (2, 1)),
    case("causal", 64, (330, 129), (2, 1), causal=True),
    case("wide", 128, (150, 190), (2, 1), causal=True),
    *DECODE,
)


class Trial(mutate.Trial):
    def __init__(self, names: list[str], dtype: torch.dtype, *_: object) -> None:
        made = [(c.name, c.make(dtype)) for c in CASES if c.name in names]
        self.cases = [(name, inputs, inputs.naive(), inputs.oracle()) for name, inputs in made]
        for _, inputs, *_ in self.cases:
            spoil_unused_keys(inputs)

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
                short = inputs.case.used_k is not None
                found = decode(inputs) if short else inputs.run(fastattn.attention, backend="cuda")
                for key, value in found.items():
                    assert_close_to_oracle(value, naive[key], oracle[key], f"{name} {key}, seed {seed}")
                if not backend.emulator.statistics().bulk_copies:
                    raise AssertionError("other kernels ran")
        torch.use_deterministic_algorithms(False)
        for dim in (64, 128) if any(inputs.case.used_k is None for _, inputs, *_ in self.cases) else ():
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
    mutate.SURVIVORS = mutate.HERE / "survivors_sm90.txt"
    arguments, only = sys.argv[1:], ""
    if "--only" in arguments:
        at = arguments.index("--only")
        only = arguments[at + 1]
        del arguments[at : at + 2]
    names = [c.name for c in CASES if not only or (c.used_k is not None) == (only == "decode")]
    sys.argv[1:] = [*arguments, "--objects", rf"sm90-dispatch\.o|{OBJECTS[only]}", "--cases", *names]
    mutate.main()


if __name__ == "__main__":
    main()
