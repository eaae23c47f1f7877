"""Studies: what they say, that they resume and keep runs, and what their report holds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from srcgcnn_fast import CGCNN, InputError
from srcgcnn_fast.cli import main
from srcgcnn_fast.graph import GraphStore
from srcgcnn_fast.training import GraphDataModule, Recipe, evaluate, fit, report, study
from srcgcnn_fast.training.alloys import write_alloys
from srcgcnn_fast.training.report import compare_study, composition, paired_difference
from srcgcnn_fast.training.study import Section, Study, Variant, find, read_study

SMALL = {"atom_fea_len": 8, "h_fea_len": 8}
RECIPE = Recipe(epochs=2, ema=0.9, optimizer="adamw", schedule="one_cycle", loss="mae")
TEXT = """
targets: [energy]
seeds: [0, 1]
recipe: {lr: 1e-3, epochs: 7, batch_size: 32}
sections:
  - title: One
    variants:
      A: {model: cgcnn, n_conv: 2}
      B: {recipe: {lr: 0.5, milestones: [3, 4]}}
  - title: Two
    scored: val
    targets: [gap]
    seeds: [5]
    recipe: {epochs: 9}
    variants: {C: }
"""


def small_study(seeds=(0, 1), targets=("energy", "volume"), recipe=RECIPE, scored="test") -> Study:
    variants = (
        Variant("CGCNN", "cgcnn", {"n_conv": 1, **SMALL}, recipe, 32),
        Variant("SR", "sr-cgcnn", SMALL, recipe, 32),
    )
    return Study("Small", (Section("Both", variants, targets, seeds, scored),))


@pytest.fixture(scope="module")
def finished(alloys, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    compare_study(small_study(), alloys, out, units={"energy": "eV/atom"}, command="srcgcnn-fast compare x --y 'a b'")
    return out


def test_the_innermost_setting_counts(tmp_path):
    (tmp_path / "s.yaml").write_text(TEXT)
    one, two = read_study(tmp_path / "s.yaml").sections
    a, b = one.variants
    assert a == Variant("A", "cgcnn", {"n_conv": 2}, Recipe(epochs=7, lr=1e-3), 32)
    assert b == Variant("B", "sr-cgcnn", {}, Recipe(epochs=7, lr=0.5, milestones=(3, 4)), 32)
    assert (one.targets, one.seeds, one.scored) == (("energy",), (0, 1), "test")
    assert (two.targets, two.seeds, two.scored) == (("gap",), (5,), "val")
    assert two.variants[0].recipe == Recipe(epochs=9, lr=1e-3)
    changed = read_study(tmp_path / "s.yaml").changed(["x"], [3], 1)
    assert changed.targets == ("x",) and changed.sections[1].seeds == (3,)
    assert {v.recipe.epochs for s in changed.sections for v in s.variants} == {1}
    (tmp_path / "s.yaml").write_text(TEXT.replace("seeds: [0, 1]", ""))
    assert [section.seeds for section in read_study(tmp_path / "s.yaml").sections] == [(0,), (5,)]
    precise = TEXT.replace("{lr: 0.5", "{precision: tf32, lr: 0.5")
    (tmp_path / "s.yaml").write_text(precise)
    given = read_study(tmp_path / "s.yaml")
    for plan, expected in (
        (given, ["float32", "tf32", "float32"]),
        (given.changed(precision="bfloat16"), ["bfloat16"] * 3),
    ):
        assert [v.precision for s in plan.sections for v in s.variants] == expected


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lr: 1e-3", "rate: 1", "B: a recipe has no rate|A: a recipe has no rate"),
        ("lr: 1e-3", "lr: fast", "lr is 'fast'; write a number"),
        ("model: cgcnn", "model: gcn", "A: the model 'gcn' is unknown"),
        ("epochs: 7", "precision: half", "the precision 'half' is unknown; choose among float32, tf32, bfloat16"),
        ("scored: val", "scored: train", "'Two' is scored on 'train'"),
        ("targets: [gap]", "target: [gap]", "A section says target"),
        ("targets: [energy]", "targets: []", "'One' needs variants and targets"),
        ("sections:", "parts:", "says parts"),
        ("sections:", "sections: 5\ntext:", "A section holds no names with values"),
        ("seeds: [0, 1]", "seeds: [0", "is not YAML"),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", "The seed 0 is named twice in the section 'One', .*; name each once"),
        ("seeds: [5]", "seeds: [5, 5]", "The seed 5 is named twice in the section 'Two'"),
        ("targets: [energy]", "targets: [energy, energy]", "The target energy is named twice in the section 'One'"),
        ("seeds: [0, 1]", "seeds: [a]", "seeds is 'a'; write a whole number"),
        ("epochs: 7", "epochs: 7.5", "epochs is 7.5; write a whole number"),
        ("lr: 1e-3", "lr:", "lr is None; write a number"),
        ("milestones: [3, 4]", "milestones: [3, late]", "B: milestones is 'late'; write a whole number"),
        ("batch_size: 32", "batch_size: many", "batch_size is 'many'; write a whole number"),
        ("model: cgcnn", "model: cgcnn, classification: true", "A: a study compares errors"),
        ("variants:", "variants: [1]\n    text:", "variants is .*; write a name and a value a line"),
    ],
)
def test_a_bad_study_is_refused(tmp_path, old, new, says):
    (tmp_path / "s.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(InputError, match=says):
        read_study(tmp_path / "s.yaml")


@pytest.mark.parametrize("text", ["", "# nothing", "- targets"])
def test_an_empty_study_is_refused(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=r"s\.yaml holds no names with values; it may hold title"):
        read_study(tmp_path / "s.yaml")


def test_one_target_or_seed_may_stand_without_brackets(tmp_path):
    text = TEXT.replace("[energy]", "energy").replace("[0, 1]", "3").replace("epochs: 7", "epochs: '7', freeze: head")
    (tmp_path / "s.yaml").write_text(text)
    section = read_study(tmp_path / "s.yaml").sections[0]
    assert (section.targets, section.seeds) == (("energy",), (3,))
    recipe = section.variants[0].recipe
    assert (recipe.epochs, recipe.freeze) == (7, ("head",)) and isinstance(recipe.epochs, int)


def test_titles_and_texts_that_yaml_takes_for_something_else(tmp_path):
    text = TEXT.replace("title: One", "title: 1\n    text: 2.5").replace("title: Two", "title:")
    (tmp_path / "s.yaml").write_text(f"title: 2024\ntext: 2024-05-01\n{text}")
    found = read_study(tmp_path / "s.yaml")
    assert (found.title, found.text) == ("2024", "2024-05-01")
    assert [(section.title, section.text) for section in found.sections] == [("1", "2.5"), ("", "")]


def test_an_argument_that_a_model_does_not_have(alloys, tmp_path):
    bad = Section("x", (Variant("A", "cgcnn", {"n_layers": 2}, RECIPE),), ("energy",), (0,))
    with pytest.raises(InputError, match=r"A: .*n_layers.*; use the arguments of CGCNN"):
        compare_study(Study("x", (bad,)), alloys, tmp_path)
    with pytest.raises(InputError, match="There is no study nothing; give a YAML file or one of: paper, search"):
        read_study("nothing")


def test_the_studies_of_the_package_are_fair():
    """As many trials for either model, on the validation crystals; recipes differ only where they are said to."""
    trials = [*read_study("search").sections, *read_study("search-muon").sections]
    assert {section.scored for section in trials} == {"val"}
    assert [len(section.variants) for section in trials] == [12, 12, 8, 8, 10, 10]
    paper = read_study("paper").sections
    for section in paper:
        assert len({(v.recipe.epochs, v.recipe.schedule) for v in section.variants}) == 1
    for section in (*trials, *paper[:3]):
        for variant in section.variants:
            if variant.model == "sr-cgcnn":
                assert variant.build(41).count_conv_parameters() <= 0.345 * CGCNN().count_conv_parameters()


def test_the_report_holds_everything(finished):
    text, page = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    for part in ("srcgcnn-fast compare x --y 'a b'", "test MAE, eV/atom", "difference to CGCNN [95 %]", "peak memory"):
        assert part in text
    assert "missing" not in text
    assert "* All: epochs 2, lr 0.003" in text and "schedule and epochs are the same" not in text  # recipes may differ
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(images) == 6 and all((finished / name).read_bytes().startswith(b"\x89PNG") for name in images)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and "<link" not in page and "<script" not in page
    for row in json.loads((finished / "report.json").read_text())["results"]:
        assert f"{row['mae']:.4f} ± {row['mae_sd']:.4f}" in text and f"{row['mae']:.4f} ± {row['mae_sd']:.4f}" in page


def test_the_table_is_computed_from_the_predictions(finished):
    content = json.loads((finished / "report.json").read_text())
    rows = {(r["target"], r["variant"], r["seed"]): r for r in content["runs"]}
    assert len(rows) == 8
    maes = {}
    for key, row in rows.items():
        given, predicted = np.loadtxt(
            finished / "runs" / row["run"] / "test_predictions.csv", delimiter=",", skiprows=1, usecols=(1, 2)
        ).T
        maes[key] = np.abs(given - predicted).mean()
        assert row["test_mae"] == pytest.approx(maes[key], rel=1e-12)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 1e7
    for result in content["results"]:
        values = [maes[result["target"], result["variant"], seed] for seed in (0, 1)]
        assert result["mae"] == pytest.approx(np.mean(values)) and result["mae_sd"] == pytest.approx(
            np.std(values, ddof=1)
        )
        if result["variant"] == "SR":
            base = np.mean([maes[result["target"], "CGCNN", seed] for seed in (0, 1)])
            gap = result["difference"]
            assert gap["mean"] == pytest.approx(result["mae"] - base) and gap["low"] <= gap["mean"] <= gap["high"]
            assert result["ratio"] == pytest.approx(result["mae"] / base)


def test_only_model_and_seed_differ_between_runs(finished):
    runs = [json.loads(path.read_text()) for path in (finished / "runs").glob("*/run.json")]
    runs = [run for run in runs if run["targets"] == ["energy"]]
    assert len(runs) == 4
    changing = {key for key in runs[0] if any(run[key] != runs[0][key] for run in runs)}
    assert changing == {"model", "hyperparameters", "seed", "data_seed"} and runs[0]["batch_size"] == 32
    tables = [(path.parent / "test_predictions.csv").read_text() for path in (finished / "runs").glob("*/run.json")]
    columns = {tuple(line.split(",")[0] for line in table.splitlines()) for table in tables if "energy" in table}
    assert len(columns) == 1  # the split does not follow the seed


def test_finished_runs_are_kept(alloys, finished, monkeypatch):
    def no_fit(*_, **__):
        raise AssertionError("trained again")

    before = (finished / "report.json").read_text()
    monkeypatch.setattr(study, "fit", no_fit)
    compare_study(small_study(), alloys, finished, command="srcgcnn-fast compare x --y 'a b'")
    assert json.loads((finished / "report.json").read_text())["runs"] == json.loads(before)["runs"]
    for other in (small_study(seeds=(2,)), small_study(recipe=Recipe(epochs=2))):
        with pytest.raises(AssertionError, match="trained again"):
            compare_study(other, alloys, finished)


def test_device_and_precision_reach_every_run(alloys, finished, tmp_path, monkeypatch):
    wanted = []

    def spy(*arguments, **options):
        wanted.append((options.pop("accelerator"), options["precision"]))
        return fit(*arguments, **options, accelerator="cpu")

    monkeypatch.setattr(study, "fit", spy)
    plan = small_study(seeds=(0,), targets=("energy",)).changed(precision="tf32")
    compare_study(plan, alloys, tmp_path, accelerator="gpu")
    assert wanted == [("gpu", "tf32")] * 2
    assert "precision tf32" in (tmp_path / "report.md").read_text()
    places = {path.name for path in (tmp_path / "runs").iterdir()}
    assert len(places) == 2 and not places & {path.name for path in (finished / "runs").iterdir()}
    compare_study(plan, alloys, tmp_path, accelerator="cpu")  # where does not matter: nothing is trained again
    assert len(wanted) == 2


class StopAfter(pl.Callback):
    """Ctrl-C in the epoch after the given number of them."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.current_epoch >= self.epochs:
            raise KeyboardInterrupt


