"""What each probe kernel of ``probes/`` is given, and what its wrapper must make of it, bit for bit if that is defined.

The same inputs go to a GPU (``python -m tests.cuda_emulation.record``), whose results are kept in ``recordings/``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """``tolerance``: how far a result, seen as float32, may be from another implementation's; None: not at all."""

    name: str
    words: Tensor  # int32, what the kernel reads
    expected: Tensor  # int32, what it writes
    tolerance: Tensor | None = None

    @property
    def sm90(self) -> bool:
        return self.name.startswith(("stmatrix", "tma", "bulk", "wgmma", "e4m3"))

    def check(self, actual: Tensor, expected: Tensor, against: str) -> None:
        if self.tolerance is None:
            wrong = (actual != expected).nonzero().flatten()
            assert not len(wrong), (
                f"{self.name}: {len(wrong)} words differ from {against}, the first is {int(wrong[0])}"
            )
            return
        x, y = actual.view(torch.float32).double(), expected.view(torch.float32).double()
        close = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= self.tolerance)
        assert close.all(), f"{self.name}: {int((~close).sum())} values are too far from {against}"


#: Every NaN is as good as another; all other results are bit for bit.
NAN_ONLY = torch.zeros(())


def words(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.int32)


def run(function: Callable[..., bytes | None], probe: Probe, out: Tensor) -> None:
    """Calls ``fastattn_probe``; ``probe.words`` and ``out`` may be on either device."""
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (probe.words, out)]
    sizes = [ctypes.c_int64(x.numel()) for x in (probe.words, out)]
    error = function(probe.name.encode(), pointers[0], sizes[0], pointers[1], sizes[1], None)
    if error is not None:
        raise RuntimeError(f"{probe.name}: {error.decode()}")


def declare(library: ctypes.CDLL) -> Callable[..., bytes | None]:
    library.fastattn_probe.restype = ctypes.c_char_p
    return library.fastattn_probe


def _low_words(x: Tensor) -> Tensor:
    """int64 numbers below 2^32 as 32 bits each."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _functions() -> list[Probe]:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 0.5])
    x = torch.cat([special, torch.randn(502), torch.linspace(-160, 140, 512)])
    positive = torch.cat([special, torch.rand(502), torch.logspace(-37, 38, 512)])

    def probe(name: str, x: Tensor, y: Tensor, relative: float, absolute: float = 0.0) -> Probe:
        y = torch.where(y.abs() < torch.finfo(torch.float32).tiny, torch.zeros((), dtype=y.dtype).copysign(y), y)
        return Probe(name, words(x), words(y.float()), y.abs().nan_to_num(0, 0, 0) * relative + absolute)

    flushed = torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros(()).copysign(x), x).double()
    flushed_positive = torch.where(
        positive.abs() < torch.finfo(torch.float32).tiny, torch.zeros(()).copysign(positive), positive
    ).double()
    tiny = torch.finfo(torch.float32).tiny
    return [
        probe("exp2", x, flushed.exp2(), 2**-22, tiny),
        probe("log2", positive, flushed_positive.log2(), 2**-22, 2**-22),
        probe("reciprocal", positive, flushed_positive.reciprocal(), 2**-23, tiny),
        probe("tanh", x, x.double().tanh(), 2**-10.9, tiny),
    ]


def _conversions() -> list[Probe]:
    found = []
    halfway = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-8, 6e-8, 3.3e38, 3.4e38]
    )
    x = torch.cat([halfway, -halfway, torch.tensor([0.0, -0.0, float("inf"), -float("inf")]), torch.randn(1000) * 100])
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        found.append(Probe(f"pack_{name}", words(x), words(x.to(dtype))))
        bits = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32)[:9360].to(torch.int16)
        y = bits.view(dtype)
        y = torch.where(y.isnan(), torch.ones_like(y), y)
        found.append(Probe(f"unpack_{name}", words(y), words(y.float())))
        rounded = x.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
        found.append(Probe(f"round_{name}", words(x), rounded))
    factors = torch.randint(0, 2**32, (256, 2))
    edges = torch.tensor([[2**32 - 1, 2**32 - 1], [2**31, 2], [2**16, 2**16], [0, 7]])
    a, b = torch.cat([edges, factors]).unbind(1)
    # a b = a (2^16 b1 + b0): 64 bits hold each of the two products.
    high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    found.append(Probe("multiply_high", _low_words(torch.stack([a, b], 1).flatten()), _low_words(high)))
    return found


def _e4m3() -> list[Probe]:
    """Halfway cases, below the smallest, above the largest, which is what they become; and all 256 of them back."""
    halfway = torch.tensor([1.0625, 1.1875, 2**-10, 3 * 2**-10, 2**-6 - 2**-10, 15.5, 464.0, 464.1, 1e9, float("inf")])
    x = torch.cat([halfway, -halfway, torch.tensor([0.0, -0.0, float("nan"), 449.0]), torch.randn(1000) * 100])
    bits = torch.arange(256, dtype=torch.uint8)
    y = bits.view(torch.float8_e4m3fn)
    eight = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    return [Probe("e4m3_pack", words(x), words(eight)), Probe("e4m3_unpack", words(bits), words(y.float()), NAN_ONLY)]


def _shuffles() -> list[Probe]:
    x = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    lane = torch.arange(32)
    rows = [x[lane ^ (1 << n)] for n in range(5)] + [x[0].expand(32), x[13].expand(32), x.flip(0)]
    votes = sum(1 << n for n in range(32) if int(x[n]) % 2 == 1)
    rows.append(torch.tensor([votes - 2**32 if votes >= 2**31 else votes], dtype=torch.int32).expand(32))
    found = [Probe("shuffle", x, torch.cat(rows).contiguous())]
    thread = torch.arange(128, dtype=torch.int32)
    voters = (thread == 77).to(torch.int32)  # of warp 2; nobody has a 2
    near = torch.where(thread // 32 == 2, 4, 0)
    found.append(Probe("vote", voters, (1 + near + 8 * (thread // 32)).to(torch.int32)))
    return found


def _matrices() -> list[Probe]:
    """Register m of lane l holds elements 2 (l % 4) and the next of row l // 4 of matrix m."""
    found = []
    for count in (1, 2, 4):
        x = torch.randint(-(2**15), 2**15 - 1, (count, 8, 8), dtype=torch.int16)
        for suffix, source in (("", x), ("_trans", x.transpose(1, 2))):
            registers = words(source.contiguous())  # 32 lanes, in order
            found.append(Probe(f"ldmatrix_x{count}{suffix}", words(x), registers))
            if count > 1:
                found.append(Probe(f"stmatrix_x{count}{suffix}", registers, words(x)))
    return found


