"""The strongest form of both models that we know in plain PyTorch: what a compiler can make of it is the honest bar.

The linear map of [h_i, h_j, e_ij] is split, so that nodes are multiplied once per row and not once per edge; the
edges' part of SR-CGCNN is made once for all steps; edge features come ready; the sum over neighbours is a plain sum,
since rows are padded to one number of neighbours.
"""

from __future__ import annotations

import copy

import torch
from peers import segment_mean, segments, without_denormals
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, softplus

from srcgcnn_fast import CGCNN
from srcgcnn_fast.graph import GraphBatch
from srcgcnn_fast.interop.upstream import to_upstream


class SplitModel(nn.Module):
    """``model`` with its own copy of the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def _layers(self) -> list[tuple[nn.Linear, nn.Module, nn.Module]]:
        model = self.model
        if isinstance(model, CGCNN):
            return [(conv.fc_full, conv.bn1, conv.bn2) for conv in model.convs]
        norms = zip(model.recurrent_bn1s, model.recurrent_bn2s, strict=True)
        return [(model.shared_conv.fc_full, bn1, bn2) for bn1, bn2 in norms]

    def forward(self, numbers: Tensor, nbr_fea: Tensor, nbr_fea_idx: Tensor, crystal: Tensor, count: Tensor) -> Tensor:
        """(B, 1); nbr_fea (N, M, K), nbr_fea_idx (N, M), segments as in :func:`peers.segment_mean`."""
        model, last, edge = self.model, None, None
        h = embedding(numbers, model.embedding(model.element_table))
        width = h.shape[1]
        for fc, bn1, bn2 in self._layers():
            of_receiver, of_sender, of_edge = fc.weight.split([width, width, nbr_fea.shape[2]], dim=1)
            if fc is not last:
                edge, last = linear(nbr_fea, of_edge, fc.bias), fc
            p, q = linear(h, torch.cat([of_receiver, of_sender])).chunk(2, dim=1)
            z = p[:, None] + q[nbr_fea_idx] + edge
            y = bn1(z.flatten(0, 1)).view_as(z)
            m = (torch.sigmoid(y[..., :width]) * softplus(y[..., width:])).sum(1)
            h = softplus(h + bn2(m))
        return model.fc_out(softplus(model.conv_to_fc(softplus(segment_mean(h, (crystal, count))))))


def split_input(batch: GraphBatch) -> tuple[Tensor, ...]:
    """What :class:`SplitModel` takes, of a batch with one row per atom; features without denormals."""
    _, nbr_fea, nbr_fea_idx, _ = to_upstream(batch)
    return batch.numbers.long(), without_denormals(nbr_fea), nbr_fea_idx, *segments(batch)
