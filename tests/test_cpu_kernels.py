"""The CPU kernels beyond the contract: every instruction set, sanitizers, bounds, strange shapes, threads."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.backends import cpu
from fastattn.dispatch import get_backend
from tests.cases import CASES, DTYPES, Case, Inputs
from tests.tolerance import assert_close_to_oracle, assert_rms_explained, gradient_sizes

ROOT = Path(__file__).resolve().parents[1]

if reason := get_backend("cpu").unavailable_reason():
    pytest.skip(reason, allow_module_level=True)

INSTRUCTION_SETS = cpu._C.cpu_instruction_sets()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[1:])
def test_contract_with_a_lower_instruction_set(isa: str) -> None:
    """The first one is what every other test runs."""
    files, chosen = ("tests/test_contract.py", __file__), "(test_contract.py and cpu) or rounded_no_more or few_rows"
    done = python("-m", "pytest", "-q", "-x", "-p", "no:xdist", *files, "-k", chosen, FASTATTN_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_vdpbf16ps_is_chosen_where_it_is_fast() -> None:
    """Twice the rate of a multiply-add on AMD's processors (Zen 4), half of it on Intel's (Sapphire Rapids)."""
    if not {"avx512", "avx512_bf16"} <= set(INSTRUCTION_SETS):
        pytest.skip("nothing to choose: this processor or compiler has no avx512_bf16")
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert (INSTRUCTION_SETS.index("avx512_bf16") < INSTRUCTION_SETS.index("avx512")) == amd


def test_an_unknown_instruction_set_is_refused() -> None:
    done = python("-c", "from fastattn import _C; _C.cpu_instruction_set()", FASTATTN_CPU_ISA="avx9")
    assert "FASTATTN_CPU_ISA is 'avx9'; this processor has: " in done.stderr


def compiler_flags(isa: str) -> list[str]:
    code = (
        "import setuptools; setuptools.setup = lambda **_: None; import setup as build; "
        f"print(*build.COMPILE_FLAGS, *build.KERNEL_FLAGS, *build.CPU_ISAS[{isa!r}])"
    )
    return [flag for flag in python("-c", code).stdout.split() if flag not in ("-O3", "-g0")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("isa", [x for x in INSTRUCTION_SETS if x in (INSTRUCTION_SETS[0], "avx512_bf16")])
def test_sanitizers_find_nothing(isa: str, tmp_path: Path) -> None:
    """Address- and UndefinedBehaviorSanitizer over random calls, with what calls get and where pairs are multiplied."""
    flags = ["-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DFASTATTN_CPU_ISA=" + isa]
    flags += [*compiler_flags(isa), f"-I{ROOT / 'csrc'}", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    sources = ["csrc/cpu/kernels.cpp", "csrc/cpu/threads.cpp", "tests/cpu_kernels/main.cpp"]
    jobs = []
    for source in sources:
        command = ["c++", *flags, "-c", str(ROOT / source), "-o", str(tmp_path / (Path(source).stem + ".o"))]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        assert job.wait() == 0, job.communicate()[1]
    program = str(tmp_path / "program")
    objects = map(str, tmp_path.glob("*.o"))
    linked = subprocess.run(
        ["c++", *objects, "-fsanitize=address,undefined", "-pthread", "-ldl", "-o", program], text=True
    )
    assert linked.returncode == 0
    # The pool's threads sleep until the process ends, with their scratch memory.
    done = subprocess.run(
        [program], env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("clean\n")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_exp_and_tanh_keep_their_bounds(isa: str, tmp_path: Path) -> None:
    program, source = str(tmp_path / "program"), str(ROOT / "tests/cpu_kernels/functions.cpp")
    flags = [*compiler_flags(isa), "-O2", f"-DFASTATTN_CPU_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "within bounds\n", done.stdout


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = st.integers(1, 140)
    heads_k, shapes = draw(st.integers(1, 2)), st.sampled_from([None, (0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 0)])
    return Case(
        "drawn",
        batch=draw(st.integers(1, 2)),
        heads_q=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        seqlen_q=draw(st.one_of(size, st.integers(1, 5))),
        seqlen_k=draw(st.integers(1, 330)),
        head_dim_qk=draw(size),
        head_dim_v=draw(size),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, (5, 3), (70, None), (0, 100)])),
        offset=draw(st.sampled_from([None, 0, 40, -30])),
        mask=draw(shapes),
        bias=draw(shapes),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        alibi=draw(st.sampled_from(["", "", "batch"])),
        sinks=draw(st.booleans()),
        segments=draw(st.sampled_from(["", "", "batch"])),
        layout=draw(st.sampled_from(["bhsd", "bshd", "strided", "sliced", "transposed"])),
        blind_rows=draw(st.booleans()),
        grad_lse=draw(st.booleans()),
    )


@settings(max_examples=110, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(DTYPES))
def test_whatever_is_drawn(case: Case, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    actual, naive, oracle = inputs.run(fastattn.attention, backend="cpu"), inputs.naive(), inputs.oracle()
    sizes = gradient_sizes(inputs, oracle["out"])
    for name, value in actual.items():
        assert_close_to_oracle(value, naive[name], oracle[name], f"{case} {dtype} {name}", sizes.get(name))


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_rounded_no_more_than_stated(causal: bool) -> None:
    """Results; weights of the products with V and, for dV, with dO; dS for dK; the output that delta is taken from.

    For dQ dS has 16 bits. Other instruction sets than avx512_bf16 round less; it is among the lower ones above where it
    is not the first.
    """
    torch.manual_seed(4)
    inputs = [torch.randn(1, 2, 600, 64).bfloat16().requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 2, 600, 64).bfloat16()
    out = fastattn.attention(*inputs, causal=causal, backend="cpu")
    actual = [out, *torch.autograd.grad(out, inputs, grad)]

    q, k, v, g = (x.detach().double() for x in (*inputs, grad))
    scores = q @ k.mT / 8
    if causal:
        scores = scores.masked_fill(torch.ones(600, 600, dtype=torch.bool).triu(1), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    p = weights / weights.sum(-1, keepdim=True)

    def results(to: torch.dtype) -> list[Tensor]:
        out = (weights.to(to).double() @ v / weights.sum(-1, keepdim=True)).to(to)
        ds = p * (g @ v.mT - (g * out.double()).sum(-1, keepdim=True)) / 8
        dq, dk, dv = ds @ k, ds.to(to).double().mT @ q, p.to(to).double().mT @ g
        return [out, dq.to(to), dk.to(to), dv.to(to)]

    rounded, oracle = results(torch.bfloat16), results(torch.float64)
    for name, *values in zip(("out", "dq", "dk", "dv"), actual, rounded, oracle, strict=True):
        assert_rms_explained(*values, name)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_over_several_blocks(dtype: torch.dtype, rows: int) -> None:
    """Every number of rows that is computed in its own way, over whole blocks and what is left of one, in one part."""
    for head_dim, more in ((128, {}), (96, {"page_size": 16}), (256, {"window": (700, None)}), (30, {"causal": True})):
        shape = {"heads_q": rows, "heads_k": 1, "seqlen_q": 1, "seqlen_k": 1232, "used_k": (1219,), "batch": 1}
        inputs = Case("few_rows", num_splits=1, head_dim_qk=head_dim, head_dim_v=head_dim, **shape, **more).make(dtype)
        actual, naive, oracle = inputs.run(fastattn.attention, backend="cpu"), inputs.naive(), inputs.oracle()
        for name, value in actual.items():
            assert_close_to_oracle(value, naive[name], oracle[name], f"{dtype} {rows} {head_dim} {name}")


@pytest.mark.parametrize("hide", ["bias", "window", "wide window"])
@pytest.mark.parametrize("head_dim", [64, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_feel_nothing_unseen(dtype: torch.dtype, head_dim: int, hide: str) -> None:
    """NaN in keys that no query sees, and in a query, changes no bit of the gradients of what does not see it.

    But in bfloat16, whose tiles round weights, blocks with NaN in them are left to vectors, which do not: there the
    gradients are held to the oracle's.
    """
    torch.manual_seed(3)
    q, k, v, grad = (torch.randn(1, h, n, head_dim).to(dtype) for h, n in ((6, 2), (2, 600), (2, 600), (6, 2)))
    bias = torch.zeros(2, 600, dtype=dtype)
    bias[0, 590:], bias[1, 100:] = -math.inf, -math.inf  # what query 0 sees, and no more; what query 1 sees
    hides = {"window": ((488, 1), 588), "wide window": ((700, None), 800)}  # both hide the first 100 keys of 600
    options = {"bias": bias} if hide == "bias" else dict(zip(("window", "offset"), hides[hide], strict=True))
    dirty = [x.clone() for x in (q, k, v)]
    hidden = slice(590, None) if hide == "bias" else slice(None, 100)
    dirty[0][:, :, 1] = dirty[1][:, :, hidden] = dirty[2][:, :, hidden] = math.nan
    seen_by_one = slice(100, None) if hide == "bias" else slice(None, 101)

    def gradients(function: Callable[..., Tensor], inputs: list[Tensor], to: torch.dtype, **more: str) -> list[Tensor]:
        leaves = [x.to(to).requires_grad_() for x in inputs]
        call = {name: x.to(to) if isinstance(x, Tensor) else x for name, x in (options | more).items()}
        return list(torch.autograd.grad(function(*leaves, **call), leaves, grad.to(to)))

    clean, dirtied = (gradients(fastattn.attention, x, dtype, backend="cpu") for x in ([q, k, v], dirty))
    naive, oracle = (gradients(fastattn.reference.attention, [q, k, v], to) for to in (dtype, torch.float64))
    assert dirtied[0][:, :, 1].isnan().all()
    for n, part in enumerate((slice(0, 1), seen_by_one, seen_by_one)):
        actual, *others = (x[n][:, :, part] for x in (dirtied, clean, naive, oracle))
        if dtype is torch.bfloat16:
            assert_close_to_oracle(actual, *others[1:])
        else:
            assert torch.equal(actual, others[0])
    assert not any(x[:, :, hidden].any() for x in dirtied[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal_long", "bias_rows", "bias_scalar", "splits", "mask_keys", "few_queries"])
def test_the_same_bits_whatever_the_threads(name: str, dtype: torch.dtype) -> None:
    inputs = next(case for case in CASES if case.name == name).make(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(inputs.run(fastattn.attention, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


def test_threads_are_those_that_torch_has() -> None:
    """OpenMP's on Linux: torch's next operation finds them, and none stands beside them. Threads take time to end."""
    code = (
        "import os, time, torch, fastattn\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "x = torch.randn(1, 1, 400, 64)\n"
        "first = count()\n"
        "def show(expected):\n"
        "    end = time.monotonic() + 10\n"
        "    while count() - first != expected and time.monotonic() < end: time.sleep(0.01)\n"
        "    print(count() - first)\n"
        "for threads in (1, 3, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    fastattn.attention(x, x, x, backend='cpu')\n"
        "    show(threads - 1)\n"
        "torch.nn.functional.scaled_dot_product_attention(x, x, x)\n"
        "show(1)\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc, which only Linux has")
    done = python("-c", code)
    assert done.stdout.split() == ["0", "2", "1", "1"], done.stdout + done.stderr


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_in_python_threads(inputs: Inputs) -> None:
    torch.set_num_threads(2)  # a forked process of torch's starts with one
    expected = inputs.run(fastattn.attention, backend="cpu")
    with ThreadPoolExecutor(4) as executor:
        for found in executor.map(lambda _: inputs.run(fastattn.attention, backend="cpu"), range(24)):
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("forked", [False, True])
def test_several_python_threads_at_once(two_threads: None, forked: bool) -> None:
    """In a forked process one of them has the pool and the others work alone; the bits are the same."""
    # Below the 32768 elements from which torch's own operations use threads: after a fork they would wait for ever.
    inputs = Case("threads", heads_k=1, seqlen_q=250, seqlen_k=250, causal=True).make(torch.float32)
    run_in_python_threads(inputs)  # torch's threads are up now, and are not there after a fork
    if forked:
        child = multiprocessing.get_context("fork").Process(target=run_in_python_threads, args=(inputs,))
        child.start()
        child.join(100)
        assert child.exitcode == 0


def test_a_process_forked_before_the_first_call() -> None:
    """From one whose torch has run on threads, which the child has not."""
    code = (
        "import os, signal, torch, fastattn\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(1, 1, 400, 64)\n"
        "torch.nn.functional.scaled_dot_product_attention(x, x, x)\n"
        "if child := os.fork():\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "signal.alarm(60)\n"
        "fastattn.attention(x, x, x, backend='cpu')\n"
        "print('done', flush=True)\n"
        "os._exit(0)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr


class Attended(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items that a worker computes, forward and backward."""

    def __init__(self) -> None:
        self.inputs = Case("workers", seqlen_q=300, seqlen_k=300).make(torch.float32)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        torch.set_num_threads(2)  # a worker starts with one
        return self.inputs.run(fastattn.attention, backend="cpu")


def test_workers_of_a_data_loader_make_pools_of_their_own(two_threads: None) -> None:
    data = Attended()
    expected = data[0]  # torch's threads are up when the workers fork, and are not there afterwards
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100
    )
    for found in loader:
        assert all(torch.equal(found[name], value) for name, value in expected.items())
