"""Neighbours that come and go smoothly: a weight for every edge, for energies whose derivatives are wanted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from ..graph import GraphBatch, GraphParameters
from ..nn import SRCGCNN
from ..ops.reference import Edges, batch_norm, edge_vectors

_BISECTIONS = 60  # of the radius: to the last bit


class _Messages(NamedTuple):
    """The edges of a graph with a weight each."""

    receiver: Tensor
    sender: Tensor
    distance: Tensor
    weight: Tensor


def _step(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, with two continuous derivatives."""
    x = x.clamp(0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2)


def soft_choice(batch: GraphBatch, parameters: GraphParameters, width: float) -> _Messages:
    """Every row's nearest neighbours: ``max_neighbors`` by weight, or what lies within the radius.

    w = step((c - d) / width), where each row's cutoff c <= radius is such that its weights add up to that number.
    What is missing to it goes to the published programs' padding, if the model has that.
    """
    n, count, radius = batch.num_rows, parameters.max_neighbors, parameters.radius
    receiver, sender, distance = batch.receiver, batch.sender.long(), batch.distance

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(n).index_add(0, receiver, x)

    with torch.no_grad():
        low, high = distance.new_zeros(n), distance.new_full((n,), radius)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            few = total(_step((middle[receiver] - distance) / width)) < count
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    near = distance < high[receiver]  # the others weigh nothing
    receiver, sender, distance = receiver[near], sender[near], distance[near]
    # The value from the numbers, the first derivative beside it: a row's weights add up to the same number whatever its
    # distances are, so that its cutoff moves as the mean of them that their slopes weight.
    with torch.no_grad():
        x = ((high[receiver] - distance) / width).clamp(0, 1)
        value, slope = _step(x), 30 * (x * (1 - x)) ** 2 / width
        of_row = total(slope)
        moves = (high < radius) & (of_row > 0)
    change = distance - distance.detach()
    cutoff_change = torch.where(moves, total(slope * change) / torch.where(moves, of_row, 1), 0)
    weight = value + slope * (cutoff_change[receiver] - change)
    if parameters.padded:
        rows, missing = torch.arange(n, device=weight.device), count - total(weight)
        receiver, sender = torch.cat([receiver, rows]), torch.cat([sender, torch.zeros_like(rows)])
        distance = torch.cat([distance, distance.new_full((n,), radius + 1)])
        weight = torch.cat([weight, missing])
    return _Messages(receiver, sender, distance, weight)


def is_no_stack() -> bool:
    """In place of the model's own method: its forward shall call :func:`weighted_convolve`."""
    return False


def weighted_convolve(
    model: Any, h: Tensor, species: Tensor | None, batch: GraphBatch, return_steps: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The convolutions of either model, in evaluation mode, with a weight for every edge's message."""
    h = h if species is None else h.index_select(0, species)
    receiver, sender, distance, weight = batch.cache["messages"]
    p = model.hyperparameters
    edges = Edges(distance, None, batch.sender, batch.row_ptr, batch.crystal_ptr, p["dmin"], p["step"])
    e = edge_vectors(edges, p["nbr_fea_len"], h.dtype)
    recurrent = isinstance(model, SRCGCNN)
    steps = []
    for t, layer in enumerate(model._layers()):
        z = linear(torch.cat([h[receiver], h[sender], e], dim=1), layer.weight, layer.bias)
        f, c = batch_norm(z, layer.bn1, weight[:, None]).chunk(2, dim=1)
        m = torch.zeros_like(h).index_add(0, receiver, weight[:, None] * torch.sigmoid(f) * softplus(c))
        new = softplus(h + batch_norm(m, layer.bn2, batch.weight[:, None]))
        if recurrent and model.recurrent_alpha is not None:
            gate = torch.sigmoid(model.recurrent_alpha[t])
            new = (1 - gate) * h + gate * new
        h = model.recurrent_norm(new) if recurrent and model.recurrent_norm is not None else new
        steps.append(h)
    return h, steps if return_steps else []
