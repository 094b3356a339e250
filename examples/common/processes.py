"""One process, or several under torchrun: who am I, which device and backend, and what do the others have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import fastattn
from examples.common.errors import UserError
from fastattn.dispatch import get_backend

ATTENTION = ("auto", "naive", "cpu", "triton", "cuda")


@contextmanager
def attention(name: str) -> Iterator[None]:
    """Run fastattn's attention on one backend within the block; "naive" is the reference, "auto" leaves the choice.

    Raises:
        UserError: that backend cannot run here, or cannot run a call of the model; the message says why.
    """
    if name == "auto":
        yield
        return
    backend = "reference" if name == "naive" else name
    if reason := get_backend(backend).unavailable_reason():
        raise UserError(f"--attention {name} cannot run here: {reason}")
    with fastattn.use_backend(backend):
        try:
            yield
        except RuntimeError as error:
            if f"backend {backend!r} cannot run" not in str(error):
                raise
            raise UserError(f"--attention {name}: {error}") from error


def choose_device(name: str) -> torch.device:
    """``auto`` is this process's GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(name)
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, nccl on GPUs and gloo on CPUs; alone, do nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's ``values``."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every process's ``value``, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
