"""The command line: one thin layer over the Python interface."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError
from .files import in_utf8, write_text

if TYPE_CHECKING:
    from .graph.parameters import GraphParameters
    from .nn import CGCNN, SRCGCNN
    from .training import Recipe


_PATHS = ("source", "input", "model", "init", "val", "test", "split_file", "study", "out", "store")
"""Arguments that are paths, in some commands."""
_LABELS = ("target", "unit")
"""Those that name what is in a file; they are UTF-8 there, whatever the locale has."""


_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What the system says of a path that cannot be one, whoever asks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 if all inputs failed (bench: numbers were wrong), 2 for bad input, 130 for Ctrl-C,
    141 if nobody reads what it prints any more, 143 for SIGTERM.

    Errors are one sentence on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    has_file = words[:1] == ["train"] and any(word.split("=")[0] == "--config" for word in words)
    arguments = argparse.Namespace(debug="--debug" in words, command=train)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Å is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    if not has_file:
        parser = _parser()
        arguments, others = parser.parse_known_args(words)
        if others:
            parser.error(_too_many(words, others))
        arguments.argv = words
    # Read when torch loads OpenMP (of GCC, of LLVM): idle threads spin for 50 µs or 1 ms. More stalls a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    logging.basicConfig(level=logging.ERROR if _rank() else logging.WARNING, format="%(levelname)s: %(message)s")
    if not arguments.debug:
        warnings.filterwarnings("ignore")  # those of third-party packages; ours go through logging
    try:
        if has_file:
            arguments = _with_file(words[1:])
        for name, value in list(vars(arguments).items()):  # empty is a variable of the shell that is not set
            if value == "" and name != "unit":
                raise InputError(f"The argument {name} is an empty text; give a value, or leave it out.")
            if isinstance(value, str) and name in _PATHS:  # of --out=~/run the shell leaves it, and so do YAML files
                setattr(arguments, name, _usable(os.path.expanduser(value)))
            elif value and name in _LABELS:
                setattr(arguments, name, in_utf8(value) if isinstance(value, str) else list(map(in_utf8, value)))
        if arguments.command is not train and _is_shared():
            raise InputError(f"{arguments.command.__name__} runs in one process; start it without torchrun.")
        status = arguments.command(arguments) or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        if arguments.debug:
            raise
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        number = error.errno or 0
        is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if arguments.debug or not (is_full or number in (errno.EACCES, errno.EPERM, errno.EROFS, *_NO_PATH)):
            raise
        where = f"{error.filename}: " if error.filename else ""
        advice = "give another path" if number in _NO_PATH else "check its permissions"
        advice = "make room, and give the command again" if is_full else advice
        print(f"error: {where}{os.strerror(number)}; {advice}.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 143:
            raise
        what, status = ("terminated", 143) if isinstance(stop, SystemExit) else ("interrupted", 130)
        hints = {train: "; --resume continues after the last whole epoch"}
        hints[compare] = "; with --study or --seeds the same command goes on where it stopped"
        hint = hints.get(arguments.command, "")
        if _rank() == 0:
            print(f"{what}{hint}", file=sys.stderr)
        return status


def _too_many(words: Sequence[str], others: Sequence[str]) -> str:
    """What to say of ``others``, those of the words that no command takes."""
    first, before = others[0], words[: words.index(others[0])]
    is_target = "--target" in before[-2:-1] or any(word.startswith("--target=") for word in before[-1:])
    if is_target and not first.startswith("-"):
        return f"--target takes one name, and {first} is another; give each its own: --target NAME --target {first}"
    if os.path.exists(first):  # a shell writes *.cif out
        return f"{first} is one path too many; of several structure files give the folder"
    return f"unrecognized arguments: {' '.join(others)}"


def _usable(path: str) -> str:
    """``path``, whether or not something is there. Raises InputError: nothing can be."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _NO_PATH:
            raise InputError(f"{path} cannot be used: {error.strerror}; give another path.") from error
    return path


