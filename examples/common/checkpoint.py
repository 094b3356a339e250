"""Checkpoints that are whole or not there, with the one before kept."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from examples.common.errors import UserError

KEYS = {"step", "model", "optimiser", "random", "data", "options"}
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``folder/checkpoint.pt``; a kill at any moment leaves this one or the one before, whole."""
    part = folder / f"{NAME}.part"
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if (folder / NAME).exists():
        (folder / NAME).replace(folder / PREVIOUS)
    part.replace(folder / NAME)


def find(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None. A kill between two renames leaves only the previous one."""
    return next((path for path in (folder / NAME, folder / PREVIOUS) if path.exists()), None)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        UserError: the file is damaged. Nothing is changed or deleted.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            if broken := archive.testzip():
                raise ValueError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= KEYS:
            raise ValueError("no training state in it")
        return state
    except Exception as error:
        advice = f"move it away to start anew (nothing has been deleted; {path.parent} is as it was)"
        previous = path.with_name(PREVIOUS)
        if path.name == NAME and previous.exists():
            advice = f"move it away to go on from the one before it, {previous}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged and cannot be read ({reason}); {advice}") from error