def _fragment(x: Tensor, rows: tuple[int, ...], cols: tuple[int, ...]) -> Tensor:
    """(lanes, len(rows)) words: for each register its two neighbours in the last dimension."""
    lane = torch.arange(32)
    row, col = lane // 4, lane % 4 * 2
    pairs = [[x[row + r, col + c], x[row + r, col + c + 1]] for r, c in zip(rows, cols, strict=True)]
    return torch.stack([torch.stack(pair, 1) for pair in pairs], 1)


def _mma() -> list[Probe]:
    found = []
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        a, b, d = (torch.randint(-8, 9, shape).to(dtype) for shape in ((16, 16), (16, 8), (16, 8)))
        lanes_a = words(_fragment(a, (0, 8, 0, 8), (0, 0, 8, 8))).view(32, 4)
        lanes_b = words(_fragment(b.T.contiguous(), (0, 0), (0, 8))).view(32, 2)
        lanes_d = _fragment(d.float(), (0, 8), (0, 0)).reshape(32, 4).contiguous().view(torch.int32)
        result = a.float() @ b.float() + d.float()
        expected = _fragment(result, (0, 8), (0, 0))
        found.append(Probe(f"mma_{name}", words(torch.cat([lanes_a, lanes_b, lanes_d], 1)), words(expected)))
    return found


def _copies() -> list[Probe]:
    found = []
    for size in (1, 2, 4):
        x = torch.randint(-(2**31), 2**31 - 1, (96, size), dtype=torch.int32)
        kept = torch.where((torch.arange(96) % 3 == 1)[:, None], 0, x)
        found.append(Probe(f"cp_async_{4 * size}", words(x), words(kept.to(torch.int32))))
    for name, dtype in (("2", torch.int16), ("4", torch.int32), ("8", torch.int64)):
        x = torch.randint(-(2**15), 2**15 - 1, (512,), dtype=dtype)
        found.append(Probe(f"shared_{name}", words(x), words(x.flip(0))))
    x = torch.randint(-(2**31), 2**31 - 1, (128, 4), dtype=torch.int32)
    found.append(Probe("shared_16", words(x), words(x.flip(0))))
    found += [Probe(f"constant_{size}", words(x), words(x)) for size in (4, 8, 16)]
    found.append(Probe("message", torch.tensor([39], dtype=torch.int32), torch.tensor([42, 39, 42], dtype=torch.int32)))
    start = torch.tensor([1.0, 2.0, 3.0, 4.0])
    added = start + 128 * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 128 * torch.tensor([8.0, 0, 0, 0])
    found.append(Probe("atomic", words(start), torch.cat([words(added), torch.tensor([128, 1], dtype=torch.int32)])))
    return found


def swizzle(rows: Tensor) -> Tensor:
    """Rows of 128 bytes as Swizzle::k128Bytes lays them: 16-byte chunk c of row r at chunk c ^ (r % 8)."""
    chunks = rows.view(torch.uint8).reshape(len(rows), 8, 16)
    r = torch.arange(len(rows))[:, None]
    laid = torch.empty_like(chunks)
    laid[r, torch.arange(8)[None] ^ (r % 8)] = chunks
    return laid.reshape(len(rows), 128).view(rows.dtype)


