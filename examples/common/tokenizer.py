"""Byte-pair encoding with a vocabulary shared by all text, by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.common.errors import UserError, require
from examples.common.files import write_text

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
#: The bytes and the special tokens: a vocabulary cannot be smaller.
SMALLEST = 256 + len(SPECIAL)


class Tokenizer:
    """Text to token ids and back. It works on UTF-8 bytes, so no character is unknown and every text comes back."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most ``vocab_size`` tokens from texts."""
        tokenizers = require("tokenizers")
        if vocab_size < SMALLEST:
            raise UserError(f"--vocab-size must be at least {SMALLEST} (bytes and special tokens), got {vocab_size}")
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.normalizer = tokenizers.normalizers.NFC()
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """What :meth:`save` wrote."""
        tokenizers = require("tokenizers")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error

    def save(self, path: Path) -> None:
        write_text(path, self.inner.to_str(pretty=True))

    def __len__(self) -> int:
        return int(self.inner.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        Raises:
            UserError: a text holds a lone surrogate, which stands for a byte that was not UTF-8.
        """
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"sentence {i + 1} is not UTF-8: {text[:60]!r}") from error
        return [encoding.ids for encoding in self.inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """The texts; special tokens are left out."""
        return [text.strip() for text in self.inner.decode_batch([list(row) for row in ids])]
