"""Models that read and write tokens: embeddings, positions, the stacks, and a head over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.transformer.cache import DecodingState
from fastattn.transformer.encoder import TransformerEncoder
from fastattn.transformer.layers import TransformerEncoderLayer, get_activation
from fastattn.transformer.model import Transformer, reset_matrices
from fastattn.transformer.positional import SinusoidalPositionalEncoding


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a token model. The same configuration serves every kind: each uses the layers it has.

    Attributes:
        vocab_size: number of tokens; of source tokens when ``tgt_vocab_size`` is given.
        tgt_vocab_size: of target tokens. Default None: source and target share one vocabulary and one embedding.
        padding_id: the token that is padding wherever no padding mask is given. Default None: no token is.
        max_length: longest sequence accepted. Default None: any, positions are computed.
        tie_head: the output head is the (target) token embedding, transposed. Default True.
        num_encoder_layers: layers of an :class:`EncoderModel` and of a :class:`Seq2SeqTransformer`'s encoder.
        num_decoder_layers: layers of a :class:`CausalLM` and of a :class:`Seq2SeqTransformer`'s decoder.
        d_model, nhead, num_kv_heads, dim_feedforward, dropout, activation, layer_norm_eps, norm_first, bias:
            as in :class:`Transformer`.
    """

    vocab_size: int
    tgt_vocab_size: int | None = None
    padding_id: int | None = None
    max_length: int | None = None
    tie_head: bool = True
    d_model: int = 512
    nhead: int = 8
    num_kv_heads: int | None = None
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str | Callable[[Tensor], Tensor] = "relu"
    layer_norm_eps: float = 1e-5
    norm_first: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, *(n for n in (self.tgt_vocab_size, self.max_length) if n is not None))
        if min(sizes) < 1:
            raise ValueError(f"vocab_size, tgt_vocab_size and max_length must be at least 1, got {sizes}")
        smallest = min(self.vocab_size, self.tgt_vocab_size or self.vocab_size)
        if self.padding_id is not None and not 0 <= self.padding_id < smallest:
            raise ValueError(f"padding_id must be in [0, {smallest}), got {self.padding_id}")
        get_activation(self.activation)

    def layer_arguments(self) -> dict[str, Any]:
        """The arguments of a layer of this configuration; token models are batch-first."""
        names = ("d_model", "nhead", "num_kv_heads", "dim_feedforward", "dropout", "activation", "layer_norm_eps")
        return {n: getattr(self, n) for n in (*names, "norm_first", "bias")} | {"batch_first": True}


class TokenEmbedding(nn.Module):
    """Token ids ``(batch, seq)`` to ``(batch, seq, d_model)``: learned embedding · sqrt(d_model) + positions, dropout.

    Weights start from N(0, 1/d_model), so that the scaled embedding has unit variance and, as a tied head, logits do.
    Scaling and the dropout of the sum are those of arXiv 1706.03762, 3.4 and 5.4.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.vocab_size, self.padding_id, self.max_length = vocab_size, config.padding_id, config.max_length
        self.scale = math.sqrt(config.d_model)
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=1 / self.scale)
        self.positions = SinusoidalPositionalEncoding(config.d_model, config.dropout)

    def padding_mask(self, tokens: Tensor) -> Tensor | None:
        """``(batch, seq)``, True where a token is ``padding_id``; None if the configuration names none."""
        return None if self.padding_id is None else tokens == self.padding_id

    def forward(self, tokens: Tensor, padding: Tensor | None = None, start: int = 0) -> Tensor:
        """Embed ``tokens``, which stand at ``start`` and after.

        Args:
            tokens: integers ``(batch, seq)``.
            padding: ``(batch, start + seq)``, True = padding. Positions count what is not padding, so that a sequence
                gets the same ones wherever its padding stands.
            start: number of positions before ``tokens``.
        """
        self.check(tokens, start)
        seq = tokens.shape[1]
        if padding is None:
            positions = torch.arange(start, start + seq, device=tokens.device)
        else:
            positions = ((~padding).cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.positions(F.embedding(tokens, self.weight) * self.scale, positions)

    def check(self, tokens: Tensor, start: int = 0) -> None:
        """Raise on tokens that are no integers ``(batch, seq)``, too long, or (on the CPU) outside the vocabulary."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens must be int64 or int32 of shape (batch, seq), got {tokens.dtype} of {tuple(tokens.shape)}"
            )
        if self.max_length is not None and start + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"a sequence of {start + tokens.shape[1]} tokens is longer than max_length={self.max_length}"
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_range(tokens)

    def check_range(self, tokens: Tensor) -> None:
        """Raise on token ids outside the vocabulary (reads the tokens: a synchronisation on a GPU)."""
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise IndexError(
                f"token ids must be in [0, {self.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}"
            )


