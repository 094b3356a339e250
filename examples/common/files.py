"""Text files: whole or not there when written, one clear error when they cannot be read."""

from __future__ import annotations

from pathlib import Path

from examples.common.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write ``path``; a kill at any moment leaves the old content or the new."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: there is no such file, it is not UTF-8, or there is nothing in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text
