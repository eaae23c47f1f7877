from __future__ import annotations

import argparse
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from srcgcnn_fast.errors import InputError
from srcgcnn_fast.graph import GraphParameters
from srcgcnn_fast.graph.elements import element_features
from srcgcnn_fast.interop import load_upstream_checkpoint, save_upstream_checkpoint
from srcgcnn_fast.nn import CGCNN, SRCGCNN, ModelMetadata

ARCHITECTURES = [
    (CGCNN, {"n_conv": 2, "atom_fea_len": 8, "h_fea_len": 6}),
    (CGCNN, {"n_conv": 1, "atom_fea_len": 8, "h_fea_len": 6, "n_h": 3, "classification": True}),
    (SRCGCNN, {"n_recurrent_steps": 2, "atom_fea_len": 8, "h_fea_len": 6}),
    (
        SRCGCNN,
        {
            "n_recurrent_steps": 4,
            "atom_fea_len": 8,
            "h_fea_len": 6,
            "recurrent_layer_norm": True,
            "recurrent_learnable_alpha": True,
        },
    ),
]


def make_checkpoint(kind=CGCNN, options=None, **changes):
    """What ``main.py`` of the published programs saves."""
    torch.manual_seed(0)
    options = {"n_conv": 2, "atom_fea_len": 8, "h_fea_len": 6} if options is None else options
    model = kind(**options)
    args = {name: options[name] for name in ("atom_fea_len", "h_fea_len")} | {"n_h": options.get("n_h", 1)}
    args |= {"task": "classification" if options.get("classification") else "regression", "data_options": ["data"]}
    if kind is SRCGCNN:
        args |= {"conv_mode": "shared_recurrent", "n_conv": 3, "n_recurrent_steps": options["n_recurrent_steps"]}
    else:
        args |= {"n_conv": options["n_conv"]}
    checkpoint = {
        "epoch": 7,
        "state_dict": model.state_dict(),
        "best_mae_error": 0.25,
        "optimizer": {},
        "normalizer": {"mean": torch.tensor(1.5), "std": torch.tensor(0.5)},
        "args": args,
    }
    return checkpoint | changes


def write(checkpoint, path: Path, zipped: bool = False) -> Path:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        load_upstream_checkpoint(path, **kwargs)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES)
def test_reads_every_architecture(kind, options, zipped, tmp_path):
    checkpoint = make_checkpoint(kind, options)
    model = load_upstream_checkpoint(write(checkpoint, tmp_path / "model_best.pth.tar", zipped))
    assert type(model) is kind and not model.training
    assert model.hyperparameters.items() >= options.items()
    assert model.state_dict().keys() == checkpoint["state_dict"].keys()
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(model.state_dict()[name], value), name
    metadata = model.metadata
    assert metadata.targets == ("target",) and metadata.extra == {"epoch": 7, "best_mae_error": 0.25}
    expected = ((0.0,), (1.0,)) if options.get("classification") else ((1.5,), (0.5,))
    assert (metadata.mean, metadata.std) == expected
    assert (metadata.graph.radius, metadata.graph.max_neighbors, metadata.graph.padded) == (8.0, 12, True)


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES)
def test_shapes_stand_in_for_args(kind, options, tmp_path):
    checkpoint = make_checkpoint(kind, options)
    del checkpoint["args"]
    model = load_upstream_checkpoint(write(checkpoint, tmp_path / "x.pth.tar"))
    assert type(model) is kind and model.hyperparameters.items() >= options.items()


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("value", [np.float64(0.875), np.float32(0.875), np.int64(3), np.bool_(True)])
def test_numpy_scalars_are_allowed(module, value, tmp_path):
    path = write(make_checkpoint(best_mae_error=value), tmp_path / "x.pth.tar")
    data = path.read_bytes()
    assert b"multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module))
    assert load_upstream_checkpoint(path).metadata.extra["best_mae_error"] == float(value)


def test_numpy_scalars_of_python_2_are_allowed(tmp_path):
    path = write(make_checkpoint(best_mae_error=np.float64(0.9)), tmp_path / "x.pth.tar")
    value = np.float64(0.9).tobytes()
    text = value.decode("latin-1").encode()
    data, encoded = path.read_bytes(), b"X" + len(text).to_bytes(4, "little") + text
    assert encoded in data
    start = data.index(b"c_codecs\nencode\n")
    end = data.index(b"R", data.index(b"latin1", start)) + 1  # the REDUCE of _codecs.encode
    path.write_bytes(data[:start] + b"U\x08" + value + data[end:])
    assert load_upstream_checkpoint(path).metadata.extra["best_mae_error"] == 0.9


