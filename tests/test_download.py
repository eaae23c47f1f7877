"""Downloads, against stand-ins for the packages of the databases: what they are asked, and what becomes of answers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from srcgcnn_fast import InputError
from srcgcnn_fast.cli import main
from srcgcnn_fast.download import download
from srcgcnn_fast.graph import prepare

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
COPPER = Structure([[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]], ["Cu"], [[0, 0, 0]])
DISORDERED = Structure(Lattice.cubic(3.0), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(".".join(parts[:k])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def document(id: str, structure: Structure, energy: float | None, gap: float | None) -> SimpleNamespace:
    return SimpleNamespace(material_id=id, structure=structure, formation_energy_per_atom=energy, band_gap=gap)


class Rester:
    """As mp_api.client.MPRester, with three materials."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, api_key: str | None = None) -> None:
        self.key = api_key
        self.materials = SimpleNamespace(summary=SimpleNamespace(search=self._search))

    def __enter__(self) -> Rester:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _search(
        self, *, fields: list[str], chemsys: Any = None, num_chunks: Any = None, chunk_size: int = 1000
    ) -> list:
        if self.error:
            raise self.error
        self.asked.append((str(self.key), {"fields": fields, "chemsys": chemsys, "pages": (num_chunks, chunk_size)}))
        return [
            document("mp-22862", SALT, -2.1, 5.0), document("mp-9", DISORDERED, -0.1, 0.0),
            document("mp-30", COPPER, 0.0, None),
        ]  # fmt: skip


@pytest.fixture
def materials_project(monkeypatch):
    install(monkeypatch, "mp_api.client", MPRester=Rester)
    monkeypatch.setenv("MP_API_KEY", "secret")
    monkeypatch.setattr(Rester, "asked", [])
    return Rester


def test_the_materials_project_becomes_a_table_that_prepare_reads(materials_project, tmp_path):
    found = download("mp", tmp_path / "mp.parquet", chemsys=["Na-Cl", "Cu"], limit=2500)
    fields = ["material_id", "structure", "formation_energy_per_atom", "band_gap"]
    query = {"fields": fields, "chemsys": ["Na-Cl", "Cu"], "pages": (3, 1000)}
    assert materials_project.asked == [("secret", query)]
    assert found.crystals == 2 and len(found.skipped) == 1 and "mp-9 is disordered" in found.skipped[0]
    table = pd.read_parquet(tmp_path / "mp.parquet")
    assert table["material_id"].tolist() == ["mp-22862", "mp-30"]
    assert table["formula"].tolist() == ["Na4Cl4", "Cu"]
    assert table["formation_energy_per_atom"].tolist() == [-2.1, 0.0]
    assert table["band_gap"].isna().tolist() == [False, True]
    assert np.reshape(table["lattice"][1], (3, 3)) == pytest.approx(COPPER.lattice.matrix)
    store = prepare(tmp_path / "mp.parquet", tmp_path / "store")
    assert store.n_atoms == 9 and set(store.targets) == {"formation_energy_per_atom", "band_gap"}
    assert download("mp", tmp_path / "mp.parquet", chemsys="Na-Cl", targets="band_gap").targets == ("band_gap",)
    assert materials_project.asked[-1][1]["chemsys"] == ["Na-Cl"]


def test_what_the_materials_project_lacks_is_one_sentence(materials_project, monkeypatch, tmp_path):
    out = tmp_path / "mp.parquet"
    with pytest.raises(InputError, match="no field hardness"):
        download("mp", out, targets=["hardness"])
    monkeypatch.setattr(Rester, "error", RuntimeError("401: Invalid\n authentication credentials."))
    with pytest.raises(InputError, match=r"\(401: Invalid authentication credentials\); check .* key in MP_API_KEY"):
        download("mp", out)
    monkeypatch.setenv("MP_API_KEY", " ")
    with pytest.raises(InputError, match=r"https://materialsproject.org/api and set it \(export MP_API_KEY"):
        download("mp", out)
    monkeypatch.setitem(sys.modules, "mp_api", None)
    monkeypatch.delitem(sys.modules, "mp_api.client")
    with pytest.raises(InputError, match=r'needs mp_api: python -m pip install "srcgcnn_fast\[data\]"'):
        download("mp", out)
    assert not list(tmp_path.iterdir())


def matbench(name: str) -> pd.DataFrame:
    if name not in ("matbench_mp_e_form", "matbench_mp_is_metal"):
        raise ValueError(f"Unrecognized dataset name: {name}")
    column = "e_form" if name.endswith("form") else "is_metal"
    values = [-2.1, -0.1, 0.3] if name.endswith("form") else [False, True, True]
    return pd.DataFrame({"structure": [SALT, DISORDERED, COPPER], column: values})