def _is_shared() -> bool:
    """Is this one of several processes that torchrun started? Asked before torch is imported."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def _rank() -> int:
    return int(os.environ["RANK"]) if _is_shared() else 0


def demo(arguments: argparse.Namespace) -> None:
    from .training.demo import demo

    print(demo(arguments.out, crystals=arguments.crystals, epochs=arguments.epochs, seed=arguments.seed, progress=True))


def prepare(arguments: argparse.Namespace) -> None:
    from .graph.store import name_it, prepare

    parameters, targets = _graph_parameters(arguments), arguments.target or None
    if arguments.ray is not None:
        from .shards import prepare_shards

        if arguments.append:
            raise InputError("--append and --ray exclude each other; give one of them.")
        store = prepare_shards(arguments.source, arguments.store, parameters, targets=targets, workers=arguments.ray)
    else:
        store = prepare(
            arguments.source, arguments.store, parameters, targets=targets, append=arguments.append, progress=True
        )
    for name, reason in store.rejected[:5]:
        print(f"rejected {name_it(name, reason)}", file=sys.stderr)
    if store.n_rejected > 5:
        print(f"… and {store.n_rejected - 5} more", file=sys.stderr)
    print(
        f"{len(store):,} crystals, {store.n_atoms:,} atoms in {store.n_rows:,} rows "
        f"(symmetry makes the graphs {store.n_atoms / store.n_rows:.2f} times smaller), "
        f"{store.n_edges:,} edges; {store.n_rejected:,} rejected; "
        f"targets: {', '.join(sorted(store.targets)) or 'none'}\n"
        f"written to {arguments.store}"
    )


def train(arguments: argparse.Namespace) -> None:
    from .serialization import load_model
    from .training import GraphDataModule, cross_validate, distributed, prepared, read_split, train_ensemble
    from .training.data import check_options

    init = load_model(arguments.init) if arguments.init else None
    _check_combination(arguments, init)
    build, recipe = partial(_build, arguments, init), _recipe(arguments)
    drawn = not (arguments.folds or arguments.split_file or arguments.val)
    check_options(
        arguments.target,
        arguments.split if drawn else None,
        batch_size=arguments.batch_size,
        batch_rows=arguments.batch_rows,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    distributed.join()
    out, parameters = Path(arguments.out), _graph_parameters(arguments)
    default = init.metadata.graph if init else None
    distributed.on_rank_zero(_check_place, arguments, out, parameters or default)
    sources = {"graphs": arguments.source, "graphs-val": arguments.val, "graphs-test": arguments.test}

    def stores() -> list[Any]:
        wanted = {"targets": arguments.target, "default": default}
        return [s if s is None else prepared(s, out / name, parameters, True, **wanted) for name, s in sources.items()]

    store, val_store, test_store = distributed.on_rank_zero(stores)  # the others open what rank 0 has prepared

    def data_of(split: Any) -> GraphDataModule:
        return GraphDataModule(
            store,
            arguments.target,
            split=split,
            val_store=val_store,
            test_store=test_store,
            units=arguments.unit and [arguments.unit],
            batch_size=256 if arguments.batch_size is None else arguments.batch_size,
            batch_rows=arguments.batch_rows,
            seed=arguments.seed,
            length_buckets=arguments.length_buckets,
            num_workers=arguments.workers,
        )

    options: dict[str, Any] = {"seed": arguments.seed, "resume": arguments.resume, "progress": True}
    options |= {name: getattr(arguments, name) for name in ("accelerator", "precision", "captured")}
    options["logger"] = "tensorboard" if arguments.tensorboard else arguments.logger
    if arguments.folds:
        found = cross_validate(build, data_of, _folds(arguments, store, init), out, recipe, **options)
        for name, (mean, std) in found.scores.items():
            print(f"{name}: {mean:.4g} ± {std:.2g} ({len(found.evaluations)} folds)")
        print(f"scores of each fold in {out / 'folds.csv'}, every crystal in {out / 'predictions.csv'}")
    else:
        split = arguments.split
        if arguments.split_file:
            split = read_split(arguments.split_file, store, arguments.target, arguments.split_column)
        data = data_of(split)
        if arguments.members > 1:
            ensemble = train_ensemble(build, data, out, recipe, members=arguments.members, **options)
            _tell_scores(ensemble, data, out)
        else:
            _train_one(build, data, out, recipe, options)
    if _rank() == 0:
        _write_config(arguments, out)


_NETWORK = (
    *("dropout", "recurrent_layer_norm", "recurrent_learnable_alpha"),
    *("model", "n_conv", "n_recurrent_steps", "atom_fea_len", "h_fea_len", "n_h"),
)
"""Options of train that decide the network."""
_IDLE = (
    (("n_conv",), "model", "cgcnn"),
    (("n_recurrent_steps", "recurrent_layer_norm", "recurrent_learnable_alpha"), "model", "sr-cgcnn"),
    (("lr_milestones",), "schedule", "multistep"),
    (("warmup",), "schedule", "one_cycle"),
    (("muon_lr",), "optimizer", "muon"),
)
"""Options of train that do nothing unless another has a certain value."""


def _check_combination(arguments: argparse.Namespace, init: Any) -> None:
    if (arguments.folds or arguments.members > 1) and _is_shared():
        raise InputError("--folds and --members train in one process; start them without torchrun.")
    if arguments.folds and (arguments.val or arguments.split_file or arguments.members > 1):
        raise InputError("--folds makes its own split and one model each; drop --val, --test, --split-file, --members.")
    if arguments.members < 1:
        raise InputError(f"--members {arguments.members} trains nothing; give 1, or more for an ensemble.")
    if arguments.split_file and arguments.val:
        raise InputError("--split-file splits SOURCE and --val brings another set; give one of them.")
    if arguments.unit and len(arguments.target) > 1:
        raise InputError("--unit is of one target, and there are several; name the columns as usual, or drop it.")
    if arguments.tensorboard and arguments.logger == "wandb":
        raise InputError("--tensorboard and --logger wandb are two logs, and a run has one; give one of them.")
    if arguments.batch_size is not None and arguments.batch_rows is not None:
        raise InputError("--batch-rows stands in place of --batch-size; give one of them.")
    if init is not None:
        own = {"model": "cgcnn" if type(init).__name__ == "CGCNN" else "sr-cgcnn", **init.hyperparameters}
        if given := _given(arguments, [name for name in _NETWORK if getattr(arguments, name) != own.get(name)]):
            raise InputError(f"--init fixes the network, so {given} would change nothing; drop it.")
    for names, option, value in _IDLE:
        if getattr(arguments, option) != value and (given := _given(arguments, names)):
            raise InputError(f"{given} would change nothing without --{option} {value}; give that, or drop it.")
    other = next((name for name in ("folds", "split_file", "val") if getattr(arguments, name)), None)
    if other and (given := _given(arguments, ("split",))):
        raise InputError(f"{given} would change nothing beside --{other.replace('_', '-')}; give one of them.")
    if (given := _given(arguments, ("split_column",))) and not arguments.split_file:
        raise InputError(f"{given} is a column of --split-file; give that, or drop it.")
    if _is_classifier(arguments, init) and (given := _given(arguments, ("loss", "unit"))):
        raise InputError(
            f"A classifier has a loss of its own, and a class no unit: {given} would change nothing; drop it."
        )
    if arguments.freeze and not arguments.init:
        raise InputError("--freeze keeps what --init brings; give --init, or drop --freeze.")


def _check_directory(out: Path) -> None:
    """A store is none for runs: another may come in its place, with all that is there."""
    from .graph.store import is_store

    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory.")
    if is_store(out):
        raise InputError(f"{out} is a store of graphs, which holds nothing else; choose another directory.")


def _check_place(arguments: argparse.Namespace, out: Path, parameters: GraphParameters | None) -> None:
    """What the directory of the run says against it, before graphs are prepared there."""
    from dataclasses import asdict

    from .graph import GraphParameters
    from .graph.store import is_store
    from .training.fit import check_free, check_same, has_begun, only_trainer

    _check_directory(out)
    kinds = {"": "one model", "fold_0": "a cross-validation", "member_0": "an ensemble"}
    own = "fold_0" if arguments.folds else "member_0" if arguments.members > 1 else ""
    for name, kind in kinds.items():
        if name != own and has_begun(out / name):
            raise InputError(f"{out} holds the run of {kind}; choose another directory.")
    if has_begun(out / own):
        with only_trainer(out / own):
            pass
    if not arguments.resume:
        return check_free(out / own)
    if not has_begun(out / own):  # it was stopped before, and a script may always say --resume
        logging.getLogger(__name__).warning("There is no run to resume in %s; one starts from the beginning.", out)
    elif not is_store(arguments.source):
        check_same(out / own, {"targets": arguments.target, "graph": asdict(parameters or GraphParameters())})


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """Which of these options of train are not at their defaults; a config.yaml names them all."""
    parser = argparse.ArgumentParser()
    _add_train_options(parser)
    given = [name for name in names if getattr(arguments, name) != parser.get_default(name)]
    return " and ".join("--" + name.replace("_", "-") for name in given)


def _train_one(build: Any, data: Any, out: Path, recipe: Any, options: dict[str, Any]) -> None:
    import torch

    from .serialization import save_model
    from .training import calibrate, evaluate, fit
    from .training.fit import has_begun
    from .uncertainty import MonteCarloDropout

    torch.manual_seed(options["seed"])
    options["resume"] = options["resume"] and has_begun(out)  # or Ctrl-C came before that
    result = fit(build(data), data, out, recipe, **options)
    if _rank() > 0:
        return
    _tell_scores(result.model, data, out)
    if result.model.hyperparameters["dropout"]:
        sampler = MonteCarloDropout(result.model)
        try:
            calibrate(sampler, data)
        except InputError as error:  # the run is done, and may want no spread
            logging.getLogger(__name__).warning("%s", error)
        else:
            save_model(result.model, out / "model")
            if _scored(data) == "test":  # the validation crystals set the scale
                _tell_calibration(sampler, evaluate(sampler, data, "test"), out)
    print(f"best epoch {result.best['epoch']} of {len(result.history)}, {result.seconds:.1f} s")
    print(f"epochs in {out / 'metrics.csv'}")


def _scored(data: Any) -> str:
    return "test" if len(data.parts["test"].indices) else "val"


def _tell_scores(model: Any, data: Any, out: Path) -> None:
    from .training import evaluate
    from .uncertainty import Sampler

    part = _scored(data)
    evaluation = evaluate(model, data, part)
    table = evaluation.write(out / f"{part}_predictions.csv")
    scores = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
    unit = f"{data.units[0] or 'units of the target'}; " if len(data.targets) == 1 else "each in its target's unit; "
    if "auc" in evaluation.metrics:  # scores of classes have none
        unit = ""
    print(f"{part}: {scores} ({unit}{len(evaluation.ids):,} crystals)")
    print(f"model in {out / 'model'}, predictions in {table}")
    if isinstance(model, Sampler) and part == "test":
        _tell_calibration(model, evaluation, out)


def _tell_calibration(sampler: Any, evaluation: Any, out: Path) -> None:
    import numpy as np

    from .training import calibration_plot, coverage
    from .training.calibration import ONE_STD

    if sampler.models[0].hyperparameters["classification"]:
        return
    for name, (share,) in zip(evaluation.target_names, coverage(evaluation, np.array([ONE_STD])), strict=True):
        print(f"{name}: {100 * share:.0f} % of them within one standard deviation (68 % would be right)")
    print(f"calibration in {calibration_plot(out / 'calibration.png', evaluation, sampler.scale)}")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from .training import Recipe

    weights = arguments.class_weights
    if weights is not None and weights != ["balanced"]:
        try:
            weights = tuple(float(weight) for weight in weights)
        except ValueError:
            raise InputError(f"--class-weights takes two numbers or 'balanced', not {' '.join(weights)}.") from None
    return Recipe(
        epochs=arguments.epochs,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        muon_lr=arguments.muon_lr,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        milestones=tuple(arguments.lr_milestones),
        gradient_clip=arguments.gradient_clip,
        loss=arguments.loss,
        warmup=arguments.warmup,
        ema=arguments.ema,
        patience=arguments.patience,
        class_weights="balanced" if weights == ["balanced"] else weights,
        freeze=tuple(arguments.freeze),
    )


def _build(arguments: argparse.Namespace, init: Any, data: Any) -> CGCNN | SRCGCNN:
    """The model that the options describe, from torch's random state."""
    from .nn import CGCNN, SRCGCNN
    from .training import fine_tuned

    if init is not None:
        return fine_tuned(init, data, classification=arguments.classification or None)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("atom_fea_len", "h_fea_len", "n_h")}
    options |= {"nbr_fea_len": data.graph_parameters.n_gaussians(), "n_targets": len(data.targets)}
    options |= {"classification": arguments.classification, "dropout": arguments.dropout}
    if arguments.model == "cgcnn":
        return CGCNN(n_conv=arguments.n_conv, **options)
    return SRCGCNN(
        n_recurrent_steps=arguments.n_recurrent_steps,
        recurrent_layer_norm=arguments.recurrent_layer_norm,
        recurrent_learnable_alpha=arguments.recurrent_learnable_alpha,
        **options,
    )


