"""A run that starts from a trained model begins where that one ended, and keeps what is frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.utils.prune

from srcgcnn_fast import CGCNN, SRCGCNN, InputError, load_model, predict
from srcgcnn_fast.graph import GraphParameters, GraphStore, prepare
from srcgcnn_fast.interop.checkpoints import save_upstream_checkpoint
from srcgcnn_fast.nn import ModelMetadata
from srcgcnn_fast.training import GraphDataModule, Recipe, TrainingModule, evaluate, fine_tuned, fit


def source(targets: tuple[str, ...] = ("energy",), **options) -> SRCGCNN:
    torch.manual_seed(1)
    model = SRCGCNN(2, 16, 16, n_targets=len(targets), **options)
    n = len(targets)
    mean, std = ([k + start for k in range(n)] for start in (0.3, 0.7))
    if not options:
        model.metadata = ModelMetadata(targets, ("eV",) * n, tuple(mean), tuple(std))
    else:
        model.metadata.targets = targets
    return model.eval()


@pytest.mark.parametrize("targets", [["energy"], ["volume", "energy"]])
def test_the_same_target_starts_with_the_same_predictions(alloys, targets):
    before, data = source(("high", "energy")), GraphDataModule(alloys, targets, batch_size=32)
    expected = evaluate(before, GraphDataModule(alloys, ["high", "energy"], batch_size=32)).predicted[:, 1]
    model = fine_tuned(before, data)
    untrained = evaluate(model, data).predicted[:, targets.index("energy")]
    assert untrained == pytest.approx(expected, abs=2e-6)
    metadata = model.metadata
    TrainingModule(model, data, Recipe())  # sets the normaliser of the new data
    assert metadata == model.metadata
    assert model.metadata.std != before.metadata.std
    ids = GraphDataModule(alloys, ["high", "energy"]).ids("test")
    found = evaluate(model, data)
    assert found.predicted[:, targets.index("energy")] == pytest.approx(expected, abs=2e-6) and found.ids == ids
    for name, value in before.state_dict().items():
        assert name.startswith("fc_out") or torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("was", "target", "options", "why"),
    [
        (("energy",), "volume", {}, "the model has energy"),
        (("energy",), "high", {"classification": True}, "the model is no classifier"),
        (("high",), "high", {"classification": True}, "the model is no classifier"),
        (("other",), "high", {}, "the model has other"),
    ],
    ids=["target", "classifier", "of the same", "class"],
)
def test_another_target_gets_a_new_output(alloys, caplog, was, target, options, why):
    before = source(was, **({"classification": True} if was == ("other",) else {}))
    model = fine_tuned(before, GraphDataModule(alloys, target), **options)
    assert f"The output for {target} starts from random weights, since {why}" in caplog.text
    for old in before.fc_out.weight:
        assert not any(torch.equal(old, new) for new in model.fc_out.weight)
    assert torch.equal(before.conv_to_fc.weight, model.conv_to_fc.weight)
    assert model.classification is bool(options or before.classification)


def test_a_classifier_goes_on(alloys, caplog):
    before, data = source(("high",), classification=True), GraphDataModule(alloys, "high")
    assert np.array_equal(evaluate(fine_tuned(before, data), data).predicted, evaluate(before, data).predicted)
    assert "random weights" not in caplog.text
    again = fine_tuned(before, data, classification=False)
    assert "since the model is a classifier" in caplog.text
    assert not any(torch.equal(again.fc_out.weight[0], old) for old in before.fc_out.weight / again.metadata.std[0])


def test_type_and_element_vectors_go_along(alloys):
    before = source().double()
    before.element_table = before.element_table + 0.25
    model = fine_tuned(before, GraphDataModule(alloys, "energy"))
    assert model.fc_out.weight.dtype is torch.float64 and torch.equal(model.element_table, before.element_table)
    model.element_table += 1
    assert not torch.equal(model.element_table, before.element_table)


def test_no_weight_is_left_random(alloys):
    before, data = source(), GraphDataModule(alloys, "energy")
    torch.nn.utils.prune.l1_unstructured(before.shared_conv.fc_full, "weight", 0.5)
    with pytest.raises(InputError, match=r"has not the same shared_conv\.fc_full\.weight.*undo pruning"):
        fine_tuned(before, data)
    torch.nn.utils.prune.remove(before.shared_conv.fc_full, "weight")
    assert torch.equal(fine_tuned(before, data).shared_conv.fc_full.weight, before.shared_conv.fc_full.weight)
    before.recurrent_bn1s[0].eps = 0.1
    with pytest.raises(InputError, match=r"recurrent_bn1s\.0 has an eps of 0\.1"):
        fine_tuned(before, data)


def test_other_graphs_are_a_sentence(alloys, tmp_path):
    before = source()
    save_upstream_checkpoint(before, tmp_path / "m.pth.tar")
    state = torch.load(tmp_path / "m.pth.tar", weights_only=True)
    del state["args"]["srcgcnn_fast"]  # as the published programs write it: padded graphs
    torch.save(state, tmp_path / "theirs.pth.tar")
    with pytest.raises(InputError, match="padded True, and these have False"):
        fine_tuned(tmp_path / "theirs.pth.tar", GraphDataModule(alloys, "energy"))
    assert fine_tuned(tmp_path / "m.pth.tar", GraphDataModule(alloys, "energy")).hyperparameters["atom_fea_len"] == 16


def test_scores_are_of_the_models_targets_and_graphs(alloys):
    two = source(("energy", "high"))
    evaluate(two, GraphDataModule(alloys, ["energy", "volume"]))  # a column may have another name
    for names in (["high", "energy"], ["high", "volume"], ["volume", "energy"]):
        with pytest.raises(InputError, match=f"predicts energy, high, the data hold {', '.join(names)}"):
            evaluate(two, GraphDataModule(alloys, names))
    with pytest.raises(InputError, match="predicts energy, high, the data hold energy"):
        evaluate(two, GraphDataModule(alloys, "energy"))
    with pytest.raises(InputError, match="There is no part 'foo'; choose among train, val, test"):
        evaluate(two, GraphDataModule(alloys, ["energy", "volume"]), "foo")
    one = source()
    for change, says in (({"radius": 6.0}, r"radius 6\.0, .* 8\.0"), ({"max_neighbors": 8}, "max_neighbors 8, .* 12")):
        one.metadata.graph = GraphParameters(**change)
        with pytest.raises(InputError, match=says):
            evaluate(one, GraphDataModule(alloys, "energy"))
    for how in ({}, {"batch_rows": 30}):
        with pytest.raises(InputError, match="no test crystals"):
            evaluate(source(), GraphDataModule(alloys, "energy", split=(0.9, 0.1, 0.0), **how))


def test_a_published_checkpoint_learns_with_its_convolutions_frozen(data_dir, small_1500, tmp_path):
    checkpoint = data_dir / "upstream" / "formation-energy-per-atom.pth.tar"
    before = load_model(checkpoint)
    small_1500.iloc[:150].to_parquet(tmp_path / "some.parquet")
    store = prepare(tmp_path / "some.parquet", tmp_path / "store", before.metadata.graph)
    data = GraphDataModule(store, "formation_energy_per_atom", batch_size=64)
    model = fine_tuned(checkpoint, data)
    assert isinstance(model, CGCNN)
    table = predict(before, tmp_path / "some.parquet").set_index("id")
    recipe = Recipe(epochs=1, lr=1e-3, freeze=("embedding", "convolutions"))
    TrainingModule(model, data, Recipe())
    started = evaluate(model, data, "val")
    expected = table.loc[started.ids, "formation_energy_per_atom"].to_numpy()
    assert started.predicted[:, 0] == pytest.approx(expected, abs=1e-4)
    result = fit(model, data, tmp_path / "run", recipe, accelerator="cpu")
    for name, value in before.state_dict().items():
        frozen = not name.startswith(("conv_to_fc", "fcs", "fc_out"))
        assert torch.equal(value, result.model.state_dict()[name]) is frozen, name
    assert isinstance(store, GraphStore)
