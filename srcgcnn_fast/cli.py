"""The command line: one thin layer over the Python interface."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError

if TYPE_CHECKING:
    from .graph.parameters import GraphParameters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 if every input failed, 2 for bad input (one sentence on stderr), 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    # Read when torch loads OpenMP: idle threads spin for 50 µs, not for milliseconds, which stall a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.ERROR if _rank() else logging.WARNING, format="%(levelname)s: %(message)s")
    if not arguments.debug:
        warnings.filterwarnings("ignore")  # those of third-party packages; ours go through logging
    try:
        if arguments.command is not train and _is_shared():
            raise InputError(f"{arguments.command.__name__} runs in one process; start it without torchrun.")
        return arguments.command(arguments) or 0
    except InputError as error:
        if arguments.debug:
            raise
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hints = {train: "; --resume continues after the last whole epoch"}
        hints[compare] = "; with --study or --seeds the same command goes on where it stopped"
        hint = hints.get(arguments.command, "")
        print(f"interrupted{hint}", file=sys.stderr)
        return 130


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

    parameters = _graph_parameters(arguments)
    store = prepare(
        arguments.source,
        arguments.store,
        parameters,
        targets=arguments.target or None,
        append=arguments.append,
        progress=True,
    )
    for name, reason in store.rejected[:5]:
        print(f"rejected {name_it(name, reason)}", file=sys.stderr)
    if len(store.rejected) > 5:
        print(f"… and {len(store.rejected) - 5} more", file=sys.stderr)
    print(
        f"{len(store):,} crystals, {store.n_atoms:,} atoms in {store.n_rows:,} rows "
        f"(symmetry makes the graphs {store.n_atoms / store.n_rows:.2f} times smaller), "
        f"{store.n_edges:,} edges; {len(store.rejected):,} rejected; "
        f"targets: {', '.join(sorted(store.targets)) or 'none'}\n"
        f"written to {arguments.store}"
    )


def train(arguments: argparse.Namespace) -> None:
    import torch

    from .nn import CGCNN, SRCGCNN
    from .training import GraphDataModule, Recipe, distributed, evaluate, fit, prepared

    distributed.join()
    out, parameters = Path(arguments.out), _graph_parameters(arguments)
    sources = {"graphs": arguments.source, "graphs-val": arguments.val, "graphs-test": arguments.test}

    def stores() -> list[Any]:
        return [s and prepared(s, out / k, parameters, True, targets=[arguments.target]) for k, s in sources.items()]

    distributed.on_rank_zero(lambda: len(stores()))  # the others find what rank 0 has prepared
    store, val_store, test_store = stores()
    data = GraphDataModule(
        store,
        arguments.target,
        split=arguments.split,
        val_store=val_store,
        test_store=test_store,
        units=arguments.unit and [arguments.unit],
        batch_size=arguments.batch_size or 256,
        batch_rows=arguments.batch_rows,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    recipe = Recipe(
        epochs=arguments.epochs,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        milestones=tuple(arguments.lr_milestones),
        gradient_clip=arguments.gradient_clip,
    )
    widths = {"atom_fea_len": arguments.atom_fea_len, "h_fea_len": arguments.h_fea_len, "n_h": arguments.n_h}
    widths["nbr_fea_len"] = data.graph_parameters.n_gaussians()
    torch.manual_seed(arguments.seed)
    model: CGCNN | SRCGCNN
    if arguments.model == "cgcnn":
        model = CGCNN(n_conv=arguments.n_conv, classification=arguments.classification, **widths)
    else:
        model = SRCGCNN(
            n_recurrent_steps=arguments.n_recurrent_steps,
            classification=arguments.classification,
            recurrent_layer_norm=arguments.recurrent_layer_norm,
            recurrent_learnable_alpha=arguments.recurrent_learnable_alpha,
            **widths,
        )
    result = fit(
        model,
        data,
        out,
        recipe,
        seed=arguments.seed,
        resume=arguments.resume,
        accelerator=arguments.accelerator,
        precision=arguments.precision,
        logger="tensorboard" if arguments.tensorboard else None,
        progress=True,
    )
    if _rank() > 0:
        return
    part = "test" if len(data.parts["test"].indices) else "val"
    evaluation = evaluate(result.model, data, part)
    table = evaluation.write(out / f"{part}_predictions.csv")
    scores = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
    print(f"{part}: {scores} ({data.units[0] or 'units of the target'}; {len(evaluation.ids):,} crystals)")
    print(f"best epoch {result.best['epoch']} of {len(result.history)}, {result.seconds:.1f} s")
    print(f"model in {out / 'model'}, epochs in {out / 'metrics.csv'}, predictions in {table}")


def compare(arguments: argparse.Namespace) -> None:
    from .training import compare

    targets = arguments.target or []
    if arguments.study or len(targets) > 1 or arguments.seeds:
        return _compare_study(arguments, targets)
    if not targets:
        raise InputError("There is nothing to learn: name a column with --target, or a study with --study.")
    result = compare(
        arguments.source,
        targets[0],
        out_dir=arguments.out,
        epochs=arguments.epochs or 30,
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
        progress=True,
    )
    print(f"\n{result.table()}\n")
    print(f"compare.md, compare.json, parity.png, learning_curves.png and both models are in {result.out_dir}")


def _compare_study(arguments: argparse.Namespace, targets: list[str]) -> None:
    import shlex

    from .training.module import Recipe
    from .training.report import compare_study
    from .training.study import pair_study, read_study

    if arguments.study:
        fixed = ["lr", "optimizer", "schedule", "batch_size", "seed", "atom_fea_len", "h_fea_len"]
        fixed += ["n_conv", "n_recurrent_steps"]
        given = [name for name in fixed if getattr(arguments, name) != arguments.defaults[name]]
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"The study {arguments.study} says itself what {options} would; change it there.")
        study = read_study(arguments.study).changed(targets, arguments.seeds or (), arguments.epochs)
    else:
        recipe = Recipe(arguments.epochs or 30, arguments.lr, arguments.optimizer, schedule=arguments.schedule)
        study = pair_study(
            targets,
            arguments.seeds or (arguments.seed,),
            recipe,
            batch_size=arguments.batch_size or 256,
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
    )
    print(f"report.md, report.json, the plots and {page.name}, which holds them all, are in {page.parent}")


def predict(arguments: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from . import use_backend, use_precision
    from .prediction import predict, write_table
    from .serialization import load_model

    _check_writable(Path(arguments.out))
    model = load_model(arguments.model).to(_device(arguments.device))
    with use_backend(arguments.backend) if arguments.backend else nullcontext(), use_precision(arguments.precision):
        table = predict(
            model,
            arguments.input,
            batch_atoms=arguments.batch_atoms,
            isolated=arguments.isolated,
            captured=arguments.captured,
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


def bench(arguments: argparse.Namespace) -> None:
    from .bench import bench

    print(bench(arguments.source, arguments.out, arguments.threads))
    print(f"\nbench.png, roofline.png and bench.json are in {arguments.out}")


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
        sub = commands.add_parser(function.__name__, help=help, description=help, formatter_class=_Help)
        sub.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        sub.set_defaults(command=function)
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
    _add_graph_options(sub)

    sub = command(train, "Train one model, score it, and save it for predict.")
    _add_training_options(sub, batch_size="256", lr=3e-3)
    sub.add_argument("--out", metavar="DIR", required=True, help="where to write the run: model, checkpoints, metrics")
    sub.add_argument("--model", choices=("cgcnn", "sr-cgcnn"), default="sr-cgcnn", help="network")
    sub.add_argument("--classification", action="store_true", help="the target is a class, 0 or 1")
    sub.add_argument("--resume", action="store_true", help="continue the run in DIR after its last whole epoch")
    sub.add_argument("--n-h", metavar="N", type=int, default=1, help="hidden layers after pooling")
    sub.add_argument("--recurrent-layer-norm", action="store_true", help="SR-CGCNN: a layer norm after each step")
    sub.add_argument(
        "--recurrent-learnable-alpha", action="store_true", help="SR-CGCNN: a learned gate between old and new features"
    )
    sub.add_argument("--batch-rows", metavar="N", type=int, help="graph rows per batch, in place of --batch-size")
    sub.add_argument("--weight-decay", metavar="X", type=float, default=0.0, help="of the optimiser")
    sub.add_argument(
        "--lr-milestones", metavar="N", type=int, nargs="+", default=[100], help="epochs of the multistep schedule"
    )
    sub.add_argument("--gradient-clip", metavar="X", type=float, help="largest norm of the gradient; default none")
    sub.add_argument("--workers", metavar="N", type=int, default=0, help="processes that assemble batches")
    sub.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, too")
    sub.add_argument(
        "--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="where to train; auto: on a GPU, if any"
    )
    _add_precision(sub)

    sub = command(compare, "Train a CGCNN and an SR-CGCNN under identical settings and tabulate error, size and time.")
    _add_training_options(sub, batch_size="64 for up to 10 000 crystals, else 256", lr=3e-3, several=True)
    sub.add_argument("--out", metavar="DIR", default="srcgcnn_fast_compare", help="where to write")
    sub.add_argument(
        "--seeds", metavar="N", type=int, nargs="+", help="train with each of these: a report with deviations"
    )
    sub.add_argument(
        "--study", metavar="FILE", help="a YAML file of variants and recipes, or one of ours by name: paper, search"
    )
    sub.set_defaults(defaults={action.dest: action.default for action in sub._actions})

    sub = command(
        predict, "Predict crystals into a table: one row per input; what cannot be read is a row with its error."
    )
    sub.add_argument("model", metavar="MODEL", help="a model directory, or a published .pth.tar")
    sub.add_argument("input", metavar="INPUT", help=f"{_SOURCE}, or a store that prepare wrote")
    sub.add_argument(
        "--out", metavar="TABLE", default="predictions.csv", help="table to write, .csv, .parquet or .json"
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
    sub.add_argument("--backend", metavar="NAME", help="force a backend that doctor lists, such as reference")
    sub.add_argument("--device", metavar="NAME", default="cpu", help="where to compute: cpu, cuda, cuda:1 …")
    sub.add_argument(
        "--captured", action="store_true", help="on a GPU: one CUDA graph for each size of batch, for small batches"
    )
    _add_precision(sub)

    sub = command(convert, "Convert a published .pth.tar to a model directory, or a model directory to a .pth.tar.")
    sub.add_argument("model", metavar="MODEL", help="a model directory, or a published .pth.tar")
    sub.add_argument("out", metavar="OUT", help="a directory, or a name that ends with .pth.tar")

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
_ISOLATED = "atoms without any neighbour: refuse the crystal, or keep it (warn: and count such crystals)"


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default="float32",
        help="of a GPU's arithmetic; the CPU computes in float32",
    )


def _device(name: str) -> Any:
    """The device of that name, which must be there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's ways to say that there is none
        reason = str(error).splitlines()[0].rstrip(".")
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


