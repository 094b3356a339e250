"""The compiled kernels. A tensor is ``(pointer, *strides)`` with four strides in elements, or None."""

_Tensor = tuple[int, ...] | None

has_cuda: bool
cuda_archs: str

def cpu_instruction_set() -> str: ...
def cpu_forward(
    call: tuple[float, ...],
    dropout_seed: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Tensor,
    bias: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    num_threads: int,
    /,
) -> None: ...
def cpu_backward(
    call: tuple[float, ...],
    dropout_seed: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Tensor,
    bias: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    grad_out: _Tensor,
    grad_lse: _Tensor,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    dbias: _Tensor,
    num_threads: int,
    /,
) -> None: ...
def cuda_forward(
    call: tuple[float, ...],
    dropout_seed: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Tensor,
    bias: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_backward(
    call: tuple[float, ...],
    dropout_seed: int,
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Tensor,
    bias: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    grad_out: _Tensor,
    grad_lse: _Tensor,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    dbias: _Tensor,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...
