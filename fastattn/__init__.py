"""Fused attention kernels for torch: one call, one contract, on every device."""

from fastattn import reference
from fastattn.dispatch import use_backend
from fastattn.functional import attention, attention_weights, explain, scaled_dot_product_attention
from fastattn.modules import MultiHeadAttention
from fastattn.packed import attention_varlen
from fastattn.swap import swap_attention

__all__ = [
    "MultiHeadAttention",
    "attention",
    "attention_varlen",
    "attention_weights",
    "explain",
    "reference",
    "scaled_dot_product_attention",
    "swap_attention",
    "use_backend",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastattn")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
