"""The crystal vector of a trained model as a featurizer with matminer's interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..nn import CGCNN, SRCGCNN
from ..prediction import run_over
from ..serialization import loaded

try:
    from matminer.featurizers.base import BaseFeaturizer as _Base
except ImportError:
    _Base = object

_CITATIONS = [
    "@article{Xie2018, author={Xie, Tian and Grossman, Jeffrey C.}, title={Crystal Graph Convolutional Neural Networks "
    "for an Accurate and Interpretable Prediction of Material Properties}, journal={Phys. Rev. Lett.}, volume={120}, "
    "pages={145301}, year={2018}, doi={10.1103/PhysRevLett.120.145301}}",
    "@misc{Bhattacharjee2026, author={Bhattacharjee, Satadeep}, title={SR-CGCNN: Shared Recurrent Convolution in "
    "Crystal Graph Neural Networks for Materials Property Prediction}, year={2026}, eprint={2605.01304}, "
    "archivePrefix={arXiv}}",
]


_process = os.getpid()


class CrystalFeaturizer(_Base):  # type: ignore[misc]
    """Structures to the pooled crystal vector of a model, ``model.features``: F numbers without a unit.

    A ``BaseFeaturizer`` where matminer is installed, with its dataframes and ``MultipleFeaturizer``; without it the
    methods here are all there is. Structures are whatever :func:`srcgcnn_fast.build_graph` takes; many are run
    through the model in batches, in this process.

    Args:
        model: a model, or what :func:`srcgcnn_fast.load_model` takes.
    """

    def __init__(self, model: CGCNN | SRCGCNN | str | os.PathLike[str]) -> None:
        self.model = model
        self._loaded = (model, loaded(model))

    @property
    def _network(self) -> CGCNN | SRCGCNN:
        if self._loaded[0] is not self.model:  # set_params
            CrystalFeaturizer.__init__(self, self.model)
        return self._loaded[1]

    def featurize(self, structure: Any) -> list[float]:
        """The F features of one structure.

        Raises:
            InputError: it has no graph, or an element that the model does not know.
        """
        return self.featurize_many([structure], pbar=False)[0]

    def featurize_many(
        self, entries: Sequence[Any], ignore_errors: bool = False, return_errors: bool = False, pbar: Any = True
    ) -> list[list[Any]]:
        """The features of many structures; ``pbar`` is taken for matminer's sake, there is no bar.

        Args:
            entries: structures, or the rows of a one-column array or dataframe of them.
            ignore_errors: NaN for a structure without features, instead of an error.
            return_errors: one more entry for each structure: NaN, or the sentence that says what is wrong.

        Raises:
            InputError: a structure has no features and ``ignore_errors`` is not set, or ``return_errors`` without it;
                a path holds several structures.
        """
        if return_errors and not ignore_errors:
            raise InputError("return_errors goes with ignore_errors=True; set both.")
        if os.getpid() != _process:  # forked, as matminer's pools are: PyTorch would wait for threads it has not
            torch.set_num_threads(1)
        entries = getattr(entries, "to_numpy", lambda: entries)()
        structures = [_only(entry) for entry in entries]
        _, values, errors = run_over([self._network], structures, self._network.features, len(self.feature_labels()))
        if len(values) != len(structures):
            raise InputError(
                "A path holds several structures, and a row has features of one; give each of them itself."
            )
        if not ignore_errors:
            for error in errors:
                if error is not None:
                    raise InputError(error)
        rows: list[list[Any]] = values.tolist()
        if return_errors:
            rows = [[*row, float("nan") if error is None else error] for row, error in zip(rows, errors, strict=True)]
        return rows

    def feature_labels(self) -> list[str]:
        """One label for each feature."""
        kind, width = type(self._network).__name__, self._network.hyperparameters["atom_fea_len"]
        return [f"{kind} feature {k}" for k in range(width)]

    def citations(self) -> list[str]:
        """The papers of the two networks, in BibTeX."""
        return _CITATIONS[: 2 if isinstance(self._network, SRCGCNN) else 1]

    def implementors(self) -> list[str]:
        return ["The srcgcnn_fast maintainers"]


def _only(entry: Any) -> Any:
    """The structure of a row of one column, as matminer hands rows over."""
    return entry[0] if isinstance(entry, list | tuple | np.ndarray) and len(entry) == 1 else entry
