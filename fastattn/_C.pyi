"""The compiled kernels, called by ``fastattn.backends.cpu`` and ``fastattn.backends.cuda``.

All arguments are positional, as packed by ``fastattn.backends.native``; a tensor is ``(pointer, *strides)`` with four
strides in elements, or None; ``tables`` is one flat tuple of ``(pointer, *strides)`` with two strides each, or None::

    *_forward:   call, dropout_seed, q, k, v, mask, bias, tables, out, lse
    *_backward:  the same, grad_out, grad_lse, dq, dk, dv, dbias
    cpu_*:       ..., num_threads
    cuda_*:      ..., (backward: workspace,) device, stream
"""

from typing import Any

has_cuda: bool
cuda_archs: str

def cpu_instruction_set() -> str: ...
def cpu_instruction_sets() -> list[str]: ...
def cpu_forward(*arguments: Any) -> None: ...
def cpu_backward(*arguments: Any) -> None: ...
def cuda_forward(*arguments: Any) -> None: ...
def cuda_backward(*arguments: Any) -> None: ...
