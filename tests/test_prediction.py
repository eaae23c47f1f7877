from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast import prediction
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.nn import CGCNN, ModelMetadata
from srcgcnn_fast.nn.models import in_eval_mode
from srcgcnn_fast.prediction import write_table

pandas = pytest.importorskip("pandas")

ROCK_SALT = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5] * 3]


def crystals(n: int) -> list[tuple]:
    """Rock salts with different elements and random displacements, 8 atoms each."""
    rng = np.random.default_rng(0)
    return [
        (
            np.eye(3) * rng.uniform(4, 6),
            np.array(ROCK_SALT) + rng.normal(0, 0.02, (8, 3)),
            np.repeat(rng.integers(1, 101, 2), 4),
        )
        for _ in range(n)
    ]


def make_model(**options) -> CGCNN:
    torch.manual_seed(0)
    model = CGCNN(**({"n_conv": 2, "atom_fea_len": 16, "h_fea_len": 8} | options))
    model.metadata.mean, model.metadata.std = (5.0,) * len(model.metadata.mean), (3.0,) * len(model.metadata.std)
    return model


def test_one_row_per_input_in_order():
    model, inputs = make_model(), crystals(7)
    model.metadata.targets = ("band_gap",)
    frame = sf.predict(model, inputs)
    assert list(frame.columns) == ["id", "band_gap", "error"] and list(frame["id"]) == [str(i) for i in range(7)]
    assert frame["error"].isna().all() and all(e is None for e in frame["error"])
    with torch.no_grad():
        expected = model.eval().predict(sf.collate(sf.build_graphs(inputs)))[:, 0]
    np.testing.assert_allclose(frame["band_gap"], expected.numpy(), atol=2e-5)
    assert frame["band_gap"].dtype == np.float64 and frame["band_gap"].std() > 1e-4


def test_a_column_of_a_table_gets_its_predictions(tmp_path):
    """Whatever was filtered or shuffled before, and whatever cannot be read."""
    ase_build = pytest.importorskip("ase.build")
    metals = [ase_build.bulk("Cu"), ase_build.bulk("Ag")]
    (tmp_path / "two.extxyz").write_text("")
    for metal in metals:
        metal.write(tmp_path / "two.extxyz", append=True)
    metals[0].write(tmp_path / "one.cif")
    pandas.DataFrame({"lattice": [], "frac_coords": [], "atomic_numbers": []}).to_parquet(tmp_path / "none.parquet")
    files = [tmp_path / name for name in ("none.parquet", "two.extxyz", "one.cif")]
    table = pandas.DataFrame({"structure": [*crystals(4), *files, None]}, index=[5, 3, 9, 0, 7, 7, 2, 8])
    table = table.sample(frac=1, random_state=0)
    found = sf.predict(make_model(), table["structure"])
    assert list(found.index) == list(table.index) and list(found["id"]) == [str(label) for label in table.index]
    expected = pandas.concat([sf.predict(make_model(), [x]) for x in table["structure"] if x not in files[:2]])[
        "target"
    ]
    np.testing.assert_allclose(found["target"][found["error"].isna()], expected.dropna(), atol=2e-5)
    errors = found["error"].dropna()
    assert sorted(errors.index) == [7, 7, 8] and sum("holds several structures" in error for error in errors) == 1
    few = table.drop(index=7)
    few["value"] = sf.predict(make_model(), few["structure"])["target"]
    assert few["value"].isna().tolist() == [label == 8 for label in few.index]
    with pytest.raises(sf.InputError, match="give its column of structures"):
        sf.predict(make_model(), table)


def batches_of(monkeypatch) -> list[sf.GraphBatch]:
    """Those that a CGCNN will be given."""
    found, original = [], CGCNN.predict
    monkeypatch.setattr(CGCNN, "predict", lambda model, batch: found.append(batch) or original(model, batch))
    return found


