"""Compiled kernels on disk, as fresh as all the files that they are compiled from."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from typing import Any


@functools.cache
def sources() -> dict[str, bytes]:
    """Name -> SHA-256 of the files of this package that are compiled: ``vectors`` and those that import from it."""
    texts = {file.name: file.read_bytes() for file in files(__package__).iterdir() if file.name.endswith(".py")}
    compiled = (x for x in sorted(texts) if x == "vectors.py" or b"from .vectors import" in texts[x])
    return {name: hashlib.sha256(texts[name]).digest() for name in compiled}


def kept_on_disk(dispatcher: Any) -> Any:
    """Keep what ``dispatcher`` compiles on disk until one of ``sources`` changes.

    Numba looks at the file of the entry point alone, which may be the old one beside new helpers after an upgrade.

    Raises:
        RuntimeError: no directory is writable.
    """
    dispatcher.enable_caching()
    file = dispatcher._cache._cache_file
    file._source_stamp = (file._source_stamp, sources())
    return dispatcher
