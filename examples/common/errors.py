"""Errors that a user can mend: one line on the terminal, no traceback."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """What the user gave cannot be used; the message names it and says what would do."""


def require(module: str) -> Any:
    """Import an optional library; where it is missing, say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.split(".")[0]
        if (error.name or "").split(".")[0] != name:
            raise
        raise UserError(
            f"{name} is not installed; install what the examples need: pip install 'fastattn[examples]'"
        ) from None


def run(main: Callable[[], None]) -> None:
    """Run a program; a :class:`UserError` ends it with its message and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