def swizzle_64(rows: Tensor) -> Tensor:
    """Rows of 64 bytes as Swizzle::k64Bytes lays them: chunk c of row r at chunk c ^ (r / 2 % 4)."""
    chunks = rows.reshape(len(rows), 4, -1)
    r = torch.arange(len(rows))[:, None]
    laid = torch.empty_like(chunks)
    laid[r, torch.arange(4)[None] ^ (r // 2 % 4)] = chunks
    return laid.reshape(rows.shape)


def _rows_of_64(x: Tensor, padded: Tensor) -> list[Probe]:
    box = padded[0, 1, 3:11, 1:3, 96:128].reshape(16, 32)
    a, b = (torch.randint(-8, 9, (64, 32)).half() for _ in range(2))
    thread, register = torch.arange(128), torch.arange(32)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + register % 4 // 2 * 8
    col = register // 4 * 8 + thread % 4 * 2 + register % 2
    d = a.float() @ b.float().T
    return [
        Probe("tma_load_rows_of_64", x, words(swizzle_64(box))),
        Probe("wgmma_rows_of_64", words(torch.cat([swizzle_64(a), swizzle_64(b)])), words(d[row, col])),
    ]


def _tma() -> list[Probe]:
    found = []
    x = torch.randint(-(2**15), 2**15 - 1, (2, 2, 5, 3, 64), dtype=torch.int16)
    padded = torch.zeros(3, 3, 11, 5, 192, dtype=torch.int16)
    padded[:2, :2, :5, :3, 64:128] = x

    def box(shift: int, last: int) -> Tensor:
        return padded[last, 1, 3:7, 1:3, 64 + shift : 128 + shift].reshape(8, 64)

    four = words(x[0])
    found.append(Probe("tma_load_4d", four, words(swizzle(box(0, 0)))))
    found.append(Probe("tma_load_5d", words(x), words(swizzle(box(0, 1)))))
    found.append(Probe("tma_load_4d_plain", four, words(box(0, 0))))
    found.append(Probe("tma_load_4d_left", four, words(swizzle(box(-8, 0)))))
    found.append(Probe("tma_load_4d_right", four, words(swizzle(box(8, 0)))))
    found += _rows_of_64(four, padded)
    for name, full in (("4d", (2, 5, 3, 64)), ("5d", (2, 2, 5, 3, 64))):
        rows = torch.randint(-(2**15), 2**15 - 1, (4, 2, 64), dtype=torch.int16)
        to = torch.zeros(full, dtype=torch.int16)
        target = to[1] if name == "4d" else to[1, 1]
        target[3:5, 1:3] = rows[:2]
        found.append(Probe(f"tma_store_{name}", words(swizzle(rows.reshape(8, 64))), words(to)))
    values = torch.randint(-100, 100, (4, 2, 32)).float()
    total = torch.ones(2, 5, 3, 32)
    total[1, 3:5, 1:3] += values[:2]
    found.append(Probe("tma_reduce_add", words(swizzle(values.reshape(8, 32))), words(total)))
    line = torch.randint(-100, 100, (1024,)).float()
    found.append(Probe("bulk_copy", words(line), words(line)))
    found.append(Probe("bulk_reduce_add", words(line), words(line + 1)))
    return found


def _wgmma() -> list[Probe]:
    found = []
    for kind in (
        "ss_half_64",
        "ss_bfloat16_176",
        "ss_ta_bfloat16_80",
        "ss_tb_half_128",
        "rs_half_96",
        "rs_tb_bfloat16_192",
        "ss_e4m3_128",
        "rs_e4m3_64",
    ):
        n = int(kind.rsplit("_", 1)[1])
        dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}[kind.split("_")[-2]]
        depth = 128 // dtype.itemsize  # sums of e4m3's products stay below 2^13, which tensor cores still hold exactly
        a, b = (torch.randint(-8, 9, (size, depth)).to(dtype) for size in (64, n))
        # Transposed: (64 of K) x (columns), 64 columns after 64 columns, the last ones padded.
        turned_b = torch.cat([swizzle(part.T.contiguous()) for part in b.split(64)]) if "tb" in kind else None
        laid_a = swizzle(a.T.contiguous() if "ta" in kind else a)
        laid_b = swizzle(b) if turned_b is None else turned_b
        start = 1.0 if kind.startswith("rs") else 0.0
        d = a.float() @ b.float().T + start
        thread, register = torch.arange(128), torch.arange(n // 2)[:, None]
        row = thread // 32 * 16 + thread % 32 // 4 + register % 4 // 2 * 8
        col = register // 4 * 8 + thread % 4 * 2 + register % 2
        found.append(Probe(f"wgmma_{kind}", words(torch.cat([words(laid_a), words(laid_b)])), words(d[row, col])))
    return found


def probes() -> list[Probe]:
    """All of them, with the same inputs every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        groups = (_functions, _conversions, _e4m3, _shuffles, _matrices, _mma, _copies, _tma, _wgmma)
        return [probe for group in groups for probe in group()]