class VocabularyHead(nn.Module):
    """``(..., d_model)`` to logits ``(..., vocab_size)``. Tied, its weight is the embedding's."""

    def __init__(self, config: TransformerConfig, embedding: TokenEmbedding) -> None:
        super().__init__()
        weight = embedding.weight
        if not config.tie_head:
            weight = nn.Parameter(torch.empty_like(weight))
            nn.init.xavier_uniform_(weight)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _stack(config: TransformerConfig, num_layers: int, device: Any, dtype: Any) -> TransformerEncoder:
    """Self-attention layers for a model of one stack; a final norm where no layer ends on one (pre-norm)."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    norm = None
    if config.norm_first:
        norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias, **factory)
    stack = TransformerEncoder(TransformerEncoderLayer(**config.layer_arguments(), **factory), num_layers, norm)
    reset_matrices(stack)
    return stack


class EncoderModel(nn.Module):
    """Encoder-only: every token sees every token (BERT; masked language modelling)."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config, config.vocab_size, device, dtype)
        self.encoder = _stack(config, config.num_encoder_layers, device, dtype)
        self.head = VocabularyHead(config, self.embedding)

    def encode(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Hidden states ``(batch, seq, d_model)``; ``padding`` is taken as it is given (None: there is none)."""
        return self.encoder(self.embedding(tokens, padding), src_key_padding_mask=padding)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits ``(batch, seq, vocab_size)``.

        Args:
            tokens: integers ``(batch, seq)``.
            padding: bool ``(batch, seq)``, True = padding. Default: where the token is ``config.padding_id``.

        Raises:
            ValueError: the shape or type of ``tokens``, or more than ``config.max_length`` of them.
            IndexError: a token id outside the vocabulary.
        """
        padding = self.embedding.padding_mask(tokens) if padding is None else padding
        return self.head(self.encode(tokens, padding))


class CausalLM(nn.Module):
    """Decoder-only: every token sees itself and those before it, and predicts the next (GPT)."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config, config.vocab_size, device, dtype)
        self.decoder = _stack(config, config.num_decoder_layers, device, dtype)
        self.head = VocabularyHead(config, self.embedding)

    def decode(self, tokens: Tensor, padding: Tensor | None = None, state: DecodingState | None = None) -> Tensor:
        """Hidden states ``(batch, seq, d_model)`` of ``tokens``, which follow what ``state`` holds and are added to it.

        ``padding`` is ``(batch, seq)`` and taken as it is given (None: there is none).
        """
        if state is None:
            return self.decoder(self.embedding(tokens, padding), src_key_padding_mask=padding, is_causal=True)
        start = state.length
        padding = state.advance(tokens, padding)
        x = self.embedding(tokens, padding, start)
        return self.decoder(x, src_key_padding_mask=padding, is_causal=True, caches=state.caches)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits ``(batch, seq, vocab_size)``, those at i for token i + 1; arguments as in :class:`EncoderModel`."""
        padding = self.embedding.padding_mask(tokens) if padding is None else padding
        return self.head(self.decode(tokens, padding))


class Seq2SeqTransformer(nn.Module):
    """Encoder-decoder on tokens: predicts the next target token from the source and the target so far."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        self.src_embedding = TokenEmbedding(config, config.vocab_size, device, dtype)
        self.tgt_embedding = self.src_embedding
        if config.tgt_vocab_size is not None:
            self.tgt_embedding = TokenEmbedding(config, config.tgt_vocab_size, device, dtype)
        self.transformer = Transformer(
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            device=device,
            dtype=dtype,
            **config.layer_arguments(),
        )
        self.head = VocabularyHead(config, self.tgt_embedding)

    def encode(self, src: Tensor, padding: Tensor | None = None) -> Tensor:
        """The memory ``(batch, seq_src, d_model)``; ``padding`` is taken as it is given (None: there is none)."""
        return self.transformer.encoder(self.src_embedding(src, padding), src_key_padding_mask=padding)

    def decode(
        self,
        tgt: Tensor,
        padding: Tensor | None = None,
        state: DecodingState | None = None,
        *,
        memory: Tensor,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``(batch, seq, d_model)`` of ``tgt``, which follows what ``state`` holds and is added to it.

        Padding masks are taken as they are given (None: there is none).
        """
        start, caches = 0, {}
        if state is not None:
            start = state.length
            padding = state.advance(tgt, padding)
            caches = {"caches": state.caches, "memory_caches": state.memory_caches}
        return self.transformer.decoder(
            self.tgt_embedding(tgt, padding, start),
            memory,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=memory_padding,
            tgt_is_causal=True,
            **caches,
        )

    def forward(
        self, src: Tensor, tgt: Tensor, src_padding: Tensor | None = None, tgt_padding: Tensor | None = None
    ) -> Tensor:
        """Logits ``(batch, seq_tgt, vocab_size)``, those at i for target token i + 1.

        Args:
            src, tgt: integers ``(batch, seq_src)``, ``(batch, seq_tgt)``.
            src_padding, tgt_padding: bool, of the same shapes, True = padding. Default: where the token is
                ``config.padding_id``.

        Raises:
            ValueError: the shape or type of the tokens, or more than ``config.max_length`` of them.
            IndexError: a token id outside its vocabulary.
        """
        if len(src) != len(tgt):
            raise ValueError(f"src and tgt must have the same batch; got {tuple(src.shape)} and {tuple(tgt.shape)}")
        src_padding = self.src_embedding.padding_mask(src) if src_padding is None else src_padding
        tgt_padding = self.tgt_embedding.padding_mask(tgt) if tgt_padding is None else tgt_padding
        memory = self.encode(src, src_padding)
        return self.head(self.decode(tgt, tgt_padding, memory=memory, memory_padding=src_padding))
