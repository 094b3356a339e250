"""Models that read and write tokens: embeddings, positions, the stacks, and a head for each objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.transformer.cache import DecodingState
from fastattn.transformer.config import TransformerConfig
from fastattn.transformer.embedding import TokenEmbedding, VocabularyHead
from fastattn.transformer.encoder import TransformerEncoder
from fastattn.transformer.layers import TransformerEncoderLayer
from fastattn.transformer.model import Transformer, reset_matrices
from fastattn.transformer.pretrained import PretrainedModel


def _stack(config: TransformerConfig, num_layers: int, device: Any, dtype: Any) -> TransformerEncoder:
    """Self-attention layers for a model of one stack; a final norm where no layer ends on one (pre-norm)."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    norm = None
    if config.norm_first:
        norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias, **factory)
    stack = TransformerEncoder(TransformerEncoderLayer(**config.layer_arguments(), **factory), num_layers, norm)
    reset_matrices(stack)
    return stack


class EncoderModel(PretrainedModel):
    """Encoder-only: every token sees every token (BERT; masked language modelling)."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        self.embedding = TokenEmbedding(config, config.vocab_size, device, dtype)
        self.encoder = _stack(config, config.num_encoder_layers, device, dtype)
        self.head = VocabularyHead(config, self.embedding)

    def encode(self, tokens: Tensor, padding: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Hidden states ``(batch, seq, d_model)``; ``padding`` is taken as it is given (None: there is none)."""
        return self.encoder(self.embedding(tokens, padding, segments=segments), src_key_padding_mask=padding)

    def forward(self, tokens: Tensor, padding: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits ``(batch, seq, vocab_size)``.

        Args:
            tokens: integers ``(batch, seq)``.
            padding: bool ``(batch, seq)``, True = padding. Default: where the token is ``config.padding_id``.
            segments: integers ``(batch, seq)`` in [0, ``config.num_segments``). Default: all 0.

        Raises:
            ValueError: the shape or type of ``tokens``, or more than ``config.max_length`` of them.
            IndexError: a token id outside the vocabulary.
        """
        padding = self.embedding.padding_mask(tokens) if padding is None else padding
        return self.head(self.encode(tokens, padding, segments))


class Pooler(nn.Module):
    """One vector per sequence, ``tanh(W h + b)`` of one position's state ``h`` (arXiv 1810.04805).

    The position is the first token that is not padding or, ``last=True``, the last: in a causal model only that one
    has seen the whole sequence.
    """

    def __init__(self, d_model: int, last: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.last = last

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            return torch.tanh(self.dense(hidden[:, -1 if self.last else 0]))
        index = torch.arange(hidden.shape[1], device=hidden.device)
        index = torch.where(padding, -1, index).amax(1) if self.last else (~padding).int().argmax(1)
        rows = torch.arange(len(hidden), device=hidden.device)
        return torch.tanh(self.dense(hidden[rows, index.clamp(min=0)]))


class PretrainingModel(EncoderModel):
    """An :class:`EncoderModel` with a second head: masked language modelling and next-sentence prediction (BERT)."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config, device, dtype)
        self.pooler = Pooler(config.d_model, device=device, dtype=dtype)
        self.next_sentence = nn.Linear(config.d_model, 2, device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, padding: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, seq, vocab_size)`` of the tokens and ``(batch, 2)`` of "is not" and "is" the next sentence.

        Arguments and errors as in :class:`EncoderModel`.
        """
        padding = self.embedding.padding_mask(tokens) if padding is None else padding
        hidden = self.encode(tokens, padding, segments)
        return self.head(hidden), self.next_sentence(self.pooler(hidden, padding))


class SequenceClassifier(PretrainedModel):
    """A label for a whole sequence: a stack, a :class:`Pooler`, dropout and a linear layer.

    Its parameters carry the names that they have in :class:`PretrainingModel` (``causal=False``) or in
    :class:`CausalLM` (``causal=True``), so that :meth:`load_pretrained` takes the stack over from those.

    Args:
        config: sizes; ``num_encoder_layers`` of them, or ``num_decoder_layers`` when ``causal``.
        num_labels: labels, at least 1.
        causal: every token sees itself and those before it, and the last one is pooled. Default False.
    """

    def __init__(
        self, config: TransformerConfig, num_labels: int, causal: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(config, num_labels=num_labels, causal=causal)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        self.embedding = TokenEmbedding(config, config.vocab_size, device, dtype)
        num_layers = config.num_decoder_layers if causal else config.num_encoder_layers
        self.stack_name = "decoder" if causal else "encoder"
        self.add_module(self.stack_name, _stack(config, num_layers, device, dtype))
        self.pooler = Pooler(config.d_model, causal, device, dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, num_labels, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, padding: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits ``(batch, num_labels)``; arguments and errors as in :class:`EncoderModel`."""
        padding = self.embedding.padding_mask(tokens) if padding is None else padding
        x = self.embedding(tokens, padding, segments=segments)
        stack = self.get_submodule(self.stack_name)
        hidden = stack(x, src_key_padding_mask=padding, is_causal=self.stack_name == "decoder")
        return self.classifier(self.dropout(self.pooler(hidden, padding)))


class CausalLM(PretrainedModel):
    """Decoder-only: every token sees itself and those before it, and predicts the next (GPT)."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
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


class Seq2SeqTransformer(PretrainedModel):
    """Encoder-decoder on tokens: predicts the next target token from the source and the target so far."""

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
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
