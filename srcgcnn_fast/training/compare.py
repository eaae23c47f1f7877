"""The paper's comparison: CGCNN with its own layers against one shared layer, trained under identical settings."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..files import names_in, write_text
from ..graph.parameters import GraphParameters, as_python
from ..graph.store import GraphStore
from ..nn import CGCNN, SRCGCNN
from .data import GraphDataModule, check_options
from .evaluate import Evaluation, evaluate
from .fit import FitResult, fit, only_trainer
from .metrics import decimals
from .module import Recipe
from .plots import learning_curves, parity_plot
from .sources import Source, prepared

MIN_CRYSTALS = 20
SMALL_SET = 10_000
FILES = ("compare.md", "compare.json", "parity.png", "learning_curves.png")


@dataclass(frozen=True)
class Contestant:
    """One trained model with what the table says about it."""

    name: str
    fit: FitResult
    evaluation: Evaluation

    @property
    def conv_parameters(self) -> int:
        return self.fit.model.count_conv_parameters()

    @property
    def mae(self) -> float:
        return self.evaluation.metrics["mae"]

    @property
    def seconds(self) -> float:
        """Spent in training steps, all epochs together."""
        return sum(row["seconds"] for row in self.fit.history)


@dataclass(frozen=True)
class Comparison:
    """CGCNN and SR-CGCNN on the same crystals."""

    cgcnn: Contestant
    sr_cgcnn: Contestant
    target: str
    unit: str
    part: str
    """The part of the data that was scored: "test", or "val" where no test crystals were set aside."""
    crystals: dict[str, int]
    """In each part."""
    mean_predictor_mae: float
    """Of always answering the mean of the training targets."""
    settings: dict[str, Any]
    graph: GraphParameters
    out_dir: Path

    @property
    def ratios(self) -> dict[str, float]:
        """SR-CGCNN over CGCNN."""
        names = ("conv_parameters", "mae", "seconds")
        return {name: getattr(self.sr_cgcnn, name) / getattr(self.cgcnn, name) for name in names}

    def table(self) -> str:
        """Markdown, as in the paper: parameters of the convolutions, MAE and time of each, and their ratios."""
        rows = [
            ["model", "convolution parameters", f"MAE ({self.unit})" if self.unit else "MAE", "seconds"],
            *(
                [c.name, f"{c.conv_parameters:,}", f"{c.mae:.{decimals(c.mae)}f}", f"{c.seconds:.1f}"]
                for c in self.contestants
            ),
            ["SR-CGCNN / CGCNN", *(f"{ratio:.3f}" for ratio in self.ratios.values())],
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
        return "\n".join(lines)

    @property
    def contestants(self) -> tuple[Contestant, Contestant]:
        return self.cgcnn, self.sr_cgcnn


def compare(
    source: Source,
    target: str,
    *,
    out_dir: str | os.PathLike[str],
    epochs: int = 30,
    lr: float = 3e-3,
    optimizer: str = "adam",
    schedule: str = "cosine",
    batch_size: int | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    val_source: Source | None = None,
    test_source: Source | None = None,
    unit: str | None = None,
    seed: int = 0,
    n_conv: int = 3,
    n_recurrent_steps: int = 3,
    atom_fea_len: int = 64,
    h_fea_len: int = 128,
    parameters: GraphParameters | None = None,
    accelerator: str = "auto",
    precision: str = "float32",
    progress: bool = False,
) -> Comparison:
    """Train a CGCNN of ``n_conv`` layers and an SR-CGCNN of ``n_recurrent_steps`` steps on the same crystals.

    Split, seeds, batches and their order, optimiser, schedule and epochs are the same for both; each is scored with
    the weights of its best validation epoch. Source: arXiv 2605.01304, where the shared layer needs 34.5 % of the
    convolution parameters. ``out_dir`` receives compare.md, compare.json, parity.png, learning_curves.png, the run of
    each model (cgcnn/, sr_cgcnn/) and the prepared graphs, which a repeated call uses again.

    Args:
        source: anything that ``prepare`` reads, a prepared store or its path.
        target: name of the target column.
        batch_size: crystals per batch; by default 64 for up to 10 000 training crystals, 256 beyond.
        val_source: a separate validation set; ``split`` is then unused.
        test_source: a separate test set, beside ``val_source``.
        parameters: of the graphs; the default reduces by symmetry. The radius decides the number of Gaussians.
        accelerator: where to train, and ``precision`` of a GPU's arithmetic, as for :func:`fit`.

    Raises:
        InputError: the target does not exist or fewer than 20 crystals have it, ``out_dir`` holds other files where
            the runs go, or another process trains there.
    """
    if not isinstance(target, str):
        raise InputError("compare takes one target, by its name; compare_study takes several.")
    seed, batch_size = as_python(seed), as_python(batch_size)
    split = (float(split[0]), float(split[1]), float(split[2]))
    recipe = Recipe(epochs=epochs, lr=lr, optimizer=optimizer, schedule=schedule)
    check_options([target], split if val_source is None else None, batch_size=batch_size, seed=seed)
    out = Path(out_dir)
    with only_trainer(out):
        sources = {"graphs": source, "graphs-val": val_source, "graphs-test": test_source}
        stores = [
            s if s is None else prepared(s, out / name, parameters, progress, targets=[target])
            for name, s in sources.items()
        ]
        data = _data(stores, target, split, batch_size, unit, seed)
        part = "test" if len(data.parts["test"].indices) else "val"
        widths = {"atom_fea_len": atom_fea_len, "h_fea_len": h_fea_len}
        how: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "progress": progress}
        widths["nbr_fea_len"] = data.graph_parameters.n_gaussians()

        _check_replaceable(out / "cgcnn", out / "sr_cgcnn")
        for name in FILES:  # those of an earlier comparison, whose runs go now
            (out / name).unlink(missing_ok=True)

        def contestant(name: str, directory: str, build: Callable[..., CGCNN | SRCGCNN], **depth: int) -> Contestant:
            shutil.rmtree(out / directory, ignore_errors=True)  # the run of an earlier comparison
            torch.manual_seed(seed)
            result = fit(build(**depth, **widths), data, out / directory, recipe, seed=seed, **how)
            return Contestant(name, result, evaluate(result.model, data, part))

        comparison = Comparison(
            contestant("CGCNN", "cgcnn", CGCNN, n_conv=n_conv),
            contestant("SR-CGCNN", "sr_cgcnn", SRCGCNN, n_recurrent_steps=n_recurrent_steps),
            target=target,
            unit=data.units[0],
            part=part,
            crystals={name: len(part.indices) for name, part in data.parts.items()},
            mean_predictor_mae=_mean_predictor_mae(data, part),
            settings={
                **asdict(recipe),
                "batch_size": data.batch_size,
                "seed": seed,
                "split": split,
                "accelerator": accelerator,
                "precision": precision,
            },
            graph=data.graph_parameters,
            out_dir=out,
        )
        _write(comparison)
    return comparison


def _check_replaceable(*runs: Path) -> None:
    """Is there nothing but runs of an earlier comparison? A clone of txie-93/cgcnn has such a name, too."""
    for run in runs:
        if run.exists() and not run.is_dir():
            raise InputError(f"{run} is a file, not a run; write the comparison to another directory.")
        if run.exists() and names_in(run) and not (run / "run.json").is_file():
            raise InputError(f"{run} holds other files than a run; write the comparison to another directory.")


def _data(
    stores: Sequence[GraphStore | None],
    target: str,
    split: tuple[float, float, float],
    batch_size: int | None,
    unit: str | None,
    seed: int,
) -> GraphDataModule:
    store, val_store, test_store = stores
    if store is None:
        raise InputError("There is no source to compare on; give one.")
    data = GraphDataModule(
        store,
        target,
        split=split,
        val_store=val_store,
        test_store=test_store,
        units=None if unit is None else (unit,),
        seed=seed,
    )
    sizes = {name: len(part.indices) for name, part in data.parts.items()}
    if sum(sizes.values()) < MIN_CRYSTALS:
        raise InputError(
            f"Only {sum(sizes.values())} crystals have a graph and a {target}; "
            f"a comparison needs at least {MIN_CRYSTALS}."
        )
    usual = 64 if sizes["train"] <= SMALL_SET else 256
    data.batch_size = usual if batch_size is None else batch_size
    return data


def _mean_predictor_mae(data: GraphDataModule, part: str) -> float:
    return float(np.abs(data.target_values(part) - data.target_values("train").mean(axis=0)).mean())


def _write(comparison: Comparison) -> None:
    out, contestants = comparison.out_dir, comparison.contestants
    report = _report(comparison)
    write_text(out / "compare.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(out / "compare.md", _markdown(comparison, report))
    panels = {c.name: (c.evaluation.target[:, 0], c.evaluation.predicted[:, 0]) for c in contestants}
    parity_plot(out / "parity.png", panels, comparison.target, comparison.unit)
    histories = {c.name: c.fit.history for c in contestants}
    learning_curves(out / "learning_curves.png", histories, unit=comparison.unit)


def _report(comparison: Comparison) -> dict[str, Any]:
    on_gpu = comparison.settings["accelerator"] != "cpu" and torch.cuda.is_available()
    return {
        "target": comparison.target,
        "unit": comparison.unit,
        "scored_on": comparison.part,
        "crystals": comparison.crystals,
        "mean_predictor_mae": comparison.mean_predictor_mae,
        "settings": comparison.settings,
        "graph": asdict(comparison.graph),
        "models": {
            c.name: {
                "hyperparameters": c.fit.model.hyperparameters,
                "conv_parameters": c.conv_parameters,
                "parameters": sum(p.numel() for p in c.fit.model.parameters()),
                **{name: x if math.isfinite(x) else None for name, x in c.evaluation.metrics.items()},
                "val_mae": c.fit.best["val_mae"],
                "best_epoch": c.fit.best["epoch"],
                "seconds": c.seconds,
            }
            for c in comparison.contestants
        },
        "ratios": comparison.ratios,
        "machine": {
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "torch": torch.__version__,
            "srcgcnn_fast": __version__,
        },
    }


def _markdown(comparison: Comparison, report: dict[str, Any]) -> str:
    sizes, settings, machine = report["crystals"], report["settings"], report["machine"]
    on_cpu = f"{machine['threads']} CPU thread(s), float32"  # whatever a GPU would do
    arithmetic = f"{machine['gpu']}, {settings['precision']}" if machine["gpu"] else on_cpu
    guess = comparison.mean_predictor_mae
    mean = f"{guess:.{decimals(guess)}f} {comparison.unit}".rstrip()
    return (
        f"# {comparison.target}\n\n{comparison.table()}\n\n"
        f"MAE of {sizes[comparison.part]:,} {comparison.part} crystals; {sizes['train']:,} were trained on, "
        f"{sizes['val']:,} chose the best epoch. "
        f"Predicting the mean gives {mean}.\n\n"
        f"Both: {settings['epochs']} epochs, batches of {settings['batch_size']}, {settings['optimizer']}, "
        f"lr {settings['lr']:g}, {settings['schedule']} schedule, seed {settings['seed']}; "
        f"{arithmetic}. Seconds are those of the training steps.\n\n"
        "![parity](parity.png)\n![learning curves](learning_curves.png)\n"
    )
