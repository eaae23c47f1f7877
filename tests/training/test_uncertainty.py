"""Ensembles and dropout left on: mean, standard deviation, and what calibration makes of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import bulk

from srcgcnn_fast import CGCNN, SRCGCNN, GraphParameters, InputError, load_model, predict, predict_shards
from srcgcnn_fast.interop.calculator import CrystalCalculator
from srcgcnn_fast.interop.featurizer import CrystalFeaturizer
from srcgcnn_fast.nn import ModelMetadata
from srcgcnn_fast.training import (
    Evaluation,
    GraphDataModule,
    Recipe,
    Split,
    TrainingModule,
    calibrate,
    calibration_plot,
    coverage,
    evaluate,
    fine_tuned,
    fit,
    train_ensemble,
)
from srcgcnn_fast.training.alloys import write_alloys
from srcgcnn_fast.training.calibration import ONE_STD, _factor
from srcgcnn_fast.uncertainty import (
    DROPOUT_SCALE,
    Ensemble,
    MonteCarloDropout,
    _kept,
    load_ensemble,
    load_predictor,
    save_ensemble,
)

CRYSTALS = [bulk("Cu"), bulk("NaCl", "rocksalt", a=5.6), bulk("Si")]


def model(seed: int = 0, **options) -> SRCGCNN:
    torch.manual_seed(seed)
    made = SRCGCNN(2, 16, 16, **options)
    made.metadata = ModelMetadata(("energy",), ("eV",), (0.5,), (2.0,))
    return made.eval()


def test_an_ensemble_gives_mean_and_standard_deviation_of_its_members(tmp_path):
    members = [model(seed) for seed in range(4)]
    each = np.stack([predict(member, CRYSTALS)["energy"] for member in members])
    save_ensemble(Ensemble(members, (3.0,)), tmp_path / "e")
    for given in (Ensemble(members, (3.0,)), tmp_path / "e", str(tmp_path / "e")):
        table = predict(given, CRYSTALS)
        assert list(table.columns) == ["id", "energy", "energy_std", "error"]
        assert table["energy"].to_numpy() == pytest.approx(each.mean(axis=0), abs=1e-5)
        assert table["energy_std"].to_numpy() == pytest.approx(3 * each.std(axis=0, ddof=1), abs=1e-5)
    save_ensemble(Ensemble(members[:2]), tmp_path / "e")
    assert len(load_ensemble(tmp_path / "e").members) == 2
    (tmp_path / "e").rename(tmp_path / ".e.set-aside")  # as a kill while it is replaced leaves it
    assert len(load_predictor(tmp_path / "e").members) == 2 and [x.name for x in tmp_path.iterdir()] == ["e"]


def test_the_columns_of_several_targets_are_theirs():
    members = [model(seed, n_targets=2) for seed in range(3)]
    for member in members:
        member.metadata = ModelMetadata(("energy", "gap"), ("eV", "eV"), (0.5, 40.0), (2.0, 3.0))
    each = np.stack([predict(member, CRYSTALS)[["energy", "gap"]] for member in members])
    table = predict(Ensemble(members, (3.0, 5.0)), CRYSTALS)
    np.testing.assert_allclose(table[["energy", "gap"]], each.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(table[["energy_std", "gap_std"]], each.std(axis=0, ddof=1) * (3, 5), atol=1e-4)


def test_dropout_left_on_repeats_and_touches_nothing_else(alloys):
    one = model(dropout=0.2).train()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    plain = predict(one, CRYSTALS)
    tables = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        tables.append(predict(one, CRYSTALS, dropout_passes=400))
    assert torch.equal(state, torch.get_rng_state()) and one.training and one.dropout.training
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    pd.testing.assert_frame_equal(*tables)
    alone = predict(one, CRYSTALS[::-1], dropout_passes=400, batch_atoms=1)[::-1].reset_index(drop=True)
    columns = ["energy", "energy_std"]  # which do not depend on the company
    pd.testing.assert_frame_equal(alone[columns], tables[0][columns], rtol=1e-5)
    spread = tables[0]["energy_std"].to_numpy()
    assert (spread > 1e-3).all()
    # The mean over many passes is the prediction, up to the head's curvature: nothing but dropout is random.
    assert np.abs(tables[0]["energy"] - plain["energy"]).max() < 0.3 * spread.max()


def test_dropout_left_on_is_left_as_it_was(make_batch):
    one = model(dropout=0.2).train()
    MonteCarloDropout(one, 2).samples(make_batch("plain"))
    assert one.dropout.training


def test_what_dropout_drops_does_not_depend_on_defaults_of_torch(make_batch):
    one, batch = MonteCarloDropout(model(dropout=0.2), 5), make_batch("plain")
    expected = one.samples(batch)
    _kept.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):  # as a GPU may be
            found = one.samples(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_factors_of_a_spread_go_to_a_device_once(make_batch, monkeypatch):
    """A GPU is waited for when they do; made in inference mode, they serve gradients all the same."""
    batch, pair, made = make_batch("plain"), Ensemble([model(0), model(1)], (0.625,)), []
    for where, name in ((torch, "tensor"), (torch.Tensor, "new_tensor")):
        make = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, make=make, **k: made.append(1) or make(*a, **k))
    with torch.inference_mode():
        found = [pair.predict(batch)[1] for _ in range(3)]
        torch.testing.assert_close(found[2], 0.625 * pair.samples(batch).std(dim=0))
    assert len(made) == 1 and torch.equal(found[0], found[2])
    pair.predict(batch)[1].sum().backward()
    drawn, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(1) or rand(*a, **k))
    dropped = MonteCarloDropout(model(dropout=0.3), 7)
    with torch.inference_mode():
        found = [dropped.predict(batch)[1] for _ in range(3)]
    assert len(drawn) == 1 and torch.equal(found[0], found[2])
    dropped.predict(batch)[1].sum().backward()


def test_what_cannot_spread_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no dropout to leave on"):
        predict(model(), CRYSTALS, dropout_passes=10)
    with pytest.raises(InputError, match="1 passes"):
        MonteCarloDropout(model(dropout=0.1), 1)
    with pytest.raises(InputError, match="ensemble of 1"):
        Ensemble([model()])
    with pytest.raises(InputError, match="not 'a'; load_model reads one"):
        Ensemble(["a", "b"])
    assert len(Ensemble(model(seed) for seed in range(2)).members) == 2
    for scale in ((1.0, 2.0), (0.0,), (-1.0,), (np.nan,), (np.inf,), 2.0, ("a",), np.ones(2)):
        for make in (lambda s: Ensemble([model(), model(1)], s), lambda s: MonteCarloDropout(model(dropout=0.1), 2, s)):
            with pytest.raises(InputError, match="scale is a positive number for each of energy, not"):
                make(scale)
    stored = save_ensemble(Ensemble([model(), model(1)], np.array([2.0])), tmp_path / "stored") / "ensemble.json"
    assert load_ensemble(stored.parent).scale == (2.0,)
    stored.write_text(stored.read_text().replace("2.0", "-2.0"))
    with pytest.raises(InputError, match=r"ensemble.json does not describe an ensemble: scale is a positive"):
        load_ensemble(stored.parent)
    with pytest.raises(InputError, match="are classifiers and others are not"):
        Ensemble([model(), model(classification=True)])
    with pytest.raises(InputError, match="have one element_table"):  # of which only the first would be asked
        other = model()
        other.element_table[11] = 0
        Ensemble([model(), other])
    for change in ({"targets": ("volume",)}, {"units": ("kJ/mol",)}, {"graph": GraphParameters(radius=6.0)}):
        with pytest.raises(InputError, match="predict the same"):
            other = model()
            other.metadata = dataclasses.replace(other.metadata, **change)
            Ensemble([model(), other])
    with pytest.raises(InputError, match="own spread"):
        predict(Ensemble([model(), model(1)]), CRYSTALS, dropout_passes=3)
    with pytest.raises(InputError, match="probability"):
        CGCNN(dropout=1.5)
    with pytest.raises(InputError, match="no ensemble"):
        load_ensemble(tmp_path)
    (tmp_path / "notes").write_text("mine")
    save_ensemble(Ensemble([model(), model(1)]), tmp_path / "mixed")
    (tmp_path / "mixed" / "notes").write_text("mine")
    for place, named in ((tmp_path, "mixed, notes, stored"), (tmp_path / "mixed", "notes")):
        with pytest.raises(InputError, match=rf"other files \({named}\)"):
            save_ensemble(Ensemble([model(), model(1)]), place)


def test_a_classifier_keeps_the_published_dropout():
    assert CGCNN(classification=True).dropout.p == 0.5
    assert CGCNN().dropout is None and CGCNN(dropout=0.1).dropout.p == 0.1
    assert CGCNN(dropout=0.1).state_dict().keys() == CGCNN().state_dict().keys()


def test_coverage_of_normal_errors_is_the_level():
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2.0, (40_000, 2))
    target = rng.normal(size=(40_000, 2))
    target[:100, 1] = np.nan
    error = rng.normal(size=std.shape) * std * [1.0, 3.0]
    found = Evaluation(["x"] * len(std), ("a", "b"), target, target + error, {}, std)
    levels = np.array([0.2, ONE_STD, 0.95])
    observed = coverage(found, levels)
    assert observed[0] == pytest.approx(levels, abs=0.01)
    assert observed[1] == pytest.approx([0.067, 0.261, 0.486], abs=0.01)  # 2 Φ(z/3) - 1
    with pytest.raises(InputError, match="no standard deviation"):
        coverage(dataclasses.replace(found, std=None), levels)
    for useless in ({"predicted": target}, {"target": target * np.nan}):  # nothing is wrong, or nothing is known
        with pytest.raises(InputError, match="predictions of b cannot be calibrated"):
            _factor(dataclasses.replace(found, **useless), 1, "val")


@pytest.fixture(scope="module")
def trained(alloys, tmp_path_factory):
    """An ensemble of two with dropout, its run and its data."""
    split = Split(np.arange(0, 80), np.arange(80, 140), np.arange(140, 160))
    data = GraphDataModule(alloys, "energy", split=split, batch_size=32)
    build = lambda data: SRCGCNN(1, 8, 8, dropout=0.2)  # noqa: E731
    folder = tmp_path_factory.mktemp("ensemble")
    return train_ensemble(build, data, folder, Recipe(epochs=2), members=2, accelerator="cpu"), folder, data


def test_a_trained_ensemble_is_calibrated_on_validation(trained, tmp_path):
    ensemble, folder, data = trained
    assert data.seed == 0
    weights = [member.fc_out.weight for member in ensemble.members]
    assert not torch.equal(*weights)
    records = [json.loads((folder / f"member_{k}" / "run.json").read_text()) for k in range(2)]
    assert [(record["seed"], record["data_seed"]) for record in records] == [(0, 0), (1, 1)]
    found = evaluate(ensemble, data, "val")
    assert coverage(found, np.array([ONE_STD])) == pytest.approx(ONE_STD, abs=1 / 60)
    assert ensemble.scale[0] > 1.2 or ensemble.scale[0] < 0.8  # two members do not happen to be right
    loaded = load_ensemble(folder / "model")
    assert loaded.scale == ensemble.scale
    assert evaluate(loaded, data, "val").predicted == pytest.approx(found.predicted)
    header = found.write(tmp_path / "t.csv").read_text().splitlines()[0]
    assert header == "id,energy,energy_predicted,energy_std"
    png = calibration_plot(tmp_path / "c.png", found, ensemble.scale)
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_every_target_has_a_factor_of_its_own(alloys):
    """And calibrating once more finds the same."""
    data = GraphDataModule(alloys, ["energy", "volume"], split=(0.1, 0.9, 0.0))
    members = [model(seed, n_targets=2) for seed in range(2)]
    for member in members:
        member.metadata = ModelMetadata(("energy", "volume"), ("eV", "Å³"), (0.0, 15.0), (0.01, 20.0))
    pair = Ensemble(members)
    scale = calibrate(pair, data)
    for share in coverage(evaluate(pair, data, "val"), np.array([ONE_STD])):
        assert share == pytest.approx(ONE_STD, abs=1 / 60)
    assert calibrate(pair, data) == scale and not 0.5 < scale[0] / scale[1] < 2


def test_what_cannot_be_calibrated_is_said_before_anything_is_trained(alloys, tmp_path):
    has = np.isfinite(alloys.target_array(["volume"])[:, 0])
    split = Split(np.flatnonzero(has)[:80], np.flatnonzero(~has), [])
    source, whole = model(), GraphDataModule(alloys, "energy", batch_size=128)
    data = GraphDataModule(alloys, ["energy", "volume"], split=split)
    build = lambda _: CGCNN(1, 8, 8, n_targets=2)  # noqa: E731
    with pytest.raises(InputError, match="No validation crystal has a value of volume"):
        train_ensemble(build, data, tmp_path / "run", Recipe(epochs=1), members=2, accelerator="cpu")
    with pytest.raises(InputError, match="ensemble of 1 has no spread"):
        train_ensemble(build, data, tmp_path / "run", Recipe(epochs=1), members=1, accelerator="cpu")
    (tmp_path / "three" / "member_2").mkdir(parents=True)
    (tmp_path / "three" / "member_2" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds more than 2 members; ask for as many as there are, or more"):
        train_ensemble(build, whole, tmp_path / "three", Recipe(epochs=1), members=2, resume=True, accelerator="cpu")
    with pytest.raises(InputError, match="the same single batch"):
        train_ensemble(lambda d: fine_tuned(source, d), whole, tmp_path / "run", Recipe(epochs=1), accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_a_spread_of_rounding_is_not_calibrated(alloys):
    """Which would be taken a million times, and look as a standard deviation does."""
    twins = [model(), model()]
    with torch.no_grad():
        twins[1].fc_out.bias += 1e-6
    pair = Ensemble(twins, (3.0,))
    with pytest.raises(InputError, match="errors, is rounding"):
        calibrate(pair, GraphDataModule(alloys, "energy"))
    assert pair.scale == (3.0,)


def test_an_ensemble_replaces_one_alone(tmp_path):
    pair = Ensemble([model(), model(1)])
    for _ in range(2):
        save_ensemble(pair, tmp_path / "pair")
    (tmp_path / "pair" / "member_notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(member_notes\.txt\)"):
        save_ensemble(pair, tmp_path / "pair")


def test_an_ensemble_is_no_model_where_one_is_wanted(alloys, tmp_path):
    pair, data = Ensemble([model(), model(1)]), GraphDataModule(alloys, "energy")
    write_alloys(tmp_path / "a.parquet", 2)
    for take in (
        CrystalCalculator,
        CrystalFeaturizer,
        lambda given: fine_tuned(given, data),
        lambda given: predict_shards(given, tmp_path / "a.parquet", tmp_path / "out"),
    ):
        with pytest.raises(InputError, match="Give a CGCNN or SRCGCNN, or the path of one, in place of the Ensemble"):
            take(pair)


def test_a_directory_of_the_other_kind_is_refused_before_anything_is_trained(alloys, tmp_path):
    data, recipe = GraphDataModule(alloys, "energy", batch_size=32), Recipe(epochs=1)
    fit(model(), data, tmp_path / "one", recipe, accelerator="cpu")
    with pytest.raises(InputError, match="new directory"):
        train_ensemble(lambda _: model(), data, tmp_path / "one", recipe, accelerator="cpu")
    assert not (tmp_path / "one" / "member_0").exists()
    save_ensemble(Ensemble([model(), model(1)]), tmp_path / "two" / "model")
    with pytest.raises(InputError, match="new directory"):
        fit(model(), data, tmp_path / "two", recipe, accelerator="cpu")
    assert not (tmp_path / "two" / "run.json").exists()
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "model").write_text("mine")
    with pytest.raises(InputError, match="is a file; give save_ensemble a directory"):
        train_ensemble(lambda _: model(), data, tmp_path / "three", recipe, accelerator="cpu")


def test_the_calibration_of_dropout_travels_with_the_model(trained, tmp_path):
    from srcgcnn_fast import save_model

    _, folder, data = trained
    one = load_model(folder / "member_0" / "model")
    raw = predict(one, CRYSTALS, dropout_passes=10)["energy_std"]
    scale = calibrate(MonteCarloDropout(one, 10), data)
    save_model(one, tmp_path / "m")
    assert load_model(tmp_path / "m").metadata.extra[DROPOUT_SCALE] == list(scale)
    found = predict(tmp_path / "m", CRYSTALS, dropout_passes=10)["energy_std"]
    assert found.to_numpy() == pytest.approx(scale[0] * raw.to_numpy(), rel=1e-5)
    TrainingModule(one, data, Recipe())  # what it learns now, nobody has calibrated
    assert DROPOUT_SCALE not in one.metadata.extra


def test_a_classifiers_spread_stays_as_it_is(alloys):
    members = [SRCGCNN(1, 8, 8, classification=True).eval() for _ in range(2)]
    ensemble = Ensemble(members, (7.0,))
    assert calibrate(ensemble, GraphDataModule(alloys, "high")) == ensemble.scale == (1.0,)
