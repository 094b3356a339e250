"""Every variant of the Hopper forward (``csrc/cuda/sm90/tiles.h``) under emulation, before a GPU times them.

    python -m tests.cuda_emulation.variants

compiles them for bfloat16 (a minute or two) and runs cases of every head_dim under three orders of threads. No part of
the test suite, which has the two variants that calls get.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda
from tests.cases import Case, Inputs
from tests.cuda_emulation.backend import EmulatedBackend, Emulator
from tests.cuda_emulation.build import ROOT, build, load
from tests.cuda_emulation.hopper_cases import case, decode, packed
from tests.tolerance import assert_close_to_oracle

OBJECTS = r"sm90-(dispatch|forward-BFloat16-\d+)\.o"
KEYS = {64: (128, 192), 96: (128, 160), 128: (176, 128), 192: (112, 96), 256: (80, 64)}  # of a tile, timed_size()


def cases(dim: int, keys: int) -> list[Case]:
    """More tiles than go round the two stages twice, a key more than tiles; rows that see nothing; several a block.

    Packed sequences: some without queries or keys, a tile of queries, one query more.
    """
    dims = (dim, 128) if dim == 192 else dim
    return [
        case(f"d{dim}-wraps", dims, (130, 5 * keys + 1), (2, 1)),
        case(f"d{dim}-causal", dims, (390, 2 * keys - 1), (2, 2), causal=True, batch=2),
        packed(f"d{dim}-packed", dims, (193, 0, 5, 128, 64), (5 * keys + 1, 9, keys, 0, 70), heads_q=2, causal=True),
    ]


def forward(inputs: Inputs) -> dict[str, Tensor]:
    if inputs.case.ragged:
        return decode(inputs)
    window = {"causal": inputs.case.causal, "window": inputs.case.window, "offset": inputs.case.offset}
    with torch.no_grad():
        out, lse = fastattn.attention(inputs.q, inputs.k, inputs.v, **window, return_lse=True)
    return {"out": out, "lse": lse}


def main() -> None:
    os.environ |= {"FASTATTN_SM90_VARIANTS": "1", "FASTATTN_EMULATED_CAPABILITY": "90"}
    torch.set_num_threads(1)
    library = build(ROOT / "build" / "cuda-emulation-variants", keep=OBJECTS)
    sys.setdlopenflags(os.RTLD_LAZY)  # no other kernels have been built
    cuda._C = load(library)
    backend = EmulatedBackend(Emulator(cuda._C))
    dispatch.get_backend = lambda name: backend  # type: ignore[assignment]
    failed = 0
    for dim, sizes in KEYS.items():
        for size, keys in enumerate(sizes):
            for each in cases(dim, keys):
                inputs = each.make(torch.bfloat16)
                naive, oracle = inputs.naive(), inputs.oracle()
                for variant in range(2 + 4 * size, 6 + 4 * size):
                    os.environ["FASTATTN_SM90_VARIANT"] = str(variant)
                    try:
                        for seed in (0, 1, 2):
                            backend.emulator.configure(seed)
                            for name, value in forward(inputs).items():
                                assert_close_to_oracle(value, naive[name], oracle[name], f"{name}, order {seed}")
                        verdict = "passed"
                    except (AssertionError, RuntimeError) as error:
                        failed, verdict = failed + 1, f"FAILED: {' '.join(str(error).split())[:300]}"
                    print(f"{each.name}, variant {variant}: {verdict}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
