from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import srcgcnn_fast as sf
from srcgcnn_fast import serialization
from srcgcnn_fast.files import atomic_directory, read_directory, sweep, write_text
from srcgcnn_fast.interop import save_upstream_checkpoint
from srcgcnn_fast.nn import CGCNN, SRCGCNN, ModelMetadata
from srcgcnn_fast.uncertainty import Ensemble, load_predictor, save_ensemble

SMALL = {"atom_fea_len": 8, "h_fea_len": 6}
MODELS = [
    lambda: CGCNN(n_conv=2, **SMALL),
    lambda: CGCNN(n_conv=1, n_h=3, classification=True, **SMALL),
    lambda: CGCNN(n_conv=1, n_targets=2, nbr_fea_len=21, dmin=0.5, step=0.3, **SMALL),
    lambda: SRCGCNN(n_recurrent_steps=2, **SMALL),
    lambda: SRCGCNN(n_recurrent_steps=3, recurrent_layer_norm=True, recurrent_learnable_alpha=True, **SMALL),
    lambda: SRCGCNN(n_recurrent_steps=3, recurrent_shared_norms=True, **SMALL),
    lambda: CGCNN(n_conv=1, **SMALL).double(),
]


def make_model(build=MODELS[0]):
    torch.manual_seed(3)
    model = build()
    n = model.hyperparameters["n_targets"]
    model.metadata = ModelMetadata(
        targets=("band_gap", "energy")[:n],
        units=("eV", "eV/atom")[:n],
        mean=(1 / 3, -0.1)[:n],
        std=(1e-7, 2.0)[:n],
        graph=sf.GraphParameters(radius=6.7, max_neighbors=9, symmetry_tolerance=None, padded=True, isolated="keep"),
        extra={"source": "made up", "mae": 0.1, "epochs": [1, 2]},
    )
    for module in model.modules():  # statistics that are not the initial ones
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def refusal(path) -> str:
    with pytest.raises(sf.InputError) as caught:
        sf.load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_gaussians_that_end_before_the_radius_are_told_once(tmp_path, caplog):
    serialization._warn_of_gaussians.cache_clear()
    for options in ({}, {"nbr_fea_len": 17, "step": 0.5}, {"nbr_fea_len": 46, "dmin": -1.0}):
        sf.save_model(CGCNN(1, **SMALL, **options), tmp_path / "model")
    assert not caplog.text
    for name in ("a", "b"):
        sf.save_model(CGCNN(1, **SMALL, nbr_fea_len=31), tmp_path / name)
    assert caplog.text.count("Gaussians end at 6 Å and its graphs at 8 Å") == caplog.text.count("nbr_fea_len=41") == 1


@pytest.mark.parametrize("build", MODELS)
def test_round_trip_is_bit_identical(build, tmp_path, make_batch):
    model = make_model(build)
    written = sf.save_model(model, tmp_path / "a" / "model")
    assert written == tmp_path / "a" / "model"
    assert sorted(p.name for p in written.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in written.parent.iterdir()] == ["model"]
    again = sf.load_model(written)
    assert type(again) is type(model) and not again.training and model.training
    assert again.hyperparameters == model.hyperparameters and again.metadata == model.metadata
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype and torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.element_table, model.element_table)
    batch = make_batch("weighted")
    with torch.no_grad():
        assert torch.equal(again.predict(batch), model.eval().predict(batch))


def test_own_element_table(tmp_path):
    model = make_model()
    model.element_table[26] += 0.25
    table = sf.load_model(sf.save_model(model, tmp_path / "own")).element_table
    assert torch.equal(table, model.element_table)
    narrow = make_model(lambda: CGCNN(n_conv=1, orig_atom_fea_len=4, **SMALL))
    narrow.element_table = torch.rand(101, 4)
    assert torch.equal(sf.load_model(sf.save_model(narrow, tmp_path / "narrow")).element_table, narrow.element_table)
    plain = sf.save_model(make_model(), tmp_path / "plain")
    assert "element_table" not in load_file(plain / "model.safetensors")


