"""From crystals to graphs: batching, and the checks before native code."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from .batch import CrystalGraph, offsets
from .crystal import AnyCrystal, Composition, MixedCrystal, mixed_features
from .elements import MAX_ATOMIC_NUMBER
from .parameters import GraphParameters

logger = logging.getLogger(__name__)

_TIE_TOLERANCE = 1e-5  # Å; distances of a full graph that count as equal when neighbours are chosen
_CHUNK_ATOMS = 4096  # atoms per kernel call where there are several threads, at least
_BATCH_ATOMS = 100_000  # atoms that build_graphs collects before it calls the kernels
_MAX_COORDINATE = 1e9
_CROWDED = 0.5  # Å; the shortest bond, of hydrogen, has 0.74
_COMPILE_SECONDS = 20


class Mixture(NamedTuple):
    """Sites or rows of one crystal that hold more or less than one full atom."""

    kind: np.ndarray
    """(n,) int32, 0 for one full atom, k for ``compositions[k - 1]``."""
    compositions: Sequence[Composition]


class PackedGraphs(NamedTuple):
    """Graphs of B crystals as concatenated arrays: R rows, E edges, A atoms; a failed crystal has none of them."""

    numbers: np.ndarray
    """(R,) int32, atomic numbers."""
    weight: np.ndarray
    """(R,) float32, atoms that the row stands for."""
    sender: np.ndarray
    """(E,) int32, row of the neighbour, counted within its crystal."""
    distance: np.ndarray
    """(E,) float64, Å."""
    row_ptr: np.ndarray
    """(R + 1,) int64, edges of each row, counted through the batch."""
    crystal_ptr: np.ndarray
    """(B + 1,) int64, rows of each crystal."""
    edge_ptr: np.ndarray
    """(B + 1,) int64, edges of each crystal."""
    atom_class: np.ndarray
    """(A,) int32, row of every atom, counted within its crystal."""
    atom_ptr: np.ndarray
    """(B + 1,) int64, atoms of each crystal."""
    image: np.ndarray | None
    """(E, 3) int32, lattice translation of the neighbour; None for symmetry quotients."""
    errors: dict[int, str]
    """What was wrong with each crystal that failed, one sentence each."""
    mixtures: Mapping[int, Mixture] = MappingProxyType({})
    """Of each crystal with averaged sites, for its rows."""

    def graph(self, index: int, distance_dtype: Any = np.float32) -> CrystalGraph:
        """The graph of one crystal (its arrays are views where they can be).

        Raises:
            InputError: that crystal failed.
        """
        if index in self.errors:
            raise InputError(self.errors[index])
        r0, r1 = self.crystal_ptr[index : index + 2]
        e0, e1 = self.edge_ptr[index : index + 2]
        return CrystalGraph(
            numbers=self.numbers[r0:r1],
            weight=self.weight[r0:r1],
            sender=self.sender[e0:e1],
            distance=self.distance[e0:e1].astype(distance_dtype),
            row_ptr=(self.row_ptr[r0 : r1 + 1] - e0).astype(np.int32),
            atom_class=self.atom_class[self.atom_ptr[index] : self.atom_ptr[index + 1]],
            atom_features=self._features(index),
            image=None if self.image is None else self.image[e0:e1],
        )

    def _features(self, index: int) -> np.ndarray | None:
        if index not in self.mixtures:
            return None
        return mixed_features(
            self.numbers[self.crystal_ptr[index] : self.crystal_ptr[index + 1]], *self.mixtures[index]
        )

    def graphs(self, distance_dtype: Any = np.float32) -> list[CrystalGraph | InputError]:
        """The graph of every crystal, views of common arrays; an InputError in the place of one that failed."""
        distance = self.distance.astype(distance_dtype, copy=False)
        rows = np.diff(self.crystal_ptr)
        crystal = np.repeat(np.arange(len(rows)), rows + 1)
        row_ptr = (self.row_ptr[np.arange(len(crystal)) - crystal] - self.edge_ptr[crystal]).astype(np.int32)
        of_rows, of_edges, of_atoms = (_slices(x) for x in (self.crystal_ptr, self.edge_ptr, self.atom_ptr))
        of_bounds = _slices(self.crystal_ptr + np.arange(len(rows) + 1))
        arrays = zip(
            map(self.numbers.__getitem__, of_rows),
            map(self.weight.__getitem__, of_rows),
            map(self.sender.__getitem__, of_edges),
            map(distance.__getitem__, of_edges),
            map(row_ptr.__getitem__, of_bounds),
            map(self.atom_class.__getitem__, of_atoms),
            strict=True,
        )
        graphs = []
        for numbers, weight, sender, distances, bounds, atom_class in arrays:
            graph = CrystalGraph.__new__(CrystalGraph)
            held = graph.__dict__  # the constructor of a frozen class takes three times as long
            held["numbers"], held["weight"], held["sender"], held["distance"] = numbers, weight, sender, distances
            held["row_ptr"], held["atom_class"] = bounds, atom_class  # the others are None, by default
            graphs.append(graph)
        if self.image is not None:
            for graph, edges in zip(graphs, of_edges, strict=True):
                graph.__dict__["image"] = self.image[edges]
        for b in self.mixtures:
            graphs[b] = replace(graphs[b], atom_features=self._features(b))
        made: list[CrystalGraph | InputError] = [*graphs]
        for b, error in self.errors.items():
            made[b] = InputError(error)
        return made


def _slices(ptr: np.ndarray) -> list[slice]:
    bounds = ptr.tolist()
    return list(map(slice, bounds, bounds[1:]))


def build_packed(
    lattices: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    ptr: np.ndarray,
    parameters: GraphParameters | None = None,
    mixtures: Mapping[int, Mixture] | None = None,
) -> PackedGraphs:
    """Graphs of B crystals that are given as concatenated arrays.

    Runs on ``torch.get_num_threads()`` threads; the result does not depend on how many.

    Args:
        lattices: (B, 3, 3), rows a b c in Å.
        frac_coords: (N, 3), in any cell.
        numbers: (N,) atomic numbers.
        ptr: (B + 1,), atoms of crystal b are ``ptr[b]:ptr[b + 1]``.
        parameters: GraphParameters() if None.
        mixtures: the averaged sites of the crystals that have some; ``numbers`` holds their largest part.

    Raises:
        InputError: the shapes do not fit together. What is wrong with one crystal goes to ``errors`` instead.
    """
    parameters = parameters or GraphParameters()
    lattices, frac_coords = _kernel_array(lattices, np.float64), _kernel_array(frac_coords, np.float64)
    ptr = _kernel_array(ptr, np.int64)
    wide_numbers = np.asarray(numbers)
    crystals = len(ptr) - 1
    if (
        ptr.ndim != 1
        or crystals < 0
        or lattices.shape != (crystals, 3, 3)
        or frac_coords.shape != (len(wide_numbers), 3)
        or ptr[0] != 0
        or ptr[-1] != len(wide_numbers)
        or (np.diff(ptr) < 0).any()
    ):
        raise InputError(
            f"Packed crystals are lattices (B, 3, 3), frac_coords (N, 3), numbers (N,) and ptr (B + 1,) from 0 to N, "
            f"not {lattices.shape}, {frac_coords.shape}, {wide_numbers.shape} and {ptr.shape}; correct the arrays."
        )
    errors = _unusable(lattices, frac_coords, wide_numbers, ptr)
    if errors:
        lattices, frac_coords, wide_numbers, ptr = _without(errors, lattices, frac_coords, wide_numbers, ptr)
    numbers = _kernel_array(wide_numbers, np.int32)
    species = numbers
    good = np.arange(crystals)
    if errors:
        good = np.delete(good, list(errors))
    if mixtures:
        species = numbers.copy()  # a composition is a species of its own, behind the elements
        for k, b in enumerate(good.tolist()):
            if b in mixtures:
                kind = mixtures[b].kind
                species[ptr[k] : ptr[k + 1]] = np.where(
                    kind > 0, MAX_ATOMIC_NUMBER + kind, numbers[ptr[k] : ptr[k + 1]]
                )
    threads = torch.get_num_threads()
    chunks = _chunks(ptr, threads)
    threads = min(len(chunks), threads)
    _announce_compilation()

    def run(chunk: tuple[int, int]) -> tuple[np.ndarray, ...]:
        return _run_kernels(lattices, frac_coords, species, ptr, chunk, parameters)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(run, chunks))
    else:
        results = [run(chunk) for chunk in chunks]
    packed = _join(results, good, crystals, numbers, ptr, parameters, errors)
    return _with_mixtures(packed, mixtures) if mixtures else packed


def build_crystals(crystals: Sequence[AnyCrystal], parameters: GraphParameters) -> PackedGraphs:
    """:func:`build_packed` of one crystal or more that are checked."""
    return build_packed(
        np.concatenate([c.lattice for c in crystals]).reshape(-1, 3, 3),
        np.concatenate([c.frac_coords for c in crystals]),
        np.concatenate([c.numbers for c in crystals]),
        offsets([len(c.numbers) for c in crystals]),
        parameters,
        {b: Mixture(c.kind, c.compositions) for b, c in enumerate(crystals) if isinstance(c, MixedCrystal)},
    )


def _with_mixtures(packed: PackedGraphs, mixtures: Mapping[int, Mixture]) -> PackedGraphs:
    """Rows of averaged sites: the element with the largest part as their number, and what they hold."""
    by_row: dict[int, Mixture] = {}
    for b, mixture in mixtures.items():
        if b not in packed.errors:
            rows = packed.numbers[packed.crystal_ptr[b] : packed.crystal_ptr[b + 1]]
            kind = np.maximum(rows - MAX_ATOMIC_NUMBER, 0)
            largest = [0, *(max(x, key=lambda pair: (pair[1], -pair[0]))[0] for x in mixture.compositions)]
            rows[:] = np.where(kind > 0, np.array(largest)[kind], rows)
            by_row[b] = Mixture(kind, mixture.compositions)
    return packed._replace(mixtures=by_row)


def _kernel_array(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Contiguous and writable, so that a kernel is compiled for one kind of array only."""
    return np.require(array, dtype=dtype, requirements=["C", "W"])


