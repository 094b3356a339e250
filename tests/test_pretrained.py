"""Models on disk: the same model comes back, a new head takes over what fits, damage is told and loses nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import transformer as ft
from tests.tolerance import assert_rounded_alike

safetensors = pytest.importorskip("safetensors")
TOKENS = torch.tensor([[3, 4, 5], [6, 7, 0]])


def config(**changes: Any) -> ft.TransformerConfig:
    sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "num_encoder_layers": 2, "num_decoder_layers": 2}
    return ft.TransformerConfig(**({"vocab_size": 11, "padding_id": 0} | sizes | changes))


MODELS = {
    "encoder": lambda **c: ft.EncoderModel(config(**c)),
    "pre-training": lambda **c: ft.PretrainingModel(config(num_segments=2, **c)),
    "causal": lambda **c: ft.CausalLM(config(norm_first=True, activation="gelu", num_kv_heads=1, **c)),
    "two vocabularies": lambda **c: ft.Seq2SeqTransformer(config(tgt_vocab_size=9, **c)),
    "one vocabulary": lambda **c: ft.Seq2SeqTransformer(config(**c)),
    "classifier": lambda **c: ft.SequenceClassifier(config(**c), 3, causal=True),
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_comes_back(name: str, tie: bool, tmp_path: Path) -> None:
    model = MODELS[name](tie_head=tie)
    model.save_pretrained(tmp_path / "new" / "folder")
    twin = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert twin.config == model.config and twin.training
    expected, found = model.state_dict(), twin.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[k], found[k]) for k in expected)
    inputs = (TOKENS, TOKENS) if isinstance(model, ft.Seq2SeqTransformer) else (TOKENS,)
    for a, b in zip(model.eval()(*inputs), twin.eval()(*inputs), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    if tie and hasattr(twin, "head"):
        embedding = twin.tgt_embedding if isinstance(twin, ft.Seq2SeqTransformer) else twin.embedding
        assert twin.head.weight is embedding.weight


def test_types(tmp_path: Path) -> None:
    model = ft.CausalLM(config()).bfloat16()
    model.save_pretrained(tmp_path)
    assert ft.CausalLM.from_pretrained(tmp_path).head.weight.dtype is torch.bfloat16
    wide = ft.CausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(wide.head.weight, model.head.weight.double())


def test_a_new_head_takes_over_the_stack(tmp_path: Path) -> None:
    model = ft.PretrainingModel(config(num_segments=2))
    model.save_pretrained(tmp_path)
    new = ft.SequenceClassifier(config(num_segments=2), 4)
    head = new.classifier.weight.clone()
    report = new.load_pretrained(tmp_path)
    assert set(report.missing) == {"classifier.weight", "classifier.bias"}
    assert set(report.unused) == {"next_sentence.weight", "next_sentence.bias"} and not report.mismatched
    assert "not in the weights: classifier.weight" in str(report)
    assert torch.equal(new.classifier.weight, head)
    for name in report.loaded:
        assert torch.equal(new.state_dict()[name], model.state_dict()[name]), name
    hidden = model.eval().encode(TOKENS, TOKENS == 0)
    pooled = model.pooler(hidden, TOKENS == 0)
    assert_rounded_alike(new.eval()(TOKENS), new.classifier(pooled))


def test_other_shapes_are_told_and_left(tmp_path: Path) -> None:
    ft.CausalLM(config()).save_pretrained(tmp_path)
    larger = ft.CausalLM(config(vocab_size=13))
    before = larger.embedding.weight.clone()
    report = larger.load_pretrained(tmp_path)
    assert report.mismatched == ("embedding.weight (13, 16), not (11, 16)",)
    assert torch.equal(larger.embedding.weight, before) and "decoder.layers.0.linear1.weight" in report.loaded


def damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flipped_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x10
    path.write_bytes(content)


def changed_config(**values: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        described = json.loads(path.read_text())
        described["config"] |= values
        path.write_text(json.dumps(described))

    return change


BAD = {
    "cut weights": (damaged_weights, ValueError, "model.safetensors is damaged"),
    "flipped weights": (flipped_weights, ValueError, r"model.safetensors is damaged .* checksum"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "cut config": (lambda f: (f / "config.json").write_text('{"model": "Ca'), ValueError, "config.json is damaged"),
    "other sizes": (changed_config(vocab_size=12), ValueError, r"embedding.weight \(12, 16\), not \(11, 16\)"),
    "more layers": (changed_config(num_decoder_layers=3), ValueError, "not in the weights: decoder.layers.2"),
    "unknown field": (changed_config(width=3), ValueError, "unknown: width"),
    "no number": (changed_config(d_model="16"), ValueError, "config.json does not describe a CausalLM"),
    "no size": (changed_config(vocab_size=None), ValueError, "config.json does not describe a CausalLM"),
    "heads": (changed_config(nhead=3), ValueError, "config.json does not describe a CausalLM"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    damage, error, message = BAD[name]
    ft.CausalLM(config()).save_pretrained(tmp_path)
    damage(tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        ft.CausalLM.from_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left


def test_bad_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ft.CausalLM(config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a CausalLM, not a EncoderModel"):
        ft.EncoderModel.from_pretrained(tmp_path)
    other = ft.EncoderModel(config(d_model=32))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"no weight of .* fits this EncoderModel"):
        other.load_pretrained(tmp_path)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="is a function"):
        ft.CausalLM(config(activation=torch.tanh)).save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastattn\[examples\]"):
        ft.CausalLM.from_pretrained(tmp_path)


def test_configuration_is_frozen_and_plain() -> None:
    sizes = config(num_kv_heads=1)
    assert ft.TransformerConfig.from_dict(json.loads(json.dumps(sizes.to_dict()))) == sizes
    with pytest.raises(dataclasses.FrozenInstanceError):
        sizes.d_model = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="no vocab_size"):
        ft.TransformerConfig.from_dict({"d_model": 3})
