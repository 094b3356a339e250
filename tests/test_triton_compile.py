"""Triton kernels compiled ahead of time, without a GPU: what they take of one, and how many a program compiles."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.backends.triton import TritonBackend, version
from fastattn.backends.triton.configs import SHARED_MEMORY, TABLE, Features, Width, config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def ahead_of_time(what: str) -> Any:
    """The output of ``python -m tests.triton_aot``, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_aot", what]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_class_of_features_compiles(arch: str) -> None:
    """Within the shared memory of a program, and without spilling more than compilers do by choice: 16 bytes a thread.

    ptxas spills that much for one program more on a multiprocessor, and those of Triton 3.6 and 3.8 a little more. On
    AMD the unit is a register, and none is allowed but that one, which the widest kernel spills.
    """
    if arch == "sm_100" and version() < (3, 8):
        pytest.skip("Triton 3.6 and 3.7 fail in a pass of their own: the backend says so")
    kernels = ahead_of_time(arch)
    assert len({kernel["class"] for kernel in kernels}) == 12 + (arch == "sm_90")
    most, older = (1, {(3, 6): 10}) if arch == "gfx942" else (16, {(3, 6): 84, (3, 8): 24})
    most = older.get(version(), most)
    assert not [kernel for kernel in kernels if kernel["spilled"] > most]
    assert max(kernel["shared"] for kernel in kernels) <= SHARED_MEMORY[arch]
    assert_plain_kernels_are_plain(kernels)


#: Of a plain call, with two loops each (whole tiles, and the last): nothing is loaded but the operands' tiles and the
#: backward's two statistics; there is one exponential of scores (in the forward, one more of maxima); no random number.
PLAIN = {
    "forward_kernel": {"tt.load": 1 + 2 * 2, "tt.store": 2, "tt.dot": 2 * 2, "math.exp2": 2 * 2, "pointers": 5},
    "dkdv_kernel": {"tt.load": 2 + 2 * 4, "tt.store": 2, "tt.dot": 2 * 4, "math.exp2": 2, "pointers": 8},
    "dq_kernel": {"tt.load": 4 + 2 * 2, "tt.store": 1, "tt.dot": 2 * 3, "math.exp2": 2, "pointers": 7},
}


def assert_plain_kernels_are_plain(kernels: list[dict[str, Any]]) -> None:
    """No trace of a feature in a call without any, and some in those that have them."""
    made = {(k["class"], k["kernel"]): k["operations"] for k in kernels if not k["careful"]}
    for name, expected in PLAIN.items():
        nothing = {"tt.descriptor_load": 0, "tt.mulhiui": 0, "math.log2": int(name == "forward_kernel")}
        assert made["plain", name] == {**expected, **nothing}, name
        assert made["dropped", name]["tt.mulhiui"] and made["shaped", name]["math.exp2"] > expected["math.exp2"]
        assert made["added", name]["pointers"] > expected["pointers"]
    for (name, kernel), found in made.items():
        if name == "described":  # every tile of keys and values
            loads = PLAIN[kernel]["tt.load"]
            assert found["tt.descriptor_load"] == 4 and found["tt.load"] == loads - 4


def test_kernels_are_compiled_for_features_and_not_for_sizes() -> None:
    found = ahead_of_time("recompilations")
    # A bias's rows are aligned or not, within the matrix and from matrix to matrix; three of these occur.
    most = {"bias": {"forward_kernel": 3, "dkdv_kernel": 3, "dq_kernel": 3, "dbias_kernel": 3}}
    # Tiles of 16, 32 or 64 rows, each with its keys split or whole.
    most["decode"] = most["paged"] = {"forward_kernel": 6}
    for case, counts in found.items():
        assert "forward_kernel" in counts
        for kernel, count in counts.items():
            assert count <= most.get(case, {}).get(kernel, 1), f"{case}: {count} compilations of {kernel}"


@pytest.mark.parametrize("dim", [1, 16, 17, 32, 33, 64, 80, 96, 128, 129, 192, 256, 320, 512, 576])
def test_width(dim: int) -> None:
    width = Width(dim)
    for part in (width.MAIN, width.TAIL):
        assert part == 0 or (part >= 16 and part & (part - 1) == 0)
    assert dim <= width.padded <= max(16, 2 * dim) and width.TAIL < width.MAIN
    assert (dim in (80, 96, 192, 320, 576)) == (width.padded == dim and width.TAIL > 0)


def test_every_call_has_a_config() -> None:
    for arch, bits, _ in TABLE:
        for dim in range(1, 577):
            for kernel in ("forward", "decode", "dkdv", "dq", "dbias"):
                f = Features(dim, min(dim, 512), DROPOUT=dim % 2 == 0)
                c = config(arch, bits, f, kernel)
                assert c.BLOCK_M >= 16 and c.BLOCK_N >= 16 and c.reason


def test_older_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import triton
    from tests.cases import Case

    spec = replace(Case("plain").make(torch.float16).spec(), device="cuda")
    monkeypatch.setattr(triton, "architecture", lambda _: "sm_100")
    for known, unavailable, unsupported in (((3, 5), True, False), ((3, 7), False, True), ((3, 8), False, False)):
        monkeypatch.setattr(triton, "version", lambda known=known: known)
        assert ("at least 3.6" in str(TritonBackend().unavailable_reason())) == unavailable
        assert any("sm_100" in reason for reason in TritonBackend().unsupported_reasons(spec)) == unsupported
