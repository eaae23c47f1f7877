"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from .errors import InputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what was written there replaces ``path`` on success.

    On an exception the temporary file (or directory) is removed and ``path`` stays as it was.

    Raises:
        InputError: the directory of ``path`` cannot be created or written, or ``path`` cannot be replaced.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"Cannot write {target}: {error.strerror or error}; choose a directory that you may write to."
        ) from error
    try:
        temporary = scratch / target.name
        yield temporary
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"Cannot write {target}: {error.strerror or error}; choose another name.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what processes killed inside :func:`atomic_path` left beside ``path``; nobody else may write it now."""
    target = Path(path)
    for scratch in target.parent.glob(f".{escape(target.name)}." + 8 * "[a-z0-9_]"):  # as tempfile names them
        shutil.rmtree(scratch, ignore_errors=True)
