"""Cases on e4m3 tensors: quantised inputs, the oracle on what they stand for, and two naive implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from tests.inputs import Inputs


@dataclass
class Quantised:
    """The tensors of a case as ``fastattn.attention_fp8`` takes them."""

    inputs: Inputs
    q: Tensor
    k: Tensor
    v: Tensor
    scales: dict[str, Tensor]

    @staticmethod
    def of(inputs: Inputs) -> Quantised:
        """Heads of different sizes, so that their scales differ; the layout of the inputs."""
        batch, heads = inputs.case.batch, inputs.case.heads_k
        sizes = torch.logspace(-1, 1, batch * heads).view(batch, heads, 1, 1).to(inputs.q.device)
        q, q_descale = fastattn.quantize_fp8(inputs.q / reference.repeat_heads(sizes, inputs.case.heads_q), heads)
        (k, k_descale), (v, v_descale) = (fastattn.quantize_fp8(x * sizes) for x in (inputs.k, inputs.v))
        return Quantised(inputs, q, k, v, {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale})

    def options(self) -> dict[str, Any]:
        """The options of the call; ``shaping`` has the features beyond mask, bias and dropout."""
        x, case = self.inputs, self.inputs.case
        masks = {"mask": x.mask, "bias": x.bias, "sinks": x.sinks}
        band = {"causal": case.causal, "window": case.window, "offset": case.offset}
        dropout = {"dropout_p": case.dropout_p, "dropout_seed": x.dropout_seed}
        return {**masks, **band, **dropout, **x.shaping, "softmax_scale": case.softmax_scale}

    def run(self, **options: Any) -> dict[str, Tensor]:
        call = {**self.options(), **self.scales, **options}
        out, lse = fastattn.attention_fp8(self.q, self.k, self.v, return_lse=True, **call)
        return {"out": out, "lse": lse}

    def wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What q, k and v stand for."""
        tensors = (self.q, self.k, self.v)
        scaled = []
        for x, descale in zip(tensors, self.scales.values(), strict=True):
            group = x.shape[1] // descale.shape[1]
            scaled.append(x.to(dtype) * descale.to(dtype).repeat_interleave(group, 1)[:, :, None, None])
        return scaled[0], scaled[1], scaled[2]

    def oracle(self) -> dict[str, Tensor]:
        return self._reference(torch.float64)

    def naive(self) -> dict[str, Tensor]:
        """In float32, the output rounded to bfloat16: nothing of it in e4m3 but the inputs."""
        found = self._reference(torch.float32)
        return {"out": found["out"].bfloat16(), "lse": found["lse"]}

    def naive_e4m3(self) -> dict[str, Tensor]:
        """With the weights of the second product in e4m3, as tensor cores take them: ``exp(s - max)`` in 1/256, so that
        all of e4m3's range is used, summed before they are rounded. Without mask, bias and dropout."""
        case = self.inputs.case
        q, k, v = (reference.repeat_heads(x, case.heads_q) for x in self.wide(torch.float32))
        offset = case.seqlen_k - case.seqlen_q if case.offset is None else case.offset
        window = (None, 0) if case.causal else case.window or (None, None)
        visible = reference.visible_keys(case.seqlen_q, case.seqlen_k, window, offset, None, None, q.device)
        scale = case.head_dim_qk**-0.5 if case.softmax_scale is None else case.softmax_scale
        scores = torch.where(visible, scale * (q @ k.mT), -torch.inf)
        largest = scores.amax(-1, keepdim=True).nan_to_num(neginf=0)
        weights = 256 * (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        rounded = weights.to(torch.float8_e4m3fn).float()
        out = torch.where(total > 0, rounded @ v / total, 0)
        return {"out": out.bfloat16(), "lse": ((total / 256).log() + largest).squeeze(-1)}

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = self.wide(dtype)
        options = self.options()
        options |= {name: x.to(dtype) for name in ("bias", "sinks") if (x := options[name]) is not None}
        out, lse = reference.attention(q, k, v, return_lse=True, **options)
        return {"out": out, "lse": lse}
