from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from srcgcnn_fast.errors import InputError

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")
from ase import io as ase_io
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.utils import estimator_checks as checks

from srcgcnn_fast.interop.estimator import CrystalRegressor
from srcgcnn_fast.training.alloys import random_alloy

SMALL = {"n_conv": 2, "atom_fea_len": 16, "h_fea_len": 16, "epochs": 20, "lr": 0.02, "batch_size": 32}


@pytest.fixture(scope="module")
def alloys():
    rng = np.random.default_rng(0)
    crystals = [random_alloy(rng) for _ in range(120)]
    return crystals, np.array([c.numbers.mean() for c in crystals])  # learned in seconds


@pytest.mark.parametrize(
    "name",
    [
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_estimators_unfitted",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_checks_of_scikit_learn_that_need_no_array(name):
    getattr(checks, name)("CrystalRegressor", CrystalRegressor())


@pytest.mark.parametrize("kind", ["cgcnn", "sr-cgcnn"])
def test_learns(kind, alloys):
    X, X_test, y, y_test = train_test_split(*alloys, test_size=0.2, random_state=0)
    regressor = CrystalRegressor(kind, **SMALL)
    assert regressor.fit(X, y) is regressor and len(regressor.history_) == 20
    assert regressor.predict(X_test).shape == y_test.shape
    assert regressor.score(X_test, y_test) > 0.9
    again = clone(regressor).fit(X, y)
    assert np.array_equal(again.predict(X_test), regressor.predict(X_test))
    assert np.array_equal(pickle.loads(pickle.dumps(regressor)).predict(X_test), regressor.predict(X_test))


def test_inside_scikit_learn(alloys):
    X, y = alloys[0][:40], alloys[1][:40]
    assert np.isfinite(cross_val_score(CrystalRegressor(**SMALL | {"epochs": 2}), X, y, cv=2)).all()
    grid = {"model": ["cgcnn", "sr-cgcnn"], "lr": np.logspace(-2, -2, 1), "n_conv": np.arange(1, 2)}
    search = GridSearchCV(CrystalRegressor(**SMALL | {"epochs": 2}), grid, cv=2, error_score="raise").fit(X, y)
    assert search.best_params_["model"] in ("cgcnn", "sr-cgcnn")


def test_a_file_of_several_structures_is_not_taken_for_one(alloys, tmp_path):
    crystals, y = alloys
    ase_io.write(tmp_path / "two.extxyz", crystals[:2])
    fitted = CrystalRegressor(**SMALL | {"epochs": 1}).fit(crystals, y)
    for given in ([tmp_path / "two.extxyz"], [str(tmp_path / "two.extxyz"), crystals[2]]):
        with pytest.raises(InputError, match="holds several structures"):
            fitted.predict(given)


def test_several_targets(alloys):
    X, y = alloys[0][:30], alloys[1][:30]
    state = torch.get_rng_state()
    both = CrystalRegressor(**SMALL | {"epochs": 1}).fit(X, np.stack([y, 2 * y], axis=1))
    assert torch.equal(torch.get_rng_state(), state), "random numbers of others go on"
    assert both.predict(X).shape == (30, 2) and both.model_.metadata.targets == ("target_0", "target_1")
    with pytest.raises(InputError, match=r"no such\.cif does not exist"):
        both.predict([*X, "no such.cif"])


def test_gaussians_reach_the_radius_and_every_fit_draws_its_seed(alloys):
    X, y = alloys[0][:20], alloys[1][:20]
    settings = SMALL | {"epochs": 1, "radius": 6.0}
    one = CrystalRegressor(**settings, random_state=np.random.RandomState(3)).fit(X, y)
    assert one.model_.hyperparameters["nbr_fea_len"] == one.model_.metadata.graph.n_gaussians() == 31
    seed = np.random.RandomState(3).randint(2**31 - 1)
    assert np.array_equal(CrystalRegressor(**settings, random_state=seed).fit(X, y).predict(X), one.predict(X))
    assert not np.array_equal(one.predict(X), one.fit(X, y).predict(X))


def test_bad_input(alloys):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    X, y = alloys[0][:20], alloys[1][:20]
    for change, word in (
        (lambda: CrystalRegressor("gcn").fit(X, y), "'cgcnn' or 'sr-cgcnn'"),
        (lambda: CrystalRegressor().fit(X[:-1], y), "19 structures and 20 targets"),
        (lambda: CrystalRegressor().fit(X, np.where(np.arange(20) == 3, np.nan, y)), "Target 3"),
        (lambda: CrystalRegressor().fit([*X[:-1], "no such.cif"], y), "no such.cif"),
        (lambda: CrystalRegressor().fit(X, None), r"shape \(\)"),
        (lambda: CrystalRegressor().fit(X, np.zeros((20, 2, 2))), r"shape \(20, 2, 2\)"),
        (lambda: CrystalRegressor().fit(X, ["a"] * 20), "no numbers"),
        (lambda: CrystalRegressor().fit(pandas.DataFrame({"structure": X}), y), r"a table \(structure\)"),
    ):
        with pytest.raises(InputError, match=word):
            change()
    with pytest.raises(NotFittedError):
        CrystalRegressor().predict(X)
