"""From whatever the user has to a prepared store, once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import InputError
from ..graph.parameters import GraphParameters
from ..graph.store import GraphStore, is_store, name_it, open_store, prepare

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | GraphStore | Iterable[Any]
"""A prepared store or its path, anything on disk that ``prepare`` reads, or structures."""


def prepared(
    source: Source,
    path: str | os.PathLike[str],
    parameters: GraphParameters | None = None,
    progress: bool = False,
    *,
    targets: str | Sequence[str] | None = None,
    default: GraphParameters | None = None,
) -> GraphStore:
    """The store of ``source``; what is not prepared yet is prepared into ``path``, and found there the next time.

    Inputs without a graph are counted in the log. ``targets`` are what is read from a source that is not a store;
    without ``parameters`` such a source takes ``default``.

    Raises:
        InputError: nothing readable is there, the source has no such target, or a given store was prepared with
            other ``parameters``.
    """
    if isinstance(source, GraphStore):
        store = source
    elif isinstance(source, str | os.PathLike) and is_store(source):
        store = open_store(source)
    else:
        store = prepare(source, path, parameters or default, targets=targets, progress=progress)
        if store.n_rejected:
            inputs, first = len(store) + store.n_rejected, name_it(*store.rejected[0])
            logger.warning("%d of %d inputs are left out; the first: %s", store.n_rejected, inputs, first)
        return store
    if parameters is not None and parameters != store.parameters:
        raise InputError(f"{source} was prepared with {store.parameters}; prepare it again, or drop the graph options.")
    return store
