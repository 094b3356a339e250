"""Every variant of the Hopper forwards (``csrc/cuda/sm90/tiles.h``) under emulation, before a GPU times them.

    python -m tests.cuda_emulation.variants [--only e4m3 | bfloat16]

compiles them for bfloat16 and e4m3 (minutes) and runs cases of every head_dim under three orders of threads. No part
of the test suite, which has the two variants that calls get.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cases import Case, Inputs
from tests.cuda_emulation.backend import EmulatedBackend, Emulator
from tests.cuda_emulation.build import ROOT, build, load
from tests.cuda_emulation.hopper_cases import case, decode, packed
from tests.fp8 import Quantised
from tests.tolerance import assert_close_to_oracle

OBJECTS = {"bfloat16": r"sm90-forward-BFloat16-\d+\.o", "e4m3": r"sm90-forward_fp8-E4M3-\d+\.o"}
KEYS = {  # of a tile: timed_size(), timed_e4m3_size()
    "bfloat16": {64: (128, 192), 96: (128, 160), 128: (176, 128), 192: (112, 96), 256: (80, 64)},
    "e4m3": {64: (192, 128), 128: (128, 192), 256: (128, 128)},
}
Results = dict[str, Tensor]


def cases(kind: str, dim: int, keys: int) -> list[Case]:
    """More tiles than go round the stages twice, a key more than tiles; rows that see nothing; several a block.

    Packed sequences, in 16 bits: some without queries or keys, a tile of queries, one query more.
    """
    dims = (dim, 128) if dim == 192 else dim
    even = [
        case(f"d{dim}-wraps", dims, (130, 9 * keys + 1), (2, 1)),
        case(f"d{dim}-causal", dims, (390, 2 * keys - 1), (2, 2), causal=True, batch=2),
    ]
    lengths = (193, 0, 5, 128, 64), (5 * keys + 1, 9, keys, 0, 70)
    return even if kind == "e4m3" else [*even, packed(f"d{dim}-packed", dims, *lengths, heads_q=2, causal=True)]


def prepared(kind: str, inputs: Inputs) -> tuple[Callable[[], Results], Results, Results]:
    """The call, the naive results and the oracle's."""
    if kind == "e4m3":
        eight = Quantised.of(inputs)
        return eight.run, eight.naive(), eight.oracle()
    window = {"causal": inputs.case.causal, "window": inputs.case.window, "offset": inputs.case.offset}

    def run() -> Results:
        if inputs.case.ragged:
            return decode(inputs)
        with torch.no_grad():
            found = fastattn.attention(inputs.q, inputs.k, inputs.v, **window, return_lse=True)
        return dict(zip(("out", "lse"), found, strict=True))

    return run, inputs.naive(), inputs.oracle()


def verdict(run: Callable[[], Results], naive: Results, oracle: Results, emulator: Emulator) -> str:
    """ "passed", or what went wrong."""
    try:
        for seed in (0, 1, 2):
            emulator.configure(seed)
            for name, value in run().items():
                assert_close_to_oracle(value, naive[name], oracle[name], f"{name}, order {seed}")
            assert emulator.statistics().wgmma, "another forward ran"
    except (AssertionError, RuntimeError) as error:
        return f"FAILED: {' '.join(str(error).split())[:300]}"
    return "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=OBJECTS)
    only = parser.parse_args().only
    kinds = [only] if only else list(OBJECTS)
    os.environ |= {"FASTATTN_SM90_VARIANTS": "1", "FASTATTN_EMULATED_CAPABILITY": "90"}
    torch.set_num_threads(1)
    keep = "|".join([r"sm90-dispatch\.o", *(OBJECTS[kind] for kind in kinds)])
    library = build(ROOT / "build" / "cuda-emulation-variants", keep=keep)
    sys.setdlopenflags(os.RTLD_LAZY)  # no other kernels have been built
    cuda._C = load(library)
    backend = EmulatedBackend(Emulator(cuda._C))
    dispatch.get_backend = lambda name: backend  # type: ignore[assignment]
    failed = 0
    for kind in kinds:
        for dim, sizes in KEYS[kind].items():
            for size, keys in enumerate(sizes):
                for each in cases(kind, dim, keys):
                    run, naive, oracle = prepared(kind, each.make(torch.bfloat16))
                    for variant in range(2 + 4 * size, 6 + 4 * size):
                        os.environ["FASTATTN_SM90_VARIANT"] = str(variant)
                        said = verdict(run, naive, oracle, backend.emulator)
                        failed += said != "passed"
                        print(f"{kind} {each.name}, variant {variant}: {said}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
