"""Both models as a scikit-learn regressor of crystal structures."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import InputError, require
from ..graph.parameters import GraphParameters
from ..graph.readers import as_crystal
from ..graph.store import prepare
from ..nn import CGCNN, SRCGCNN
from ..prediction import predict

_base: Any = require("sklearn.base", "A scikit-learn regressor", "sklearn")
_utils: Any = require("sklearn.utils", "A scikit-learn regressor", "sklearn")
_validation: Any = require("sklearn.utils.validation", "A scikit-learn regressor", "sklearn")


class CrystalRegressor(_base.RegressorMixin, _base.BaseEstimator):  # type: ignore[misc]
    """Trains CGCNN or SR-CGCNN by :func:`srcgcnn_fast.training.fit`, and predicts, on lists of structures.

    X is a sequence of what :func:`srcgcnn_fast.graph.readers.as_crystal` takes (pymatgen, ASE, paths, arrays); y is
    (n,), or (n, T) for several targets. The epoch with the lowest error on ``validation_fraction`` of the training
    crystals is kept. The same ``random_state`` gives the same model on the CPU.

    Args:
        model: "cgcnn" or "sr-cgcnn".
        n_conv: convolutions, or recurrent steps.
        radius: cutoff of the neighbours, Å; the Gaussians of the distance reach it.
        isolated: "keep" takes crystals with atoms that have no neighbour within the radius, "error" refuses them.
        random_state: a number, or what else scikit-learn takes, of which every fit draws one.

    Attributes:
        model_: the trained model; save it with :func:`srcgcnn_fast.save_model`.
        history_: one row per epoch.
    """

    def __init__(
        self,
        model: Literal["cgcnn", "sr-cgcnn"] = "sr-cgcnn",
        *,
        n_conv: int = 3,
        atom_fea_len: int = 64,
        h_fea_len: int = 128,
        epochs: int = 30,
        lr: float = 3e-3,
        batch_size: int = 256,
        validation_fraction: float = 0.1,
        radius: float = 8.0,
        max_neighbors: int = 12,
        isolated: Literal["error", "keep"] = "error",
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.n_conv = n_conv
        self.atom_fea_len = atom_fea_len
        self.h_fea_len = h_fea_len
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.radius = radius
        self.max_neighbors = max_neighbors
        self.isolated = isolated
        self.random_state = random_state

    def fit(self, X: Sequence[Any], y: Any) -> CrystalRegressor:
        """Train on structures and their targets.

        Raises:
            InputError: a structure cannot be used, a target is no finite number, or their numbers differ.
        """
        from ..training import GraphDataModule, Recipe, fit

        kinds = {"cgcnn": CGCNN, "sr-cgcnn": SRCGCNN}
        if self.model not in kinds:
            raise InputError(f"model must be 'cgcnn' or 'sr-cgcnn', not {self.model!r}.")
        structures, values = _structures(X), _targets(y)
        if len(structures) != len(values):
            raise InputError(f"There are {len(structures)} structures and {len(values)} targets; give one target each.")
        table = values[:, None] if values.ndim == 1 else values
        names = [f"target_{k}" for k in range(table.shape[1])] if values.ndim > 1 else ["target"]
        graph = GraphParameters(self.radius, self.max_neighbors, isolated=self.isolated)
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = _utils.check_random_state(seed).randint(2**31 - 1)
        held_out = self.validation_fraction
        recipe = Recipe(epochs=self.epochs, lr=self.lr)
        with tempfile.TemporaryDirectory() as folder:
            crystals = _write(structures, table, names, Path(folder) / "crystals.parquet")
            store = prepare(crystals, Path(folder) / "graphs", graph, targets=names)
            if store.rejected:
                raise InputError(f"Structure {store.rejected[0][0]} cannot be used: {store.rejected[0][1]}")
            split = (1 - held_out, held_out, 0.0)
            data = GraphDataModule(store, names, split=split, batch_size=self.batch_size, seed=seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                sizes = (self.n_conv, self.atom_fea_len, self.h_fea_len)
                model = kinds[self.model](*sizes, n_targets=len(names), nbr_fea_len=graph.n_gaussians())
                result = fit(model, data, Path(folder) / "run", recipe, seed=seed)
        self.model_, self.history_ = result.model, result.history
        self._one_dimensional = values.ndim == 1
        return self

    def predict(self, X: Sequence[Any]) -> np.ndarray:
        """(n,) or (n, T), in the targets' units.

        Raises:
            InputError: a structure cannot be predicted.
        """
        _validation.check_is_fitted(self)
        structures = _structures(X)
        table = predict(self.model_, structures)
        if len(table) != len(structures):
            raise InputError("A path in X holds several structures, and X has one a row; give each of them itself.")
        for error in table["error"].dropna():
            raise InputError(str(error))
        values = table[list(self.model_.metadata.targets)].to_numpy(np.float64)
        return values[:, 0] if self._one_dimensional else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.target_tags.multi_output = True
        return tags


def _structures(X: Any) -> list[Any]:
    if hasattr(X, "columns"):
        raise InputError(f"X is a table ({', '.join(map(str, X.columns))}); give its column of structures alone.")
    return list(X)


def _targets(y: Any) -> np.ndarray:
    """(n,) or (n, T) float64."""
    try:
        values = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"The targets are no numbers ({error}); give one for each structure.") from error
    if values.ndim not in (1, 2) or values.size == 0:
        raise InputError(f"The targets have the shape {values.shape}; give one number, or one row, for each structure.")
    wrong = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if wrong.any():
        raise InputError(f"Target {int(np.argmax(wrong))} is not a finite number.")
    return values


def _write(structures: Sequence[Any], targets: np.ndarray, names: list[str], path: Path) -> Path:
    """The crystals and their targets as a Parquet file."""
    pandas = require("pandas", "Training", extra="train")
    crystals = [as_crystal(structure, f"Structure {i}") for i, structure in enumerate(structures)]
    columns: dict[str, Any] = {
        "material_id": [str(i) for i in range(len(crystals))],
        "lattice": [np.ravel(crystal.lattice) for crystal in crystals],
        "frac_coords": [np.ravel(crystal.frac_coords) for crystal in crystals],
        "atomic_numbers": [np.asarray(crystal.numbers) for crystal in crystals],
    }
    pandas.DataFrame(columns | {name: targets[:, k] for k, name in enumerate(names)}).to_parquet(path)
    return path
