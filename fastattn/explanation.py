"""``fastattn.explain``: what a call would run, and why nothing else would."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import dispatch, ops
from fastattn.backends.base import Tensors
from fastattn.functional import attention

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.call import AttentionOptions

P = ParamSpec("P")


class _DryRun(TorchDispatchMode):
    """Stands before the kernels: describes what they are called for, and writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.FORWARD:
            tensors, others, call = args[:5], args[5], tuple(args[6:])
            self.texts.append(dispatch.describe(ops.make_spec(Tensors(*tensors, *others), call), call[7]))
            return ops.forward_fake(*args)
        if func._schema.is_mutable:  # new keys appended to a cache
            return args[0]
        return func(*args, **(kwargs or {}))


@overload
def explain() -> None: ...
@overload
def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> None: ...
@overload
def explain(function: Callable[P, Any], /, *arguments: P.args, **options: P.kwargs) -> None: ...
def explain(*arguments: Any, **options: Any) -> None:
    """Print what a call would run, how that is configured, and why nothing else would. Nothing is computed or written.

    ``explain(q, k, v, causal=True)`` is about ``fastattn.attention(q, k, v, causal=True)``. Of any other function, it
    is put before its arguments, and each attention call that it makes is told of::

        fastattn.explain(fastattn.attention_varlen, q, k, v, cu_seqlens, causal=True)
        fastattn.explain(fastattn.attention_with_kv_cache, q, k_cache, v_cache, k, v, cache_seqlens=lengths)
        fastattn.explain(fastattn.MultiHeadAttention(512, 8), x, x, x)

    Without arguments: which backends can run on this machine, and why the others cannot.

    Raises:
        TypeError, ValueError: as the function, whose arguments are checked.
    """
    if not arguments and not options:
        print(dispatch.describe(None))
        return
    function, rest = attention, arguments
    if arguments and callable(arguments[0]) and not isinstance(arguments[0], Tensor):
        function, rest = arguments[0], arguments[1:]
    changed: list[tuple[Any, dict[str, Any]]] = []
    token = ops.undo.set(changed)
    # what dropout draws is given back; asking for CUDA's generators would start CUDA
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), _DryRun() as run:
            function(*rest, **options)
    finally:
        for cache, before in reversed(changed):
            vars(cache).update(before)
        ops.undo.reset(token)
    print("\n".join(run.texts) or "no attention call was made")
