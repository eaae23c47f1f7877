from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from srcgcnn_fast.errors import InputError

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("ase", reason="ASE is not installed")
import pandas as pd
from ase.build import bulk

from srcgcnn_fast.interop.estimator import CrystalRegressor
from srcgcnn_fast.interop.matbench import record
from srcgcnn_fast.training.alloys import random_alloy


class Task:
    """What `record` uses of matbench.task.MatbenchTask 0.6, with two folds of made-up data."""

    def __init__(self, kind: str = "regression", given: str = "structure", crystals: int = 60) -> None:
        rng = np.random.default_rng(0)
        alloys = [random_alloy(rng) for _ in range(crystals - 1)]
        alloys.append(bulk("Ar", "sc", a=20.0))  # an atom without neighbours, as some tasks have
        self.dataset_name = "made_up"
        self.metadata = SimpleNamespace(task_type=kind, input_type=given, target="number")
        ids = [f"mb-{k:03d}" for k in range(crystals)]
        self.inputs = pd.Series(alloys, index=ids, dtype=object)
        self.outputs = pd.Series([float(a.numbers.mean()) for a in alloys], index=ids)
        self.folds = [0, 1]
        self.is_recorded = dict.fromkeys(self.folds, False)
        self.results: dict[int, tuple[list[float], dict]] = {}
        self.asked: list[int] = []

    def _test(self, fold: int) -> np.ndarray:
        return np.arange(len(self.inputs)) % 2 == fold

    def get_train_and_val_data(self, fold: int, as_type: str = "tuple"):
        self.asked.append(fold)
        return self.inputs[~self._test(fold)], self.outputs[~self._test(fold)]

    def get_test_data(self, fold: int, as_type: str = "tuple", include_target: bool = False):
        assert not include_target
        return self.inputs[self._test(fold)]

    def record(self, fold: int, predictions, ci=None, std=None, params=None) -> None:
        assert len(predictions) == self._test(fold).sum()
        json.dumps(params)
        self.results[fold] = (list(predictions), params)
        self.is_recorded[fold] = True


def test_every_fold_is_recorded_once():
    task = Task()
    regressor = CrystalRegressor("cgcnn", n_conv=1, atom_fea_len=16, h_fea_len=16, epochs=15, lr=0.02, batch_size=16,
                                 isolated="keep")  # fmt: skip
    assert record(task, regressor) is task and task.asked == [0, 1]
    for fold, (predictions, params) in task.results.items():
        truth = task.outputs[task._test(fold)].to_numpy()
        alloy = truth != 18
        error = np.abs(np.array(predictions) - truth)[alloy].mean()
        assert error < 0.5 * np.abs(truth - truth[alloy].mean())[alloy].mean()
        assert params["model"] == "cgcnn" and params["isolated"] == "keep"
    assert not hasattr(regressor, "model_")
    task.is_recorded[1] = False
    record(task, regressor)
    assert task.asked == [0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [("classification", "structure", "only regression"), ("regression", "composition", "only tasks with structures")],
)
def test_other_tasks_are_refused(kind, given, words):
    with pytest.raises(InputError, match=words):
        record(Task(kind, given, crystals=4))