def test_matbench_keeps_its_ids_also_behind_a_gap(monkeypatch, tmp_path):
    install(monkeypatch, "matminer.datasets", load_dataset=matbench)
    download("matbench", tmp_path / "m.parquet", dataset="matbench_mp_e_form")
    table = pd.read_parquet(tmp_path / "m.parquet")
    assert table["material_id"].tolist() == ["mb-mp-e-form-1", "mb-mp-e-form-3"]
    assert table["formation_energy_per_atom"].tolist() == [-2.1, 0.3]
    found = download("matbench", tmp_path / "c.parquet", dataset="matbench_mp_is_metal", limit=1)
    assert found.targets == ("is_metal",) and pd.read_parquet(tmp_path / "c.parquet")["is_metal"].tolist() == [0.0]
    for dataset, says in {
        None: "Which task", "matbench_steels": "without structures", "matbench_x": "Unrecognized dataset",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=says):
            download("matbench", tmp_path / "x.parquet", dataset=dataset)
    with pytest.raises(InputError, match="no field gap; it has e_form"):
        download("matbench", tmp_path / "x.parquet", dataset="matbench_mp_e_form", targets=["gap"])


def jarvis(dataset: str) -> list[dict[str, Any]]:
    if dataset != "dft_3d":
        raise ValueError("Check DB name options.")
    print("Obtaining 3D dataset ...")
    copper = {"lattice_mat": COPPER.lattice.matrix.tolist(), "coords": [[0, 0, 0]], "elements": ["Cu "]}
    salt = {"lattice_mat": SALT.lattice.matrix.tolist(), "coords": SALT.cart_coords.tolist()}
    salt["elements"] = [site.specie.symbol for site in SALT]
    energies = {"formation_energy_peratom": -2.0, "optb88vdw_bandgap": 5.1, "ehull": 0.0}
    return [
        {"jid": "JVASP-1", "atoms": {**copper, "cartesian": False}, **energies, "optb88vdw_bandgap": "na"},
        {"jid": "JVASP-2", "atoms": {**salt, "cartesian": True}, **energies},
        {"jid": "JVASP-3", "atoms": {**copper, "elements": ["Xx"], "cartesian": False}, **energies},
        {"jid": "JVASP-4", "atoms": {**copper, "cartesian": False}, "formation_energy_peratom": -1.0},
    ]


def test_jarvis(monkeypatch, tmp_path, capsys):
    install(monkeypatch, "jarvis.db.figshare", data=jarvis)
    found = download("jarvis", tmp_path / "j.parquet")
    assert capsys.readouterr().out == ""
    table = pd.read_parquet(tmp_path / "j.parquet")
    assert table["material_id"].tolist() == ["JVASP-1", "JVASP-2", "JVASP-4"] and "JVASP-3" in found.skipped[0]
    assert table["optb88vdw_bandgap"].isna().tolist() == [True, False, True]  # written so, there, not named
    assert found.targets == ("formation_energy_per_atom", "optb88vdw_bandgap")
    assert np.reshape(table["frac_coords"][1], (-1, 3)) == pytest.approx(SALT.frac_coords)
    with pytest.raises(InputError, match=r"dft_4d of JARVIS .*Check DB name"):
        download("jarvis", tmp_path / "x.parquet", dataset="dft_4d")
    with pytest.raises(InputError, match="no field gap; it has jid, formation"):
        download("jarvis", tmp_path / "x.parquet", targets=["gap"])


def test_the_command(materials_project, tmp_path, capsys):
    out = tmp_path / "new" / "mp.parquet"
    assert main(["download", "mp", str(out), "--target", "band_gap", "--limit", "10"]) == 0
    captured = capsys.readouterr()
    assert "2 crystals with band_gap, 1 left out" in captured.out and "mp-9" in captured.err
    assert materials_project.asked[0][1]["pages"] == (1, 10)
    for words, says in {
        ("mp", "mp.csv"): ".parquet", ("jarvis", "a.parquet", "--chemsys", "Li-O"): "Chemical systems",
        ("mp", "a.parquet", "--limit", "0"): "limit of 0", ("mp", "a.parquet", "--dataset", "x"): "one data set",
    }.items():  # fmt: skip
        assert main(["download", words[0], str(tmp_path / words[1]), *words[2:]]) == 2
        assert says in capsys.readouterr().err
