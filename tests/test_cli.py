"""The command line: what it prints, what it writes, and one sentence for what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from srcgcnn_fast import CGCNN, load_model, save_model
from srcgcnn_fast import predict as sf_predict
from srcgcnn_fast.cli import main
from srcgcnn_fast.prediction import write_table
from srcgcnn_fast.training.alloys import write_alloys
from srcgcnn_fast.training.fit import only_trainer

TARGET = "formation_energy_per_atom"
NARROW = "--atom-fea-len 8 --h-fea-len 8"
WIDTHS = "atom_fea_len: 8\nh_fea_len: 8\n"
ANGLES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_alloys(tmp_path_factory.mktemp("source") / "alloys.parquet", 40)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "sr"
    argv = ["train", str(source), "--target", TARGET, "--epochs", "1", "--out", str(out), "--atom-fea-len", "16"]
    assert main(argv) == 0
    return out


def refused(capsys, *argv: object) -> str:
    """The one sentence that a bad request gets."""
    assert main([str(word) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def with_classes(tmp_path: Path, source: Path) -> Path:
    """The source with a class for a second target."""
    frame = pd.read_parquet(source)
    frame["stable"] = (frame[TARGET] < frame[TARGET].median()).astype(float)
    frame.to_parquet(tmp_path / "c.parquet")
    return tmp_path / "c.parquet"


def test_help_is_instant():
    code = (
        "import sys, srcgcnn_fast.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numba', 'lightning', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert result.returncode == 0, result.stderr
    assert all(
        word in result.stdout for word in ("demo", "prepare", "train", "compare", "predict", "convert", "doctor")
    )


def test_prepare_tells_the_sizes(source, tmp_path, capsys):
    assert main(["prepare", str(source), str(tmp_path / "store")]) == 0
    reduced = capsys.readouterr().out
    assert "40 crystals" in reduced and TARGET in reduced and "0 rejected" in reduced
    assert main(["prepare", str(source), str(tmp_path / "full"), "--full-graph"]) == 0
    assert "1.00 times smaller" in capsys.readouterr().out


def test_prepare_names_what_it_rejects(tmp_path, capsys, monkeypatch):
    from ase.build import bulk

    from srcgcnn_fast.graph import GraphStore

    read, original = [], GraphStore.rejected.fget
    monkeypatch.setattr(GraphStore, "rejected", property(lambda store: read.append(store) or original(store)))
    bulk("Cu").write(tmp_path / "good.cif")
    (tmp_path / "bad.cif").write_text("data_bad\n_cell_length_a what\n")
    assert main(["prepare", str(tmp_path), str(tmp_path / "store")]) == 0
    captured = capsys.readouterr()
    assert "1 crystals" in captured.out and "1 rejected" in captured.out
    assert "rejected bad" in captured.err
    assert len(read) == 1  # it may be a long file


def test_train_writes_a_run(trained, source, capsys):
    assert sorted(p.name for p in trained.iterdir()) == [
        "best.ckpt", "config.yaml", "graphs", "last.ckpt", "metrics.csv", "model", "run.json", "test_predictions.csv",
    ]  # fmt: skip
    assert len(pd.read_csv(trained / "test_predictions.csv")) == 4
    assert not any(b"\r" in table.read_bytes() for table in trained.glob("*.csv"))  # as in predict's
    again = ["train", source, "--target", TARGET, "--epochs", "1", "--out", trained, "--atom-fea-len", "16"]
    assert "already holds a run" in refused(capsys, *again)
    assert main([str(word) for word in (*again, "--resume")]) == 0


@pytest.mark.parametrize(
    "options",
    [
        NARROW,
        f"{NARROW} --full-graph --split .7 .2 .1 --seed 3 --optimizer adamw --ema .9 --dropout .2",
        f"{NARROW} --schedule one_cycle --batch-size 9",
        f"{NARROW} --model cgcnn --n-conv 2 --schedule multistep --lr-milestones 2 --batch-rows 99",
        f"{NARROW} --target stable --classification --class-weights 1 2 --split 0.5 0.3 0.2",
        "--init {model} --freeze embedding --loss mae",
        "--init {stack} --model cgcnn --n-conv 2",
    ],
)
def test_a_run_of_the_command_line_repeats_from_its_file(trained, source, tmp_path, options):
    stack = save_model(CGCNN(2, 8, 8), tmp_path / "stack")
    data, words = str(with_classes(tmp_path, source)), options.format(model=trained / "model", stack=stack).split()
    target = () if "--target" in words else ("--target", TARGET)
    assert main(["train", data, *target, "--epochs", "1", "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--classification --loss mae --unit eV", "--loss and --unit would change nothing; drop"),
        ("--n-conv 4", "--n-conv would change nothing without --model cgcnn; give that, or drop it"),
        ("--model cgcnn --n-recurrent-steps 4 --recurrent-layer-norm",
         "--n-recurrent-steps and --recurrent-layer-norm would change nothing without --model sr-cgcnn"),
        ("--model cgcnn --recurrent-learnable-alpha", "--recurrent-learnable-alpha would change nothing without"),
        ("--lr-milestones 10 20", "--lr-milestones would change nothing without --schedule multistep"),
        ("--warmup 0.1", "--warmup would change nothing without --schedule one_cycle"),
        ("--muon-lr 0.02", "--muon-lr would change nothing without --optimizer muon"),
        ("--batch-size 256 --batch-rows 99", "--batch-rows stands in place of --batch-size; give one of them"),
        ("--tensorboard --logger wandb", "are two logs, and a run has one; give one of them"),
        ("--split-column part", "--split-column is a column of --split-file"),
        ("--split .5 .3 .2 --folds 3", "--split would change nothing beside --folds; give one of them"),
        ("--split .5 .3 .2 --split-file f.csv", "--split would change nothing beside --split-file"),
        ("--split .5 .3 .2 --val v.parquet", "--split would change nothing beside --val"),
        ("--init {model} --model cgcnn --n-conv 2", "fixes the network, so --model and --n-conv would change nothing"),
        ("--init {model} --n-recurrent-steps 4", "--n-recurrent-steps would change nothing; drop"),
        ("--init {model} --atom-fea-len 24 --h-fea-len 16 --n-h 2", "--atom-fea-len and --h-fea-len and --n-h would"),
        ("--patience 0", "A patience of 0 epochs stops at once"),
        ("--split 80 10 10", "is not three fractions (train, val, test) that sum to at most 1"),
        ("--split .5 .5 .5", "is not three fractions"),
        ("--batch-size 0", "A batch cannot hold 0 crystals or rows"),
        ("--batch-rows -1", "A batch cannot hold -1 crystals or rows"),
        ("--seed -1", "The seed -1"),
        ("--workers 99999", "99999 workers are too many"),
        ("--target volume --target volume", "name one twice"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_or_make_no_sense_are_refused_before_anything_is_written(
    trained, source, tmp_path, capsys, options, says
):
    words = options.format(model=trained / "model").split()
    assert says in refused(capsys, "train", source, "--target", TARGET, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_refused_before_anything_is_written(source, tmp_path, capsys):
    compare = ("compare", source, "--target", TARGET, "--out", tmp_path / "run")
    for words, says in (
        ("--split 80 10 10", "is not three fractions"), ("--batch-size 0", "A batch cannot hold 0 crystals"),
        ("--epochs 0", "0 epochs"), ("--seed -1", "The seed -1"),
    ):  # fmt: skip
        for more in ((), ("--target", "volume")):
            assert says in refused(capsys, *compare, *words.split(), *more)
    assert not (tmp_path / "run").exists()


def test_a_config_file_takes_one_value_where_there_may_be_several_and_numbers_as_texts(source, tmp_path, capsys):
    config, out = tmp_path / "c.yaml", tmp_path / "2024"
    config.write_text(f"source: {source}\ntarget: {TARGET}\nfolds: 2\nepochs: 1\nlr_milestones: 100\n{WIDTHS}")
    assert main(["train", "--config", str(config), "--out", str(out), "--debug"]) == 0
    assert len(pd.read_csv(out / "folds.csv")) == 2
    config.write_text(f"source: {source}\ntarget: {TARGET}\nepochs: 1\nfreeze: embedding\n{WIDTHS}")
    assert "--freeze keeps what --init brings" in refused(capsys, "train", "--config", config, "--out", out)
    with pytest.raises(SystemExit) as stopped:  # not an abbreviation that nobody reads
        main(["train", "--conf", str(config), "--out", str(out)])
    assert stopped.value.code == 2


def test_a_config_file_holds_any_option_and_the_command_line_wins(trained, source, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"source: {source}\ntarget: [{TARGET}]\nepochs: 2\nlr: 1e-3\nsplit: [0.5, 0.3, 0.2]\n")
    argv = ["train", "--lr", "0.004", "--config", str(config), "--out", str(tmp_path / "run"), "--atom-fea-len", "8"]
    assert main([*argv, "--h-fea-len", "8"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["epochs"], run["lr"]) == (2, 0.004)
    assert run["crystals"] == {"train": 20, "val": 12, "test": 8}
    # What a run leaves behind repeats it.
    again = ["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]
    for text in ("", "# nothing\n", "- epochs\n"):
        config.write_text(text)
        assert refused(capsys, *argv).endswith("c.yaml holds no options; write a name and a value a line.")
    assert "config is an empty text" in refused(capsys, "train", "--config", "")
    for text, says in {
        "lrate: 3": "names the option lrate, which is none",
        "epochs: fast": "epochs: invalid int value: 'fast'",
        "model: gcn": "model: invalid choice: 'gcn'",
        "padded: maybe": "has 'maybe' for padded, which is true or false",
        "recurrent_layer_norm: 'false'": "has 'false' for recurrent_layer_norm",
        "split: 0.8": "split: expected 3 arguments",
        "class_weights: loud": "--class-weights takes two numbers or 'balanced', not loud",
        "out: [a, b]": "has ['a', 'b'] for out; give one value",
        "unit: yes": "has True for unit; give one value",
        "lr: {fast: 1}": "give one value",
        "lr: 1: 2": "is not YAML",
    }.items():
        config.write_text(f"source: {source}\ntarget: [{TARGET}]\n{text}\n")
        assert says in refused(capsys, "train", "--config", config, "--out", tmp_path / "none")
    config.write_bytes("# 8 Å\nepochs: 1\n".encode("latin-1"))
    assert "is not YAML" in refused(capsys, *argv)
    assert not (tmp_path / "none").exists()
    assert "none.yaml" in refused(capsys, "train", "--config", tmp_path / "none.yaml")


def tables(tmp_path: Path, source: Path) -> Path:
    """The source with a second target, half of it missing."""
    frame = pd.read_parquet(source)
    frame["volume"] = [abs(np.linalg.det(np.reshape(cell, (3, 3)))) for cell in frame["lattice"]]
    frame.loc[::2, "volume"] = np.nan
    frame.to_parquet(tmp_path / "two.parquet")
    return tmp_path / "two.parquet"


SHORT = ("--epochs", "1", *NARROW.split())
SMALL = (*SHORT, "--split", "0.5", "0.3", "0.2")


def test_two_targets_and_an_ensemble(source, tmp_path, capsys):
    two, out = str(tables(tmp_path, source)), tmp_path / "run"
    argv = ["train", two, "--target", TARGET, "--target", "volume", *SMALL, "--members", "2", "--out", str(out)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "within one standard deviation" in said
    assert "mae_scaled" in said and "mae_volume" in said and "each in its target's unit" in said and "mae 0" not in said
    assert (out / "calibration.png").exists() and (out / "member_1" / "metrics.csv").exists()
    assert main(["predict", str(out / "model"), two, "--out", str(tmp_path / "p.csv")]) == 0
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table.columns) == ["id", TARGET, f"{TARGET}_std", "volume", "volume_std", "error"]
    assert (table["volume_std"] > 0).all()
    assert "--unit" in refused(capsys, *argv, "--unit", "eV")


def test_dropout_is_left_on_for_a_spread(source, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", str(source), "--target", TARGET, *SMALL, "--dropout", "0.2", "--out", str(out)]
    assert main(argv) == 0
    argv = ["predict", str(out / "model"), str(source), "--out", str(tmp_path / "p.csv"), "--dropout-passes", "5"]
    assert main(argv) == 0
    assert (pd.read_csv(tmp_path / "p.csv")[f"{TARGET}_std"] > 0).all()
    extra = json.loads((out / "model" / "config.json").read_text())["extra"]
    assert extra["dropout_scale"][0] > 0
    assert "within one standard deviation" in capsys.readouterr().out and (out / "calibration.png").exists()
    for name, more in (("dropout", ["--dropout", "0.2"]), ("ensemble", ["--members", "2"])):
        out = tmp_path / name  # the validation crystals, which set the scale, would prove nothing
        argv = ["train", str(source), "--target", TARGET, *SHORT, "--split", "0.6", "0.4", "0", *more]
        assert main([*argv, "--out", str(out)]) == 0
        assert "standard deviation" not in capsys.readouterr().out and not (out / "calibration.png").exists()


def test_dropout_without_values_to_calibrate_with_is_a_warning(source, tmp_path, caplog):
    frame = pd.read_parquet(source)
    frame["rare"] = frame[TARGET].where(np.arange(40) < 20)
    frame.assign(split=["train"] * 25 + ["val"] * 15).to_parquet(tmp_path / "t.parquet")
    table, out = str(tmp_path / "t.parquet"), str(tmp_path / "run")
    argv = ["train", table, "--target", TARGET, "--target", "rare", *SHORT, "--dropout", "0.2", "--out", out]
    assert main([*argv, "--split-file", table]) == 0
    assert "predictions of rare cannot be calibrated" in caplog.text
    assert "dropout_scale" not in load_model(tmp_path / "run" / "model").metadata.extra


def test_folds_of_a_classifier_to_start_from_are_stratified(trained, source, tmp_path, monkeypatch):
    """As with --classification: labels decide."""
    from srcgcnn_fast.training import several, splits

    data, given = with_classes(tmp_path, source), []
    argv = ["train", str(data), "--target", "stable", "--epochs", "1", "--out"]
    assert main([*argv, str(tmp_path / "first"), "--classification", *NARROW.split()]) == 0
    monkeypatch.setattr(several, "fit", None)  # the folds are made before

    def noted(*arguments, **options):
        given.append(options["labels"])
        return splits.k_folds(*arguments, **options)

    monkeypatch.setattr("srcgcnn_fast.training.k_folds", noted)
    with pytest.raises(TypeError):
        main([*argv, str(tmp_path / "cv"), "--folds", "2", "--init", str(tmp_path / "first" / "model")])
    assert given[0].sum() == 20


def test_a_target_named_fold_has_no_folds(source, tmp_path, capsys):
    frame = pd.read_parquet(source).rename(columns={TARGET: "fold"})
    frame.to_parquet(tmp_path / "f.parquet")
    argv = ("train", tmp_path / "f.parquet", "--target", "fold", *SHORT, "--out", tmp_path / "cv")
    assert "has a column fold, so no target may; rename it" in refused(capsys, *argv, "--folds", "2")
    assert "The folds of ² need the package matbench" in refused(capsys, *argv, "--folds", "²")  # a digit, no number


def test_folds_and_split_files(source, tmp_path, capsys):
    common = ["train", str(source), "--target", TARGET, *SHORT]
    assert main([*common, "--folds", "2", "--out", str(tmp_path / "cv")]) == 0
    assert "(2 folds)" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "cv" / "predictions.csv")) == 40
    frame = pd.read_parquet(source)
    frame["part"] = ["train"] * 20 + ["val"] * 9 + ["test"] * 11
    frame.to_parquet(tmp_path / "parts.parquet")
    file = ["--split-file", str(tmp_path / "parts.parquet"), "--split-column", "part"]
    assert main([*common, *file, "--out", str(tmp_path / "run")]) == 0
    scored = pd.read_csv(tmp_path / "run" / "test_predictions.csv")
    assert scored["id"].tolist() == frame["material_id"][29:].tolist()
    out = ("--out", tmp_path / "no")
    assert "--folds" in refused(capsys, *common, "--folds", "2", "--members", "2", *out)
    assert "give one of them" in refused(capsys, *common, *file, "--val", source, *out)
    assert "package matbench" in refused(capsys, *common, "--folds", "matbench_x", *out)


def test_fine_tuning_keeps_what_is_frozen(trained, source, tmp_path, capsys):
    upstream, out = tmp_path / "m.pth.tar", tmp_path / "run"
    assert main(["convert", str(trained / "model"), str(upstream)]) == 0
    common = ["train", str(source), "--target", TARGET, "--epochs", "1", "--out", str(out)]
    assert main([*common, "--init", str(upstream), "--freeze", "embedding", "convolutions"]) == 0
    before, after = (load_model(path).state_dict() for path in (trained / "model", out / "model"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "conv_to_fc.weight", "conv_to_fc.bias", "fc_out.weight", "fc_out.bias",
    }  # fmt: skip
    assert "give --init" in refused(capsys, *common, "--freeze", "embedding")
    fixed = refused(capsys, *common, "--init", upstream, "--dropout", "0.1", "--recurrent-layer-norm")
    assert "--dropout and --recurrent-layer-norm would change nothing" in fixed


def test_classes_are_weighted_and_a_run_stops_early(source, tmp_path, capsys):
    common = ["train", str(with_classes(tmp_path, source)), "--target", "stable", "--classification", *SMALL[2:]]
    options = ["--epochs", "30", "--lr", "1e-9", "--patience", "2", "--class-weights", "balanced"]
    assert main([*common, *options, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "auc" in said and " crystals)" in said and "target" not in said  # whose unit scores of classes do not have
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["class_weights"] == "balanced"
    tuned = [*common[:4], "--init", tmp_path / "run" / "model", "--loss", "mae", "--out", tmp_path / "no"]
    assert "--loss would change nothing" in refused(capsys, *tuned)  # a classifier by its model
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) < 30
    assert "two numbers" in refused(capsys, *common, "--class-weights", "a", "b", "--out", tmp_path / "no")


def test_train_from_a_prepared_store(source, tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["prepare", str(source), str(store)]) == 0
    common = ["train", store, "--target", TARGET, "--epochs", "1", "--model", "cgcnn", "--out", tmp_path / "run"]
    assert "prepared with" in refused(capsys, *common, "--radius", "6")
    assert main([str(word) for word in common]) == 0
    assert "test: mae" in capsys.readouterr().out
    assert not (tmp_path / "run" / "graphs").exists()


def test_the_radius_decides_the_gaussians_and_predict_uses_it(source, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--target", TARGET, "--epochs", "1", "--radius", "4", "--max-neighbors", "6", "--atom-fea-len", "16")
    assert main(["train", str(source), *options, "--out", str(out)]) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["hyperparameters"]["nbr_fea_len"] == 21
    assert (config["graph"]["radius"], config["graph"]["max_neighbors"]) == (4.0, 6)
    assert main(["predict", str(out / "model"), str(source), "--out", str(tmp_path / "p.csv")]) == 0
    scored = pd.read_csv(out / "test_predictions.csv").set_index("id")
    predicted = pd.read_csv(tmp_path / "p.csv").set_index("id").loc[scored.index]
    assert predicted[TARGET].to_numpy() == pytest.approx(scored[f"{TARGET}_predicted"].to_numpy(), abs=1e-5)
    model = load_model(out / "model")
    model.metadata.graph = replace(model.metadata.graph, radius=8.0, max_neighbors=12)
    other = sf_predict(model, source).set_index("id").loc[scored.index]
    assert (other[TARGET] - predicted[TARGET]).abs().max() > 1e-4  # it was not those of 8 Å


def test_compare_takes_radius_and_precision(source, tmp_path):
    argv = ["compare", str(source), "--target", TARGET, "--epochs", "1", "--radius", "5", "--out", str(tmp_path)]
    argv += ["--accelerator", "cpu", "--precision", "tf32"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "compare.json").read_text())
    assert [m["hyperparameters"]["nbr_fea_len"] for m in report["models"].values()] == [26, 26]
    assert (report["settings"]["precision"], report["machine"]["gpu"]) == ("tf32", None)
    assert json.loads((tmp_path / "cgcnn" / "run.json").read_text())["precision"] == "tf32"


def test_isolated_atoms_are_kept_on_request(trained, tmp_path, capsys):
    from ase import Atoms
    from ase.build import bulk

    folder = tmp_path / "in"
    folder.mkdir()
    Atoms("He", cell=[18.0] * 3, pbc=True).write(folder / "lone.cif")
    bulk("Cu").write(folder / "copper.cif")
    assert main(["prepare", str(folder), str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert "1 rejected" in captured.out and "--isolated keep" in captured.err
    assert main(["prepare", str(folder), str(tmp_path / "b"), "--isolated", "keep"]) == 0
    assert "2 crystals" in capsys.readouterr().out
    argv = ["predict", str(trained / "model"), str(folder), "--out", str(tmp_path / "p.csv")]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "1 errors" in captured.out and "--isolated keep" in captured.err
    assert main([*argv, "--isolated", "keep"]) == 0
    assert "2 rows, 0 errors" in capsys.readouterr().out


def test_files_in_place_of_a_folder_are_refused(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.cif").write_text(cif())
    files = [str(tmp_path / f"{name}.cif") for name in "abc"]
    for words, said in (
        (["predict", "model", *files], f"{files[1]} is one path too many; of several structure files give the folder"),
        (["prepare", *files, "store"], f"{files[2]} is one path too many"),
        (["predict", "model", files[0], "--output", files[1]], f"unrecognized arguments: --output {files[1]}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "data", "--out", "run"], ["compare", "data"], ["prepare", "data", "store"]]
)
def test_several_names_after_one_target_are_told_how_to_be_given(words, capsys):
    for target, other in (
        (["--target", "a", "b"], "b"),
        (["--target=a", "b", "c"], "b"),
        (["--target", "a", "--target", "b", "c"], "c"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *target])
        assert stopped.value.code == 2
        assert f"--target takes one name, and {other} is another; give each its own: " in capsys.readouterr().err


def test_words_too_many_beside_a_file_of_options(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("epochs: 1\n")
    words = ["train", "data", "--out", "run", "--config", str(tmp_path / "options.yaml"), "--target", "a"]
    for more, said in (
        (["b"], "give each its own: --target NAME --target b."),
        (["--no"], "unrecognized arguments: --no."),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "prepare", "train", "compare", "predict", "convert", "download", "doctor"])
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    for line, following in pairwise(lines):
        if line.startswith("  -"):
            assert "  " in line.strip() or following.startswith(" " * 20), line


def test_compare_prints_the_table(source, tmp_path, capsys):
    assert main(["compare", str(source), "--target", TARGET, "--epochs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| SR-CGCNN / CGCNN | 0.345" in out and "66,432" in out
    assert (tmp_path / "compare.json").exists()


def test_predict_and_convert(trained, source, tmp_path, capsys):
    upstream, back = tmp_path / "model.pth.tar", tmp_path / "back"
    assert main(["convert", str(trained / "model"), str(upstream)]) == 0
    assert main(["convert", str(upstream), str(back)]) == 0
    assert "SRCGCNN" in capsys.readouterr().out
    tables = []
    for number, model in enumerate((trained / "model", back)):
        out = tmp_path / f"{number}.csv"
        assert main(["predict", str(model), str(source), "--out", str(out), "--backend", "reference"]) == 0
        assert "40 rows, 0 errors" in capsys.readouterr().out
        tables.append(pd.read_csv(out))
    assert list(tables[0].columns) == ["id", TARGET, "error"]
    assert tables[0][TARGET].to_numpy() == pytest.approx(tables[1][TARGET].to_numpy(), abs=1e-5)
    there, here = (json.loads((model / "config.json").read_text()) for model in (trained / "model", back))
    assert all(there[key] == here[key] for key in ("targets", "units", "graph", "normalizer", "hyperparameters"))


def test_predict_fails_only_when_every_input_fails(trained, tmp_path, capsys):
    from ase.build import bulk

    (tmp_path / "bad.cif").write_text("data_bad\n")
    argv = ["predict", str(trained / "model"), str(tmp_path), "--out", str(tmp_path / "out.csv")]
    assert main(argv) == 1
    bulk("Cu").write(tmp_path / "good.cif")
    assert main(argv) == 0
    assert "2 rows, 1 errors" in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "reference" in capsys.readouterr().out


def test_doctor_says_that_a_forced_backend_is_an_error(monkeypatch):
    from srcgcnn_fast import doctor

    taken = {"reference": "reference", "triton": "none: Backend 'triton' cannot ", "x": "none: There is no backend 'x'"}
    for name, backend in taken.items():
        monkeypatch.setenv("SRCGCNN_FAST_BACKEND", name)
        assert f"  CPU tensors take: {backend}" in doctor.report()


@pytest.mark.parametrize("fastest", ["cuda", "triton", "reference"])
def test_doctor_names_what_cuda_tensors_take(monkeypatch, fastest):
    from srcgcnn_fast import doctor
    from srcgcnn_fast.ops import registry

    order = ("cuda", "triton", "reference", "cpu")
    known = {name: registry.BackendStatus(name, True, k >= order.index(fastest), "") for k, name in enumerate(order)}
    monkeypatch.setattr(registry, "backends", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert f"  CUDA tensors take: {fastest} (float32; other types: reference)" in doctor.report().splitlines()


def test_bad_input_is_one_sentence(trained, source, tmp_path, capsys):
    out = tmp_path / "out"
    assert TARGET in refused(capsys, "train", source, "--target", "mass", "--out", out)
    assert "missing.parquet" in refused(capsys, "train", tmp_path / "missing.parquet", "--target", "x", "--out", out)
    assert "missing.parquet" in refused(capsys, "compare", tmp_path / "missing.parquet", "--target", "x", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "prepare", tmp_path / "empty", tmp_path / "store")
    assert "empty" in refused(capsys, "predict", trained / "model", tmp_path / "empty", "--out", tmp_path / "p.csv")
    assert "missing" in refused(capsys, "predict", tmp_path / "missing", source, "--out", tmp_path / "p.csv")
    assert "missing" in refused(capsys, "convert", tmp_path / "missing", tmp_path / "model")
    assert "seed -1 is negative" in refused(capsys, "demo", "--seed", "-1", "--out", out)
    assert "exclude" in refused(
        capsys, "prepare", source, tmp_path / "s", "--full-graph", "--symmetry-tolerance", "1e-4"
    )
    assert not (tmp_path / "p.csv").exists()
    for words, says in (
        (("--batch-size", "0"), "cannot hold 0"), (("--members", "0"), "--members 0"), (("--seed", "-1"), "seed -1"),
        (("--weight-decay", "-1"), "weight_decay -1.0"), (("--workers", "-1"), "workers -1"),
    ):  # fmt: skip
        assert says in refused(capsys, "train", source, "--target", TARGET, "--out", tmp_path / "new", *words)
    assert "cannot hold 0" in refused(
        capsys, "compare", source, "--target", TARGET, "--out", tmp_path / "both", "--batch-size", "0"
    )


@pytest.mark.parametrize("command", ["train", "compare", "predict", "prepare", "demo"])
def test_an_empty_argument_is_not_passed_over(source, tmp_path, capsys, monkeypatch, command):
    """It is a variable of the shell that is not set, and no current folder."""
    monkeypatch.chdir(tmp_path)
    given = {
        "train": {"source": source, "--target": TARGET, "--out": "o", "--val": "v", "--init": "m", "--split-file": "s"},
        "compare": {"source": source, "--target": TARGET, "--out": "o", "--study": "paper"},
        "predict": {"model": "m", "input": source, "--out": "p.csv", "--backend": "reference", "--device": "cpu"},
        "prepare": {"source": source, "store": "s"},
        "demo": {"--out": "o"},
    }[command]
    for empty in given.keys() - {"--target"}:
        words = [[name] * name.startswith("--") + ["" if name == empty else value] for name, value in given.items()]
        said = refused(capsys, command, *(word for pair in words for word in pair))
        name = empty.removeprefix("--").replace("-", "_")
        assert f"The argument {name} is an empty text; give a value, or leave it out" in said
    assert list(tmp_path.iterdir()) == []


def cif(x: str = "0.5", a: float = 4.2, element: str = "Cl") -> str:
    cell = "".join(
        f"_cell_length_{k} {v}\n_cell_angle_{w} 90\n" for k, w, v in zip("abc", ANGLES, (a, 4, 4), strict=True)
    )
    site = "".join(f"_atom_site_{k}\n" for k in ("label", "type_symbol", "fract_x", "fract_y", "fract_z"))
    return (
        f"data_x\n{cell}_symmetry_space_group_name_H-M 'P 1'\nloop_\n{site}Na Na 0 0 0\n{element} {element} {x} .5 .5\n"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (cif(x="nan"), "finite number"), (cif(a=0), "no usable cell"), (cif(element="Xx"), "unknown element Xx"),
        ("", "empty"), (cif()[:90], "a.cif"),
    ],
)  # fmt: skip
def test_a_bad_structure_is_a_row_or_one_sentence(text, says, trained, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.cif").write_text(text)
    (folder / "id_prop.csv").write_text("a,1\n")
    assert says in refused(capsys, "train", folder, "--target", "target", "--out", tmp_path / "run")
    argv = ["predict", str(trained / "model"), str(folder), "--out", str(tmp_path / "p.csv")]
    assert main(argv) == 1
    assert says in pd.read_csv(tmp_path / "p.csv")["error"][0]
    (folder / "b.cif").write_text(cif())
    (folder / "id_prop.csv").write_text("a,1\nb,2\n")
    assert main(argv) == 0
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["error"].notna().tolist() == [True, False] and table[TARGET].isna().tolist() == [True, False]
    assert "Traceback" not in capsys.readouterr().err


def test_a_bad_target_is_one_sentence(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.cif").write_text(cif())
    out = tmp_path / "out"
    assert "no id_prop.csv" in refused(capsys, "train", tmp_path, "--target", "gap", "--out", out)
    (tmp_path / "id_prop.csv").write_text("a,wide\nb,\n")
    assert "'wide'" in refused(capsys, "train", tmp_path, "--target", "target", "--out", out)
    assert "has no target gap; it has target" in refused(capsys, "train", tmp_path, "--target", "gap", "--out", out)
    assert not list(out.rglob("*"))
    table = pd.DataFrame({"lattice": [4.0 * np.eye(3).ravel()], "frac_coords": [np.zeros(3)], "atomic_numbers": [[29]]})
    table.assign(gap="wide").to_parquet(tmp_path / "t.parquet")
    assert "give numbers" in refused(capsys, "compare", tmp_path / "t.parquet", "--target", "gap", "--out", out)


def test_training_says_what_it_leaves_out(source, tmp_path, caplog):
    table = pd.read_parquet(source)
    table.at[3, "atomic_numbers"] = np.full_like(table.at[3, "atomic_numbers"], 130)
    table.to_parquet(tmp_path / "t.parquet")
    argv = ["train", str(tmp_path / "t.parquet"), "--target", TARGET, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    assert "1 of 40 inputs are left out; the first: alloy-00003 (row 4 of t.parquet) has the unknown" in caplog.text
    assert caplog.text.count("inputs are left out") == 1


def test_a_bad_model_is_one_sentence(trained, source, tmp_path, capsys):
    torch.save({"state_dict": {"layer1.weight": torch.zeros(3, 3)}}, tmp_path / "foreign.pth.tar")
    broken = shutil.copytree(trained / "model", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert main(["convert", str(trained / "model"), str(tmp_path / "cut.pth.tar")]) == 0
    (tmp_path / "cut.pth.tar").write_bytes((tmp_path / "cut.pth.tar").read_bytes()[:5000])
    (tmp_path / "nothing").mkdir()
    for name, says in {
        "foreign.pth.tar": "another program", "broken": "damaged", "cut.pth.tar": "damaged", "nothing": "no model",
    }.items():  # fmt: skip
        out = tmp_path / "p.csv"
        message = refused(capsys, "predict", tmp_path / name, source, "--out", out)
        assert says in message and name in message and not out.exists()
        assert says in refused(capsys, "convert", tmp_path / name, tmp_path / "converted")


def test_what_is_no_store_is_one_sentence(trained, tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing to train on")
    assert "folder" in refused(capsys, "train", folder, "--target", "x", "--out", out)
    (folder / "row_count.npy").write_bytes(b"")
    assert "not a store" in refused(capsys, "train", folder, "--target", "x", "--out", out)


def test_an_unwritable_place_is_one_sentence(trained, source, tmp_path, capsys):
    (tmp_path / "file").write_text("")  # no directory can be made below a file, not even by root
    below = tmp_path / "file" / "below"
    for argv in (
        ("predict", trained / "model", source, "--out", below / "p.csv"),
        ("prepare", source, below),
        ("train", source, "--target", TARGET, "--out", below),
        ("compare", source, "--target", TARGET, "--out", below),
        ("demo", "--crystals", 30, "--out", below),
    ):
        assert str(below) in refused(capsys, *argv)


def test_a_table_that_cannot_be_written_is_named_before_the_work(trained, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("srcgcnn_fast.prediction.predict", None)  # nobody may get there
    (tmp_path / "d.csv").mkdir()
    assert "is a directory" in refused(capsys, "predict", trained / "model", source, "--out", tmp_path / "d.csv")
    assert "give .csv" in refused(capsys, "predict", trained / "model", source, "--out", tmp_path / "p.txt")
    long, loop, file = tmp_path / f"{'x' * 252}.csv", tmp_path / "loop", tmp_path / "file.csv"
    predict, compare = ("predict", trained / "model", source), ("compare", source, "--target", TARGET)
    file.touch()
    loop.symlink_to(loop)
    for argv in (
        (*predict, "--out", long), (*predict, "--out", loop / "p.csv"), (*predict, "--out", file / "p.csv"),
        ("predict", trained / "model", loop), ("prepare", source, long), (*compare, "--out", loop),
    ):  # fmt: skip
        assert refused(capsys, *argv).endswith("; give another path.")
    assert "File name too long" in refused(capsys, *predict, "--out", tmp_path / f"{'x' * 246}.csv")
    for argv in ((*compare, "--out", file), ("train", *compare[1:], "--out", file)):
        assert "file.csv is a file; give a directory" in refused(capsys, *argv)
    (tmp_path / "m.pth.tar").mkdir()
    assert "choose another name" in refused(capsys, "convert", trained / "model", tmp_path / "m.pth.tar")


def test_a_tilde_is_the_home_directory(trained, source, tmp_path, monkeypatch):
    """Also where the shell leaves it: after =, in a file."""
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(trained / "model", home / "m")
    shutil.copy(source, home / "s.parquet")
    (home / "c.yaml").write_text(f"source: ~/s.parquet\ntarget: {TARGET}\nout: ~/run\nepochs: 1\n{WIDTHS}")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for argv in (
        ["predict", "~/m", "~/s.parquet", "--out=~/p.csv"], ["prepare", "~/s.parquet", "~/g"],
        ["convert", "~/m", "~/m.pth.tar"], ["train", "--config=~/c.yaml"],
        ["train", "--config=~/c.yaml", "--init=~/m", "--val=~/s.parquet", "--out=~/fine", "--atom-fea-len=64",
         "--h-fea-len=128"],
    ):  # fmt: skip
        assert main(argv) == 0
    write_table(pd.read_csv(home / "p.csv"), "~/q.csv")
    assert not list(here.iterdir())
    made = {"m", "s.parquet", "c.yaml", "p.csv", "q.csv", "g", "m.pth.tar", "run", "fine"}
    assert {path.name for path in home.iterdir()} == made


def test_options_that_shards_do_not_know_are_refused(trained, source, tmp_path, capsys):
    said = refused(
        capsys, "predict", trained / "model", source, "--out", tmp_path / "p", "--ray", 2, "--dropout-passes", 5
    )
    assert "--dropout-passes" in said and "--batch-atoms" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of file sizes")
def test_a_full_disk_is_one_sentence(trained, source, tmp_path):
    code = (
        "import json, sys, resource, srcgcnn_fast.cli as cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "print([cli.main(argv) for argv in json.loads(sys.argv[1])])"
    )
    model = trained / "model"
    calls = [
        ["predict", model, source, "--out", tmp_path / "p.csv"],
        ["prepare", source, tmp_path / "s"],
        ["convert", model, tmp_path / "model.pth.tar"],
    ]
    words = json.dumps([[str(word) for word in call] for call in calls])
    # -B, since Python would keep what it could write of a compiled module, too.
    result = subprocess.run([sys.executable, "-B", "-c", code, words], capture_output=True, text=True)
    assert result.stdout.strip() == "[2, 2, 2]", result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: File too large; make room, and give the command again."] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that break")
def test_nobody_reads_on():
    argv = [sys.executable, "-m", "srcgcnn_fast.cli", "doctor"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_help_on_a_terminal_of_ascii():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "srcgcnn_fast.cli", "prepare", "--help"]
    result = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and r"\xc5" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs names of any bytes")
def test_where_the_locale_is_ascii_files_are_utf_8(source, tmp_path):
    code = (
        "import mmap, sys, srcgcnn_fast.cli as cli\n"
        "file = open(sys.argv[1], 'rb')\n"
        "library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print([cli.main(argv.split()) for argv in sys.argv[2:]])"
    )
    (tmp_path / "é.so").write_bytes(b"one of those that doctor looks through")
    compare = f"compare {source} --target {TARGET} --unit eV/Å³ --epochs 1 {NARROW} --out Fußnote"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, "é.so", compare, "doctor"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.endswith("[0, 0]\n") and r"eV/\xc5\xb3" in result.stdout, result.stderr
    assert "eV/Å³" in (tmp_path / "Fußnote" / "compare.md").read_text(encoding="utf-8")


def test_a_folder_that_may_not_be_read_is_one_sentence(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.cif").write_text(cif())

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("srcgcnn_fast.graph.readers.os.scandir", forbidden)  # chmod does not stop root
    for argv in (
        ("predict", trained / "model", tmp_path / "theirs", "--out", tmp_path / "p.csv"),
        ("prepare", tmp_path / "theirs", tmp_path / "s"),
    ):
        assert refused(capsys, *argv).endswith("theirs: Permission denied; check its permissions.")


def test_debug_shows_the_traceback(tmp_path):
    from srcgcnn_fast import InputError

    with pytest.raises(InputError):
        main(["predict", str(tmp_path / "missing"), str(tmp_path), "--debug"])


def test_predict_takes_a_store_and_a_device(trained, source, tmp_path, monkeypatch):
    from tqdm import auto

    bars, made = [], auto.tqdm
    monkeypatch.setattr(auto, "tqdm", lambda *given, **options: bars.append(made(*given, **options)) or bars[-1])
    assert main(["prepare", str(source), str(tmp_path / "store")]) == 0
    for name, given in (("store", tmp_path / "store"), ("source", source)):
        table = str(tmp_path / f"{name}.csv")
        argv = ["predict", str(trained / "model"), str(given), "--out", table, "--device", "cpu", "--precision", "tf32"]
        assert main(argv) == 0
    a, b = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("store", "source"))
    assert list(a["id"]) == list(b["id"]) and len(a) == 40
    np.testing.assert_allclose(a[TARGET], b[TARGET], atol=1e-5)
    assert [(bar.desc, bar.n) for bar in bars] == [("prepare", 40), ("predict", 40), ("predict", 40)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(trained, source, tmp_path, capsys):
    argv = ["predict", trained / "model", source, "--out", tmp_path / "t.csv"]
    for device in ("cuda", "cuda:1", "nonsense", "meta", "hpu", "vulkan", "mkldnn"):
        said = refused(capsys, *argv, "--device", device)
        assert f"There is no device '{device}' here" in said and len(said) < 170
    assert "needs a model on a CUDA device, not on cpu" in refused(capsys, *argv, "--captured")
    assert not (tmp_path / "t.csv").exists()


def test_precision_is_part_of_the_run(trained, source, capsys):
    assert json.loads((trained / "run.json").read_text())["precision"] == "float32"
    argv = ["train", source, "--target", TARGET, "--epochs", "1", "--out", trained, "--atom-fea-len", "16", "--resume"]
    assert "precision (float32 before, bfloat16 now)" in refused(capsys, *argv, "--precision", "bfloat16")


def test_a_table_of_predictions_is_neither_its_input_nor_a_part_of_it(trained, source, tmp_path, capsys):
    folder, store = tmp_path / "cifs", tmp_path / "store"
    folder.mkdir()
    table = folder / "t.parquet"
    shutil.copy(source, table)
    shutil.copytree(trained / "graphs", store)
    before = table.read_bytes()
    predict = ("predict", trained / "model")
    assert "is the input" in refused(capsys, *predict, table, "--out", folder / "." / "t.parquet")
    for name, given in (("p.json", folder), ("id_prop.csv", folder), ("p.csv", store)):
        assert "would be part of the input" in refused(capsys, *predict, given, "--out", given / name)
    assert table.read_bytes() == before and [x.name for x in folder.iterdir()] == ["t.parquet"]
    own = [trained / name for name in ("model/config.json", "run.json", "metrics.csv")]
    texts = [file.read_text() for file in own]
    for file in own:
        assert "is a file of a model or of a run" in refused(capsys, *predict, table, "--out", file)
    assert [file.read_text() for file in own] == texts
    assert main([str(x) for x in (*predict, table, "--out", folder.parent / "metrics.csv")]) == 0
    assert main([str(x) for x in (*predict, folder, "--out", folder / "predictions.csv")]) == 0


def test_a_run_that_is_refused_leaves_the_graphs_of_the_one_that_is_there(trained, source, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    other, graphs = write_alloys(tmp_path / "other.parquet", 30, seed=1), run / "graphs" / "distance.npy"
    before = graphs.read_bytes()
    start = ("train", "--target", TARGET, *SHORT, "--out", run)
    assert "already holds a run" in refused(capsys, *start, other)
    assert "graph (" in refused(capsys, *start, source, "--resume", "--radius", "4")
    assert "targets (" in refused(capsys, *start, source, "--resume", "--target", "volume")
    for kind in ("--folds", "--members"):
        assert "holds the run of one model" in refused(capsys, *start, source, kind, "2")
    if sys.platform != "win32":  # where there are file locks
        with only_trainer(run):
            assert "Another process trains in" in refused(capsys, *start, source, "--resume")
    assert graphs.read_bytes() == before
    for command in (("train", "--out", run / "graphs"), ("compare", "--out", run / "graphs")):
        words = (command[0], source, "--target", TARGET, *command[1:])
        assert "is a store of graphs" in refused(capsys, *words)


def test_a_run_that_was_stopped_before_its_first_epoch_is_resumed_from_the_beginning(source, tmp_path, caplog):
    words = ["train", "--target", TARGET, *SMALL, "--resume"]
    graphs, runs = tmp_path / "a" / "graphs", [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert main(["prepare", str(source), str(graphs), "--target", TARGET]) == 0
    more = [[str(source)], [str(graphs)], [str(graphs), "--members", "2"]]  # stopped after the graphs, and before
    for run, given in zip(runs, more, strict=True):
        for _ in range(2):
            assert main([*words, *given, "--out", str(run)]) == 0
        assert (run / "model").is_dir()
        assert caplog.text.count(f"There is no run to resume in {run}; one starts from the beginning.") == 1
