"""From whatever the user has to a prepared store, once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from ..graph.parameters import GraphParameters
from ..graph.store import GraphStore, open_store, prepare

Source = str | os.PathLike[str] | GraphStore | Iterable[Any]
"""A prepared store or its path, anything on disk that ``prepare`` reads, or structures."""


def prepared(
    source: Source,
    target: str,
    cache_dir: str | os.PathLike[str],
    parameters: GraphParameters | None = None,
    progress: bool = False,
) -> GraphStore:
    """The store of ``source``; what is not prepared yet is prepared into ``cache_dir`` and found there next time.

    The name of the cached store changes with the files of the source, their times, the target and ``parameters``.

    Raises:
        InputError: nothing readable is there, or a given store was prepared with other ``parameters``.
    """
    store = _existing(source)
    if store is not None:
        if parameters is not None and parameters != store.parameters:
            raise InputError(f"{source} was prepared with {store.parameters}; prepare it again, or drop the options.")
        return store
    parameters = parameters or GraphParameters()
    if not isinstance(source, str | os.PathLike):
        return prepare(source, Path(cache_dir) / "graphs", parameters, progress=progress)
    if not Path(source).exists():
        raise InputError(f"There is no {source}; give a file, a folder or a prepared store.")
    path = Path(cache_dir) / f"graphs-{_fingerprint(Path(source), target, parameters)}"
    return open_store(path) if path.exists() else prepare(source, path, parameters, targets=[target], progress=progress)


def _fingerprint(source: Path, target: str, parameters: GraphParameters) -> str:
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    text = json.dumps([__version__, stats, target, asdict(parameters)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
