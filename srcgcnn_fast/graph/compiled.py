"""Compiled kernels on disk, as fresh as all the files that they are compiled from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from importlib.resources import files
from typing import Any

logger = logging.getLogger(__name__)


@functools.cache
def sources() -> dict[str, bytes]:
    """Name -> SHA-256 of the files of this package that are compiled: ``vectors`` and those that import from it."""
    texts = {file.name: file.read_bytes() for file in files(__package__).iterdir() if file.name.endswith(".py")}
    compiled = (x for x in sorted(texts) if x == "vectors.py" or b"from .vectors import" in texts[x])
    return {name: hashlib.sha256(texts[name]).digest() for name in compiled}


def kept_on_disk(dispatcher: Any) -> Any:
    """Keep what ``dispatcher`` compiles on disk until one of ``sources`` changes.

    Numba looks at the file of the entry point alone, which may be the old one beside new helpers after an upgrade.
    Files that are damaged are compiled anew, and where they cannot be written the code stays in memory.

    Raises:
        RuntimeError: no directory is writable.
    """
    dispatcher.enable_caching()
    cache = dispatcher._cache
    file = cache._cache_file
    file._source_stamp = (file._source_stamp, sources())
    load, save = cache.load_overload, cache.save_overload

    def load_what_is_whole(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except Exception as error:  # whatever unpickling and LLVM make of a damaged file
            logger.warning("The compiled neighbour search in %s is damaged (%s).", cache.cache_path, _reason(error))
            with contextlib.suppress(OSError):  # then it cannot be written either, which the next function says
                file.flush()
            return None

    def save_if_possible(signature: Any, compiled: Any) -> None:
        try:
            save(signature, compiled)
        except Exception as error:
            logger.warning("The compiled neighbour search cannot be kept in %s (%s).", cache.cache_path, _reason(error))

    cache.load_overload, cache.save_overload = load_what_is_whole, save_if_possible
    return dispatcher


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