def _is_classifier(arguments: argparse.Namespace, init: Any) -> bool:
    return arguments.classification or (init is not None and init.hyperparameters["classification"])


def _folds(arguments: argparse.Namespace, store: Any, init: Any) -> list[Any]:
    import numpy as np

    from .training import k_folds, matbench_folds

    if not arguments.folds.isdecimal():
        return matbench_folds(store, arguments.folds, arguments.seed)
    values = store.target_array(arguments.target)
    usable = np.flatnonzero(np.isfinite(values).any(axis=1))
    labels = values[usable, 0] if _is_classifier(arguments, init) else None
    return k_folds(usable, int(arguments.folds), arguments.seed, labels=labels)


def _write_config(arguments: argparse.Namespace, out: Path) -> None:
    """All options, as ``--config`` takes them."""
    import yaml

    left_out = ("argv", "command", "debug", "config", "resume")
    options = {name: value for name, value in vars(arguments).items() if name not in left_out and value is not None}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    write_text(out / "config.yaml", yaml.safe_dump(options, sort_keys=False))


def _with_file(words: Sequence[str]) -> argparse.Namespace:
    """The options of train from YAML files, and from the command line, which has the last word."""
    from .options import with_files

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    found, others = files.parse_known_args(words)
    if "" in found.config:
        raise InputError("The argument config is an empty text; give the path of a YAML file, or leave it out.")
    paths = [os.path.expanduser(path) for path in found.config]
    arguments, unknown = with_files(paths, others, _add_train_options, "srcgcnn-fast train")
    if unknown:
        raise InputError(f"{_too_many(others, unknown)}.")
    arguments.command = train
    return arguments