def test_iterables_are_read_in_chunks(monkeypatch):
    monkeypatch.setattr(prediction, "_CHUNK", 5)
    inputs, held = crystals(23), []

    def watch(records):
        held.append(len(records))
        return records

    original = prediction._run_over_chunk
    monkeypatch.setattr(prediction, "_run_over_chunk", lambda m, records, *more: original(m, watch(records), *more))
    counts = []
    frame = sf.predict(make_model(), (c for c in inputs), progress=counts.append)
    assert held == [5, 5, 5, 5, 3] and counts == list(range(1, 24)) and len(frame) == 23
    whole = prediction.predict(make_model(), inputs)
    assert list(frame["id"]) == list(whole["id"])
    np.testing.assert_allclose(frame["target"], whole["target"], atol=2e-5)


def test_chunks_of_large_cells_hold_fewer(monkeypatch):
    monkeypatch.setattr(prediction, "_CHUNK_ATOMS", 20)
    inputs, held, original = [*crystals(5), "absent.cif", *crystals(2)], [], prediction._run_over_chunk
    monkeypatch.setattr(prediction, "_run_over_chunk", lambda m, x, *more: held.append(len(x)) or original(m, x, *more))
    assert len(sf.predict(make_model(), inputs)) == 8 and held == [3, 4, 1]


@pytest.mark.parametrize("padded", [False, True])
def test_of_ordered_crystals_no_graph_is_made_an_object(padded, monkeypatch):
    good, model = crystals(9), make_model()
    model.metadata.graph = replace(model.metadata.graph, padded=padded)
    model.element_table[good[2][2][7]] = 0
    lattice, coords, numbers = good[0]
    bad = [(lattice, coords * 0, numbers), "absent.cif", (np.eye(3) * 30, np.zeros((1, 3)), [10])]
    inputs = [*good[:3], *bad, *good[3:]]
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "_packed", prediction._graphs)
        expected = sf.predict(model, inputs, batch_atoms=30)
    assert expected["error"].notna().tolist() == [False, False, True, True, True, True] + [False] * 6
    for name in ("build_graphs", "collate"):
        monkeypatch.setattr(prediction, name, lambda *given, **options: pytest.fail("an object for each crystal"))
    pandas.testing.assert_frame_equal(sf.predict(model, inputs, batch_atoms=30), expected, check_exact=True)


def test_a_bar_tells_how_many_inputs_are_read(monkeypatch, capsys):
    auto, bars = pytest.importorskip("tqdm.auto"), []

    class Bar(auto.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"delay": 0})
            bars.append(self)

    model, inputs = make_model(), crystals(3)
    sf.predict(model, inputs, progress=True)
    assert not capsys.readouterr().err  # within a second there is nothing to tell
    monkeypatch.setattr(auto, "tqdm", Bar)
    for given in (inputs, GraphStore.from_graphs(sf.build_graphs(inputs))):
        sf.predict(model, given, progress=True)
        assert bars[-1].n == 3 and "predict: 3 crystals" in capsys.readouterr().err
    for silent in (None, False):
        sf.predict(model, inputs, progress=silent)
        assert not capsys.readouterr().err


def test_the_rest_of_the_batch_does_not_matter(monkeypatch):
    inputs = crystals(12)
    whole = sf.predict(make_model(), inputs)["target"]
    batches = batches_of(monkeypatch)
    alone = sf.predict(make_model(), inputs, batch_atoms=1)["target"]
    assert [batch.num_crystals for batch in batches] == [1] * 12
    batches.clear()
    some = sf.predict(make_model(), inputs, batch_atoms=20)["target"]
    assert [batch.num_crystals for batch in batches] == [2] * 6
    backwards = sf.predict(make_model(), inputs[::-1])["target"][::-1].to_numpy()
    for other in (alone, some, backwards):
        np.testing.assert_allclose(other, whole, atol=2e-5)


def test_mode_is_kept_and_eval_is_used():
    model, inputs = make_model(classification=True), crystals(3)
    model.train()
    frame = sf.predict(model, inputs)
    assert model.training and all(m.training for m in model.modules())
    assert int(model.convs[0].bn1.num_batches_tracked) == 0
    model.convs.eval()  # as frozen parts are, whose statistics must not move
    sf.predict(model, inputs)
    assert model.training and not any(m.training for m in model.convs.modules())
    model.eval()
    assert sf.predict(model, inputs).equals(frame) and not model.training


