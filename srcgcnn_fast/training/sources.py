"""From whatever the user has to a prepared store, once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..graph.parameters import GraphParameters
from ..graph.store import GraphStore, open_store, prepare

Source = str | os.PathLike[str] | GraphStore | Iterable[Any]
"""A prepared store or its path, anything on disk that ``prepare`` reads, or structures."""


def prepared(
    source: Source, path: str | os.PathLike[str], parameters: GraphParameters | None = None, progress: bool = False
) -> GraphStore:
    """The store of ``source``; what is not prepared yet is prepared into ``path``, and found there the next time.

    Raises:
        InputError: nothing readable is there, or a given store was prepared with other ``parameters``.
    """
    if isinstance(source, GraphStore):
        store = source
    elif isinstance(source, str | os.PathLike) and (Path(source) / "row_count.npy").is_file():
        store = open_store(source)
    else:
        return prepare(source, path, parameters, progress=progress)
    if parameters is not None and parameters != store.parameters:
        raise InputError(f"{source} was prepared with {store.parameters}; prepare it again, or drop the graph options.")
    return store
