from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import collate

pytest.importorskip("ase", reason="ASE is not installed")
from ase import io as ase_io
from ase.build import bulk

from srcgcnn_fast.interop.featurizer import CrystalFeaturizer

CRYSTALS = [bulk("NaCl", "rocksalt", a=5.6), bulk("Fe"), bulk("Si"), bulk("Ti")]


@pytest.fixture(params=[sf.CGCNN, sf.SRCGCNN])
def model(request):
    torch.manual_seed(0)
    return request.param(2, atom_fea_len=16, h_fea_len=8)


def test_features_are_the_models(model):
    featurizer = CrystalFeaturizer(model)
    with torch.no_grad():
        expected = model.eval().features(collate(sf.build_graphs(CRYSTALS))).numpy()
    model.train()
    many = featurizer.featurize_many(CRYSTALS)
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(featurizer.featurize(CRYSTALS[2]), expected[2], rtol=1e-5, atol=1e-6)
    column = np.empty((len(CRYSTALS), 1), dtype=object)  # as a dataframe hands it over
    for k, crystal in enumerate(CRYSTALS):
        column[k, 0] = crystal
    assert featurizer.featurize_many(column) == many
    assert featurizer.featurize_many(pytest.importorskip("pandas").DataFrame(column)) == many
    assert len(set(featurizer.feature_labels())) == 16 and model.training
    assert all("@" in text for text in featurizer.citations()) and featurizer.implementors()


def test_from_a_saved_model(model, tmp_path):
    saved = sf.save_model(model, tmp_path / "model")
    expected = pytest.approx(CrystalFeaturizer(model).featurize(CRYSTALS[1]), rel=1e-6)
    assert CrystalFeaturizer(str(saved)).featurize(CRYSTALS[1]) == expected
    other = CrystalFeaturizer(sf.CGCNN(1, 16, 8))
    other.model = str(saved)  # as set_params of matminer's classes does
    assert other.featurize(CRYSTALS[1]) == expected


def test_a_file_of_several_structures_is_not_taken_for_one(model, tmp_path):
    ase_io.write(tmp_path / "two.extxyz", CRYSTALS[1:3])
    for given in ([tmp_path / "two.extxyz"], [CRYSTALS[0], str(tmp_path / "two.extxyz")]):
        with pytest.raises(InputError, match="holds several structures"):
            CrystalFeaturizer(model).featurize_many(given, ignore_errors=True)
    with pytest.raises(InputError, match="holds several structures"):
        CrystalFeaturizer(model).featurize(tmp_path / "two.extxyz")


def test_bad_input(model):
    featurizer, lonely = CrystalFeaturizer(model), bulk("Ar", "sc", a=20.0)
    with pytest.raises(InputError, match="no neighbo"):
        featurizer.featurize_many([CRYSTALS[0], lonely])
    with pytest.raises(InputError, match="ignore_errors=True"):
        featurizer.featurize_many(CRYSTALS, return_errors=True)
    good, bad = featurizer.featurize_many([CRYSTALS[0], lonely], ignore_errors=True, return_errors=True)
    assert math.isnan(good[-1]) and np.isfinite(good[:-1]).all()
    assert np.isnan(bad[:-1]).all() and "no neighbo" in bad[-1]
    assert np.isnan(featurizer.featurize_many([lonely], ignore_errors=True)).all()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_in_a_forked_process():
    """As matminer's pools: PyTorch's threads of the parent are not there."""
    featurizer, threads = CrystalFeaturizer(sf.SRCGCNN()), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = featurizer.featurize_many(CRYSTALS * 20)[0]
        torch.rand(1000, 1000).sin()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(featurizer.featurize, CRYSTALS[:1]).get(30) == pytest.approx(expected, rel=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_inside_matminer(model):
    base = pytest.importorskip("matminer.featurizers.base", reason="matminer is not installed")
    pandas = pytest.importorskip("pandas")
    featurizer = CrystalFeaturizer(model)
    frame = pandas.DataFrame({"structure": pandas.Series([*CRYSTALS, bulk("Ar", "sc", a=20.0)], dtype=object)})
    wide = featurizer.featurize_dataframe(frame, "structure", ignore_errors=True, return_errors=True, pbar=False)
    assert list(wide.columns) == ["structure", *featurizer.feature_labels(), "CrystalFeaturizer Exceptions"]
    np.testing.assert_array_equal(wide[featurizer.feature_labels()].to_numpy()[:4], featurizer.featurize_many(CRYSTALS))
    for each in (False, True):
        both = base.MultipleFeaturizer([featurizer], iterate_over_entries=each)
        both.set_n_jobs(2)
        found = both.featurize_many(CRYSTALS, pbar=False)
        np.testing.assert_allclose(found, featurizer.featurize_many(CRYSTALS), rtol=1e-5, atol=1e-6)
    assert featurizer.get_params()["model"] is model
