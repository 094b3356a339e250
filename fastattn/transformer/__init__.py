"""The reference transformer: encoder, decoder and whole models on :class:`fastattn.MultiHeadAttention`."""

from fastattn.kv_cache import KVCache
from fastattn.transformer.beam import Beams, generate_beam
from fastattn.transformer.config import TransformerConfig
from fastattn.transformer.decoder import TransformerDecoder
from fastattn.transformer.encoder import TransformerEncoder
from fastattn.transformer.generation import filter_logits, generate_greedy, generate_sample
from fastattn.transformer.heads import (
    CausalLM,
    EncoderModel,
    PretrainingModel,
    Seq2SeqTransformer,
    SequenceClassifier,
)
from fastattn.transformer.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.transformer.model import Transformer
from fastattn.transformer.objectives import (
    IGNORED,
    causal_lm_loss,
    cross_entropy,
    mask_tokens,
    next_sentence_pairs,
    seq2seq_loss,
)
from fastattn.transformer.positional import SinusoidalPositionalEncoding, sinusoidal_encoding
from fastattn.transformer.pretrained import LoadReport, PretrainedModel

__all__ = [
    "IGNORED",
    "Beams",
    "CausalLM",
    "EncoderModel",
    "KVCache",
    "LoadReport",
    "PretrainedModel",
    "PretrainingModel",
    "Seq2SeqTransformer",
    "SequenceClassifier",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "causal_lm_loss",
    "cross_entropy",
    "filter_logits",
    "generate_beam",
    "generate_greedy",
    "generate_sample",
    "mask_tokens",
    "next_sentence_pairs",
    "seq2seq_loss",
    "sinusoidal_encoding",
]