def _check_writable(path: Path) -> None:
    """Say before the work, not after it, that its result has no place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; choose a directory that you may write to.") from error


def _graph_parameters(arguments: argparse.Namespace) -> GraphParameters | None:
    """None where no option was given, so that a prepared store keeps its own."""
    from .graph.parameters import GraphParameters

    if arguments.full_graph and arguments.symmetry_tolerance is not None:
        raise InputError("--full-graph and --symmetry-tolerance exclude each other; give one of them.")
    names = ("radius", "max_neighbors", "symmetry_tolerance", "isolated")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.full_graph:
        given["symmetry_tolerance"] = None
    if arguments.padded:
        given["padded"] = True
    return GraphParameters(**given) if given else None


def _add_training_options(parser: argparse.ArgumentParser, batch_size: str, lr: float, several: bool = False) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"a store that prepare wrote, or {_SOURCE}")
    if several:
        parser.add_argument("--target", metavar="NAME", action="append", help="target column to learn, repeatable")
    else:
        parser.add_argument("--target", metavar="NAME", required=True, help="target column to learn")
    parser.add_argument("--unit", help="of the target, for tables and plots; known for the usual names")
    parser.add_argument("--val", metavar="SOURCE", help="separate validation set; --split is then unused")
    parser.add_argument("--test", metavar="SOURCE", help="separate test set; needs --val")
    parser.add_argument(
        "--split",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        default=(0.8, 0.1, 0.1),
        help="fractions of SOURCE",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the split, order and initial weights")
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        default=None if several else 30,
        help="passes over the training crystals" + " (default: 30, or the study's)" * several,
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help=f"crystals per batch (default: {batch_size})")
    parser.add_argument("--lr", metavar="X", type=float, default=lr, help="initial learning rate")
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default="adam", help="optimiser")
    parser.add_argument(
        "--schedule", choices=("constant", "multistep", "cosine"), default="cosine", help="of the learning rate"
    )
    parser.add_argument("--n-conv", metavar="N", type=int, default=3, help="layers of a CGCNN")
    parser.add_argument("--n-recurrent-steps", metavar="N", type=int, default=3, help="steps of an SR-CGCNN")
    parser.add_argument("--atom-fea-len", metavar="N", type=int, default=64, help="features of an atom")
    parser.add_argument("--h-fea-len", metavar="N", type=int, default=128, help="features of a hidden layer")
    _add_graph_options(parser)


if __name__ == "__main__":
    sys.exit(main())
