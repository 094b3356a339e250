"""Sizes and training for each kind of data."""

from __future__ import annotations

from typing import Any

#: Grammar of numbers, sized for two CPU cores.
NUMBERS: dict[str, Any] = {
    "train_pairs": 60_000, "held_out": 1000, "vocab_size": 512, "max_length": 96,
    "d_model": 128, "heads": 4, "layers": 2, "feedforward": 512, "dropout": 0.0, "activation": "relu", "norm": "pre",
    "label_smoothing": 0.1,
    "steps": 2200, "max_tokens": 2048, "learning_rate": 2e-3, "warmup": 150, "cooldown": 0.5,
    "validate_every": 550, "checkpoint_every": 110, "report_every": 50,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "numbers": NUMBERS,
    #: What `make demo` trains: the same in half the steps.
    "demo": NUMBERS | {"held_out": 500, "steps": 1100},
    #: The base model of arXiv 1706.03762, for real corpora on a GPU.
    "base": {
        "held_out": 2000, "vocab_size": 37_000, "max_length": 256,
        "d_model": 512, "heads": 8, "layers": 6, "feedforward": 2048, "dropout": 0.1, "activation": "relu",
        "norm": "post", "label_smoothing": 0.1,
        "steps": 100_000, "max_tokens": 25_000, "accumulate": 2, "learning_rate": 7e-4, "warmup": 4000, "clip": 1.0,
        "validate_every": 2000, "checkpoint_every": 1000, "report_every": 100,
    },
}  # fmt: skip
