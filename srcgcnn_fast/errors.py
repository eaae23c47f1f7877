"""The one exception for bad input, the words of others, and the check for optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Bad input. Its message is one sentence that names the input and says what to do."""


_LONGEST = 400
"""Characters of somebody else's message."""


def one_line(error: object) -> str:
    """The reason of an exception in one line without a final full stop; its type, where it gives none."""
    text = " ".join(str(error).split()).rstrip(".")
    return (text if len(text) < _LONGEST else f"{text[:_LONGEST]} …") or type(error).__name__


def require(module: str, purpose: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Raises:
        InputError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        if error.name and error.name.partition(".")[0] != root:
            raise
        message = f'{purpose} needs {root}: python -m pip install "srcgcnn_fast[{extra}]"'
        raise InputError(message) from error
