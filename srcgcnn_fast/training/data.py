"""Batches of a prepared store for Lightning: split, shuffled and cut by a seed alone."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ..errors import InputError
from ..graph.parameters import GraphParameters, as_python
from ..graph.store import GraphStore, open_store
from .distributed import place
from .prefetch import Batches, Item, moved, unchanged

logger = logging.getLogger(__name__)

KNOWN_UNITS = {"formation_energy_per_atom": "eV/atom", "energy_per_atom": "eV/atom", "band_gap": "eV"}
"""Units of targets whose usual name leaves no doubt."""

_BUCKET_BATCHES = 16
"""Batches whose crystals are sorted by size together."""
_HASHED = 4096
"""Graphs that are hashed together."""


class Split(NamedTuple):
    """Indices into the store for each part; int64, disjoint."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def random_split(indices: np.ndarray, fractions: Sequence[float], seed: int) -> Split:
    """Shuffle ``indices`` by ``seed`` and cut them into (train, val, test) by ``fractions``.

    Of four or more, each part with a fraction above 0 gets at least one.

    Raises:
        InputError: the fractions are not three numbers in 0…1 that sum to at most 1, or ``indices`` is no list of them.
    """
    if len(fractions) != 3 or not (min(fractions) >= 0 and sum(fractions) <= 1 + 1e-9):
        raise InputError(
            f"The split {tuple(fractions)} is not three fractions (train, val, test) that sum to at most 1."
        )
    order = np.random.default_rng(seed).permutation(as_indices("What is split", indices))
    cuts = np.rint(np.cumsum(fractions) * len(order)).astype(int)
    if len(order) >= 4:  # of three, two must be trained on
        least = np.cumsum(np.greater(fractions, 0))
        cuts = np.maximum.accumulate(np.maximum(cuts - least, 0)) + least
        cuts = np.minimum(cuts, len(order) - least[-1] + least)
    return Split(order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] : cuts[2]])


