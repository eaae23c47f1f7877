"""Batches of other programs: the tuple of the published CGCNN programs, and PyTorch Geometric's ``Data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.batch import GraphBatch
from ..graph.elements import MAX_ATOMIC_NUMBER, element_features


def expand_quotient(batch: GraphBatch) -> GraphBatch:
    """The batch with one row per atom of the full cells: every atom receives what its symmetry class receives.

    A neighbour is given as the first atom of its class. Models give the same output for both batches. Distances,
    and features where present, keep their order within a row.
    """
    rows = batch.atom_class.long()
    n_rows, device = batch.num_rows, batch.device
    degree = batch.row_ptr.diff().long()[rows]
    row_ptr = _pointer(degree)
    first = torch.full((n_rows,), len(rows), device=device).scatter_reduce(
        0, rows, torch.arange(len(rows), device=device), "amin"
    )
    start = batch.row_ptr.long()[rows]
    edge = torch.arange(int(row_ptr[-1]), device=device) + torch.repeat_interleave(start - row_ptr[:-1], degree)
    atoms = torch.bincount(batch.atom_crystal[rows], minlength=batch.num_crystals)
    return GraphBatch(
        numbers=batch.numbers[rows],
        weight=torch.ones_like(batch.weight[rows]),
        sender=first[batch.sender.long()[edge]].int(),
        distance=batch.distance[edge],
        row_ptr=row_ptr.int(),
        crystal_ptr=_pointer(atoms).int(),
        atom_class=torch.arange(len(rows), dtype=torch.int32, device=device),
        atom_features=None if batch.atom_features is None else batch.atom_features[rows],
        edge_features=None if batch.edge_features is None else batch.edge_features[edge],
    )


def to_upstream(
    batch: GraphBatch, nbr_fea_len: int = 41, dmin: float = 0.0, step: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The published programs' input of the same crystals, one row per atom.

    Returns:
        atom_fea (N, A) float32, nbr_fea (N, M, K) float32, nbr_fea_idx (N, M) int64, and crystal_atom_idx, one
        int64 tensor of row indices per crystal; on the batch's device.

    Raises:
        InputError: rows have different numbers of neighbours, which that input cannot express.
    """
    full = expand_quotient(batch)
    degree = full.row_ptr.diff()
    width = int(degree.max()) if len(degree) else 0
    if bool((degree != width).any()):
        raise InputError(
            f"The published input needs as many neighbours in every row, and this batch has {int(degree.min())} to "
            f"{width}; build its graphs with padded=True."
        )
    atom_fea = full.atom_features
    if atom_fea is None:
        atom_fea = torch.tensor(element_features(), device=full.device)[full.numbers.long()]
    nbr_fea = full.edge_features
    if nbr_fea is None:  # the Gaussians in float64, as those programs compute them
        mu = dmin + step * torch.arange(nbr_fea_len, dtype=torch.float64, device=full.device)
        nbr_fea = torch.exp(-(((full.distance.double()[:, None] - mu) / step) ** 2)).float()
    ptr = full.crystal_ptr.tolist()
    rows = torch.arange(full.num_rows, device=full.device)
    return (
        atom_fea,
        nbr_fea.reshape(full.num_rows, width, nbr_fea.shape[1]),
        full.sender.long().reshape(full.num_rows, width),
        [rows[a:b] for a, b in pairwise(ptr)],
    )


def from_upstream(
    atom_fea: Tensor, nbr_fea: Tensor, nbr_fea_idx: Tensor, crystal_atom_idx: Sequence[Tensor]
) -> GraphBatch:
    """The batch of a published program's input. It carries that input's features; its distances are NaN, its
    atomic numbers 0, since the input holds neither.

    Args:
        atom_fea: (N, A).
        nbr_fea: (N, M, K).
        nbr_fea_idx: (N, M) integer, rows of ``atom_fea``.
        crystal_atom_idx: the rows of each crystal; every row belongs to one crystal.

    Raises:
        InputError: the shapes disagree, an index is out of range or leaves its crystal, or the crystals do not share
            out the rows.
    """
    n, device = atom_fea.shape[0], atom_fea.device
    if nbr_fea.ndim != 3 or nbr_fea_idx.shape != nbr_fea.shape[:2] or nbr_fea_idx.shape[0] != n:
        raise InputError(
            f"Shapes disagree: atom_fea {tuple(atom_fea.shape)}, nbr_fea {tuple(nbr_fea.shape)}, nbr_fea_idx "
            f"{tuple(nbr_fea_idx.shape)}; expected (N, A), (N, M, K) and (N, M)."
        )
    if nbr_fea_idx.numel() and not 0 <= int(nbr_fea_idx.min()) <= int(nbr_fea_idx.max()) < n:
        raise InputError(f"nbr_fea_idx points outside the {n} rows of atom_fea; count it from 0 through the batch.")
    order = torch.cat([torch.as_tensor(rows, device=device).long() for rows in crystal_atom_idx] or [_empty(device)])
    rank = torch.full((n,), -1, device=device)
    if len(order) == n and (n == 0 or 0 <= int(order.min()) <= int(order.max()) < n):
        rank[order] = torch.arange(n, device=device)
    if len(order) != n or bool((rank < 0).any()):
        raise InputError(f"crystal_atom_idx must name each of the {n} rows of atom_fea once.")
    counts = torch.tensor([len(rows) for rows in crystal_atom_idx], dtype=torch.int64, device=device)
    if len(counts) == 0 or int(counts.min()) == 0:
        raise InputError("crystal_atom_idx has no crystal, or one without atoms; leave it out.")
    sender, m = rank[nbr_fea_idx.long()[order]], nbr_fea_idx.shape[1]
    crystal = torch.repeat_interleave(counts)
    if bool((crystal[sender] != crystal[:, None]).any()):
        raise InputError("nbr_fea_idx joins atoms of two crystals; offset it by crystal before batching.")
    return GraphBatch(
        numbers=torch.zeros(n, dtype=torch.int32, device=device),
        weight=torch.ones(n, dtype=torch.float32, device=device),
        sender=sender.flatten().int(),
        distance=torch.full((n * m,), torch.nan, dtype=torch.float32, device=device),
        row_ptr=torch.arange(n + 1, dtype=torch.int32, device=device) * m,
        crystal_ptr=_pointer(counts).int(),
        atom_class=torch.arange(n, dtype=torch.int32, device=device),
        atom_features=atom_fea[order].contiguous(),
        edge_features=nbr_fea[order].reshape(n * m, nbr_fea.shape[2]).contiguous(),
    )