def test_numpy_scalars_of_another_byte_order_are_allowed(tmp_path):
    path = write(make_checkpoint(best_mae_error=np.float64(0.9)), tmp_path / "x.pth.tar")
    value, data = np.float64(0.9).tobytes(), path.read_bytes()
    for a, b in ((b"X\x01\0\0\0<", b"X\x01\0\0\0>"), (x.decode("latin-1").encode() for x in (value, value[::-1]))):
        assert data.count(a) == 1
        data = data.replace(a, b)
    path.write_bytes(data)
    assert load_upstream_checkpoint(path).metadata.extra["best_mae_error"] == 0.9


@pytest.mark.parametrize("value", [np.zeros(2), np.complex128(1j), np.datetime64("2020-01-01")])
def test_other_numpy_objects_are_refused(value, tmp_path):
    refusal(write(make_checkpoint(best_mae_error=value), tmp_path / "x.pth.tar"))


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_code_in_a_checkpoint_is_refused(zipped, tmp_path):
    trace = tmp_path / "trace"
    for payload in (Payload(os.system, f"touch {trace}"), Payload(eval, f"open({str(trace)!r}, 'w')")):
        path = write(make_checkpoint(best_mae_error=payload), tmp_path / "evil.pth.tar", zipped)
        message = refusal(path)
        assert "refused" in message and ("system" in message or "eval" in message)
        assert not trace.exists()


