"""torch's ``nn.MultiheadAttention`` beside ours: inputs, masks, and what comes out of either."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import MultiHeadAttention
from tests.tolerance import assert_close_to_oracle

E, H, N, L, S = 24, 4, 3, 5, 7

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 10, "vdim": 14, "batch_first": True},
    "kdim, no bias": {"kdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "bias_kv, zero": {"add_bias_kv": True, "add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 14, "batch_first": True},
}
MASKS = ["none", "padding", "padding float", "2d", "2d float", "3d", "3d float", "both", "both float", "both 3d"]


def make_masks(kind: str, batch: int | None, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """``key_padding_mask`` and ``attn_mask`` of one kind; every query keeps a key, as torch needs."""
    n = batch or 1
    generator = torch.Generator().manual_seed(5)
    padding = torch.rand(n, seqlen_k, generator=generator) < 0.4
    shape = (seqlen_q, seqlen_k) if "3d" not in kind else (n * H, seqlen_q, seqlen_k)
    attn = torch.rand(shape, generator=generator) < 0.4
    padding[:, 1] = False
    attn[..., 1] = False
    masks = {}
    if "padding" in kind or "both" in kind:
        masks["key_padding_mask"] = padding if batch else padding[0]
    if "2d" in kind or "3d" in kind or "both" in kind:
        masks["attn_mask"] = attn
    if "float" in kind:
        masks = {name: torch.randn(m.shape, generator=generator, dtype=dtype) for name, m in masks.items()}
        for mask in masks.values():
            mask[..., 0] = -torch.inf
    return masks


def make_inputs(module: nn.MultiheadAttention, batched: bool = True, self_attention: bool = False) -> list[Tensor]:
    def one(length: int, dim: int) -> Tensor:
        x = torch.randn((N, length, dim) if batched else (length, dim))
        return x.transpose(0, 1).contiguous() if batched and not module.batch_first else x

    if self_attention:
        return [one(L, E)] * 3
    return [one(L, E), one(S, module.kdim), one(S, module.vdim)]


def pair(**config: Any) -> tuple[nn.MultiheadAttention, MultiHeadAttention]:
    """torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, **config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)  # scores of order 1, as with trained or initial weights
    ours = MultiHeadAttention(E, H, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Output, weights and every gradient; of a copy in ``dtype`` when given. Tensors passed twice stay one tensor."""
    if dtype is not None:
        module = copy.deepcopy(module).to(dtype)
        kwargs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    leaves = {id(x): x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs}
    out, weights = module(*(leaves[id(x)] for x in inputs), **kwargs)
    results = {"out": out}
    generator = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    if weights is not None:
        results["weights"] = weights
        loss = loss + (weights * torch.randn(weights.shape, generator=generator).to(weights.dtype)).sum()
    module.zero_grad()
    loss.backward()
    results |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    results |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves.values())}
    return {name: x.detach() for name, x in results.items()}


def compare(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], **kwargs: Any) -> None:
    actual, naive = run(ours, inputs, **kwargs), run(theirs, inputs, **kwargs)
    oracle = run(theirs, inputs, torch.float64, **kwargs)
    assert actual.keys() == oracle.keys()
    for name in oracle:
        assert_close_to_oracle(actual[name], naive[name], oracle[name], name)