def _unusable(lattices: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, ptr: np.ndarray) -> dict[int, str]:
    """What native code must not see, by crystal."""
    errors: dict[int, str] = {}
    if (
        numbers.dtype.kind in "iu"
        and (ptr[1:] > ptr[:-1]).all()
        and (not len(numbers) or (numbers.min() >= 1 and numbers.max() <= MAX_ATOMIC_NUMBER))
        and _bounded(frac_coords)
        and _bounded(lattices)
    ):
        return errors
    with np.errstate(invalid="ignore"):  # comparisons with NaN are False, as they should be
        known = (numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER) & (numbers == np.trunc(numbers))
        inside = (np.abs(frac_coords) < _MAX_COORDINATE).all(axis=1)
        fine = (np.abs(lattices) < _MAX_COORDINATE).all(axis=(1, 2))
    for b in np.flatnonzero(np.diff(ptr) == 0).tolist():
        errors[b] = "The crystal has no atoms; give it at least one."
    for b, atom in _first_of_each(~known, ptr):
        errors[b] = (
            f"Atomic number {numbers[atom]:g} at site {atom - ptr[b] + 1} is not one of the elements 1 to "
            f"{MAX_ATOMIC_NUMBER}; correct the species."
        )
    for b, atom in _first_of_each(~inside, ptr):
        errors[b] = (
            f"The fractional coordinates {frac_coords[atom].tolist()} at site {atom - ptr[b] + 1} are not finite "
            f"numbers below {_MAX_COORDINATE:g}; correct the coordinates."
        )
    for b in np.flatnonzero(~fine).tolist():
        errors[b] = (
            f"The lattice {lattices[b].tolist()} has an entry that is not a finite number below "
            f"{_MAX_COORDINATE:g} Å; correct the lattice."
        )
    return errors