def compare(arguments: argparse.Namespace) -> None:
    from .training import compare

    targets = arguments.target or []
    _check_directory(Path(arguments.out))
    if arguments.study or len(targets) > 1 or arguments.seeds:
        return _compare_study(arguments, targets)
    if not targets:
        raise InputError("There is nothing to learn: name a column with --target, or a study with --study.")
    result = compare(
        arguments.source,
        targets[0],
        out_dir=arguments.out,
        epochs=30 if arguments.epochs is None else arguments.epochs,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        schedule=arguments.schedule,
        batch_size=arguments.batch_size,
        split=arguments.split,
        val_source=arguments.val,
        test_source=arguments.test,
        unit=arguments.unit,
        seed=arguments.seed,
        n_conv=arguments.n_conv,
        n_recurrent_steps=arguments.n_recurrent_steps,
        atom_fea_len=arguments.atom_fea_len,
        h_fea_len=arguments.h_fea_len,
        parameters=_graph_parameters(arguments),
        accelerator=arguments.accelerator,
        precision=arguments.precision or "float32",
        progress=True,
    )
    print(f"\n{result.table()}\n")
    print(f"compare.md, compare.json, parity.png, learning_curves.png and both models are in {result.out_dir}")


def _changed(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """Which of these options of compare or predict are not at their defaults."""
    given = [name for name in names if getattr(arguments, name) != arguments.defaults[name]]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _compare_study(arguments: argparse.Namespace, targets: list[str]) -> None:
    import shlex

    from .training.module import Recipe
    from .training.report import compare_study
    from .training.study import pair_study, read_study

    if arguments.seeds and arguments.seed != arguments.defaults["seed"]:
        raise InputError(f"--seeds stands in place of --seed {arguments.seed}; give one of them.")
    if arguments.study:
        fixed = ["lr", "optimizer", "schedule", "batch_size", "seed", "atom_fea_len", "h_fea_len"]
        if given := _changed(arguments, [*fixed, "n_conv", "n_recurrent_steps"]):
            raise InputError(f"The study {arguments.study} says itself what {given} would; change it there.")
        changes = (targets, arguments.seeds or (), arguments.epochs, arguments.precision)
        study = read_study(arguments.study).changed(*changes)
    else:
        epochs = 30 if arguments.epochs is None else arguments.epochs
        recipe = Recipe(epochs, arguments.lr, arguments.optimizer, schedule=arguments.schedule)
        study = pair_study(
            targets,
            arguments.seeds or (arguments.seed,),
            recipe,
            batch_size=256 if arguments.batch_size is None else arguments.batch_size,
            precision=arguments.precision or "float32",
            n_conv=arguments.n_conv,
            n_recurrent_steps=arguments.n_recurrent_steps,
            atom_fea_len=arguments.atom_fea_len,
            h_fea_len=arguments.h_fea_len,
        )
    if arguments.unit and len(study.targets) > 1:
        raise InputError("--unit is of one target, and there are several; name the columns as usual, or drop it.")
    page = compare_study(
        study,
        arguments.source,
        arguments.out,
        val_source=arguments.val,
        test_source=arguments.test,
        split=arguments.split,
        parameters=_graph_parameters(arguments),
        units={study.targets[0]: arguments.unit} if arguments.unit else None,
        command=shlex.join(["srcgcnn-fast", *arguments.argv]),
        tell=lambda line: print(line, flush=True),
        accelerator=arguments.accelerator,
    )
    print(f"report.md, report.json, the plots and {page.name}, which holds them all, are in {page.parent}")


def predict(arguments: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from . import use_backend, use_precision
    from .prediction import check_table, predict, write_table
    from .uncertainty import Sampler, load_predictor

    if arguments.ray is not None:
        from .shards import predict_shards

        names = ("dropout_passes", "batch_atoms", "device", "captured", "precision", "backend")
        if given := _changed(arguments, names):
            raise InputError(f"The workers of --ray predict on CPUs, by one model, with no {given}; leave it out.")
        policies = {"isolated": arguments.isolated, "disorder": arguments.disorder}
        rows = predict_shards(arguments.model, arguments.input, arguments.out, workers=arguments.ray, **policies)
        print(f"{rows:,} rows; written to {arguments.out}, a directory of Parquet files")
        return 0
    check_table(arguments.out)
    _check_apart(arguments.input, Path(arguments.out))
    _check_writable(Path(arguments.out))
    predictor = load_predictor(arguments.model)
    for model in predictor.models if isinstance(predictor, Sampler) else [predictor]:
        model.to(_device(arguments.device))
    with use_backend(arguments.backend) if arguments.backend else nullcontext(), use_precision(arguments.precision):
        table = predict(
            predictor,
            arguments.input,
            dropout_passes=arguments.dropout_passes,
            batch_atoms=arguments.batch_atoms,
            isolated=arguments.isolated,
            captured=arguments.captured,
            disorder=arguments.disorder,
            progress=True,
        )
    write_table(table, arguments.out)
    failed = table["error"].notna()
    print(f"{len(table):,} rows, {int(failed.sum()):,} errors; written to {arguments.out}")
    for reason in table["error"][failed][:3]:
        print(f"  {reason}", file=sys.stderr)
    return 1 if len(table) and failed.all() else 0


def convert(arguments: argparse.Namespace) -> None:
    from .serialization import load_model, save_model

    model = load_model(arguments.model)
    if str(arguments.out).endswith(".pth.tar"):
        from .interop.checkpoints import save_upstream_checkpoint

        save_upstream_checkpoint(model, arguments.out)
    else:
        save_model(model, arguments.out)
    metadata = model.metadata
    print(f"{type(model).__name__} for {', '.join(metadata.targets)}, written to {arguments.out}")


def download(arguments: argparse.Namespace) -> None:
    from .download import download

    _check_writable(Path(arguments.out))
    found = download(
        arguments.source,
        arguments.out,
        dataset=arguments.dataset,
        targets=arguments.target,
        chemsys=arguments.chemsys,
        limit=arguments.limit,
    )
    for sentence in found.skipped[:3]:
        print(f"left out: {sentence}", file=sys.stderr)
    print(
        f"{found.crystals:,} crystals with {', '.join(found.targets)}, {len(found.skipped):,} left out; "
        f"written to {found.path}"
    )


def bench(arguments: argparse.Namespace) -> int:
    from .bench import WrongNumbersError, bench

    try:
        print(bench(arguments.source, arguments.out, arguments.threads))
    except WrongNumbersError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nbench.png, roofline.png and bench.json are in {arguments.out}")
    return 0


def doctor(arguments: argparse.Namespace) -> None:
    from .doctor import report

    print(report())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srcgcnn-fast",
        description="Fast crystal graph networks: CGCNN and SR-CGCNN.",
        epilog="To see it all at work: srcgcnn-fast demo. Options of a command: srcgcnn-fast COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(function: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            function.__name__, help=help, description=help, formatter_class=_Help, allow_abbrev=False
        )
        sub.set_defaults(command=function)
        if function is not train:  # whose options have it
            _add_debug(sub)
        return sub

    sub = command(demo, "Make a data set, train and compare both models on it, predict new crystals (two minutes).")
    sub.add_argument("--out", metavar="DIR", help="where to write; by default in the user's cache directory")
    sub.add_argument("--crystals", metavar="N", type=int, default=2400, help="size of the data set")
    sub.add_argument("--epochs", metavar="N", type=int, default=40, help="passes over the training crystals")
    sub.add_argument("--seed", metavar="N", type=int, default=0, help="of the data, split and initial weights")

    sub = command(prepare, "Build the graphs of a data set once, into a store that trains without parsing.")
    sub.add_argument("source", metavar="SOURCE", help=_SOURCE)
    sub.add_argument("store", metavar="STORE", help="directory to write, which train and compare take as SOURCE")
    sub.add_argument(
        "--target", metavar="NAME", action="append", default=[], help="target column to keep, repeatable; default all"
    )
    sub.add_argument("--append", action="store_true", help="add to the store that is there, with its graph options")
    sub.add_argument("--ray", metavar="N", type=int, help=_RAY)
    _add_graph_options(sub)

    sub = command(train, "Train one model, score it, and save it for predict.")
    sub.add_argument("--config", metavar="FILE", help="YAML with any of these options; the command line overrides it")
    _add_train_options(sub)

    sub = command(compare, "Train a CGCNN and an SR-CGCNN under identical settings and tabulate error, size and time.")
    _add_training_options(sub, batch_size="64 for up to 10 000 crystals, else and in a report 256", is_study=True)
    sub.add_argument("--out", metavar="DIR", default="srcgcnn_fast_compare", help="where to write")
    sub.add_argument(
        "--seeds", metavar="N", type=int, nargs="+", help="train with each of these: a report with deviations"
    )
    sub.add_argument(
        "--study",
        metavar="FILE",
        help="a YAML file of variants and recipes, or one of ours by name: paper, search, search-muon",
    )
    sub.set_defaults(defaults={action.dest: action.default for action in sub._actions})

    sub = command(
        predict, "Predict crystals into a table: one row per input; what cannot be read is a row with its error."
    )
    sub.add_argument("model", metavar="MODEL", help="a directory of a model or an ensemble, or a published .pth.tar")
    sub.add_argument("input", metavar="INPUT", help=f"{_SOURCE}, or a store that prepare wrote")
    sub.add_argument(
        "--out", metavar="TABLE", default="predictions.csv", help="table to write, .csv, .parquet or .json"
    )
    sub.add_argument(
        "--dropout-passes",
        metavar="N",
        type=int,
        help="predict N times with dropout left on, for a mean and a standard deviation; 30 is usual",
    )
    sub.add_argument(
        "--batch-atoms",
        metavar="N",
        type=int,
        default=20_000,
        help="most graph rows in one forward pass (a row is an atom, or several that symmetry makes equal)",
    )
    sub.add_argument(
        "--isolated", choices=("error", "warn", "keep"), help=f"{_ISOLATED}; default: as the model was trained"
    )
    sub.add_argument("--disorder", choices=_POLICIES, help=f"{_DISORDER}; default: as the model was trained")
    sub.add_argument("--ray", metavar="N", type=int, help=f"{_RAY}, and TABLE a directory")
    sub.add_argument("--backend", metavar="NAME", help="force a backend that doctor lists, such as reference")
    sub.add_argument("--device", metavar="NAME", default="cpu", help="where to compute: cpu, cuda, cuda:1 …")
    sub.add_argument(
        "--captured", action="store_true", help="on a GPU: one CUDA graph for each size of batch, for small batches"
    )
    _add_precision(sub)
    sub.set_defaults(defaults={action.dest: action.default for action in sub._actions})

    sub = command(convert, "Convert a published .pth.tar to a model directory, or a model directory to a .pth.tar.")
    sub.add_argument("model", metavar="MODEL", help="a model directory, or a published .pth.tar")
    sub.add_argument("out", metavar="OUT", help="a directory, or a name that ends with .pth.tar")

    sub = command(download, "Fetch crystals of a public database into a Parquet file that prepare and train take.")
    sub.add_argument(
        "source",
        metavar="DATABASE",
        choices=("mp", "matbench", "jarvis"),
        help="mp (Materials Project; its key in MP_API_KEY), matbench or jarvis",
    )
    sub.add_argument("out", metavar="FILE", help="file to write, .parquet")
    sub.add_argument("--dataset", metavar="NAME", help="matbench task, or JARVIS set (default: dft_3d)")
    sub.add_argument(
        "--target", metavar="FIELD", action="append", default=[], help="field to keep, repeatable; default the usual"
    )
    sub.add_argument(
        "--chemsys", metavar="A-B", nargs="+", default=[], help="mp: only such systems, as Li-Fe-O or Si-*"
    )
    sub.add_argument("--limit", metavar="N", type=int, help="most crystals; default all")

    sub = command(bench, "Measure both models on this machine: a table, a bar chart and a roofline (a minute).")
    sub.add_argument("source", metavar="SOURCE", nargs="?", help=f"a store that prepare wrote, or {_SOURCE}")
    sub.add_argument("--out", metavar="DIR", default="srcgcnn_fast_bench", help="where to write")
    sub.add_argument("--threads", metavar="N", type=int, help="most threads to measure; default all")

    command(doctor, "Say what is installed, which backends run here, and why others do not.")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if isinstance(default, list | tuple) and default:
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return action.help if default is None or default is False or default == [] else super()._get_help_string(action)


_SOURCE = (
    "a CIF, POSCAR, extxyz, pymatgen JSON, ASE db or Parquet file, or a folder of these, with or without id_prop.csv"
)
_RAY = "let N workers of a Ray cluster do it (one on this machine unless RAY_ADDRESS is set); the input is Parquet"
_POLICIES = ("error", "majority", "average")
_DISORDER = "sites that are not one full atom: refuse the crystal, take the largest share, or mix the element vectors"
_ISOLATED = "atoms without any neighbour: refuse the crystal, or keep it (warn: and count such crystals)"


def _add_precision(parser: argparse.ArgumentParser, default: str | None = "float32") -> None:
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default=default,
        help="of a GPU's arithmetic; the CPU computes in float32"
        + " (default: float32, or the study's)" * (not default),
    )


