"""One crystal as a graph, and many as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import is_
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .elements import element_features


def outside_inference_mode(build: Callable[[], Any]) -> Any:
    """What ``build`` makes, of tensors that training may keep as well."""
    if not torch.is_inference_mode_enabled():
        return build()
    with torch.inference_mode(False), torch.no_grad():
        return build()


@dataclass(frozen=True)
class CrystalGraph:
    """A crystal graph in CSR form: n rows (atoms, or symmetry classes of atoms) and e directed edges.

    Edges are sorted by receiver; row ``i`` receives from ``sender[row_ptr[i]:row_ptr[i + 1]]``.
    """

    numbers: np.ndarray
    """(n,) int32, atomic numbers."""
    weight: np.ndarray
    """(n,) float32, atoms that the row stands for (1 in a full graph)."""
    sender: np.ndarray
    """(e,) int32, row of the neighbour."""
    distance: np.ndarray
    """(e,) float32 or float64, Å."""
    row_ptr: np.ndarray
    """(n + 1,) int32."""
    atom_class: np.ndarray
    """(n_atoms,) int32, row of every atom of the full cell."""
    atom_features: np.ndarray | None = None
    """(n, A) float32, in place of the element table."""
    edge_features: np.ndarray | None = None
    """(e, K) float32, in place of the Gaussians of ``distance``."""
    image: np.ndarray | None = None
    """(e, 3) int32, lattice translation of the neighbour (full graphs only)."""

    @property
    def n_rows(self) -> int:
        return len(self.numbers)

    @property
    def n_edges(self) -> int:
        return len(self.sender)

    @property
    def n_atoms(self) -> int:
        return len(self.atom_class)


@dataclass
class GraphBatch:
    """B crystal graphs as one disjoint graph of N rows and E edges; what every model and operator takes."""

    numbers: torch.Tensor
    """(N,) int32, atomic numbers."""
    weight: torch.Tensor
    """(N,) float32, atoms that the row stands for."""
    sender: torch.Tensor
    """(E,) int32, row of the neighbour, counted through the batch."""
    distance: torch.Tensor
    """(E,) float32 (float64 on request), Å."""
    row_ptr: torch.Tensor
    """(N + 1,) int32, edges of each row."""
    crystal_ptr: torch.Tensor
    """(B + 1,) int32, rows of each crystal."""
    atom_class: torch.Tensor
    """(n_atoms,) int32, row of every atom of the full cells."""
    atom_features: torch.Tensor | None = None
    """(N, A), in place of the element table."""
    edge_features: torch.Tensor | None = None
    """(E, K), in place of the Gaussians of ``distance``."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What follows from the graph alone, built once for the tensors that are here (:meth:`cached`)."""

    @property
    def num_rows(self) -> int:
        return self.numbers.shape[0]

    @property
    def num_edges(self) -> int:
        return self.sender.shape[0]

    @property
    def num_crystals(self) -> int:
        return self.crystal_ptr.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.sender.device

    @property
    def receiver(self) -> torch.Tensor:
        """(E,) int64, the row that each edge ends in."""
        return self.cached("receiver", lambda: _expand(self.row_ptr, self.num_edges))

    @property
    def atom_crystal(self) -> torch.Tensor:
        """(N,) int64, the crystal of each row."""
        return self.cached("atom_crystal", lambda: _expand(self.crystal_ptr, self.num_rows))

    def cached(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` makes of this graph alone, made once and kept in ``cache``.

        It is made anew after a tensor was exchanged or written to; of tensors from inference mode, which do not count
        what is written to them, it is made every time. (Writing through NumPy or ``.data`` leaves no trace.)
        """
        if torch.compiler.is_compiling():  # a traced graph must not fill a cache with its own symbols
            return build()
        if self.sender.is_cuda and torch.cuda.is_current_stream_capturing():
            return build()  # part of the CUDA graph, since a replay may bring other edges
        found = self.kept(key)
        if found is None:
            known = self._tensors(), self._versions()
            found = outside_inference_mode(build)
            if known[1] is not None:
                self.cache[key] = found, *known
        return found

    def kept(self, key: Any) -> Any:
        """What :meth:`cached` keeps for ``key``, if it is of the tensors as they are now; else None."""
        if key not in self.cache:
            return None
        found, tensors, versions = self.cache[key]
        same = all(map(is_, tensors, self._tensors())) and versions == self._versions()
        return found if same else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what follows from the graph, ten times its size."""
        return {**self.__dict__, "cache": {}}

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight, self.sender, self.distance, self.row_ptr, self.crystal_ptr, self.edge_features

    def _versions(self) -> list[int] | None:
        try:
            return [x._version for x in self._tensors() if x is not None]
        except RuntimeError:  # tensors of inference mode have none
            return None

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> GraphBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cache"}
        mapped: dict[str, Any] = {k: v if v is None else function(v) for k, v in tensors.items()}
        return replace(self, **mapped, cache={})

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> GraphBatch:
        """Move to ``device``; ``dtype`` converts the floating-point tensors only."""

        def move(x: torch.Tensor) -> torch.Tensor:
            wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
            return x.to(device=device or x.device, dtype=wanted, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> GraphBatch:
        return self._map(torch.Tensor.pin_memory)


def _expand(ptr: torch.Tensor, length: int) -> torch.Tensor:
    index = torch.arange(ptr.shape[0] - 1, device=ptr.device)
    return torch.repeat_interleave(index, (ptr[1:] - ptr[:-1]).long(), output_size=length)


def offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n + 1,) int64, where each of n runs begins; the last is the end."""
    begins = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=begins[1:])
    return begins


def with_element_vectors(graphs: Sequence[CrystalGraph]) -> list[np.ndarray]:
    """Atom features of every graph: its own, or the built-in element vectors if all widths are theirs."""
    table = element_features()
    given = [table[g.numbers] if g.atom_features is None else g.atom_features for g in graphs]
    if any(x.shape[1] != table.shape[1] for x in given):
        own = sum(g.atom_features is not None for g in graphs)
        raise InputError(f"Only {own} of {len(graphs)} graphs carry atom_features; give it to all or to none.")
    return given


def check_graphs(graphs: Iterable[Any]) -> None:
    """Raises InputError: one of them is none."""
    for position, graph in enumerate(graphs):
        if isinstance(graph, InputError):
            raise InputError(f"Graph {position} could not be built ({graph}); leave it out.") from graph
        if not isinstance(graph, CrystalGraph):
            kind = type(graph).__name__
            raise InputError(f"Item {position} is a {kind}, no CrystalGraph; make one with build_graph().")


def collate(graphs: Iterable[CrystalGraph] | CrystalGraph, distance_dtype: torch.dtype = torch.float32) -> GraphBatch:
    """Join graphs, or one, into a batch on the CPU.

    Raises:
        InputError: no graph was given, or something else among them, the batch exceeds int32 indices, or only some
            graphs carry their own edge features, or atom features that are no mixtures of element vectors.
    """
    graphs = [graphs] if isinstance(graphs, CrystalGraph) else list(graphs)
    if not graphs:
        raise InputError("A batch needs at least one crystal graph; collate() was given none.")
    check_graphs(graphs)
    rows = offsets([g.n_rows for g in graphs])
    edges = offsets([g.n_edges for g in graphs])
    if max(rows[-1], edges[-1]) > np.iinfo(np.int32).max:
        raise InputError(f"A batch of {edges[-1]} edges is beyond 2^31 - 1; use smaller batches.")

    def join(arrays: Sequence[Any], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False))

    def optional(name: str) -> torch.Tensor | None:
        present = [getattr(g, name) for g in graphs if getattr(g, name) is not None]
        if not present:
            return None
        if name == "atom_features" and len(present) < len(graphs):
            present = with_element_vectors(graphs)
        if len(present) < len(graphs):
            raise InputError(f"Only {len(present)} of {len(graphs)} graphs carry {name}; give it to all or to none.")
        return join(present, np.float32)

    shifted = list(zip(graphs, rows[:-1], strict=True))
    return GraphBatch(
        numbers=join([g.numbers for g in graphs], np.int32),
        weight=join([g.weight for g in graphs], np.float32),
        sender=join([g.sender + r for g, r in shifted], np.int32),
        distance=join([g.distance for g in graphs], np.float64).to(distance_dtype),
        row_ptr=join([[0], *(g.row_ptr[1:] + e for g, e in zip(graphs, edges[:-1], strict=True))], np.int32),
        crystal_ptr=torch.from_numpy(rows.astype(np.int32)),
        atom_class=join([g.atom_class + r for g, r in shifted], np.int32),
        atom_features=optional("atom_features"),
        edge_features=optional("edge_features"),
    )
