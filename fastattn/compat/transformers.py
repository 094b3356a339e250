"""fastattn under Hugging Face transformers (5 or later)::

fastattn.compat.transformers.register()
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.weights import attention_weights

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface.

    Args:
        query: ``(batch, heads_q, seq_q, head_dim)``; ``key, value (batch, heads_k, seq_k, head_dim)``, not repeated.
        attention_mask: boolean (True = may attend) or floating (added), 4-D; None: what ``is_causal`` says.
        is_causal: None: ``module.is_causal``. Without effect beside a mask, which says it all, window included.
        s_aux: attention sinks ``(heads_q,)``.
        position_bias: added to the scores.
        output_attentions: also return the weights.
        others: what models pass to other implementations; none of it has a meaning here.

    Returns:
        ``(batch, seq_q, heads_q, head_dim)``, and the weights or None.
    """
    if any(others.get(name) is not None for name in _PACKED) and attention_mask is None and query.shape[0] == 1:
        raise NotImplementedError("packed sequences by cu_seq_lens: pass position_ids, from which a mask is made")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    call: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "dropout_p": dropout, "sinks": s_aux}
    if attention_mask is None:
        call["causal"] = causal and query.shape[2] > 1
        if sliding_window is not None and causal:
            call["window"] = (sliding_window - 1, 0)
    elif attention_mask.dtype is torch.bool:
        call["mask"] = attention_mask
    else:
        call["bias"] = attention_mask
    if position_bias is not None:
        bias = call.get("bias")
        call["bias"] = position_bias if bias is None else position_bias + bias
    if output_attentions and dropout:
        raise ValueError("output_attentions with attention dropout: call model.eval() first")
    out, lse = attention(query, key, value, return_lse=True, **call)
    weights = attention_weights(query, key, lse, **call) if output_attentions else None
    return out.transpose(1, 2).contiguous(), weights


def register(name: str = "fastattn") -> None:
    """Make ``attn_implementation=name`` known to transformers: its attention, and the masks made for it.

    Both are needed: without the second, transformers passes no mask and padding would be attended to.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