def _device(name: str) -> Any:
    """The device of that name, which must be there."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # torch has many ways to say that there is none, and long ones
        reason = str(error).partition("\n")[0].rstrip(".")
        reason = reason if len(reason) < 80 else "PyTorch has none of that name"
        raise InputError(f"There is no device {name!r} here ({reason}); srcgcnn-fast doctor lists them.") from error
    return device


def _add_graph_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("graphs")
    group.add_argument("--radius", metavar="X", type=float, help="cutoff radius, Å (default: 8)")
    group.add_argument("--max-neighbors", metavar="N", type=int, help="neighbours kept per atom (default: 12)")
    group.add_argument(
        "--symmetry-tolerance", metavar="X", type=float, help="Å within which atoms count as equal (default: 1e-5)"
    )
    group.add_argument("--full-graph", action="store_true", help="keep every atom: no reduction by symmetry")
    group.add_argument("--padded", action="store_true", help="pad short neighbour lists as the published programs do")
    group.add_argument("--isolated", choices=("error", "warn", "keep"), help=f"{_ISOLATED} (default: error)")
    group.add_argument("--disorder", choices=_POLICIES, help=f"{_DISORDER} (default: error)")


def _check_writable(path: Path) -> None:
    """Say before the work, not after it, that its result has no place."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the name of a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # as when it is written
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; choose a directory that you may write to.") from error