def test_config_is_readable_and_complete(tmp_path):
    config = json.loads((sf.save_model(make_model(), tmp_path / "m") / "config.json").read_text())
    assert config["format_version"] == 1 and config["package_version"] == sf.__version__
    assert config["model"] == "CGCNN" and config["targets"] == ["band_gap"] and config["units"] == ["eV"]
    assert config["normalizer"] == {"mean": [1 / 3], "std": [1e-7]}
    assert config["graph"]["radius"] == 6.7 and config["element_table"] == "cgcnn-92"


def test_a_model_is_replaced_whole(tmp_path, monkeypatch):
    first, second = make_model(MODELS[0]), make_model(MODELS[3])
    sf.save_model(first, tmp_path / "m")
    sf.save_model(second, tmp_path / "m")
    assert type(sf.load_model(tmp_path / "m")) is SRCGCNN
    assert [p.name for p in tmp_path.iterdir()] == ["m"]

    rename = os.rename

    def failing(error):
        def fail(source, target):
            if Path(target).name == Path(source).name == "m":
                raise error
            rename(source, target)

        return fail

    with monkeypatch.context() as patch, pytest.raises(sf.InputError, match="No space left"):
        patch.setattr(os, "rename", failing(OSError(28, "No space left on device")))
        sf.save_model(first, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and type(sf.load_model(tmp_path / "m")) is SRCGCNN
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # or a kill
        patch.setattr(os, "rename", failing(KeyboardInterrupt()))
        sf.save_model(first, tmp_path / "m")
    assert not (tmp_path / "m").exists() and type(sf.load_model(tmp_path / "m")) is SRCGCNN
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("same_number", [False, True])
def test_what_is_replaced_while_it_is_loaded_is_the_new_one(tmp_path, monkeypatch, several, same_number):
    """Not weights of one with the settings of the other, also where the new directory has the inode of the old one."""
    read, done, models = serialization._read_bytes, [], [CGCNN(n_conv=1, **SMALL) for _ in range(4)]

    def save(k, name):
        if several:
            save_ensemble(Ensemble(models[k : k + 2], (k + 1.0,)), tmp_path / name)
        else:
            sf.save_model(models[k], tmp_path / name)

    def replaced(file, model):
        data = read(file, model)
        if not done:
            done.append(file)
            save(2, "n" if same_number else "m")
            time.sleep(0.02)  # the system's clock of files ticks every few milliseconds
            for new in (tmp_path / "n").glob("*"):
                old = tmp_path / "m" / new.name
                old.rename(tmp_path / f"old {new.name}")
                new.rename(old)
        return data

    save(0, "m")
    monkeypatch.setattr(serialization, "_read_bytes", replaced)
    found = load_predictor(tmp_path / "m")
    members = found.models if several else [found]
    assert not several or found.scale == (3.0,)
    for k, member in enumerate(members, 2):
        assert torch.equal(member.fc_out.weight, models[k].fc_out.weight)


def test_what_is_replaced_all_the_time_is_not_read(tmp_path):
    def read(path):
        with atomic_directory(path) as new:
            (new / "a").touch()
        return "half of each"

    read(tmp_path / "m")
    with pytest.raises(sf.InputError, match="replaced all the time"):
        read_directory(tmp_path / "m", read)


def test_what_was_killed_is_swept_and_nothing_beside_it(tmp_path):
    kept = {".m.set-aside", ".m.abcd123", ".m.abcd12345", ".mm.abcd1234", "m.abcd1234", ".m1.abcd1234"}
    for name in (*kept, ".m.abcd123_", ".m[1].abcd1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name.strip(".").partition(".")[0]).mkdir()  # what was being written
    (tmp_path / ".m.previous").mkdir()  # a copy of a model that somebody made
    (tmp_path / ".m.previous" / "config.json").write_text("{}")
    sweep(tmp_path / "m")
    sweep(tmp_path / "m[1]")
    kept.add(".m.previous")
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_text_is_written_whole_and_with_what_names_of_files_may_hold(tmp_path, monkeypatch):
    write_text(tmp_path / "new" / "a.md", "Å of caf\udce9 and \udcc3\udca9")  # of Latin-1, and of UTF-8 read as ASCII
    assert (tmp_path / "new" / "a.md").read_bytes().decode() == r"Å of caf\xe9 and é"
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(tmp_path / "new" / "a.md", "other")
    assert [file.read_bytes()[:3] for file in (tmp_path / "new").iterdir()] == ["Å ".encode()]


def test_nothing_foreign_is_replaced(tmp_path):
    model = make_model()
    (tmp_path / "empty").mkdir()
    sf.save_model(model, tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["Bert"]}')
    (tmp_path / "file").write_text("x")
    for name in ("empty", "foreign", "file"):
        with pytest.raises(sf.InputError, match=name):
            sf.save_model(model, tmp_path / name)
    assert (tmp_path / "empty" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "foreign" / "config.json").exists() and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", [".DS_Store", ".directory", "Thumbs.db", "desktop.ini"])
def test_what_a_file_manager_left_is_no_file_of_anybody(name, tmp_path):
    for place, save in (("model", sf.save_model), ("pair", save_pair)):
        (tmp_path / place).mkdir()
        for _ in range(2):
            (tmp_path / place / name).write_bytes(b"icons")
            save(make_model(), tmp_path / place)


def save_pair(model, place):
    save_ensemble(Ensemble([model, make_model()]), place)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(sf.InputError, match="Linear"):
        sf.save_model(torch.nn.Linear(2, 2), tmp_path / "m")
    model = make_model()
    with pytest.raises(sf.InputError, match=r"m\.pth\.tar is the name of a published checkpoint.*save_upstream_checkp"):
        sf.save_model(model, tmp_path / "m.pth.tar")
    assert not (tmp_path / "m.pth.tar").exists()
    for value in (float("nan"), {1, 2}):
        model.metadata.extra["value"] = value
        with pytest.raises(sf.InputError, match="JSON"):
            sf.save_model(model, tmp_path / "m")
    (tmp_path / "file").write_text("x")
    model.metadata.extra.clear()
    with pytest.raises(sf.InputError, match="Cannot write"):
        sf.save_model(model, tmp_path / "file" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("change", ["pruned", "parametrized", "quantised", "wider"])
def test_what_could_not_be_loaded_again_is_not_saved(change, tmp_path):
    from torch.nn.utils import parametrizations, prune

    model = SRCGCNN(2, 8, 8)
    if change == "pruned":
        prune.l1_unstructured(model.shared_conv.fc_full, "weight", 0.5)
    elif change == "parametrized":
        parametrizations.weight_norm(model.fc_out)
    elif change == "quantised":

        class Quantised(torch.nn.Linear):  # its state has more than tensors
            get_extra_state, set_extra_state = (lambda self: torch.qint8), (lambda self, state: None)

        model.fc_out = Quantised(8, 1)
    else:
        model.conv_to_fc, model.fc_out = torch.nn.Linear(8, 16), torch.nn.Linear(16, 1)
    state = torch.get_rng_state()
    with pytest.raises(sf.InputError, match="so it could not be loaded again; undo pruning"):
        sf.save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    if change == "pruned":
        prune.remove(model.shared_conv.fc_full, "weight")
        sf.save_model(model, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("part", ["recurrent_bn1s.1", "recurrent_bn2s.0", "recurrent_norm"])
def test_an_eps_that_no_file_records_is_not_lost(part, tmp_path):
    """A model that is loaded again predicts the same, or is not written."""
    model = SRCGCNN(2, 8, 8, recurrent_layer_norm=True)
    model.get_submodule(part).eps = 0.1
    for write in (sf.save_model, save_upstream_checkpoint):
        with pytest.raises(
            sf.InputError, match=rf"{part} has an eps of 0\.1, .* it would have 1e-05, and predict other"
        ):
            write(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model.get_submodule(part).eps = 1e-5
    sf.save_model(model, tmp_path / "model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(sf.InputError, match="Cannot write"):
            sf.save_model(make_model(), tmp_path / "m")
    finally:
        tmp_path.chmod(0o700)


def test_a_run_that_has_not_ended_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert refusal(path).endswith("/model yet: the run has not ended; continue it with --resume.")
    assert "yet" not in refusal(tmp_path / "run" / "best")
    written = sf.save_model(make_model(), tmp_path / "run" / "model")
    assert refusal(tmp_path / "run").endswith(f"such as {written}.")
    (written / "run.json").write_text("{}")  # kept beside the model it made
    sf.load_model(written)


def test_absent_and_foreign_paths(tmp_path):
    assert "no model" in refusal(tmp_path / "absent")
    assert refusal(tmp_path).endswith("written by save_model.")
    written = sf.save_model(make_model(), tmp_path / "m")
    sf.save_model(make_model(), tmp_path / ".m.set-aside")  # as a kill while it is replaced leaves it
    assert refusal(tmp_path).endswith(f"written by save_model, such as {written}.")
    sf.save_model(make_model(), tmp_path / "several" / "cgcnn" / "model")
    assert refusal(tmp_path / "several").endswith(f"such as {tmp_path / 'several' / 'cgcnn' / 'model'}.")
    (tmp_path / "several" / "model").mkdir()
    (tmp_path / "several" / "model" / "ensemble.json").touch()
    assert refusal(tmp_path / "several").endswith(f"such as {tmp_path / 'several' / 'model'}.")
    assert "directory" in refusal(written / "config.json")
    assert "directory" in refusal(written / "model.safetensors")
    (tmp_path / "README.md").write_text("# hello")
    refusal(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"format_version": "two"}, "upgrade"),
        ({"format": "other"}, "save_model"),
        ({"model": "ALIGNN"}, "ALIGNN"),
        ({"hyperparameters": {"n_conv": 2, "colour": "red"}}, "colour"),
        ({"hyperparameters": {"n_conv": 0}}, "n_conv"),
        ({"graph": {"radius": -1}}, "radius"),
        ({"normalizer": {"mean": [0.0]}}, "std"),
        ({"targets": ["a", "b"], "units": ["", ""], "normalizer": {"mean": [0, 0], "std": [1, 1]}}, "n_targets"),
        ({"dtype": "colour"}, "colour"),
        ({"element_table": "element_table"}, "element_table"),
    ],
)
def test_config_that_does_not_describe_a_model(change, word, tmp_path):
    written = sf.save_model(make_model(), tmp_path / "m")
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps(config | change))
    assert word in refusal(written)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '"model"'])
