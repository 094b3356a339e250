"""Dropout: how often, independent of what, the same everywhere; under compile, checkpointing and CUDA graphs.

The statistics are of fixed seeds, so they always come out the same. Each bound is where a fair coin would fall outside
with a probability of 1e-6 (two-sided: 4.9 standard deviations).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.reference import dropout_keep
from tests.devices import BACKENDS, device_or_skip
from tests.tolerance import assert_rounded_alike

SIGMAS = 4.9


def centred(seed: int, p: float, shape: tuple[int, int, int, int] = (2, 4, 256, 256)) -> Tensor:
    """What is kept, scaled to mean 0 and variance 1 if the coin is fair."""
    keep = dropout_keep(*shape, p, torch.tensor([seed])).double()
    return (keep - (1 - p)) / math.sqrt(p * (1 - p))


def assert_nothing(mean: Tensor, n: int) -> None:
    """A mean of ``n`` independent numbers of mean 0 and variance 1."""
    assert abs(mean.item()) < SIGMAS / math.sqrt(n)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, -5, 2**40 + 77])
def test_rate(seed: int, p: float) -> None:
    x = centred(seed, p)
    assert_nothing(x.mean(), x.numel())
    for dims in itertools.combinations(range(4), 3):  # of every batch entry, head, row and column by itself
        means = x.mean(dims)
        # so many intervals: the probability is shared among them (Bonferroni); 6.2 sigmas for 1024 of them
        assert means.abs().max() < 6.2 / math.sqrt(x.numel() / len(means))
        # and their spread is that of independent draws: chi-square, by its normal approximation
        chi = (means.square().sum() * (x.numel() / len(means)) - len(means)) / math.sqrt(2 * len(means))
        assert abs(chi.item()) < (SIGMAS if len(means) > 50 else 9)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_within_a_call(p: float) -> None:
    """Of entries some way apart along each axis: heads, rows, columns, the four words of a counter, and beyond them."""
    x = centred(77, p)
    for dim in range(4):
        for lag in (1, 2, 3, 4, 5, 8, 64, 128):
            if lag < x.shape[dim]:
                size = x.shape[dim] - lag
                product = x.narrow(dim, 0, size) * x.narrow(dim, lag, size)
                assert_nothing(product.mean(), product.numel())
    diagonal = x[:, :, 1:, 1:] * x[:, :, :-1, :-1]
    assert_nothing(diagonal.mean(), diagonal.numel())
    swapped = torch.triu(torch.ones(256, 256, dtype=torch.bool), 1)
    assert_nothing((x * x.transpose(2, 3))[..., swapped].mean(), int(swapped.sum()) * 8)


def test_the_words_of_a_counter_are_jointly_independent() -> None:
    """Each of the 16 patterns of four neighbours as often as it should be; chi-square of 15 degrees of freedom."""
    p = 0.3
    keep = dropout_keep(2, 4, 256, 256, p, torch.tensor([5])).unflatten(-1, (-1, 4)).long()
    found = torch.bincount((keep * torch.tensor([8, 4, 2, 1])).sum(-1).flatten(), minlength=16)
    kept = torch.tensor([bin(n).count("1") for n in range(16)])
    expected = (1 - p) ** kept * p ** (4 - kept) * found.sum()
    assert ((found - expected).square() / expected).sum() < 56.5  # its 1 - 1e-6 quantile


@pytest.mark.parametrize("other", [78, 77 + 2**32, -77, 2**62 + 77])
def test_independence_of_seeds(other: int) -> None:
    x, y = centred(77, 0.3), centred(other, 0.3)
    assert_nothing((x * y).mean(), x.numel())
    assert_nothing((x[:, 1:] * y[:, :-1]).mean(), x[:, 1:].numel())


def masks(calls: int, **options: Any) -> Tensor:
    """Which of a head's keys each query keeps, by what comes out: with values that are the identity, the weights."""
    eye = torch.eye(64).expand(1, 2, 64, 64)
    q = torch.zeros(1, 2, 64, 8)
    outs = [fastattn.attention(q, torch.zeros(1, 2, 64, 8), eye, dropout_p=0.5, **options) for _ in range(calls)]
    return torch.stack(outs) != 0


def test_independence_of_calls() -> None:
    """A seed is drawn for each call from torch's generator, which repeats it."""
    torch.manual_seed(3)
    first = masks(6)
    signs = first.double() * 2 - 1
    for a, b in itertools.combinations(signs, 2):
        assert_nothing((a * b).mean(), a.numel())
    torch.manual_seed(3)
    assert torch.equal(masks(6), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernels_drop_what_the_definition_does(backend: str) -> None:
    device = device_or_skip(backend)
    shape, seed = (2, 3, 37, 50), torch.tensor([-(2**61) + 9], device=device)
    q, k = (torch.zeros(2, 3, n, 16, device=device) for n in shape[2:])
    eye = torch.eye(50, device=device).expand(2, 3, 50, 50)
    out = fastattn.attention(q, k, eye, dropout_p=0.4, dropout_seed=seed, backend=backend)
    assert torch.equal(out != 0, dropout_keep(*shape, 0.4, seed))
    assert_rounded_alike(out[out != 0], torch.full((int((out != 0).sum()),), 1 / 50 / 0.6, device=device))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant: bool) -> None:
    x, kept = torch.randn(1, 2, 20, 8), {}

    def step(y: Tensor) -> Tensor:
        return fastattn.attention(y, y, y, dropout_p=0.4, softcap=3.0).tanh()

    for preserve in (None, True, False):
        y = x.clone().requires_grad_()
        torch.manual_seed(5)
        options = {"use_reentrant": reentrant, "preserve_rng_state": preserve}
        out = step(y) if preserve is None else checkpoint(step, y, **options)
        kept[preserve] = torch.autograd.grad(out.sum(), y)[0] if not reentrant else _backward(out, y)
    assert torch.equal(kept[None], kept[True])
    assert not torch.equal(kept[None], kept[False])  # what the comparison above would look like if it were not kept


def _backward(out: Tensor, y: Tensor) -> Tensor:
    out.sum().backward()  # reentrant checkpoints do not work with autograd.grad
    assert y.grad is not None
    return y.grad


def test_compiled() -> None:
    """The generator's state goes in and out of a compiled function; its gradient is of the mask that was used."""

    def step(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, torch.eye(64).expand(1, 2, 64, 64) * x[..., :1], dropout_p=0.5)

    x = torch.rand(1, 2, 64, 8, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled, compiled):
        torch.manual_seed(4)
        out = function(x)
        results.append([out, *torch.autograd.grad(out.sum(), x), function(x)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_rounded_alike(b, a)
    first, second = ((out != 0).double() * 2 - 1 for out in (results[1][0], results[1][2]))
    assert_nothing(first.mean(), first.numel())
    assert_nothing((first * second).mean(), first.numel())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; this has not run on one yet")
def test_cuda_graphs() -> None:
    """A replay draws a new seed where none is given, and reads the given one anew."""
    q, k = (torch.zeros(1, 2, 64, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    eye = torch.eye(64, device="cuda", dtype=torch.float16).expand(1, 2, 64, 64)
    seed = torch.tensor([1], device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        drawn = fastattn.attention(q, k, eye, dropout_p=0.5)
        return drawn, fastattn.attention(q, k, eye, dropout_p=0.5, dropout_seed=seed)  # type: ignore[return-value]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    found = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        found.append([out.clone() != 0 for out in outs])
        assert torch.equal(found[-1][1], dropout_keep(1, 2, 64, 64, 0.5, seed))
    assert not torch.equal(found[0][0], found[1][0])
