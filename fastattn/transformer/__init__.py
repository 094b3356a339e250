"""The reference transformer: encoder, decoder and whole models on :class:`fastattn.MultiHeadAttention`."""

from fastattn.transformer.cache import KVCache
from fastattn.transformer.decoder import TransformerDecoder
from fastattn.transformer.encoder import TransformerEncoder
from fastattn.transformer.generation import generate_greedy
from fastattn.transformer.heads import CausalLM, EncoderModel, Seq2SeqTransformer, TransformerConfig
from fastattn.transformer.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.transformer.model import Transformer
from fastattn.transformer.positional import SinusoidalPositionalEncoding, sinusoidal_encoding

__all__ = [
    "CausalLM",
    "EncoderModel",
    "KVCache",
    "Seq2SeqTransformer",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "generate_greedy",
    "sinusoidal_encoding",
]