def test_damaged_config(text, tmp_path):
    written = sf.save_model(make_model(), tmp_path / "m")
    (written / "config.json").write_text(text)
    assert "config.json" in refusal(written)


@pytest.mark.parametrize("name", ["model", "hyperparameters", "graph", "targets", "weights_sha256", "extra", "dtype"])
def test_config_lacks_an_entry(name, tmp_path):
    written = sf.save_model(make_model(), tmp_path / "m")
    config = json.loads((written / "config.json").read_text())
    del config[name]
    (written / "config.json").write_text(json.dumps(config))
    assert name in refusal(written)


def test_damaged_weights(tmp_path):
    written = sf.save_model(make_model(), tmp_path / "m")
    file = written / "model.safetensors"
    data = file.read_bytes()
    for part in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:part])
        assert "cut short" in refusal(written)
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert "not the file that was saved" in refusal(written)
    file.unlink()
    assert "lacks model.safetensors" in refusal(written)


def test_weights_of_another_model(tmp_path):
    written = sf.save_model(make_model(), tmp_path / "m")
    file = written / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"fc_out.weight": torch.ones(1, 7)}, file)
    assert "fc_out.weight" in refusal(written)
    save_file(tensors | {"attention.weight": torch.ones(1, 7)}, file)
    assert "attention.weight" in refusal(written)
    save_file({k: v for k, v in tensors.items() if k != "conv_to_fc.bias"}, file)
    assert "conv_to_fc.bias" in refusal(written)


def test_published_checkpoint_as_a_directory(data_dir, tmp_path, make_batch):
    model = sf.load_model(data_dir / "upstream" / "band-gap.pth.tar")
    again = sf.load_model(sf.save_model(model, tmp_path / "m"))
    assert again.metadata == model.metadata and again.metadata.units == ("eV",)
    batch = make_batch("plain")
    with torch.no_grad():
        assert torch.equal(again.predict(batch), model.predict(batch))


@pytest.mark.parametrize("change", [{"targets": ("a", "b")}, {"units": ()}, {"std": (1.0, 2.0)}])
def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path, change):
    model = sf.CGCNN(1, 8, 8)
    vars(model.metadata).update(change)
    with pytest.raises(sf.InputError, match="one unit, mean and std per target"):
        sf.save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
