"""Matbench tasks (Dunn et al., npj Comput. Mater. 6, 138, 2020): train on every fold, predict its test set, record."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..errors import InputError, require
from .estimator import CrystalRegressor

logger = logging.getLogger(__name__)


def record(task: Any, regressor: CrystalRegressor | None = None) -> Any:
    """Train a clone of ``regressor`` on every fold of ``task`` that is not recorded yet, and record its predictions.

    Args:
        task: a loaded ``matbench.task.MatbenchTask`` of structures with a number as its target.
        regressor: ``CrystalRegressor(isolated="keep")`` if not given, since a task wants every crystal predicted.

    Returns:
        ``task``.

    Raises:
        InputError: the task is a classification or takes compositions; a crystal cannot be used.
    """
    clone = require("sklearn.base", "Recording a Matbench task", "sklearn").clone
    metadata = task.metadata
    if metadata.task_type != "regression":
        raise InputError(f"{task.dataset_name} is a {metadata.task_type}; only regression tasks can be recorded.")
    if metadata.input_type != "structure":
        raise InputError(f"{task.dataset_name} gives a {metadata.input_type}; only tasks with structures have graphs.")
    regressor = CrystalRegressor(isolated="keep") if regressor is None else regressor
    for fold in task.folds:
        if task.is_recorded[fold]:
            continue
        inputs, outputs = task.get_train_and_val_data(fold)
        fitted = clone(regressor).fit(list(inputs), np.asarray(outputs))
        predictions = fitted.predict(list(task.get_test_data(fold, include_target=False)))
        task.record(fold, predictions, params=fitted.get_params())
        logger.info("%s: fold %s is recorded.", task.dataset_name, fold)
    return task
