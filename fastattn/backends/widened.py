"""Calls on e4m3 tensors for backends that have no kernel for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastattn.backends.base import Backend, Gradients, Tensors
from fastattn.spec import AttentionSpec, dtype_names


class Widened:
    """A backend that is handed e4m3 tensors in a type that it takes: float32 on the CPU, bfloat16 elsewhere.

    Both hold every e4m3 number, so k and v are exact as they come; their scales multiply what is rounded anyway, in
    float32: ``q · q_descale · k_descale`` on the way in, once, and ``out · v_descale`` on the way out.
    """

    def __init__(self, backend: Backend, reasons: list[str]) -> None:
        """``reasons``: why the backend does not take e4m3 as it is."""
        self.name = backend.name
        self._backend, self._reasons = backend, reasons

    def unavailable_reason(self) -> str | None:
        return self._backend.unavailable_reason()

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        if spec.needs_grad or spec.needs_bias_grad:
            return ["a gradient of float8_e4m3fn inputs: forward only"]
        return self._backend.unsupported_reasons(self._widen(spec))

    def configuration(self, spec: AttentionSpec) -> str:
        wide = self._widen(spec)
        why = "; ".join(self._reasons)
        return f"widened to {dtype_names((wide.dtype,))} first ({why}): {self._backend.configuration(wide)}"

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        wide = self._widen(spec)
        q = t.q.float()
        for descale in (t.q_descale, t.k_descale):
            if descale is not None:
                q = q * descale.repeat_interleave(spec.group_size, 1)[:, :, None, None]
        k, v = t.k.to(wide.dtype), t.v.to(wide.dtype)
        plain = t._replace(q=q.to(wide.dtype), k=k, v=v, q_descale=None, k_descale=None, v_descale=None)
        out, lse = self._backend.forward(wide, plain)
        if t.v_descale is not None:
            out = out * t.v_descale.repeat_interleave(spec.group_size, 1)[:, :, None, None]
        return out.to(spec.out_dtype), lse

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        raise NotImplementedError(*self.unsupported_reasons(replace(spec, needs_grad=True)))

    def _widen(self, spec: AttentionSpec) -> AttentionSpec:
        exact = spec.device == "cpu" or self.name == "reference"
        return replace(spec, dtype=torch.float32 if exact else torch.bfloat16)
