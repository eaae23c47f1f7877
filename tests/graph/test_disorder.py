"""Sites that are not one full atom: refused, taken as their majority, or averaged, from file to prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import srcgcnn_fast as sf
from srcgcnn_fast.cli import main
from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import element_features
from srcgcnn_fast.graph.crystal import Crystal, MixedCrystal
from srcgcnn_fast.graph.readers import as_crystal, read_inputs
from srcgcnn_fast.graph.store import GraphStore, open_store, prepare
from srcgcnn_fast.training import GraphDataModule, Recipe, fit

pymatgen = pytest.importorskip("pymatgen.core")
AVERAGE = sf.GraphParameters(disorder="average")
SR, TI, OXYGEN, BA = 38, 22, 8, 56


def perovskite(a_site: dict[str, float] | str, shift: float = 0.0, order: tuple[int, ...] = (0, 1, 2, 3, 4)):
    species = [a_site, "Ti", "O", "O", "O"]
    coords = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + shift
    return pymatgen.Structure(np.eye(3) * 3.9, [species[i] for i in order], coords[list(order)])


MIXED = perovskite({"Sr": 0.7, "Ba": 0.2})
MIXED_VECTOR = np.float32(0.7) * element_features()[SR] + np.float32(0.2) * element_features()[BA]


def model(seed: int = 0) -> sf.CGCNN:
    torch.manual_seed(seed)
    made = sf.CGCNN(n_conv=2, atom_fea_len=8, h_fea_len=8).eval()
    made.metadata.targets = ("gap",)
    return made


def test_policies() -> None:
    with pytest.raises(InputError, match=r"is disordered \(site 1 holds Ba:0.2, Sr:0.7\).*average"):
        sf.build_graph(MIXED)
    majority = sf.build_graph(MIXED, disorder="majority")
    ordered = sf.build_graph(perovskite("Sr"))
    assert majority.atom_features is None
    assert np.array_equal(majority.numbers, ordered.numbers) and np.array_equal(majority.distance, ordered.distance)
    average = sf.build_graph(MIXED, disorder="average")
    assert average.n_rows == 3 and average.atom_features.dtype == np.float32
    row = average.atom_class[0]
    assert average.numbers[row] == SR
    np.testing.assert_allclose(average.atom_features[row], MIXED_VECTOR, rtol=0, atol=1e-7)
    for number in (TI, OXYGEN):
        k = int(np.flatnonzero(average.numbers == number)[0])
        assert np.array_equal(average.atom_features[k], element_features()[number])
    for policy in ("majority", "average"):  # an ordered crystal is none of their business
        assert sf.build_graph(perovskite("Sr"), disorder=policy).atom_features is None


def test_a_wrong_policy_is_named() -> None:
    for call in (
        lambda: sf.build_graph(MIXED, disorder="mean"),
        lambda: as_crystal(MIXED, disorder="mean"),
        lambda: read_inputs([MIXED], disorder="mean"),
        lambda: sf.GraphParameters(disorder="mean"),
    ):
        with pytest.raises(InputError, match=r"disorder must be .* not 'mean'"):
            call()


def test_the_vacancy_may_be_the_majority() -> None:
    half_empty = pymatgen.Structure(np.eye(3) * 3.5, [{"Na": 0.3}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    kept = as_crystal(half_empty, disorder="majority")
    assert isinstance(kept, Crystal) and kept.numbers.tolist() == [17]
    split = pymatgen.Structure(np.eye(3) * 3.5, [{"Na": 0.4, "K": 0.3}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert as_crystal(split, disorder="majority").numbers.tolist() == [11, 17]
    thirds = pymatgen.Structure(np.eye(3) * 3.5, [{"Na": 0.3333, "K": 0.3333}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert as_crystal(thirds, disorder="majority").numbers.tolist() == [11, 17], "0.3334 is no more than 0.3333"
    with pytest.raises(InputError, match="only sites that are mostly vacant"):
        as_crystal(pymatgen.Structure(np.eye(3) * 3.5, [{"Na": 0.3}], [[0, 0, 0]]), disorder="majority")


@pytest.mark.parametrize(("held", "number"), [({"Fe2+": 0.5, "Fe3+": 0.5}, 26), ({"D": 0.3, "H": 0.7}, 1)])
def test_states_and_isotopes_of_one_element_fill_a_site_together(held: dict[str, float], number: int) -> None:
    crystal = as_crystal(pymatgen.Structure(np.eye(3) * 3.5, [held, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert isinstance(crystal, Crystal) and crystal.numbers.tolist() == [number, 17]


def test_colours_start_from_the_composition() -> None:
    """Two sites of the same majority but other shares are two kinds; of the same shares one."""
    lattice, coords = np.eye(3) * [3.6, 3.6, 7.2], [[0, 0, 0], [0, 0, 0.5]]

    def rows(a: dict[str, float], b: dict[str, float]) -> int:
        return sf.build_graph(pymatgen.Structure(lattice, [a, b], coords), disorder="average").n_rows

    assert rows({"Cu": 0.6, "Au": 0.4}, {"Cu": 0.6, "Au": 0.4}) == 1
    assert rows({"Cu": 0.6, "Au": 0.4}, {"Cu": 0.8, "Au": 0.2}) == 2
    assert rows({"Cu": 0.6, "Au": 0.4}, {"Cu": 1.0}) == 2


def test_average_depends_on_the_crystal_alone() -> None:
    written = [MIXED, perovskite({"Ba": 0.2, "Sr": 0.7}, 0.37, (3, 0, 4, 1, 2)), MIXED * (1, 2, 1)]
    full = [sf.build_graph(s, disorder="average", symmetry_tolerance=None, distance_dtype=np.float64) for s in written]
    quotient = [sf.build_graph(s, disorder="average", distance_dtype=np.float64) for s in written]
    with torch.no_grad():
        out = model().double()(sf.collate([*full, *quotient], torch.float64))
    assert float(out.max() - out.min()) < 1e-10
    halves = pymatgen.Structure(np.eye(3) * 3.5, [{"Au": 0.5, "Cu": 0.5}], [[0, 0, 0]])
    assert [sf.build_graph(halves, disorder=x).numbers.tolist() for x in ("average", "majority")] == [[29], [29]]
    limit = sf.build_graph(perovskite({"Sr": 1 - 1e-5}), disorder="average")
    assert limit.atom_features is None  # within the tolerance of one full atom


def test_batches_may_hold_both_kinds() -> None:
    graphs = sf.build_graphs([perovskite("Sr"), MIXED], disorder="average")
    batch = sf.collate(graphs)
    assert torch.equal(batch.atom_features[:3], torch.from_numpy(element_features()[graphs[0].numbers]))
    with torch.no_grad():
        together = model()(batch)
        alone = torch.cat([model()(sf.collate([g])) for g in graphs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert abs(float(together[0] - together[1])) > 1e-5
    store = GraphStore.from_graphs(graphs)
    assert torch.equal(store.batch([0, 1]).atom_features, batch.atom_features)


def test_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = {"a": perovskite("Sr"), "b": MIXED, "c": perovskite({"Ba": 0.5, "Sr": 0.25, "Ca": 0.25}), "d": MIXED}
    expected = sf.build_graphs(structures.values(), disorder="average")
    monkeypatch.setattr("srcgcnn_fast.graph.store._CHUNK_CRYSTALS", 2)
    store = prepare(structures, tmp_path / "s", AVERAGE)
    assert store.is_mixed and open_store(tmp_path / "s").parameters.disorder == "average"
    store.verify()
    for order in ([0, 1, 2, 3], [3, 0, 0, 2], [1]):
        found, wanted = store.batch(order), sf.collate([expected[i] for i in order])
        torch.testing.assert_close(found.atom_features, wanted.atom_features, rtol=0, atol=1e-7)
        assert torch.equal(found.numbers, wanted.numbers) and torch.equal(found.distance, wanted.distance)
    assert store.batch([0]).atom_features is None and store[0].atom_features is None
    np.testing.assert_allclose(store[2].atom_features, expected[2].atom_features, rtol=0, atol=1e-7)
    more = prepare({"e": perovskite({"Sr": 0.4, "Ba": 0.6})}, tmp_path / "s", append=True)
    assert len(more) == 5
    np.testing.assert_allclose(more[1].atom_features, expected[1].atom_features, rtol=0, atol=1e-7)
    assert more[4].numbers[more[4].atom_class[0]] == BA
    for name in ("mixed_number", "mixed_row", "numbers"):
        before = np.load(tmp_path / "s" / f"{name}.npy")
        np.save(tmp_path / "s" / f"{name}.npy", before + before.dtype.type(100))
        damaged = open_store(tmp_path / "s")
        for read in (lambda: damaged[1], lambda: damaged.batch([1, 0])):  # noqa: B023
            with pytest.raises(InputError, match=r"s is damaged .averaged sites have no such atom.; prepare it again"):
                read()
        np.save(tmp_path / "s" / f"{name}.npy", before)
    refused = prepare(structures, tmp_path / "t")
    assert len(refused) == 1 and [name for name, _ in refused.rejected] == ["b", "c", "d"]


def test_predictions() -> None:
    made = model()
    assert sf.predict(made, [MIXED])["error"][0].startswith("Structure 0 is disordered")
    table = sf.predict(made, [perovskite("Sr"), MIXED], disorder="average")
    assert table["error"].isna().all() and abs(table["gap"][0] - table["gap"][1]) > 1e-5
    made.metadata.graph = AVERAGE
    assert sf.predict(made, [MIXED])["gap"][0] == pytest.approx(table["gap"][1], abs=1e-6)
    made.element_table = made.element_table * 2
    assert "the model has others" in sf.predict(made, [MIXED])["error"][0]


def test_training(tmp_path: Path) -> None:
    structures = [perovskite({"Sr": share, "Ba": 1 - share}) for share in np.linspace(0.05, 0.95, 12)]
    for k, structure in enumerate(structures):
        structure.properties = {"gap": k / 12}
    store = prepare(structures, tmp_path / "s", AVERAGE)
    data = GraphDataModule(store, "gap", batch_size=4)
    other = model()
    other.element_table = other.element_table * 2
    with pytest.raises(InputError, match="the model has others"):
        fit(other, data, tmp_path / "no", Recipe(epochs=1))
    trained = fit(model(), data, tmp_path / "run", Recipe(epochs=2)).model
    loaded = sf.load_model(tmp_path / "run" / "model")
    assert loaded.metadata.graph.disorder == "average"
    table = sf.predict(loaded, structures)
    assert table["error"].isna().all() and table["gap"].nunique() == 12
    assert np.allclose(table["gap"], sf.predict(trained, structures)["gap"])


CASES = {  # file: sites, sites of the majority, one element's amount in the cell
    "disordered__4003024.cif": (5, 5, (49, 0.0672)),
    "disordered__Cod_2100513.cif": (20, 20, (41, 2.0)),
    "disordered__Li10GeP2S12.cif": (58, 58, (3, 20.2)),
    "disordered__srycoo.cif": (80, 72, (38, 11.2)),
}


@pytest.mark.filterwarnings("ignore")
def test_hard_cases(data_dir: Path) -> None:
    paths = [data_dir / "hard_cases" / name for name in CASES]
    majority = list(read_inputs(paths, disorder="majority"))
    average = list(read_inputs(paths, disorder="average"))
    for path, one, mixed in zip(paths, majority, average, strict=True):
        sites, kept, (number, amount) = CASES[path.name]
        assert isinstance(one.crystal, Crystal) and len(one.crystal.numbers) == kept, one.error
        assert isinstance(mixed.crystal, MixedCrystal) and len(mixed.crystal.numbers) == sites, mixed.error
        assert mixed.crystal.content()[number] == pytest.approx(amount, abs=1e-6)
        assert sf.build_graph(path, disorder="average").n_atoms == sites


def test_command_line(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(data_dir / "hard_cases" / "disordered__Cod_2100513.cif")
    assert main(["prepare", source, str(tmp_path / "s")]) == 2 and "is disordered" in capsys.readouterr().err
    assert main(["prepare", source, str(tmp_path / "s"), "--disorder", "average"]) == 0
    assert open_store(tmp_path / "s").is_mixed
    checkpoint = str(data_dir / "upstream" / "band-gap.pth.tar")
    out = tmp_path / "p.csv"
    assert main(["predict", checkpoint, source, "--out", str(out)]) == 1 and "is disordered" in out.read_text()
    assert main(["predict", checkpoint, source, "--out", str(out), "--disorder", "majority"]) == 0
    assert "disordered" in out.read_text() and "is disordered" not in out.read_text()