def test_the_last_of_several_threads_restores_the_mode():
    model = make_model()
    model.convs.eval()
    both = torch.nn.ModuleList([model, make_model()])  # as a compiled model has it for a part
    first, second = in_eval_mode([model, model]), in_eval_mode([both])
    for caller, leaves in ((first, False), (second, False), (first, True)):
        caller.__exit__(None, None, None) if leaves else caller.__enter__()
        assert not any(module.training for module in model.modules())
    assert not both[1].training
    second.__exit__(None, None, None)
    assert model.training and both[1].training and not any(module.training for module in model.convs.modules())


def test_mode_is_kept_when_the_input_fails(tmp_path):
    model = make_model()
    with pytest.raises(sf.InputError):
        sf.predict(model, tmp_path / "absent")
    assert model.training


def test_a_classifier_gives_the_probability_of_class_1():
    model, inputs = make_model(classification=True), crystals(4)
    frame = sf.predict(model, inputs)
    with torch.no_grad():
        expected = model.eval()(sf.collate(sf.build_graphs(inputs)))[:, 1].exp()
    np.testing.assert_allclose(frame["target"], expected.numpy(), atol=1e-6)
    assert frame["target"].between(0, 1).all()


def test_several_targets_and_float64():
    model, inputs = make_model(n_targets=2), crystals(3)
    frame = sf.predict(model, inputs)
    assert list(frame.columns) == ["id", "target_0", "target_1", "error"]
    double = sf.predict(model.double(), inputs)[["target_0", "target_1"]]
    np.testing.assert_allclose(double, frame[["target_0", "target_1"]], atol=2e-5)
    graphs = sf.build_graphs(inputs, distance_dtype=np.float64)  # with all digits, as the atoms have them
    with torch.no_grad():
        expected = model.eval().predict(sf.collate(graphs, torch.float64))
    np.testing.assert_allclose(double, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    plain = sf.predict(make_model(), crystals(3))["target"]
    np.testing.assert_allclose(sf.predict(make_model().to(dtype), crystals(3))["target"], plain, rtol=3e-2)


@pytest.mark.parametrize("embedding", [[torch.nn.Linear(92, 16), torch.nn.ReLU()], [torch.nn.AvgPool1d(32, 4)]])
def test_another_embedding(embedding):
    """The second has no parameters, as quantised ones have none."""
    model, inputs = make_model(), crystals(2)
    model.embedding = torch.nn.Sequential(*embedding)
    batch = sf.collate(sf.build_graphs(inputs))
    with torch.no_grad():
        expected = model.eval().predict(batch)[:, 0].numpy()
        batch.atom_features = model.element_table[batch.numbers].double()
        np.testing.assert_allclose(model.predict(batch)[:, 0].numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(sf.predict(model, inputs)["target"], expected, atol=2e-5)


@pytest.mark.parametrize(("padded", "tolerance"), [(True, None), (False, None), (False, 0.01)])
def test_graphs_are_those_of_the_training(monkeypatch, padded, tolerance):
    model, inputs = make_model(), [*crystals(3), (np.eye(3) * 5, np.array(ROCK_SALT), [11] * 4 + [17] * 4)]
    default = sf.predict(model, inputs)["target"]
    model.metadata.graph = sf.GraphParameters(radius=3.0, max_neighbors=5, symmetry_tolerance=tolerance, padded=padded)
    graphs = sf.build_graphs(inputs, 3.0, 5, tolerance, padded=padded)
    assert max(g.n_edges / g.n_rows for g in graphs) <= 5
    with torch.no_grad():
        expected = model.eval().predict(sf.collate(graphs))[:, 0]
    batches = batches_of(monkeypatch)
    frame = sf.predict(model, inputs)["target"]
    np.testing.assert_allclose(frame, expected.numpy(), atol=2e-5)
    assert not np.allclose(frame, default, atol=1e-3)
    assert [batch.num_rows for batch in batches] == [sum(g.n_rows for g in graphs)]


def test_a_slow_file_is_waited_for_as_long_as_is_said(monkeypatch):
    read, waits = prediction.read_inputs, []
    monkeypatch.setattr(prediction, "read_inputs", lambda *a, **how: waits.append(how["timeout"]) or read(*a, **how))
    sf.predict(make_model(), crystals(1), timeout=7.0)
    assert waits == [7.0]


def test_what_cannot_be_predicted_is_a_row():
    good = crystals(2)
    lattice, coords, numbers = good[0]
    isolated = (np.eye(3) * 30, np.zeros((1, 3)), [10])
    bad = {
        "unknown element": (lattice, coords, numbers * 0 + 119),
        "no neighbour": isolated,
        "singular": (lattice * 0, coords, numbers),
        "not finite": (lattice, coords * np.nan, numbers),
        "no file": "absent.cif",
    }
    frame = sf.predict(make_model(), {"first": good[0], **bad, "last": good[1]}).set_index("id")
    assert list(frame.index) == ["first", *bad, "last"]
    assert frame.loc[["first", "last"], "error"].isna().all() and frame.loc[["first", "last"], "target"].notna().all()
    for name in bad:
        assert np.isnan(frame.loc[name, "target"]), name
        error = frame.loc[name, "error"]
        assert len(error) > 20 and "\n" not in error
    assert frame.loc["no neighbour", "error"].startswith("no neighbour: ")
    alone = sf.predict(make_model(), good)["target"]
    np.testing.assert_allclose(frame.loc[["first", "last"], "target"], alone, atol=2e-5)
    kept = make_model()
    kept.metadata.graph = sf.GraphParameters(isolated="keep")
    assert sf.predict(kept, [isolated])["error"].isna().all()
    assert sf.predict(make_model(), [isolated], isolated="keep")["error"].isna().all()
    assert "--isolated keep" in sf.predict(kept, [isolated], isolated="error")["error"][0]
    with pytest.raises(sf.InputError, match="isolated must be"):
        sf.predict(kept, [isolated], isolated="drop")


def test_an_element_without_a_vector_is_a_row():
    model = make_model()
    model.element_table[17] = 0
    salt = (np.eye(3) * 5.6, np.array(ROCK_SALT), np.repeat([11, 17], 4))
    metal = (np.eye(3) * 4.2, np.array([[0, 0, 0], [0.5] * 3]), [11, 11])
    frame = sf.predict(model, [salt, metal])
    assert "Cl" in frame["error"][0] and frame["error"][1] is None
    model.element_table = model.element_table[:17].clone()  # which ends before it
    assert sf.predict(model, [salt, metal]).equals(frame)


def test_output_that_is_not_finite_is_a_row():
    model = make_model()
    model.element_table[8] = float("inf")
    model.element_table[8, 1] = float("nan")
    inputs = crystals(2)
    inputs[0] = (inputs[0][0], inputs[0][1], [8] * 8)
    inputs[1] = (inputs[1][0], inputs[1][1], [11] * 8)
    frame = sf.predict(model, inputs)
    assert "not finite" in frame["error"][0] and np.isnan(frame["target"][0])
    assert frame["error"][1] is None and np.isfinite(frame["target"][1])


def test_nothing_but_errors_and_nothing_at_all():
    model = make_model()
    frame = sf.predict(model, ["absent.cif"])
    assert len(frame) == 1 and frame["error"][0]
    empty = sf.predict(model, [])
    assert len(empty) == 0 and list(empty.columns) == ["id", "target", "error"]


def test_bad_arguments():
    model = make_model()
    with pytest.raises(sf.InputError, match="batch_atoms"):
        sf.predict(model, [], batch_atoms=0)
    model.metadata = ModelMetadata(targets=("error",))
    with pytest.raises(sf.InputError, match="clash"):
        sf.predict(model, [])
    with pytest.raises(sf.InputError, match="no model"):
        sf.predict("absent_model", [])
    with pytest.raises(sf.InputError, match="A text of several lines is no path"):
        sf.predict(make_model(), "data_x\n" * 1000)
    with pytest.raises(sf.InputError, match="not a DataParallel; give the model that it holds"):
        sf.predict(torch.nn.DataParallel(make_model()), [])


def write_poscar(path, scale: float) -> None:
    rows = "\n".join(" ".join(map(str, row)) for row in ROCK_SALT)
    path.write_text(f"salt\n{scale}\n1 0 0\n0 1 0\n0 0 1\nNa Cl\n4 4\nDirect\n{rows}\n")


@pytest.mark.parametrize(("targets", "outputs"), [(("a", "b"), 1), (("a",), 2)])
def test_no_output_has_two_names_and_none_has_none(targets, outputs):
    crystals = [(4 * np.eye(3), [[0, 0, 0]], [29])]
    model, count = sf.CGCNN(1, 8, 8, n_targets=outputs), len(targets)
    model.metadata.targets = targets
    with pytest.raises(sf.InputError, match=f"there are {count} targets, {outputs} units"):
        sf.predict(model, crystals)
    model.metadata = ModelMetadata(targets, ("",) * count, (0.0,) * count, (1.0,) * count)
    with pytest.raises(sf.InputError, match=rf"The model has {outputs} output\(s\), and its metadata name {count}"):
        sf.predict(model, crystals)


def test_a_folder_needs_no_targets(tmp_path):
    pytest.importorskip("pymatgen")
    for name, scale in (("b", 5.6), ("a", 5.0), ("c", 6.0)):
        write_poscar(tmp_path / f"{name}.vasp", scale)
    (tmp_path / "b.vasp").write_text("not a structure")
    model = sf.save_model(make_model(), tmp_path / "model")
    frame = sf.predict(model, tmp_path)
    assert list(frame["id"]) == ["a", "b", "c"] and [e is None for e in frame["error"]] == [True, False, True]
    (tmp_path / "id_prop.csv").write_text("c,unknown\na,\nz,1.0\n")
    again = sf.predict(str(model), str(tmp_path)).set_index("id")
    assert list(again.index) == ["c", "a", "z"] and "z.cif" in again["error"]["z"]
    np.testing.assert_allclose(again["target"][["a", "c"]], frame["target"][[0, 2]], atol=2e-5)


def test_a_parquet_file_needs_no_targets(tmp_path):
    pytest.importorskip("pyarrow")
    inputs = crystals(3)
    table = pandas.DataFrame(
        {
            "material_id": ["x", "y", "z"],
            "lattice": [c[0].ravel().tolist() for c in inputs],
            "frac_coords": [c[1].ravel().tolist() for c in inputs],
            "atomic_numbers": [c[2].tolist() for c in inputs],
            "band_gap": [1.0, float("inf"), None],
        }
    )
    table.to_parquet(tmp_path / "x.parquet")
    frame = sf.predict(make_model(), tmp_path / "x.parquet")
    assert list(frame["id"]) == ["x", "y", "z"] and frame["error"].isna().all()
    np.testing.assert_allclose(frame["target"], sf.predict(make_model(), inputs)["target"], atol=2e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_tables_are_written_whole(suffix, tmp_path, monkeypatch):
    frame = sf.predict(make_model(), {"a": crystals(1)[0], "b": "absent.cif"})
    frame["target"] *= 1e-17  # as in some units
    path = write_table(frame, tmp_path / "new" / f"table{suffix}")
    read = {
        ".csv": lambda: pandas.read_csv(path),
        ".parquet": lambda: pandas.read_parquet(path),
        ".json": lambda: pandas.DataFrame(json.loads(path.read_text(), parse_constant=pytest.fail)),  # JSON has no NaN
    }[suffix]()
    assert list(read.columns) == list(frame.columns) and list(read["id"]) == ["a", "b"]
    np.testing.assert_allclose(read["target"].astype(float), frame["target"], rtol=1e-15)
    assert list(read["error"].isna()) == [True, False] and read["error"][1] == frame["error"][1]
    if suffix == ".parquet":  # files with and without an error join
        parquet = pytest.importorskip("pyarrow.parquet")
        whole = write_table(frame[:1], tmp_path / "whole.parquet")
        assert parquet.read_schema(whole).equals(parquet.read_schema(path))
    before = path.read_bytes()

    def stop(*args, **kwargs):
        raise RuntimeError("full")

    for name in ("to_csv", "to_parquet", "to_dict"):
        monkeypatch.setattr(type(frame), name, stop)
    with pytest.raises(RuntimeError):
        write_table(frame, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_json_is_written_some_rows_at_a_time(n, tmp_path, monkeypatch):
    values = [0.1 * k if k % 2 else float("nan") for k in range(n)]
    frame = pandas.DataFrame({"id": [f"é{k}" for k in range(n)], "target": values, "error": [None] * n})
    whole = [{"id": f"é{k}", "target": 0.1 * k if k % 2 else None, "error": None} for k in range(n)]
    counts, original = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda rows, **options: counts.append(len(rows)) or original(rows, **options))
    monkeypatch.setattr(prediction, "_CHUNK", 2)
    monkeypatch.setattr(prediction, "_PREPARED", 1)
    text = write_table(frame, tmp_path / "t.json").read_text(encoding="utf-8")
    assert text == original(whole, indent=1) + "\n" and counts == [2] * (n // 2) + [1] * (n % 2)


def test_tables_of_other_kinds(tmp_path):
    with pytest.raises(sf.InputError, match="xlsx"):
        write_table(pandas.DataFrame(), tmp_path / "x.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.InputError, match="Cannot write"):
        write_table(pandas.DataFrame({"id": []}), tmp_path / "file" / "x.csv")


def test_a_store_is_predicted_as_its_structures(tmp_path, monkeypatch):
    """From the directory or the opened store, whatever the chunks and batches; a crystal without a vector is a row."""
    inputs = crystals(23)
    model = make_model()
    model.element_table[[inputs[k][2][0] for k in (4, 13)]] = 0.0
    expected = sf.predict(model, inputs)
    store = sf.prepare(inputs, tmp_path / "store")
    monkeypatch.setattr(prediction, "_CHUNK", 5)
    monkeypatch.setattr(prediction, "_PREPARED", 1)
    counts: list[int] = []
    for given, atoms in ((store, 20_000), (tmp_path / "store", 20), (str(tmp_path / "store"), 1)):
        counts.clear()
        found = sf.predict(model, given, batch_atoms=atoms, progress=counts.append)
        assert counts == [5, 10, 15, 20, 23]
        assert list(found["id"]) == list(expected["id"]) and list(found["error"]) == list(expected["error"])
        np.testing.assert_allclose(found["target"], expected["target"], atol=2e-5)
    assert all("element table lacks" in found["error"][k] for k in (4, 13)) and found["error"].isna().any()
    graph = sf.build_graph(inputs[found["error"].isna().argmax()])
    bad = replace(graph, numbers=graph.numbers + 300)  # beyond the table: in no batch
    for graphs in ([graph, bad, graph], [bad] * 7):  # of two chunks, too, without any batch
        ids = [f"x{k}" for k in range(len(graphs))]
        found = sf.predict(model, GraphStore.from_graphs(graphs, ids=ids, parameters=store.parameters))
        assert found["id"].tolist() == ids and [g is bad for g in graphs] == found["target"].isna().tolist()
        assert found["error"][1] == (
            f"x1 has an atom of atomic number {bad.numbers[0]}, which the model's element table lacks; leave it out."
        )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.compiled
def test_what_was_isolated_or_left_out_when_a_store_was_prepared(tmp_path, caplog, padded):
    """As if its structures were predicted: in a store of those that were kept, a row with the same sentence."""
    far = (np.diag([8.0, 8.0, 40.0]), np.array([[0, 0, 0], [0, 0, 0.5]]), [10, 29])  # each its own image alone
    structures = [*crystals(3), (np.eye(3) * 30, np.zeros((1, 3)), [10]), far, *crystals(2)]
    model = make_model()
    model.metadata.graph = sf.GraphParameters(radius=7.0, padded=padded)
    kept = sf.prepare(structures, tmp_path / "kept", replace(model.metadata.graph, isolated="keep"))
    assert not sf.predict(model, kept, isolated="keep")["error"].notna().any()
    found, expected = (sf.predict(model, x) for x in (kept, structures))
    assert found["error"].notna().tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert found["error"].tolist() == expected["error"].tolist() and "2 of 2 atoms" in found["error"][4]
    assert np.array_equal(found["target"], expected["target"], equal_nan=True)
    assert not caplog.text
    strict = sf.prepare(structures, tmp_path / "strict", model.metadata.graph)
    assert len(sf.predict(model, strict)) == 5 and "2 inputs" in caplog.text and "left out" in caplog.text


def test_a_batch_of_a_store_is_on_its_way_before_the_next_is_put_together(tmp_path, monkeypatch):
    """And a chunk is waited for when the next one is on its way, so that a GPU does not stand still."""
    monkeypatch.setattr(prediction, "_CHUNK", 4)
    monkeypatch.setattr(prediction, "_PREPARED", 1)
    store, model, events = sf.prepare(crystals(10), tmp_path / "store"), make_model(), []
    pack, finish = type(store).batch, prediction._finished
    monkeypatch.setattr(type(store), "batch", lambda *given: events.append("pack") or pack(*given))
    monkeypatch.setattr(prediction, "_finished", lambda *given: events.append("read") or finish(*given))
    pairs = lambda counts, most: [(k, min(k + 2, len(counts))) for k in range(0, len(counts), 2)]  # noqa: E731
    monkeypatch.setattr(prediction, "_cuts", pairs)
    function = lambda batch: events.append("call") or model.predict(batch)  # noqa: E731
    names, values, _ = prediction.run_over([model], store, function, 1)
    assert len(names) == len(values) == 10
    assert " ".join(events) == " ".join(["pack call"] * 4 + ["read", "pack call", "read", "read"])


@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_batches_of_a_store_begun_ahead_are_those_of_the_store(tmp_path, monkeypatch, ahead):
    store, events = sf.prepare(crystals(11), tmp_path / "store"), []
    chosen = [np.array(some) for some in ([0, 1, 2], [3], [4, 6, 8], [10, 9])]
    packing = type(store).packing
    monkeypatch.setattr(
        type(store), "packing", lambda self, *given, **how: events.append("begin") or packing(self, *given, **how)
    )
    for number, batch in enumerate(prediction._store_batches(store, chosen, torch.device("cpu"), torch.float64, ahead)):
        assert events.count("begin") == (min(number + ahead + 1, 4) if ahead else 0)
        expected = store.batch(chosen[number]).to(dtype=torch.float64)
        for name in ("numbers", "weight", "sender", "distance", "row_ptr", "crystal_ptr", "atom_class"):
            found, wanted = getattr(batch, name), getattr(expected, name)
            assert found.dtype is wanted.dtype and torch.equal(found, wanted), name
    assert number == 3


@pytest.mark.parametrize("most", [1, 5, 7, 20, 1000])
def test_cuts_are_those_of_one_crystal_after_the_other(most):
    counts = np.random.default_rng(0).integers(0, 9, 200)
    expected, rows = [0], 0
    for i, count in enumerate(counts):
        if i > expected[-1] and rows + count > most:
            expected.append(i)
            rows = 0
        rows += count
    found = list(prediction._cuts(counts, most))
    assert [first for first, _ in found] == expected
    assert [stop for _, stop in found] == [*expected[1:], 200]
    assert list(prediction._cuts(counts[:0], most)) == []


def test_a_store_of_other_graphs_is_refused(tmp_path):
    store = sf.prepare(crystals(2), tmp_path / "store", sf.GraphParameters(radius=6.0))
    with pytest.raises(sf.InputError, match=r"prepared with radius=6\.0, and the model wants radius=8\.0; "):
        sf.predict(make_model(), store)


def test_captured_prediction_needs_a_gpu():
    with pytest.raises(sf.InputError, match="CUDA graph needs a model on a CUDA device, not on cpu"):
        sf.predict(make_model(), crystals(2), captured=True)


def test_one_target_of_several_that_is_not_finite_is_an_error():
    values, errors = np.array([[1.0, 2.0], [1.0, np.nan], [np.inf, 1.0], [3.0, 4.0]]), [None] * 4
    prediction._mark(values, [0, 1, 2], "abcd", errors)
    assert [error is not None for error in errors] == [False, True, True, False] and errors[1].startswith("b: ")
    np.testing.assert_array_equal(values, [[1, 2], [np.nan] * 2, [np.nan] * 2, [3, 4]])
    prediction._mark(values, [], "abcd", errors)