def _check_apart(source: str, out: Path) -> None:
    """Results replace neither what they follow from nor a model's or run's own; nor are they read the next time."""
    from .graph.readers import is_read
    from .graph.store import is_store

    given, place = Path(source).resolve(), out.resolve()
    if place == given:
        raise InputError(f"--out {out} is the input; give the table another name.")
    if given == place.parent and (is_store(given) or is_read(given, place.name)):
        raise InputError(f"--out {out} would be part of the input {source}; put the table elsewhere.")
    is_kept = place.name in ("config.json", "ensemble.json", "run.json")
    if place.exists() and (is_kept or (place.name == "metrics.csv" and (place.parent / "run.json").exists())):
        raise InputError(f"--out {out} is a file of a model or of a run; give the table another name.")


def _graph_parameters(arguments: argparse.Namespace) -> GraphParameters | None:
    """None where no option was given, so that a prepared store keeps its own."""
    from .graph.parameters import GraphParameters

    if arguments.full_graph and arguments.symmetry_tolerance is not None:
        raise InputError("--full-graph and --symmetry-tolerance exclude each other; give one of them.")
    names = ("radius", "max_neighbors", "symmetry_tolerance", "isolated", "disorder")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.full_graph:
        given["symmetry_tolerance"] = None
    if arguments.padded:
        given["padded"] = True
    return GraphParameters(**given) if given else None


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """Of train, whether words or a file give them."""
    _add_debug(parser)
    _add_training_options(parser, batch_size="256", schedules=("one_cycle",))
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="where to write the run: model, checkpoints, metrics")
    add("--model", choices=("cgcnn", "sr-cgcnn"), default="sr-cgcnn", help="network")
    add("--classification", action="store_true", help="the target is a class, 0 or 1")
    add("--resume", action="store_true", help="continue the run in DIR after its last whole epoch, or start it")
    add("--n-h", metavar="N", type=int, default=1, help="hidden layers after pooling")
    add("--recurrent-layer-norm", action="store_true", help="SR-CGCNN: a layer norm after each step")
    help = "SR-CGCNN: a learned gate between old and new features"
    add("--recurrent-learnable-alpha", action="store_true", help=help)
    help = "share of features dropped after pooling (default: 0.5 for a classifier, else none)"
    add("--dropout", metavar="X", type=float, help=help)
    add("--batch-rows", metavar="N", type=int, help="graph rows per batch, in place of --batch-size")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="of the optimiser")
    help = "peak rate of the convolutions' weights with --optimizer muon; --lr is that of the rest"
    add("--muon-lr", metavar="X", type=float, default=0.04, help=help)
    help = "epochs of the multistep schedule"
    add("--lr-milestones", metavar="N", type=int, nargs="+", default=[100], help=help)
    add("--warmup", metavar="X", type=float, default=0.05, help="share of the run in which one_cycle rises to --lr")
    add("--gradient-clip", metavar="X", type=float, help="largest norm of the gradient; default none")
    add("--loss", choices=("mse", "mae"), default="mse", help="squared or absolute error of the normalised target")
    help = "decay of a moving average of the weights, such as 0.999, less in the first steps; default none"
    add("--ema", metavar="X", type=float, help=help)
    add("--patience", metavar="N", type=int, help="stop after N epochs without a better one; default never")
    help = "'balanced', or factors of the loss of class 0 and of class 1"
    add("--class-weights", metavar="X", nargs="+", help=help)
    add(
        "--init", metavar="MODEL", help="start from this model directory or published .pth.tar, which fixes the network"
    )
    help = "parts of --init to keep as they are: embedding, convolutions, head"
    parts = ("embedding", "convolutions", "head")
    add("--freeze", metavar="PART", nargs="+", choices=parts, default=[], help=help)
    help = "CSV or Parquet with id and part (train, val, test), or JSON with ids by part, in place of --split"
    add("--split-file", metavar="FILE", help=help)
    add("--split-column", metavar="NAME", default="split", help="column of the part in --split-file")
    help = "cross-validate: number of folds, or a matbench task such as matbench_mp_e_form"
    add("--folds", metavar="K", help=help)
    help = "train an ensemble of N models; predict then gives mean and standard deviation"
    add("--members", metavar="N", type=int, default=1, help=help)
    add("--captured", action="store_true", help="on a GPU: CUDA graphs of a step, for small batches")
    add("--length-buckets", action="store_true", help="training batches of crystals of similar size")
    add("--workers", metavar="N", type=int, default=0, help="processes that assemble batches")
    add("--tensorboard", action="store_true", help="log for TensorBoard, too")
    add("--logger", choices=("tensorboard", "wandb"), help="log there, too (wandb: Weights & Biases)")


