"""The gated graph convolution as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..graph.batch import GraphBatch
from .norm import batch_norm_states, stand_in_for


class GatedConv(nn.Module):
    """One gated graph convolution with its two batch norms (Xie & Grossman 2018, eq. 5).

    Args:
        atom_fea_len: F, features of a row.
        nbr_fea_len: K, features of an edge.
        batch_norm: hold ``bn1`` and ``bn2``; SR-CGCNN's shared convolution does not, its steps bring their own.
        dmin: centre of the first Gaussian, Å.
        step: distance between centres and width of the Gaussians, Å.
    """

    def __init__(
        self, atom_fea_len: int, nbr_fea_len: int = 41, *, batch_norm: bool = True, dmin: float = 0.0, step: float = 0.2
    ) -> None:
        super().__init__()
        self.dmin, self.step = dmin, step
        self.fc_full = nn.Linear(2 * atom_fea_len + nbr_fea_len, 2 * atom_fea_len)
        if batch_norm:
            self.bn1 = nn.BatchNorm1d(2 * atom_fea_len)
            self.bn2 = nn.BatchNorm1d(atom_fea_len)

    def parameters_of_call(self) -> functional.ConvParameters:
        """What :func:`srcgcnn_fast.functional.gated_conv` takes, counting one batch in training mode."""
        stand_in_for(self.fc_full, nn.Linear)
        return functional.ConvParameters(
            self.fc_full.weight, self.fc_full.bias, *batch_norm_states([self.bn1, self.bn2])
        )

    def forward(self, atom_fea: Tensor, batch: GraphBatch) -> Tensor:
        """(N, F) -> (N, F)"""
        return functional.gated_conv(atom_fea, batch, *self.parameters_of_call(), dmin=self.dmin, step=self.step)