def to_pyg(batch: GraphBatch) -> dict[str, Tensor]:
    """The fields of a PyTorch Geometric ``Data`` with one row per atom: ``Data(**to_pyg(batch))``.

    Returns:
        z (N,) int64 atomic numbers; edge_index (2, E) int64, sender first; edge_weight (E,) distances in Å;
        batch (N,) int64; x (N, A) and edge_attr (E, K) where the batch carries its own features.
    """
    full = expand_quotient(batch)
    out = {
        "z": full.numbers.long(),
        "edge_index": torch.stack([full.sender.long(), full.receiver]),
        "edge_weight": full.distance,
        "batch": full.atom_crystal,
    }
    if full.atom_features is not None:
        out["x"] = full.atom_features
    if full.edge_features is not None:
        out["edge_attr"] = full.edge_features
    return out


def from_pyg(data: Any) -> GraphBatch:
    """The batch of a PyTorch Geometric ``Data`` or ``Batch`` (or of anything with such attributes, or keys).

    It reads ``edge_index`` (2, E), sender first; atoms from ``z`` (N,) or, as features, from ``x`` (N, A); edges
    from distances ``edge_weight`` (E,) in Å (or an ``edge_attr`` with one column), or, as features, from
    ``edge_attr`` (E, K); ``batch`` (N,), absent for one crystal. Edges are sorted by receiver, then distance.

    Raises:
        InputError: something needed is absent, or the graph contradicts itself.
    """
    data = SimpleNamespace(**data) if isinstance(data, Mapping) else data
    index = getattr(data, "edge_index", None)
    if index is None:
        raise InputError("The graph has no edge_index; give a PyTorch Geometric Data object.")
    z, x = getattr(data, "z", None), getattr(data, "x", None)
    atoms = x if z is None else z
    if atoms is None:
        raise InputError("The graph has neither z (atomic numbers) nor x (atom features); give one.")
    n, device = len(atoms), index.device
    if x is None and n and not 1 <= int(atoms.min()) <= int(atoms.max()) <= MAX_ATOMIC_NUMBER:
        raise InputError(f"z must hold atomic numbers from 1 to {MAX_ATOMIC_NUMBER}; give other atoms as features x.")
    if index.ndim != 2 or index.shape[0] != 2 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n):
        raise InputError(f"edge_index must be (2, E) with values from 0 to {n - 1}; it is {tuple(index.shape)}.")
    distance, features = getattr(data, "edge_weight", None), getattr(data, "edge_attr", None)
    if features is not None and (features.ndim == 1 or features.shape[1] == 1):
        distance, features = (features if distance is None else distance), None
    if distance is None and features is None:
        raise InputError("The graph has neither edge_weight (distances, Å) nor edge_attr (edge features); give one.")
    distance = torch.full((index.shape[1],), torch.nan, device=device) if distance is None else distance.reshape(-1)
    if len(distance) != index.shape[1] or (features is not None and len(features) != index.shape[1]):
        raise InputError(f"edge_index has {index.shape[1]} edges; edge_weight or edge_attr has another number.")
    crystal = getattr(data, "batch", None)
    crystal = torch.zeros(n, dtype=torch.int64, device=device) if crystal is None else crystal.long()
    if len(crystal) != n or n == 0 or int(crystal[0]) < 0 or bool((crystal.diff() < 0).any()):
        raise InputError(f"batch must give each of the {n} atoms its crystal, rising from 0; sort the atoms by it.")
    counts = torch.bincount(crystal)
    sender, receiver = index.long()
    if int(counts.min()) == 0:
        raise InputError("batch skips a crystal; number the crystals that have atoms from 0.")
    if bool((crystal[sender] != crystal[receiver]).any()):
        raise InputError("An edge of edge_index joins atoms of two crystals; check edge_index and batch.")
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(receiver[order], stable=True)]
    return GraphBatch(
        numbers=torch.zeros(n, dtype=torch.int32, device=device) if z is None else z.int().reshape(n),
        weight=torch.ones(n, dtype=torch.float32, device=device),
        sender=sender[order].int(),
        distance=distance[order],
        row_ptr=_pointer(torch.bincount(receiver, minlength=n)).int(),
        crystal_ptr=_pointer(counts).int(),
        atom_class=torch.arange(n, dtype=torch.int32, device=device),
        atom_features=None if x is None else (x if x.is_floating_point() else x.float()).reshape(n, -1),
        edge_features=None if features is None else features[order],
    )


def _pointer(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)
