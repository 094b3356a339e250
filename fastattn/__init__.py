"""Fused attention kernels for torch: one call, one contract, on every device."""

from importlib import import_module
from typing import Any

from fastattn import reference
from fastattn.cache import apply_rotary, attention_with_kv_cache
from fastattn.checks import debug_checks
from fastattn.dispatch import use_backend
from fastattn.explanation import explain
from fastattn.fp8 import attention_fp8, quantize_fp8
from fastattn.functional import attention, scaled_dot_product_attention
from fastattn.kv_cache import KVCache, PagedKVCache
from fastattn.modules import MultiHeadAttention
from fastattn.packed import attention_varlen, pad, unpad
from fastattn.swap import swap_attention
from fastattn.weights import attention_statistics, attention_weights

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "apply_rotary",
    "attention",
    "attention_fp8",
    "attention_statistics",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "debug_checks",
    "explain",
    "pad",
    "quantize_fp8",
    "reference",
    "scaled_dot_product_attention",
    "swap_attention",
    "unpad",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "transformer":  # imported when first asked for
        return import_module("fastattn.transformer")
    if name == "__version__":
        from importlib.metadata import version

        return version("fastattn")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
