"""Checks of the arguments that shape scores and of those that give sequences their lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec import LARGEST, SUPPORTED_DTYPES, dtype_names


def check_flag(name: str, x: bool) -> None:
    """Raise unless ``x`` is True or False: a string or a tensor that is taken for True is a mistake."""
    if not isinstance(x, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be True or False, got {type(x).__name__}")


def check_offset(offset: int | None) -> None:
    """Raise unless the diagonal's offset is None or an integer that kernels can add to."""
    if offset is None:
        return
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be None or an int, got {offset!r}")
    if abs(offset) > 2**30:
        raise ValueError(f"offset must be from -2**30 to 2**30, got {offset}")


def check_softcap(softcap: float) -> None:
    """Raise unless the softcap is a finite number, 0 (none) or more."""
    if isinstance(softcap, (Tensor, bool)) or not isinstance(softcap, (int, float, torch.SymFloat)):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}")
    if not 0 <= softcap <= LARGEST:
        raise ValueError(f"softcap must be 0 (none) or a positive finite number, got {softcap}")


def check_dense(name: str, x: Tensor, q: Tensor) -> None:
    """Raise unless ``x`` is a dense tensor on the query's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized or x.is_nested:
        kind = "a NestedTensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the query's device {q.device}, got {x.device}")


def check_slopes(slopes: Tensor, q: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless ``alibi_slopes`` is ``(heads_q,)`` or ``expected``, ``(*batch, heads_q)``, and asks no gradient."""
    check_dense("alibi_slopes", slopes, q)
    if slopes.dtype not in SUPPORTED_DTYPES[:3]:
        raise TypeError(f"alibi_slopes must be of dtype {dtype_names(SUPPORTED_DTYPES[:3])}, got {slopes.dtype}")
    if tuple(slopes.shape) not in (expected[-1:], expected):
        raise ValueError(
            f"alibi_slopes must have shape (heads_q,) = {expected[-1:]} or (batch, heads_q) = {tuple(expected)}, "
            f"got {tuple(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes get no gradient: pass alibi_slopes.detach(), or a bias, which has one")


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Raise unless ``sinks`` is ``(heads_q,)``, of a type that lse holds exactly."""
    check_dense("sinks", sinks, q)
    accepted = SUPPORTED_DTYPES if q.dtype is torch.float64 else SUPPORTED_DTYPES[:3]
    if sinks.dtype not in accepted:
        raise TypeError(
            f"sinks must be of dtype {dtype_names(accepted)}, got {str(sinks.dtype).removeprefix('torch.')}"
        )
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must have shape (heads_q,) = ({q.shape[1]},), got {tuple(sinks.shape)}")


def check_seed(seed: Tensor, q: Tensor) -> None:
    """Raise unless ``dropout_seed`` is one int64 on the query's device."""
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int64 tensor of one element, got {got}")
    if seed.device != q.device:
        raise ValueError(f"dropout_seed must be on the query's device {q.device}, got {seed.device}")


def _broadcasts(x: Tensor, expected: tuple[int, ...]) -> bool:
    sizes = zip(reversed(x.shape), reversed(expected), strict=False)
    return x.dim() <= len(expected) and all(have in (1, want) for have, want in sizes)


def check_descale(name: str, x: Tensor, q: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless a scale of e4m3 inputs is float32, of one element or broadcasts to ``(*batch, heads_k)``."""
    check_dense(name, x, q)
    if x.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {dtype_names((x.dtype,))}")
    if x.numel() != 1 and not _broadcasts(x, expected):
        raise ValueError(
            f"{name} must have one element or broadcast to (..., heads_k) = {expected}, got shape {tuple(x.shape)}"
        )


_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_integers(name: str, x: Tensor, q: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless ``x`` holds integers and broadcasts to ``expected`` (but not in its last dimension)."""
    check_dense(name, x, q)
    if x.dtype not in _INTEGERS:
        raise TypeError(
            f"{name} must hold integers ({dtype_names(_INTEGERS)}), got {str(x.dtype).removeprefix('torch.')}"
        )
    if not _broadcasts(x, expected) or (x.dim() > 1 and x.shape[-1] != expected[-1]):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(x.shape)}")


def check_cu_seqlens(name: str, x: Tensor, q: Tensor, batch: int | None) -> None:
    """Raise unless ``x`` is int32 ``(batch + 1,)`` on the query's device."""
    check_dense(name, x, q)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_names((x.dtype,))}")
    if x.dim() != 1 or x.shape[0] == 0 or (batch is not None and x.shape[0] != batch + 1):
        expected = "(batch + 1,)" if batch is None else f"(batch + 1,) = ({batch + 1},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def check_length(name: str, x: int) -> int:
    """``x``, or an error unless it is an integer of at least 0."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {x!r}")
    if x < 0:
        raise ValueError(f"{name} must be at least 0, got {x}")
    return x


def check_block_table(block_table: Tensor, q: Tensor, batch: int) -> None:
    """Raise unless ``block_table`` is int32 ``(batch, pages)`` on the query's device."""
    if not isinstance(block_table, Tensor) or block_table.dtype is not torch.int32:
        got = block_table.dtype if isinstance(block_table, Tensor) else type(block_table).__name__
        raise TypeError(f"block_table must be an int32 tensor, got {got}")
    if block_table.device != q.device:
        raise ValueError(f"block_table must be on the query's device {q.device}, got {block_table.device}")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must have shape (batch, pages) = ({batch}, pages), got {tuple(block_table.shape)}"
        )