def test_the_allow_list_does_not_leak(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    load_upstream_checkpoint(write(make_checkpoint(), tmp_path / "x.pth.tar"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(part, zipped, tmp_path):
    path = write(make_checkpoint(), tmp_path / "short.pth.tar", zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize(
    "data", [b"hello\n", b"\x89PNG\r\n\x1a\n" * 9, b"cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04" * 50]
)
def test_not_a_checkpoint(data, tmp_path):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(data)
    refusal(path)


def test_a_real_tar_and_absent_files(tmp_path):
    with tarfile.open(tmp_path / "real.tar", "w") as archive:
        archive.add(__file__, "test.py")
    refusal(tmp_path / "real.tar")
    assert "no checkpoint" in refusal(tmp_path / "absent.pth.tar")
    assert "Cannot read" in refusal(tmp_path)


def test_a_pickled_module_is_refused(tmp_path):
    assert "CGCNN" in refusal(write(CGCNN(n_conv=1, atom_fea_len=4, h_fea_len=4), tmp_path / "module.pt"))


def test_foreign_checkpoints_are_named(tmp_path):
    foreign = {"atom_embedding.layer.0.weight": torch.ones(4, 4), "alignn_layers.0.bn.weight": torch.ones(4)}
    message = refusal(write({"state_dict": foreign}, tmp_path / "a.pth.tar"))
    assert "alignn_layers.0.bn.weight" in message and "another program" in message
    message = refusal(write({"model": foreign, "optimizer": {}}, tmp_path / "b.pth.tar"))
    assert "'state_dict'" in message and "optimizer" in message
    assert "state_dict" in refusal(write([1, 2], tmp_path / "c.pth.tar"))
    lightning = {"state_dict": foreign, "pytorch-lightning_version": "2.5"}
    assert "save_model" in refusal(write(lightning, tmp_path / "d.ckpt", zipped=True))
    assert "fc_full" in refusal(write({"state_dict": {}}, tmp_path / "e.pth.tar"))


def test_unexpected_and_missing_keys_are_named(tmp_path):
    checkpoint = make_checkpoint()
    extra = dict(checkpoint["state_dict"], **{"attention.weight": torch.ones(2, 2)})
    assert "attention.weight" in refusal(write(checkpoint | {"state_dict": extra}, tmp_path / "a.pth.tar"))
    less = {k: v for k, v in checkpoint["state_dict"].items() if k != "convs.1.bn2.weight"}
    assert "convs.1.bn2.weight" in refusal(write(checkpoint | {"state_dict": less}, tmp_path / "b.pth.tar"))
    parallel = {f"module.{k}": v for k, v in checkpoint["state_dict"].items()}
    assert "module.embedding.weight" in refusal(write(checkpoint | {"state_dict": parallel}, tmp_path / "c.pth.tar"))


def test_contradictions_are_named(tmp_path):
    checkpoint = make_checkpoint()
    for name, value in {"n_conv": 5, "atom_fea_len": 64, "h_fea_len": 1, "n_h": 2}.items():
        path = write(checkpoint | {"args": checkpoint["args"] | {name: value}}, tmp_path / f"{name}.pth.tar")
        assert f"{name} = {value}" in refusal(path)
    path = write(checkpoint | {"args": checkpoint["args"] | {"task": "classification"}}, tmp_path / "task.pth.tar")
    assert "classification" in refusal(path)
    path = write(checkpoint | {"args": checkpoint["args"] | {"task": "ranking"}}, tmp_path / "other.pth.tar")
    assert "ranking" in refusal(path)


@pytest.mark.parametrize(
    "normalizer", [None, {}, {"mean": 1.0}, {"mean": float("nan"), "std": 1.0}, {"mean": "1", "std": "1"}]
)
def test_a_regression_needs_its_normalizer(normalizer, tmp_path):
    assert "normalizer" in refusal(write(make_checkpoint(normalizer=normalizer), tmp_path / "x.pth.tar"))


def test_weights_must_be_finite(tmp_path):
    checkpoint = make_checkpoint()
    checkpoint["state_dict"]["fc_out.bias"].fill_(float("nan"))
    assert "fc_out.bias" in refusal(write(checkpoint, tmp_path / "x.pth.tar"))


def test_data_options_give_the_graph(tmp_path):
    options = {"n_conv": 1, "atom_fea_len": 8, "h_fea_len": 6, "nbr_fea_len": 13, "dmin": 0.5, "step": 0.5}
    checkpoint = make_checkpoint(CGCNN, options)
    checkpoint["args"]["data_options"] = ["data", "8", "6.5", "0.5", "0.5"]
    model = load_upstream_checkpoint(write(checkpoint, tmp_path / "x.pth.tar"))
    assert (model.metadata.graph.radius, model.metadata.graph.max_neighbors) == (6.5, 8)
    assert model.hyperparameters.items() >= options.items()
    checkpoint["args"]["data_options"] = ["data"]
    assert "data_options" in refusal(write(checkpoint, tmp_path / "y.pth.tar"))


def test_own_element_vectors(tmp_path):
    options = {"n_conv": 1, "atom_fea_len": 8, "h_fea_len": 6, "orig_atom_fea_len": 3}
    path = write(make_checkpoint(CGCNN, options), tmp_path / "x.pth.tar")
    assert "atom_init" in refusal(path)
    (tmp_path / "atom_init.json").write_text('{"1": [1, 0, 0], "8": [0, 0.5, 0], "0": [1, 1, 1], "-1": [1, 1, 1]}')
    table = load_upstream_checkpoint(path, atom_init=tmp_path / "atom_init.json").element_table
    assert table.shape == (101, 3) and table[8].tolist() == [0, 0.5, 0] and int(table.any(dim=1).sum()) == 2
    for text in ('{"1": [1, 0]}', "[]", "{", '{"H": [1, 0, 0]}'):
        (tmp_path / "bad.json").write_text(text)
        assert "bad.json" in refusal(path, atom_init=tmp_path / "bad.json")


def test_file_names_give_the_target(tmp_path):
    for name, target in {
        "formation-energy-per-atom.pth.tar": ("formation_energy_per_atom", "eV/atom"),
        "band-gap.pth.tar": ("band_gap", "eV"),
        "other.pth.tar": ("target", ""),
    }.items():
        metadata = load_upstream_checkpoint(write(make_checkpoint(), tmp_path / name)).metadata
        assert (metadata.targets[0], metadata.units[0]) == target


@pytest.mark.parametrize("name", ["formation-energy-per-atom", "band-gap"])
def test_published_checkpoints(name, data_dir, tmp_path):
    path = data_dir / "upstream" / f"{name}.pth.tar"
    model = load_upstream_checkpoint(path)
    assert type(model) is CGCNN
    assert model.hyperparameters.items() >= {"n_conv": 4, "atom_fea_len": 64, "h_fea_len": 32, "n_h": 1}.items()
    state = torch.load(path, weights_only=True, map_location="cpu")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state["state_dict"].items())
    assert model.metadata.mean == (state["normalizer"]["mean"],)
    assert model.metadata.extra == {"epoch": state["epoch"], "best_mae_error": state["best_mae_error"]}
    assert torch.equal(model.element_table, torch.tensor(element_features()))
    renamed = tmp_path / "model_best.pth.tar"
    renamed.write_bytes(path.read_bytes())
    assert load_upstream_checkpoint(renamed).metadata.targets == model.metadata.targets


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES)
def test_written_checkpoints_read_back(kind, options, tmp_path):
    model = load_upstream_checkpoint(write(make_checkpoint(kind, options), tmp_path / "a.pth.tar"))
    again = load_upstream_checkpoint(save_upstream_checkpoint(model, tmp_path / "new" / "b.pth.tar"))
    assert again.metadata == model.metadata and again.hyperparameters == model.hyperparameters
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    plain = torch.load(tmp_path / "new" / "b.pth.tar", weights_only=True)
    assert {"state_dict", "args", "normalizer", "epoch", "best_mae_error"} <= plain.keys()
    assert {"task", "atom_fea_len", "n_conv", "h_fea_len", "n_h"} <= plain["args"].keys()


@pytest.mark.parametrize("own_table", [False, True])
def test_what_the_published_programs_ignore_comes_back(own_table, tmp_path):
    model = CGCNN(n_conv=1, atom_fea_len=4, h_fea_len=4).eval()
    graph = GraphParameters(symmetry_tolerance=None, isolated="keep")
    model.metadata = ModelMetadata(("gap",), ("eV",), (1.5,), (0.5,), graph)
    if own_table:
        model.element_table = torch.rand_like(model.element_table)
    path = save_upstream_checkpoint(model, tmp_path / "band-gap-of-mine.pth.tar")
    again = load_upstream_checkpoint(path)
    assert (again.metadata.targets, again.metadata.units, again.metadata.graph) == (("gap",), ("eV",), graph)
    assert torch.equal(again.element_table, model.element_table)
    args = torch.load(path, weights_only=True)["args"]
    assert ("element_table" in args["srcgcnn_fast"]) == own_table
    assert json.loads(json.dumps(args)) == args  # plain values only
    (tmp_path / "atom_init.json").write_text(json.dumps({"8": [1] * 92}))
    given = load_upstream_checkpoint(path, atom_init=tmp_path / "atom_init.json").element_table
    assert given[8].tolist() == [1] * 92 and int(given.any(dim=1).sum()) == 1
    assert again.metadata.extra == {"epoch": 0}
    model.metadata.extra["best_epoch"] = {"epoch": 9, "val_mae": 0.25}
    again = load_upstream_checkpoint(save_upstream_checkpoint(model, path))
    assert again.metadata.extra == {"epoch": 9, "best_mae_error": 0.25}
    argparse.Namespace(**args)  # as the published predict.py takes them


@pytest.mark.parametrize(
    "ours",
    [
        3, {}, {"targets": ["a"]}, {"targets": [1], "units": [""], "graph": {}},
        {"targets": ["a", "b"], "units": ["", ""], "graph": {}},
        {"targets": ["a"], "units": [""], "graph": {"radius": "8"}},
        {"targets": ["a"], "units": [""], "graph": {"colour": 1}},
        {"targets": ["a"], "units": [""], "graph": {}, "element_table": [[1.0]]},
    ],
)  # fmt: skip
def test_additions_that_do_not_fit_are_refused(ours, tmp_path):
    checkpoint = make_checkpoint()
    checkpoint["args"] = checkpoint["args"] | {"srcgcnn_fast": ours}
    assert "args['srcgcnn_fast']" in refusal(write(checkpoint, tmp_path / "x.pth.tar"))


def test_what_the_published_programs_cannot_express_is_not_written(tmp_path):
    small = {"n_conv": 1, "atom_fea_len": 4, "h_fea_len": 4}
    for model in (CGCNN(**small, n_targets=2), CGCNN(**small, nbr_fea_len=31, step=0.1)):
        with pytest.raises(InputError, match="Cannot write"):
            save_upstream_checkpoint(model, tmp_path / "x.pth.tar")
    assert not (tmp_path / "x.pth.tar").exists()


def test_the_epoch_of_our_own_training_is_written(tmp_path):
    """Not that of the file which it began from."""
    model = load_upstream_checkpoint(write(make_checkpoint(), tmp_path / "a.pth.tar"))
    model.metadata.extra["best_epoch"] = {"epoch": 3, "val_mae": 0.125}
    path = save_upstream_checkpoint(model, tmp_path / "b.pth.tar")
    assert load_upstream_checkpoint(path).metadata.extra == {"epoch": 3, "best_mae_error": 0.125}
