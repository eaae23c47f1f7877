"""Neighbour lists by nvalchemi-toolkit-ops (NVIDIA Warp), on a GPU or, slowly, on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError, require
from .neighbors import (
    COINCIDENT_ATOMS,
    COINCIDENT_DISTANCE,
    DEGENERATE_LATTICE,
    EDGE_SLACK,
    TOO_MANY_IMAGES,
    NeighborList,
    failure,
)

_FIRST_ROOM = 512
_CROWD = 1 << 20  # neighbours of one atom


def pairs_on(
    device: str,
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    radius: float,
    max_neighbors: int | None,
) -> NeighborList:
    """What :func:`~srcgcnn_fast.graph.neighbors.neighbor_list` returns, found on ``device``; arguments as there."""
    library = require("nvalchemiops.torch.neighbors", "Neighbour lists on a GPU", extra="alchemi")
    no_atoms = np.zeros(2, dtype=np.int64)
    volume = abs(np.linalg.det(lattice))
    faces = [np.linalg.norm(np.cross(lattice[i - 2], lattice[i - 1])) for i in range(3)]
    if not volume > COINCIDENT_DISTANCE * max(faces):
        raise InputError(failure(DEGENERATE_LATTICE, no_atoms, 0.0, numbers, radius))
    if len(numbers) / volume * 4.2 * radius**3 > _CROWD:
        raise InputError(failure(TOO_MANY_IMAGES, no_atoms, 0.0, numbers, radius))
    inside = frac_coords - np.floor(frac_coords)
    cell = torch.from_numpy(lattice).to(device)
    position = torch.from_numpy(inside).to(device) @ cell
    room, n = _FIRST_ROOM, len(numbers)
    while True:
        matrix, count, image = library.neighbor_list(
            position,
            radius + EDGE_SLACK,
            cell=cell[None],
            pbc=torch.ones(1, 3, dtype=torch.bool, device=device),
            max_neighbors=room,
            wrap_positions=False,
        )
        most = int(count.max()) if n else 0
        if most <= room:
            break
        room = most
    held = torch.arange(matrix.shape[1], device=device) < count[:, None]
    receiver = torch.nonzero(held)[:, 0]
    sender, shift = matrix[held].long(), image[held]
    vector = position[sender] - position[receiver] + shift.double() @ cell
    distance = vector.norm(dim=1)
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(receiver[order], stable=True)]
    if max_neighbors is not None:
        first = torch.cumsum(count, 0) - count
        place = torch.arange(len(order), device=device) - first[receiver[order]]
        order = order[place < max_neighbors]
    taken_off = np.floor(frac_coords).astype(np.int64)
    i, j, shift, d = (x[order].cpu().numpy() for x in (receiver, sender, shift, distance))
    if len(d) and d.min() < COINCIDENT_DISTANCE:
        k = int(d.argmin())
        raise InputError(failure(COINCIDENT_ATOMS, np.array([i[k], j[k]]), float(d[k]), numbers, radius))
    translation = shift + taken_off[i] - taken_off[j]
    return NeighborList(i.astype(np.int32), j.astype(np.int32), translation.astype(np.int32), d)
