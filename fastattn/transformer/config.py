"""The sizes of a token model: :class:`TransformerConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from fastattn.transformer.layers import get_activation


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a token model. The same configuration serves every kind: each uses the layers it has.

    Attributes:
        vocab_size: number of tokens; of source tokens when ``tgt_vocab_size`` is given.
        tgt_vocab_size: of target tokens. Default None: source and target share one vocabulary and one embedding.
        padding_id: the token that is padding wherever no padding mask is given. Default None: no token is.
        max_length: longest sequence accepted. Default None: any, positions are computed.
        num_segments: kinds of segment, such as 2 for the two sentences of next-sentence prediction; each has a learned
            vector that is added to its tokens. Default 0: none.
        tie_head: the output head is the (target) token embedding, transposed. Default True.
        num_encoder_layers: layers of the encoder models and of a :class:`Seq2SeqTransformer`'s encoder.
        num_decoder_layers: layers of a :class:`CausalLM` and of a :class:`Seq2SeqTransformer`'s decoder.
        d_model, nhead, num_kv_heads, dim_feedforward, dropout, activation, layer_norm_eps, norm_first, bias:
            as in :class:`Transformer`.
    """

    vocab_size: int
    tgt_vocab_size: int | None = None
    padding_id: int | None = None
    max_length: int | None = None
    num_segments: int = 0
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
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {self.dropout}")
        if self.num_segments < 0:
            raise ValueError(f"num_segments must not be negative, got {self.num_segments}")
        get_activation(self.activation)

    def layer_arguments(self) -> dict[str, Any]:
        """The arguments of a layer of this configuration; token models are batch-first."""
        names = ("d_model", "nhead", "num_kv_heads", "dim_feedforward", "dropout", "activation", "layer_norm_eps")
        return {n: getattr(self, n) for n in (*names, "norm_first", "bias")} | {"batch_first": True}

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, to be read by :meth:`from_dict`.

        Raises:
            ValueError: ``activation`` is a function: only a name can be written down.
        """
        if not isinstance(self.activation, str):
            raise ValueError(f"a configuration is saved with a named activation; {self.activation!r} is a function")
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ValueError: a name that no field has, no ``vocab_size``, or a value that is none.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or "vocab_size" not in values:
            what = f"unknown: {', '.join(unknown)}" if unknown else "no vocab_size"
            raise ValueError(f"not a TransformerConfig ({what})")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a TransformerConfig ({error})") from error
