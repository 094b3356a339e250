"""The encoder-decoder on vectors: :class:`Transformer`, ``torch.nn.Transformer`` on fastattn's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.transformer.decoder import TransformerDecoder
from fastattn.transformer.encoder import TransformerEncoder
from fastattn.transformer.layers import TransformerDecoderLayer, TransformerEncoderLayer


class Transformer(nn.Module):
    """``torch.nn.Transformer`` on :class:`fastattn.MultiHeadAttention`: same arguments, same state dict, same results.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, layer_norm_eps, bias,
        device, dtype: as in torch.
        activation: ``"relu"``, ``"gelu"`` or a callable. Default relu.
        custom_encoder, custom_decoder: modules to use in place of the stacks built here.
        batch_first: ``(batch, seq, d_model)`` instead of torch's default ``(seq, batch, d_model)``.
        norm_first: pre-norm instead of post-norm. Default False.
        num_kv_heads: key and value heads, a divisor of ``nhead`` (grouped-query attention). Default ``nhead``.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layer_args: dict[str, Any] = {
            "d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward, "dropout": dropout,
            "activation": activation, "layer_norm_eps": layer_norm_eps, "batch_first": batch_first,
            "norm_first": norm_first, "bias": bias, "num_kv_heads": num_kv_heads, **factory,
        }  # fmt: skip

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)

        if custom_encoder is None:
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(**layer_args), num_encoder_layers, norm())
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(**layer_args), num_decoder_layers, norm())
        self.encoder, self.decoder = custom_encoder, custom_decoder
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first
        reset_matrices(self)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode ``src`` and decode ``tgt`` from it. With ``N`` the batch, ``S`` and ``T`` the lengths:

        Args:
            src: ``(N, S, d_model)``, ``(S, N, d_model)`` unless ``batch_first``, or ``(S, d_model)``.
            tgt: ``(N, T, d_model)``, ``(T, N, d_model)`` or ``(T, d_model)``.
            src_mask, tgt_mask, memory_mask: ``(S, S)``, ``(T, T)``, ``(T, S)``, or one per batch entry and head with a
                leading ``N * nhead``; bool (True = masked) or float (added to the scores).
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: ``(N, S)``, ``(N, T)``, ``(N, S)``,
                without ``N`` when unbatched; bool (True = padding) or float (added).
            src_is_causal, tgt_is_causal, memory_is_causal: position i sees positions up to i only. Unlike torch's,
                they need no mask beside them; where there is one, it is applied and the flag is a hint.

        Returns:
            The decoder's output, of the shape of ``tgt``. A position that may attend to nothing gets 0 from that
            attention, never NaN.

        Raises:
            ValueError: shapes that do not fit together.
        """
        batch = 0 if self.batch_first else 1
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.shape[batch] != tgt.shape[batch]):
            raise ValueError(f"src and tgt must have the same batch; got {tuple(src.shape)} and {tuple(tgt.shape)}")
        if src.shape[-1] != self.d_model or tgt.shape[-1] != self.d_model:
            raise ValueError(
                f"src and tgt must have {self.d_model} features; got {tuple(src.shape)} and {tuple(tgt.shape)}"
            )
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    @staticmethod
    def generate_square_subsequent_mask(sz: int, device: Any = None, dtype: Any = None) -> Tensor:
        """The ``(sz, sz)`` causal mask: -inf above the diagonal, 0 elsewhere. ``is_causal=True`` needs no mask."""
        return nn.Transformer.generate_square_subsequent_mask(sz, device=device, dtype=dtype)


def reset_matrices(module: nn.Module) -> None:
    """Xavier-uniform initialisation of every parameter that is a matrix, as ``torch.nn.Transformer`` does."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