class EpochSampler(DistributedSampler[np.ndarray]):  # or Lightning would share out the shares once more
    """Yields the indices of one batch at a time; the order depends on (seed, epoch) alone, so it resumes exactly.

    ``batch_size`` counts crystals; a last training batch of one crystal joins the batch before (batch norm has no
    variance over a single row). With ``batch_rows`` instead, batches hold about that many graph rows and at least
    two crystals; their number is the same in every epoch.

    Of several processes each gets its share of every batch, as equal as can be, so that all of them together take the
    batches of one; only a last batch of fewer crystals than processes joins the one before. Without ``shuffle`` each
    takes its share of the crystals.

    With ``length_buckets`` crystals of similar size share a batch, in training: each run of 16 batches of the shuffled
    order is sorted by rows before it is cut, and the batches are shuffled again.
    """

    def __init__(
        self,
        indices: np.ndarray,
        row_counts: np.ndarray,
        *,
        batch_size: int = 256,
        batch_rows: int | None = None,
        shuffle: bool = False,
        length_buckets: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batch(batch_size, batch_rows)
        if min(len(indices), batch_size) < world_size > 1:
            raise InputError(
                f"{world_size} processes cannot share {len(indices)} crystals in batches of {batch_size}; "
                "start fewer, or give more to each."
            )
        self.rank, self.world_size = rank, world_size
        self.least = max(2, world_size)
        self.indices = indices if shuffle else indices[rank::world_size]
        self.rows = row_counts[self.indices]
        self.batch_size = min(batch_size, max(1, len(indices)))
        self.batch_rows = batch_rows
        self.shuffle = shuffle
        self.length_buckets = length_buckets
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next (Lightning calls this)."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.indices)
        if self.batch_rows is not None:
            return max(1, min(-(-int(self.rows.sum()) // self.batch_rows), count // self.least))
        whole, rest = divmod(count, self.batch_size)
        return max(1, whole) if self.shuffle and rest < self.least else whole + (rest > 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.arange(len(self.indices))
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle:
            order = rng.permutation(order)
        if self.shuffle and self.length_buckets:
            run = np.arange(len(order)) * len(self) // (_BUCKET_BATCHES * len(order))
            order = order[np.lexsort((self.rows[order], run))]
        batches = np.split(self.indices[order], self._cuts(order))
        if self.shuffle and self.length_buckets:
            batches = [batches[k] for k in rng.permutation(len(batches))]
        for batch in batches:
            is_shared = self.shuffle and self.world_size > 1
            yield np.array_split(batch, self.world_size)[self.rank] if is_shared else batch

    def _cuts(self, order: np.ndarray) -> np.ndarray:
        n_cuts = len(self) - 1
        if self.batch_rows is None:
            return np.arange(1, n_cuts + 1) * self.batch_size
        ends = np.cumsum(self.rows[order])
        cuts = np.searchsorted(ends, np.arange(1, n_cuts + 1) * (ends[-1] / len(self))) + 1
        least = self.least * np.arange(n_cuts)  # at least so many crystals between one cut and the next
        cuts = np.maximum.accumulate(np.maximum(cuts, self.least) - least) + least
        return np.minimum(cuts, len(order) - least[::-1] - self.least)


class GraphDataset(Dataset[Item]):
    """Whole batches of a store: an item is asked for by the array of its crystals."""

    def __init__(self, store: GraphStore, targets: np.ndarray) -> None:
        self.store = store
        self.targets = np.where(np.isfinite(targets), targets, np.nan)

    def usable(self) -> np.ndarray:
        """Indices of the crystals that have at least one target."""
        return np.flatnonzero(np.isfinite(self.targets).any(axis=1))

    def __getitem__(self, indices: np.ndarray) -> Item:
        target = torch.from_numpy(self.targets[indices].astype(np.float32))
        return self.store.batch(indices), target, torch.from_numpy(indices)

    def begin(self, indices: np.ndarray, device: torch.device) -> Callable[[], Item]:
        """Begin to put an item together; the result gives it, on ``device``."""
        target = self.targets[indices].astype(np.float32)
        packing = self.store.packing(indices, target, pin=device.type == "cuda")
        if packing is None:
            return lambda: moved(self[indices], device)
        return lambda: (*packing.on(device), torch.from_numpy(indices))


class Part(NamedTuple):
    """Crystals of one data set: training, validation or test."""

    dataset: GraphDataset
    indices: np.ndarray


class _Parts(dict[str, Part]):
    def __missing__(self, name: object) -> Part:
        raise InputError(f"There is no part {name!r}; choose among {', '.join(self)}.")


class GraphDataModule(pl.LightningDataModule):
    """Training, validation and test batches (GraphBatch, target (B, T), index (B,)) of one store or of three.

    Args:
        store: crystals to split, or the training set where ``val_store`` is given; a store or its path.
        targets: names of the target columns.
        split: fractions (train, val, test) drawn by ``seed``, or the indices themselves, a list or array for each part.
        batch_size: crystals per batch.
        batch_rows: graph rows per batch instead; bounds the memory where sizes differ much.
        val_store: a separate validation set; ``split`` is then unused.
        test_store: a separate test set, beside ``val_store``.
        units: of the targets (of one, a text), for tables and plots; those in ``KNOWN_UNITS`` need none.
        length_buckets: training batches of crystals of similar size.
        num_workers: processes that assemble batches ahead; 0 assembles in the training process.

    Crystals without any of the targets are left out and counted in the log; a missing one of several targets is NaN.
    Validation and test crystals that are also trained on are counted, too, including others with the same id and graph.

    Raises:
        InputError: a store does not exist, there is no target, one does not exist or is named twice, too few crystals
            have it, or given indices do not fit.
    """

    def __init__(
        self,
        store: GraphStore | str | os.PathLike[str],
        targets: str | Sequence[str],
        *,
        split: Sequence[Any] = (0.8, 0.1, 0.1),
        batch_size: int = 256,
        batch_rows: int | None = None,
        val_store: GraphStore | str | os.PathLike[str] | None = None,
        test_store: GraphStore | str | os.PathLike[str] | None = None,
        units: str | Sequence[str] | None = None,
        seed: int = 0,
        length_buckets: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.targets = (targets,) if isinstance(targets, str | None) else tuple(targets)
        _check_numbers(self.targets, seed, num_workers)
        _check_batch(batch_size, batch_rows)
        units = (units,) if isinstance(units, str) and units else units
        self.units = tuple(units or (KNOWN_UNITS.get(name, "") for name in self.targets))
        store = _opened(store)
        val_store, test_store = (s if s is None else _opened(s) for s in (val_store, test_store))
        self.graph_parameters = store.parameters
        self.batch_size, self.batch_rows, self.seed = map(as_python, (batch_size, batch_rows, seed))
        self.length_buckets = as_python(length_buckets)
        self.num_workers = num_workers
        _check_same_graphs(store, val_store, test_store)
        if val_store is None and test_store is not None:
            raise InputError("A test store was given without a validation store; give both, or one store to split.")
        whole = _dataset(store, self.targets)
        if val_store is None:
            if not hasattr(split, "__len__"):
                raise InputError(f"The split is {split!r}; give three fractions, or the indices of three parts.")
            is_given = isinstance(split, Split) or (len(split) == 3 and all(np.ndim(part) for part in split))
            parts = zip(Split._fields, split if is_given else random_split(whole.usable(), split, seed), strict=True)
            self.parts = {name: Part(whole, as_indices(f"The {name} part of a split", part)) for name, part in parts}
        else:
            datasets = {"train": whole, "val": _dataset(val_store, self.targets)}
            datasets["test"] = _dataset(test_store, self.targets) if test_store else datasets["val"]
            self.parts = {name: Part(dataset, dataset.usable()) for name, dataset in datasets.items()}
            if test_store is None:
                self.parts["test"] = Part(whole, whole.usable()[:0])
        self.parts = _Parts(self.parts)
        _check_parts(self.parts)
        _warn_of_overlap(self.parts)

    def target_values(self, part: str = "train") -> np.ndarray:
        """(n, T) float64, the targets of one part, in the order of its indices."""
        dataset, indices = self.parts[part]
        return dataset.targets[indices]

    def ids(self, part: str) -> list[str]:
        """Names of the crystals of one part, in the order of its indices."""
        dataset, indices = self.parts[part]
        return _ids(dataset.store, indices)

    def fingerprint(self) -> str:
        """A hash of names, targets and sizes of the crystals of each part, in order."""
        digest = hashlib.sha256()
        for name, (dataset, indices) in self.parts.items():
            digest.update(f"{name} {len(indices)}".encode())
            digest.update("\0".join(self.ids(name)).encode())
            digest.update(np.ascontiguousarray(self.target_values(name)).tobytes())
            digest.update(np.ascontiguousarray(dataset.store.row_counts[indices]).tobytes())
        return digest.hexdigest()[:16]

    def graph_fingerprint(self) -> str:
        """A hash of the graphs of each part, in order: other structures of the same names are other data."""
        digest = hashlib.sha256()
        for dataset, indices in self.parts.values():
            for begin in range(0, len(indices), _HASHED):
                batch = dataset.store.batch(indices[begin : begin + _HASHED])
                held = (batch.numbers, batch.weight, batch.row_ptr, batch.sender, batch.distance)
                for x in (*held, batch.atom_features, batch.edge_features):
                    if x is not None:
                        digest.update(x.numpy().data)
        return digest.hexdigest()[:16]

    def check_graphs(self, there: GraphParameters) -> None:
        """Are these crystals the same graphs as those of a model trained on ``there``?"""
        here = self.graph_parameters
        for name in ("radius", "max_neighbors", "padded"):
            if getattr(there, name) != getattr(here, name):
                raise InputError(
                    f"The model was trained on graphs with {name} {getattr(there, name)}, and these have "
                    f"{getattr(here, name)}; prepare them with {there}."
                )

    def loader(self, part: str, shuffle: bool = False) -> Batches:
        """Batches of ``part`` ("train", "val" or "test"), all of them in this process; shuffled, those of epoch 0."""
        return self._loader(part, shuffle, 0, 1)

    def _loader(self, part: str, shuffle: bool, rank: int, world_size: int) -> Batches:
        dataset, indices = self.parts[part]
        sampler = EpochSampler(
            indices,
            dataset.store.row_counts,
            batch_size=self.batch_size,
            batch_rows=self.batch_rows,
            shuffle=shuffle,
            length_buckets=self.length_buckets,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return Batches(
            dataset,
            batch_size=None,  # the sampler yields whole batches
            collate_fn=unchanged,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_sigterm,
            multiprocessing_context=_context() if self.num_workers else None,
        )

    def train_dataloader(self) -> DataLoader[Item]:
        return self._loader("train", True, *place(self.trainer))  # Lightning sets the epoch

    def val_dataloader(self) -> DataLoader[Item]:
        return self._loader("val", False, *place(self.trainer))

    def test_dataloader(self) -> DataLoader[Item]:
        return self._loader("test", False, *place(self.trainer))


def _context() -> str | None:
    """On Linux a fork, unless the program has chosen: at once, and without running its script again. The server that
    Python 3.14 forks from instead is ended by the signal that schedulers send to all processes of a job."""
    is_chosen = multiprocessing.get_start_method(allow_none=True) is not None
    return "fork" if sys.platform == "linux" and not is_chosen else None


def _leave_sigterm(_worker: int) -> None:
    """A scheduler sends it to all processes of a job; that which trains answers it, and the workers end with that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _opened(store: Any) -> GraphStore:
    if isinstance(store, GraphStore):
        return store
    if isinstance(store, str | os.PathLike):
        return open_store(store)
    raise InputError(f"A {type(store).__name__} is no store; give one that prepare made, or its path.")


def _ids(store: GraphStore, indices: np.ndarray) -> list[str]:
    names = list(store.ids)  # one by one they take several times longer
    return [names[i] for i in indices.tolist()]


def _dataset(store: GraphStore, targets: Sequence[str]) -> GraphDataset:
    dataset = GraphDataset(store, store.target_array(targets))
    if missing := len(store) - len(dataset.usable()):
        logger.warning("%d of %d crystals have no %s and are left out", missing, len(store), " or ".join(targets))
    if len(targets) > 1:
        for name, column in zip(targets, dataset.targets.T, strict=True):
            if lacking := int(np.isnan(column).sum()) - missing:
                logger.warning("%d crystals lack %s and train the other targets alone", lacking, name)
    return dataset


def _check_same_graphs(store: GraphStore, *others: GraphStore | None) -> None:
    for other in others:
        if other is not None and other.parameters != store.parameters:
            raise InputError(
                f"The stores hold different graphs ({store.parameters} and {other.parameters}); prepare them alike."
            )


def _check_batch(batch_size: int, batch_rows: int | None) -> None:
    wanted = batch_size if batch_rows is None else batch_rows
    if not isinstance(wanted, int | np.integer) or wanted < 1:
        raise InputError(f"A batch cannot hold {wanted} crystals or rows; give a whole number of at least 1.")


def check_options(
    targets: Sequence[str],
    split: Sequence[float] | None = None,
    *,
    batch_size: int | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> None:
    """Raises InputError: no data would suit a :class:`GraphDataModule` of these. Asked before graphs are made."""
    _check_numbers(tuple(targets), seed, num_workers)
    _check_batch(1 if batch_size is None else batch_size, batch_rows)
    if split is not None:
        random_split(np.empty(0), split, seed)


def _check_numbers(targets: tuple[str, ...], seed: int, num_workers: int) -> None:
    if not targets:
        raise InputError("There is no target to learn; name at least one.")
    if len(set(targets)) < len(targets):
        raise InputError(f"The targets {', '.join(targets)} name one twice; name each once.")
    columns = ["id", "error", *(f"{name}{suffix}" for name in targets for suffix in ("", "_predicted", "_std"))]
    if len(set(columns)) < len(columns):
        raise InputError(
            f"The targets {', '.join(targets)} clash in tables of predictions, which have the columns id, error, and "
            "of each target NAME, NAME_predicted and NAME_std; rename one."
        )
    if len(targets) > 1 and "scaled" in targets:
        raise InputError("The mae_scaled of several targets ranks epochs, so none may be named scaled; rename it.")
    if not all(isinstance(number, int | np.integer) and number >= 0 for number in (seed, num_workers)):
        raise InputError(f"The seed {seed} and the number of workers {num_workers} must be whole numbers of 0 or more.")
    if num_workers > (most := 16 * (os.cpu_count() or 1)):
        raise InputError(f"{num_workers} workers are too many for this machine; give at most {most} (0 is often best).")


def as_indices(name: str, part: Sequence[int] | np.ndarray) -> np.ndarray:
    """As int64; a list may be empty. ``name`` begins the sentence of an InputError."""
    indices = np.asarray(part)
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise InputError(
            f"{name} is a list of indices, not an array of {indices.dtype} {indices.shape}; np.flatnonzero makes them "
            "of a mask, and np.arange of a number of crystals."
        )
    return indices.astype(np.int64)


def _warn_of_overlap(parts: dict[str, Part]) -> None:
    for name in ("val", "test"):
        if shared := _shared(parts[name], parts["train"]):
            logger.warning(
                "%d %s crystals are also trained on, so their scores tell nothing about others", shared, name
            )


def _shared(part: Part, train: Part) -> int:
    """Crystals of ``part`` that are trained on: the same one, or another with the same id and the same graph."""
    store, other = part.dataset.store, train.dataset.store
    ours, theirs = np.zeros(len(store), bool), np.zeros(len(other), bool)
    ours[part.indices], theirs[train.indices] = True, True
    same = int((ours & theirs).sum()) if store is other else 0
    if store is other:
        ours &= ~theirs
    both = set(_named(store, ours)).intersection(_named(other, theirs))
    if not both:
        return same
    graphs = set(_contents(other, theirs, both))
    return same + sum(content in graphs for content in _contents(store, ours, both))


def _named(store: GraphStore, chosen: np.ndarray) -> Iterator[tuple[str, int]]:
    """Id and rows of each chosen crystal."""
    return zip(compress(store.ids, chosen), store.row_counts[chosen].tolist(), strict=True)


def _contents(store: GraphStore, chosen: np.ndarray, names: set[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Id and hash of the graph of each chosen crystal of these names."""
    pairs = zip(np.flatnonzero(chosen).tolist(), _named(store, chosen), strict=True)
    wanted = (pair for pair in pairs if pair[1] in names)
    while some := list(islice(wanted, _HASHED)):
        batch = store.batch([i for i, _ in some])
        numbers, distance = batch.numbers.numpy(), batch.distance.numpy()
        rows, edges = batch.crystal_ptr.tolist(), batch.row_ptr[batch.crystal_ptr].tolist()
        for k, (_, (id, _)) in enumerate(some):
            of_rows, of_edges = numbers[rows[k] : rows[k + 1]], distance[edges[k] : edges[k + 1]]
            yield id, hash((of_rows.tobytes(), of_edges.tobytes()))


def _check_parts(parts: dict[str, Part]) -> None:
    for name, (dataset, indices) in parts.items():
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(dataset.store)):
            raise InputError(f"The {name} indices leave the store of {len(dataset.store)} crystals.")
        if not np.isfinite(dataset.targets[indices]).any(axis=1).all():
            raise InputError(f"The {name} indices name crystals without a target; leave those out.")
    n_train, n_val = len(parts["train"].indices), len(parts["val"].indices)
    if n_train < 2 or n_val < 1:
        raise InputError(
            f"Training needs at least 2 crystals with a target, and 1 to validate; there are {n_train} and {n_val}."
        )