def test_an_interrupted_study_goes_on_where_it_stopped(alloys, finished, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(options["resume"])
        stop = [StopAfter(1)] if len(calls) == 3 else []
        return fit(*arguments, **options, callbacks=stop)

    monkeypatch.setattr(study, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_study(small_study(), alloys, tmp_path)
    assert "6 of 8 runs of this section are still missing." in (tmp_path / "report.md").read_text()
    compare_study(small_study(), alloys, tmp_path)
    assert calls == [False, False, False, True, *[False] * 5]  # two are kept, the third resumed
    timing = ("seconds_per_epoch", "wall_seconds", "peak_memory_bytes", "finished")
    again, whole = (json.loads((out / "report.json").read_text())["runs"] for out in (tmp_path, finished))
    assert [{k: v for k, v in row.items() if k not in timing} for row in again] == [
        {k: v for k, v in row.items() if k not in timing} for row in whole
    ]


def test_a_run_that_fails_is_named_and_stops_no_other(alloys, finished, tmp_path):
    plan = small_study(seeds=(0,), targets=("energy",))
    (section,) = plan.sections
    wild = Variant("wild", "sr-cgcnn", SMALL, Recipe(epochs=2, lr=1e30, optimizer="sgd"), 32)
    plan = dataclasses.replace(plan, sections=(dataclasses.replace(section, variants=(wild, *section.variants)),))
    shutil.copytree(finished / "runs", tmp_path / "runs")
    told = []
    with pytest.raises(InputError, match=r"^1 of 3 runs failed, at first wild, energy, seed 0: The training loss is"):
        compare_study(plan, alloys, tmp_path, tell=told.append)
    assert [line[:3] for line in told] == ["2/3", "3/3"]
    text = (tmp_path / "report.md").read_text()
    assert "1 of 3 runs of this section are still missing." in text and "| CGCNN |" in text and "| SR |" in text


def test_settings_are_chosen_without_the_test_crystals(alloys, tmp_path):
    compare_study(small_study(seeds=(0,), targets=("energy",), scored="val"), alloys, tmp_path)
    assert not list(tmp_path.glob("runs/*/test_predictions.csv"))
    assert "val MAE" in (tmp_path / "report.md").read_text() and "test MAE" not in (tmp_path / "report.md").read_text()


def test_what_decides_a_run(alloys):
    data = GraphDataModule(alloys, "energy")
    values = alloys.targets["energy"] + 1e-6
    corrected = GraphStore.from_graphs([alloys[i] for i in range(len(alloys))], targets={"energy": values})
    relaxed = [dataclasses.replace(graph, distance=graph.distance * np.float32(1.001)) for graph in alloys]
    strained = GraphStore.from_graphs(relaxed, targets={"energy": alloys.targets["energy"]})
    variant = small_study().sections[0].variants[0]

    def place(variant=variant, data=data, seed=0):
        return find(variant, data, Path("x"), seed)[0]

    assert place(Variant("another name", "cgcnn", {"n_conv": 1, "n_h": 1, **SMALL}, RECIPE, 32)) == place()
    others = [
        place(Variant("CGCNN", "cgcnn", {"n_conv": 2, **SMALL}, RECIPE, 32)),
        place(Variant("CGCNN", "cgcnn", {"n_conv": 1, **SMALL}, Recipe(epochs=2), 32)),
        place(Variant("CGCNN", "cgcnn", {"n_conv": 1, **SMALL}, RECIPE, 31)),
        place(Variant("CGCNN", "cgcnn", {"n_conv": 1, **SMALL}, RECIPE, 32, "bfloat16")),
        place(seed=1),
        place(data=GraphDataModule(alloys, "high")),
        place(data=GraphDataModule(alloys, "energy", split=(0.7, 0.2, 0.1))),
        place(data=GraphDataModule(alloys, "energy", seed=1)),
        place(data=GraphDataModule(corrected, "energy")),
        place(data=GraphDataModule(strained, "energy")),
    ]
    assert len({*others, place()}) == 11


def test_scores_are_those_of_the_best_epoch(alloys):
    data, model = GraphDataModule(alloys, "energy"), CGCNN(1, 8, 8)
    history = [{"epoch": k + 1.0, "val_mae": mae, "seconds": 3.0**k} for k, mae in enumerate((3.0, 1.0, 2.0))]
    found = study._scores(SimpleNamespace(model=model, history=history, best=history[1], seconds=20.0), data, False)
    assert (found["val_mae"], found["best_epoch"], found["seconds_per_epoch"]) == (1.0, 2, 3.0)
    assert found["train_mae"] == evaluate(model, data, "train").metrics["mae"]


def test_a_paired_difference_has_the_interval_of_its_crystals():
    rng = np.random.default_rng(0)
    others = rng.exponential(1.0, (1, 2000))
    gaps = rng.normal(0.1, 0.5, (1, 2000))
    found = paired_difference(others + gaps, others)
    error = gaps.std() / np.sqrt(gaps.size)
    assert found.mean == pytest.approx(gaps.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.low < found.mean < found.high
    wide = paired_difference(np.stack([others[0] + 0.5, others[0]]), np.stack([others[0]] * 2))  # seeds disagree
    assert (wide.low, wide.high) == pytest.approx((0.0, 0.5))


def test_atoms_and_elements_are_those_of_the_crystals(alloys):
    data = GraphDataModule(alloys, "energy")
    atoms, holds = composition(data, "test")
    for k, index in enumerate(data.parts["test"].indices):
        graph = alloys[int(index)]
        assert atoms[k] == graph.n_atoms
        assert set(np.flatnonzero(holds[k])) == set(graph.numbers.tolist())


def test_sizes_are_apart_and_whole():
    atoms = np.array([1, 4, 5, 64, 65, 300])
    found = report._by_size(atoms, {"A": np.arange(6.0)})
    assert found == {
        "1–4": (2, {"A": 0.5}),
        "5–8": (1, {"A": 2.0}),
        "33–64": (1, {"A": 3.0}),
        "≥ 65": (2, {"A": 4.5}),
    }


def test_a_name_with_a_bar_stays_in_its_cell():
    assert report._grid(["model"], [["lr | wd"]]).markdown.endswith("| lr \\| wd |")


def test_errors_in_a_small_unit_have_digits():
    errors = np.array([0.0582, 0.0586])
    assert report._plus_minus(errors) == "0.0584 ± 0.0003"
    assert report._plus_minus(1e-9 * errors) == "0.0000000000584 ± 0.0000000000003"


def test_runs_that_patience_ends_share_a_curve():
    long, short = [{"epoch": 1, "val_mae": 0.4}, {"epoch": 2, "val_mae": 0.3}], [{"epoch": 1, "val_mae": 0.2}]
    mean = [{"epoch": 1, "val_mae": pytest.approx(0.3)}, {"epoch": 2, "val_mae": 0.3}]
    assert report.mean_history([long, short]) == report.mean_history([short, long]) == mean


def test_errors_by_steps_are_of_runs_that_were_trained_alike(alloys):
    variants = [Variant(f"T = {t}", "sr-cgcnn", {"n_recurrent_steps": t}, RECIPE, 32) for t in (1, 2, 3)]
    variants.append(Variant("small batches", "sr-cgcnn", {"n_recurrent_steps": 3}, RECIPE, 8))
    section, nothing = Section("Steps", tuple(variants), ("energy",), (0,)), np.zeros(1)
    runs = {
        ("energy", 0, v.name): study.Run(Path(), {}, [], ["x"], nothing, nothing + k) for k, v in enumerate(variants)
    }
    steps, _ = report._by_depth(report._Found(section, runs, GraphDataModule(alloys, "energy"), "energy"))
    assert steps == {1: [0.0], 2: [1.0], 3: [2.0]}


def test_a_report_says_what_is_missing(alloys, finished, tmp_path):
    plan = small_study(seeds=(0, 1, 2, 2))
    data = {target: GraphDataModule(alloys, target) for target in plan.targets}
    runs = study.kept_runs(plan.sections[0], data, finished / "runs")
    assert len(runs) == 8
    slow = {
        key: dataclasses.replace(run, history=[{**row, "seconds": 3600.0} for row in run.history])
        for key, run in runs.items()
    }
    report.write_report(plan, [(plan.sections[0], slow)], data, tmp_path, "again")
    text = (tmp_path / "report.md").read_text()
    assert "4 of 12 runs of this section are still missing." in text
    assert "8 run(s), 16.00 h of training in all" in text  # of all epochs, also those before an interruption


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_alloys(tmp_path / "a.parquet", 40)
    argv = ["compare", "a.parquet", "--target", "formation_energy_per_atom", "--seeds", "0", "1", "--epochs", "1"]
    argv += ["--split", "0.5", "0.25", "0.25", "--atom-fea-len", "8", "--h-fea-len", "8", "--out", "o"]
    argv += ["--accelerator", "cpu", "--precision", "tf32"]
    assert main(argv) == 0
    assert "4/4 Comparison: SR-CGCNN, formation_energy_per_atom, seed 1: test MAE" in capsys.readouterr().out
    assert f"```bash\nsrcgcnn-fast {' '.join(argv)}\n```" in (tmp_path / "o" / "report.md").read_text()
    assert all(json.loads(path.read_text())["precision"] == "tf32" for path in Path("o/runs").glob("*/run.json"))
    if not torch.cuda.is_available():
        assert main([*argv, "--seeds", "2", "--accelerator", "gpu"]) == 2
        assert "PyTorch finds no GPU here" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "--study", "paper", "--lr", "1", "--seed", "3"]) == 2
    assert "The study paper says itself what --lr, --seed would" in capsys.readouterr().err
    for target in ([], ["--seeds", "0"], ["--study", "paper"]):
        assert main(["compare", "a.parquet", "--target", "formation_energy_per_atom", "--epochs", "0", *target]) == 2
        assert "Training for 0 epochs does nothing" in capsys.readouterr().err
    for more in (["--target", "x"], ["--study", "paper"]):
        assert main(["compare", "a.parquet", *more, "--seeds", "1", "0", "1"]) == 2
        assert "The seed 1 is named twice" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "--target", "x", "--target", "x"]) == 2
    assert "The target x is named twice" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "--target", "x", "--seeds", "0", "--seed", "3"]) == 2
    assert "--seeds stands in place of --seed 3; give one of them" in capsys.readouterr().err
    assert main(["compare", "a.parquet"]) == 2
    assert "--target" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "--study", "paper", "--unit", "eV"]) == 2
    assert "--unit is of one target" in capsys.readouterr().err