def _add_training_options(
    parser: argparse.ArgumentParser, batch_size: str, schedules: tuple[str, ...] = (), is_study: bool = False
) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"a store that prepare wrote, or {_SOURCE}")
    text = "target column to learn, repeatable" + ("" if is_study else "; a crystal may lack some")
    parser.add_argument("--target", metavar="NAME", action="append", required=not is_study, help=text)
    parser.add_argument("--unit", help="of the target, for tables and plots; known for the usual names")
    parser.add_argument("--val", metavar="SOURCE", help="separate validation set, in place of --split")
    parser.add_argument("--test", metavar="SOURCE", help="separate test set; needs --val")
    parser.add_argument(
        "--split",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        default=[0.8, 0.1, 0.1],
        help="fractions of SOURCE",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the split, order and initial weights")
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        default=None if is_study else 30,
        help="passes over the training crystals" + " (default: 30, or the study's)" * is_study,
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help=f"crystals per batch (default: {batch_size})")
    parser.add_argument("--lr", metavar="X", type=float, default=3e-3, help="initial learning rate")
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adamw", "muon"), default="adam", help="optimiser")
    parser.add_argument(
        "--schedule",
        choices=("constant", "multistep", "cosine", *schedules),
        default="cosine",
        help="of the learning rate",
    )
    parser.add_argument("--n-conv", metavar="N", type=int, default=3, help="layers of a CGCNN")
    parser.add_argument("--n-recurrent-steps", metavar="N", type=int, default=3, help="steps of an SR-CGCNN")
    parser.add_argument("--atom-fea-len", metavar="N", type=int, default=64, help="features of an atom")
    parser.add_argument("--h-fea-len", metavar="N", type=int, default=128, help="features of a hidden layer")
    help = "where to train; auto: on a GPU, if any"
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help=help)
    _add_precision(parser, default=None if is_study else "float32")
    _add_graph_options(parser)


if __name__ == "__main__":
    sys.exit(main())
