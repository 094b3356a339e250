"""Models on disk: ``config.json`` beside ``model.safetensors``, and weights taken over into a model with a new head."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastattn.transformer.config import TransformerConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
Model = TypeVar("Model", bound="PretrainedModel")


@dataclass(frozen=True)
class LoadReport:
    """What became of the parameters when weights were loaded.

    Attributes:
        loaded: parameters that now hold the loaded values.
        missing: parameters of the model that the weights do not have; they keep their initial values.
        unused: weights that the model has no parameter for.
        mismatched: parameters of another shape than the weights of that name, with both shapes; they keep their
            initial values.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        parts = {"not in the weights": self.missing, "not in the model": self.unused, "other shape": self.mismatched}
        lines = [f"{len(self.loaded)} parameters loaded"]
        return "\n".join(lines + [f"{what}: {', '.join(names)}" for what, names in parts.items() if names])


class PretrainedModel(nn.Module):
    """A model that is made from a :class:`TransformerConfig` and can be saved and loaded.

    Args:
        config: its sizes.
        arguments: what else its constructor was given, written down beside the configuration.
    """

    def __init__(self, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__()
        self.config = config
        self._arguments = arguments

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made if need be.

        Each file is written whole and then renamed. Parameters that are tied are written once. The weights carry a
        checksum in their metadata.

        Raises:
            ValueError: the configuration holds a function (an activation without a name).
            ModuleNotFoundError: safetensors is not installed.
        """
        save_file = _safetensors().save_file
        described = {"model": type(self).__name__, "config": self.config.to_dict(), "arguments": self._arguments}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        part = folder / f"{WEIGHTS_FILE}.{os.getpid()}.part"
        save_file(weights, str(part), metadata={"format": "pt", "crc32": _checksum(weights)})
        part.replace(folder / WEIGHTS_FILE)
        part = folder / f"{CONFIG_FILE}.{os.getpid()}.part"
        part.write_text(json.dumps(described, indent=2) + "\n")
        part.replace(folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path, device: Any = None, dtype: Any = None) -> Model:
        """The model that :meth:`save_pretrained` wrote, in training mode as a new one is.

        Args:
            device, dtype: of the parameters. Default: the CPU, and the type they were saved in (that of the first).

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, was written by another class of model, or the two do not fit together.
            ModuleNotFoundError: safetensors is not installed.
        """
        described = _read_config(Path(folder))
        if described["model"] != cls.__name__:
            raise ValueError(
                f"{folder} holds a {described['model']}, not a {cls.__name__}; to take over the weights that fit, make "
                f"a {cls.__name__} and call load_pretrained"
            )
        weights = read_weights(folder)
        if dtype is None and weights:
            dtype = next(iter(weights.values())).dtype
        try:
            config = TransformerConfig.from_dict(described["config"])
            model = cls(config, **described["arguments"], device=device, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / CONFIG_FILE} does not describe a {cls.__name__}: {error}") from error
        report = model.load_weights(weights)
        if report.missing or report.unused or report.mismatched:
            raise ValueError(f"{Path(folder) / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {report}")
        return model

    def load_pretrained(self, folder: str | Path) -> LoadReport:
        """Take over from ``folder`` the weights whose name and shape fit, and say which did and which did not.

        Raises:
            FileNotFoundError, ValueError, ModuleNotFoundError: as in :meth:`from_pretrained`; ValueError too when no
                weight fits. The model is then as it was.
        """
        weights = read_weights(folder)
        own = dict(self.named_parameters())
        if not any(name in own and own[name].shape == w.shape for name, w in weights.items()):
            raise ValueError(f"no weight of {folder} fits this {type(self).__name__}")
        return self.load_weights(weights)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> LoadReport:
        """Copy into each parameter the tensor of its name, where the shapes agree."""
        own = dict(self.named_parameters())
        loaded, mismatched = [], []
        for name, parameter in own.items():
            if name not in weights:
                continue
            if weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])
                loaded.append(name)
            else:
                mismatched.append(f"{name} {tuple(parameter.shape)}, not {tuple(weights[name].shape)}")
        missing = tuple(name for name in own if name not in weights)
        unused = tuple(name for name in weights if name not in own)
        return LoadReport(tuple(loaded), missing, unused, tuple(mismatched))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of ``folder/model.safetensors``, by parameter name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
        ModuleNotFoundError: safetensors is not installed.
    """
    safe_open = _safetensors().safe_open
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_FILE} in {folder}: save_pretrained writes it")
    try:
        with safe_open(str(path), framework="pt") as file:
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("crc32", found := _checksum(weights)) != found:
            raise ValueError(f"its checksum is {found}, not {metadata['crc32']}")
    except Exception as error:  # safetensors raises its own type, or none in particular
        raise ValueError(f"{path} is damaged and cannot be read: {error}") from error
    return weights


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """Of the bytes of the tensors, in the order of their names; files by other hands need not have one."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {folder}: save_pretrained writes it")
    try:
        described = json.loads(path.read_text())
        return {name: described[name] for name in ("model", "config", "arguments")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or was not written by save_pretrained: {error!r}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models are saved and loaded with safetensors: pip install 'fastattn[examples]'"
        ) from error
    return safetensors.torch