def _bounded(array: np.ndarray) -> bool:
    return not array.size or bool(array.min() > -_MAX_COORDINATE and array.max() < _MAX_COORDINATE)  # NaN is neither


def _first_of_each(bad: np.ndarray, ptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """(crystal, atom) for the first bad atom of every crystal that has one."""
    if not bad.any():
        return
    atoms = np.flatnonzero(bad)
    crystals, first = np.unique(np.searchsorted(ptr, atoms, side="right") - 1, return_index=True)
    yield from zip(crystals.tolist(), atoms[first].tolist(), strict=True)


def _without(
    errors: dict[int, str],
    lattices: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    ptr: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    keep = np.ones(len(lattices), dtype=bool)
    keep[list(errors)] = False
    atoms = np.repeat(keep, np.diff(ptr))
    kept_ptr = offsets(np.diff(ptr)[keep])
    return lattices[keep], frac_coords[atoms], numbers[atoms], kept_ptr


def _chunks(ptr: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Runs of whole crystals: all of them for one thread, else some four for each thread that are not too short."""
    if len(ptr) == 1:
        return []
    if threads == 1:
        return [(0, len(ptr) - 1)]
    group = ptr[:-1] // max(_CHUNK_ATOMS, int(ptr[-1]) // (4 * threads) + 1)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return list(zip(first.tolist(), [*first[1:].tolist(), len(ptr) - 1], strict=True))


@cache
def _announce_compilation() -> None:
    """Say so when a kernel is compiled, which is once per machine and version, not when it comes from the cache."""
    from numba.core import event

    from . import neighbors, symmetry

    class Announcement(event.Listener):
        said = False

        def on_start(self, event: Any) -> None:
            if not self.said and event.data["dispatcher"] in (neighbors._search, symmetry._build):
                self.said = True
                logger.warning("Compiling the neighbour search (about %d s, once).", _COMPILE_SECONDS)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Announcement())


def _run_kernels(
    lattices: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    ptr: np.ndarray,
    chunk: tuple[int, int],
    parameters: GraphParameters,
) -> tuple[np.ndarray, ...]:
    """What ``symmetry.build`` returns for a run of crystals."""
    from . import symmetry

    begin, end = chunk
    atoms = slice(ptr[begin], ptr[end])
    local_ptr = ptr[begin : end + 1] - ptr[begin]
    tolerance = parameters.symmetry_tolerance
    slack = _TIE_TOLERANCE if tolerance is None else float(tolerance)
    radius, count = float(parameters.radius), int(parameters.max_neighbors)
    return symmetry.build(
        lattices[begin:end], frac_coords[atoms], numbers[atoms], local_ptr, radius, count, slack,
        tolerance is not None, bool(parameters.padded), parameters.isolated != "error",
    )  # fmt: skip


def _nothing() -> tuple[np.ndarray, ...]:
    """What :func:`_run_kernels` returns for no crystals."""
    dtypes = (np.int64,) * 2 + (np.float64,) + (np.int64,) * 2 + (
        np.int32, np.int32, np.float32, np.int32, np.int32, np.float64, np.int32,
    )  # fmt: skip
    return tuple(np.empty((0, 2) if k == 1 else (0, 3) if k == 11 else 0, dtype) for k, dtype in enumerate(dtypes))


def _join(
    results: list[tuple[np.ndarray, ...]],
    good: np.ndarray,
    crystals: int,
    numbers: np.ndarray,
    ptr: np.ndarray,
    parameters: GraphParameters,
    errors: dict[int, str],
) -> PackedGraphs:
    """Chunks to one set of arrays; ``good`` are the crystals that reached the kernels."""
    from . import neighbors, symmetry

    if len(results) == 1:
        columns = list(results[0])
    else:
        columns = [np.concatenate(column) for column in zip(*(results or [_nothing()]), strict=True)]
    status, detail, gap, rows, edges, atom_class, row_numbers, weight, row_size, sender, distance, image = columns
    for k in np.flatnonzero(status != neighbors.OK):
        atoms = numbers[ptr[k] : ptr[k + 1]]
        errors[int(good[k])] = (
            symmetry.isolated_failure(detail[k], atoms, parameters.radius)
            if status[k] == symmetry.ISOLATED_ATOMS
            else neighbors.failure(status[k], detail[k], gap[k], atoms, parameters.radius)
        )
    accepted = status == neighbors.OK
    if parameters.isolated == "warn" and (lonely := int((accepted & (detail[:, 0] > 0)).sum())):
        logger.warning(
            "%d of %d crystals have atoms without any neighbour within %g Å; such an atom receives nothing.",
            lonely, crystals, parameters.radius,
        )  # fmt: skip
    if (close := np.flatnonzero(_nearest(distance, row_size) < _CROWDED)).size:
        logger.warning(
            "%d of %d crystals have atoms less than %g Å apart, which no material has; look for sites that are given "
            "twice, and for another unit of length.",
            len(np.unique(np.searchsorted(offsets(rows), close, side="right"))), crystals, _CROWDED,
        )  # fmt: skip
    if not accepted.all():
        atom_class = atom_class[np.repeat(accepted, np.diff(ptr))]
    counts = np.zeros((3, crystals), dtype=np.int64)
    counts[:, good] = rows, edges, np.where(accepted, np.diff(ptr), 0)
    crystal_ptr, edge_ptr, atom_ptr = (offsets(c) for c in counts)
    return PackedGraphs(
        numbers=row_numbers,
        weight=weight,
        sender=sender,
        distance=distance,
        row_ptr=offsets(row_size),
        crystal_ptr=crystal_ptr,
        edge_ptr=edge_ptr,
        atom_class=atom_class,
        atom_ptr=atom_ptr,
        image=image if parameters.symmetry_tolerance is None else None,
        errors=dict(sorted(errors.items())),
    )


def _nearest(distance: np.ndarray, row_size: np.ndarray) -> np.ndarray:
    """Each row's shortest distance, its first; infinite without a neighbour."""
    nearest = np.full(len(row_size), np.inf)
    has_edges = row_size > 0
    nearest[has_edges] = distance[offsets(row_size)[:-1][has_edges]]
    return nearest


def build_graph(
    structure: Any,
    radius: float = 8.0,
    max_neighbors: int = 12,
    symmetry_tolerance: float | None = 1e-5,
    *,
    padded: bool = False,
    isolated: Literal["error", "warn", "keep"] = "error",
    disorder: Literal["error", "majority", "average"] = "error",
    distance_dtype: Any = np.float32,
) -> CrystalGraph:
    """The CGCNN graph of one crystal: each atom's nearest neighbours within a radius (Xie & Grossman 2018).

    Neighbours at equal distance are chosen by (distance shell, atomic number, colour of the symmetry refinement), so
    the graph depends on the crystal alone, not on the order of its atoms, the origin or the choice of cell.

    Args:
        structure: pymatgen Structure, ASE Atoms, path, or (lattice (3, 3) in Å, frac_coords (n, 3), numbers (n,)).
        radius: cutoff in Å.
        max_neighbors: neighbours kept per atom; an atom with fewer has a shorter row.
        symmetry_tolerance: Å up to which distances count as equal when atoms of one symmetry kind are merged into
            one row with a weight. Predictions are those of the full graph. None for the full graph.
        padded: fill short rows as the published programs do.
        isolated: "keep" accepts atoms without any neighbour, "warn" does so and counts their crystals in the log.
        disorder: for sites that are not one full atom: "majority" takes the species with the largest share (if that is
            the vacancy, the site is left out), "average" mixes the built-in element vectors by occupancy into
            ``atom_features``; a vacancy adds nothing.
        distance_dtype: float32, or float64.

    Raises:
        InputError: the structure cannot be read, or is no usable crystal, or a parameter is out of range.
    """
    return build_graphs(
        [structure], radius, max_neighbors, symmetry_tolerance,
        padded=padded, isolated=isolated, disorder=disorder, distance_dtype=distance_dtype,
    )[0]  # fmt: skip


def build_graphs(
    structures: Iterable[Any],
    radius: float = 8.0,
    max_neighbors: int = 12,
    symmetry_tolerance: float | None = 1e-5,
    *,
    padded: bool = False,
    isolated: Literal["error", "warn", "keep"] = "error",
    disorder: Literal["error", "majority", "average"] = "error",
    errors: Literal["raise", "collect"] = "raise",
    distance_dtype: Any = np.float32,
) -> list[Any]:
    """Graphs of many crystals, in their order; arguments as in ``build_graph``.

    Args:
        errors: "collect" leaves the InputError of a bad crystal in its place, "raise" raises the first one.

    Raises:
        InputError: a parameter is out of range, ``structures`` are not several, or with ``errors="raise"`` a crystal is
            unusable.
    """
    parameters = GraphParameters(radius, max_neighbors, symmetry_tolerance, padded, isolated, disorder)
    if errors not in ("raise", "collect"):
        raise InputError(f'errors = {errors!r} is neither "raise" nor "collect"; choose one.')
    if distance_dtype not in (np.float32, np.float64, float, "float32", "float64"):
        raise InputError(f"distance_dtype = {distance_dtype!r} is neither numpy's float32 nor float64; choose one.")
    _check_several(structures)
    graphs: list[Any] = []
    paths: dict[int, str] = {}
    batch: list[tuple[int, Arrays]] = []
    waiting = 0
    for position, structure in enumerate(structures):
        if not isinstance(structure, tuple) and isinstance(structure, str | os.PathLike):
            paths[position] = str(structure)
        graphs.append(None)
        try:
            crystal = _as_arrays(structure, disorder)
        except InputError as error:
            graphs[position] = error
        else:
            batch.append((position, crystal))
            waiting += len(crystal[2])
        if waiting >= _BATCH_ATOMS:
            _build_batch(batch, parameters, distance_dtype, graphs)
            batch, waiting = [], 0
    _build_batch(batch, parameters, distance_dtype, graphs)
    if errors == "raise":
        for position, graph in enumerate(graphs):
            if isinstance(graph, InputError):
                name = paths.get(position, f"Structure {position}")
                raise graph if name in str(graph) or len(graphs) == 1 else InputError(f"{name}: {graph}") from graph
    return graphs


def _check_several(structures: Any) -> None:
    """Raises InputError: they are one structure, a path, or nothing that structures are taken from."""
    from .readers import is_single

    name = type(structures).__name__
    if isinstance(structures, str | os.PathLike):
        kind, advice = f"the path {structures}", "give [path], or the crystals that read_inputs finds there"
    elif is_single(structures):
        kind, advice = f"one {name}", "give [structure]"
    elif isinstance(structures, Mapping) or hasattr(structures, "columns") or not isinstance(structures, Iterable):
        kind, advice = f"a {name}", "give the values of a dictionary, or a column of a table"
    else:
        return
    raise InputError(f"build_graphs takes a list of structures, not {kind}; {advice}.")


def _build_batch(
    batch: list[tuple[int, Arrays]],
    parameters: GraphParameters,
    distance_dtype: Any,
    graphs: list[Any],
) -> None:
    if not batch:
        return
    positions, crystals = zip(*batch, strict=True)
    lattices, frac_coords, numbers, mixtures = zip(*crystals, strict=True)
    ptr = offsets([len(n) for n in numbers])
    cells = np.concatenate(lattices).reshape(-1, 3, 3)
    mixed = {b: mixture for b, mixture in enumerate(mixtures) if mixture is not None}
    packed = build_packed(cells, np.concatenate(frac_coords), np.concatenate(numbers), ptr, parameters, mixed)
    for position, graph in zip(positions, packed.graphs(distance_dtype), strict=True):
        graphs[position] = graph


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, Mixture | None]


def _as_arrays(structure: Any, disorder: str) -> Arrays:
    """lattice, frac_coords, numbers, mixture of any crystal; values are checked later, for all at once."""
    if not (isinstance(structure, tuple) and len(structure) == 3):
        from .readers import as_crystal

        structure = as_crystal(structure, disorder=disorder)
        if isinstance(structure, MixedCrystal):
            return (*structure[:3], Mixture(structure.kind, structure.compositions))
    try:
        if any(np.iscomplexobj(x) or np.ma.is_masked(x) for x in structure):
            raise ValueError("some are complex or masked")
        lattice = np.asarray(structure[0], np.float64)
        frac_coords = np.asarray(structure[1], np.float64)
        numbers = np.asarray(structure[2])
        if numbers.dtype.kind not in "iuf":
            raise ValueError("atomic numbers are not numbers")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"A crystal is (lattice, frac_coords, numbers) of plain numbers, but {error}; correct the arrays."
        ) from error
    if lattice.shape != (3, 3) or numbers.ndim != 1 or frac_coords.shape != (len(numbers), 3):
        raise InputError(
            f"A crystal is a (3, 3) lattice, (n, 3) fractional coordinates and n atomic numbers, not {lattice.shape}, "
            f"{frac_coords.shape} and {numbers.shape}; correct the shapes."
        )
    return lattice, frac_coords, numbers, None
