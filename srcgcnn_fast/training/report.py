"""A study as a report: Markdown with plots beside it, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_text
from ..graph.parameters import GraphParameters
from ..graph.store import GraphStore
from . import plots
from .data import GraphDataModule, check_options
from .fit import only_trainer
from .metrics import decimals
from .module import Recipe
from .sources import Source, prepared
from .study import Run, Runs, Section, Study, Variant, kept_runs, run_study

RESAMPLES = 2000
SIZES = ((1, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, None))
MIN_WITH_ELEMENT = 20

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}"
    "td,th{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    "pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}"
)


@dataclass(frozen=True)
class Difference:
    """Mean absolute error of one model minus that of another on the same crystals, with a 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(errors: np.ndarray, others: np.ndarray, seed: int = 0) -> Difference:
    """The mean of absolute errors ``errors`` - ``others``, both (S seeds, n crystals), paired by crystal and seed.

    The interval is the bootstrap's 2.5 to 97.5 %, with crystals and seeds resampled together: it says how far another
    test set and other seeds would move the difference. With one seed only crystals are resampled.
    """
    rng = np.random.default_rng(seed)
    gaps = errors - others
    s, n = gaps.shape
    seeds = rng.multinomial(s, np.full(s, 1 / s), RESAMPLES) / s
    means = [seeds[k] @ gaps @ (rng.multinomial(n, np.full(n, 1 / n)) / n) for k in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(float(gaps.mean()), float(low), float(high))


def compare_study(
    study: Study,
    source: Source,
    out_dir: str | os.PathLike[str],
    *,
    val_source: Source | None = None,
    test_source: Source | None = None,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    parameters: GraphParameters | None = None,
    units: Mapping[str, str] | None = None,
    command: str = "",
    tell: Callable[[str], None] | None = None,
    accelerator: str = "auto",
) -> Path:
    """Do every run of ``study`` that is not done yet and write its report into ``out_dir``; returns report.html.

    Runs are kept in ``out_dir/runs``, identified by all that determines them (model, recipe, precision, seed, graphs,
    data, version). So an interrupted study continues where it stopped, even within a run, and a changed one trains
    only what is new. The report is written after every section, and after Ctrl-C or SIGTERM with the runs so far.

    Args:
        source: anything that ``prepare`` reads, a prepared store or its path.
        val_source: a separate validation set; ``split`` is then unused.
        test_source: a separate test set, beside ``val_source``.
        split: fractions; the split is the same for all seeds.
        parameters: of the graphs; the default reduces by symmetry.
        units: of targets whose names do not tell.
        command: what the report calls the way to make it.
        tell: receives one line a run.
        accelerator: "cpu", "gpu", or "auto" for what Lightning finds; it does not decide which runs are kept.

    Raises:
        InputError: a target does not exist, too few crystals have it, a variant cannot be built, another process
            trains in ``out_dir``, or the loss of a run is no longer finite (after the other runs and the report).
    """
    for section in study.sections:
        for variant in section.variants:
            check_options(
                section.targets,
                split if val_source is None else None,
                batch_size=variant.batch_size,
                seed=min(section.seeds, default=0),
            )
    out = Path(out_dir)
    with only_trainer(out):
        sources = {"graphs": source, "graphs-val": val_source, "graphs-test": test_source}
        stores = [
            s if s is None else prepared(s, out / name, parameters, tell is not None, targets=study.targets)
            for name, s in sources.items()
        ]
        data = {target: _data(stores, target, split, (units or {}).get(target)) for target in study.targets}
        runs = out / "runs"
        results = [(section, kept_runs(section, data, runs)) for section in study.sections]
        try:
            for number, finished in enumerate(run_study(study, data, runs, tell, accelerator)):
                results[number] = finished
                write_report(study, results, data, out, command)
        except (KeyboardInterrupt, SystemExit):
            results = [(section, kept_runs(section, data, runs)) for section in study.sections]
            write_report(study, results, data, out, command)
            raise
    return out / "report.html"


def _data(
    stores: Sequence[GraphStore | None], target: str, split: Sequence[float], unit: str | None
) -> GraphDataModule:
    store, val_store, test_store = stores
    if store is None:
        raise InputError("There is no source to compare on; give one.")
    units = None if unit is None else (unit,)
    return GraphDataModule(store, target, split=split, val_store=val_store, test_store=test_store, units=units)


def write_report(
    study: Study,
    results: Sequence[tuple[Section, Runs]],
    data: Mapping[str, GraphDataModule],
    out: Path,
    command: str,
) -> None:
    """Write report.md, report.html, report.json and the plots of the sections that have runs.

    Runs that are missing are counted in their section, so that a report of an unfinished study is honest.

    Args:
        data: one for each target.
        command: what reproduces the report.
    """
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[_Block] = [_heading(1, study.title), *_introduction(study, results, data, command)]
    record: list[dict[str, Any]] = []
    for number, (section, runs) in enumerate(results):
        blocks += [_heading(2, section.title), *_text(section.text), *_settings(section)]
        planned = len({(target, seed, variant.name) for target, seed, variant in section.runs()})
        if len(runs) < planned:
            blocks.append(_paragraph(f"{planned - len(runs)} of {planned} runs of this section are still missing."))
        for target in section.targets:
            found = _Found(section, runs, data[target], target)
            if found.variants:
                summaries = [_summary(found, variant) for variant in found.variants]
                blocks += [_heading(3, f"{section.title}: {found.quantity}"), _table(found, summaries)]
                blocks += [_image(out, *image) for image in _pictures(found, out, f"{number + 1}-{target}")]
                record += summaries
    rows = [_row(section, key, run) for section, runs in results for key, run in runs.items()]
    write_text(out / "report.json", json.dumps({"command": command, "results": record, "runs": rows}, indent=1) + "\n")
    write_text(out / "report.md", "\n\n".join(block.markdown for block in blocks) + "\n")
    body = "\n".join(block.html for block in blocks)
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(study.title)}</title>'
    write_text(out / "report.html", f"{page}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n")


class _Found:
    """The runs of one section and target: seeds that every variant shown here has."""

    def __init__(self, section: Section, runs: Runs, data: GraphDataModule, target: str) -> None:
        self.section, self.target, self.data = section, target, data
        self.unit = data.units[0]
        self.quantity = target.replace("_", " ")
        self.part = section.scored
        self.runs = {
            variant.name: {seed: runs[target, seed, variant.name] for seed in section.seeds
                           if (target, seed, variant.name) in runs}
            for variant in section.variants
        }  # fmt: skip
        self.variants = [variant for variant in section.variants if self.runs[variant.name]]

    def maes(self, variant: Variant, score: str | None = None) -> np.ndarray:
        """(S,) of the scored part, or of the ``score`` that the runs hold."""
        runs = self.runs[variant.name].values()
        return np.array([run.errors.mean() if score is None else run.scores[score] for run in runs])

    def first(self, variant: Variant) -> Run:
        return next(iter(self.runs[variant.name].values()))

    def difference(self, variant: Variant) -> tuple[Difference, float] | None:
        """To the section's first variant, over the seeds that both have, and as a share of its error."""
        base = self.section.variants[0]
        mine, others = self.runs[variant.name], self.runs[base.name]
        seeds = [seed for seed in mine if seed in others]
        if variant is base or not seeds:
            return None
        a, b = (np.stack([runs[seed].errors for seed in seeds]) for runs in (mine, others))
        return paired_difference(a, b), float(a.mean() / b.mean() - 1)

    def errors(self, variant: Variant) -> np.ndarray:
        """(n,) absolute errors, mean over the seeds."""
        return np.mean([run.errors for run in self.runs[variant.name].values()], axis=0)


def _introduction(
    study: Study, results: Sequence[tuple[Section, Runs]], data: Mapping[str, GraphDataModule], command: str
) -> list[_Block]:
    lines = []
    for target, module in data.items():
        sizes = ", ".join(f"{len(part.indices):,} {name}" for name, part in module.parts.items() if len(part.indices))
        part = next(section.scored for section in study.sections if target in section.targets)
        train = module.target_values("train")
        guess = float(np.abs(module.target_values(part) - np.median(train)).mean())
        unit = module.units[0]
        said = f"{guess:.{decimals(guess)}f} {unit}".rstrip()
        lines.append(f"{target.replace('_', ' ')}: {sizes} crystals; predicting the median gives {said} ({part})")
    distinct = {run.directory: run for _, runs in results for run in runs.values()}.values()
    hours = sum(row["seconds"] for run in distinct for row in run.history) / 3600  # also before an interruption
    machines = sorted({run.scores["gpu"] or f"{run.scores['threads']} CPU thread(s)" for run in distinct})
    return [
        *_text(study.text),
        _list(lines),
        _paragraph(
            f"{len(distinct)} run(s), {hours:.2f} h of training in all, on {', '.join(machines) or 'nothing yet'}. "
            'All have the same split; what else the variants of a section share stands after "All". A seed decides '
            "initial weights and, with the batch size, the batches and their order. Each run is scored with the "
            "weights of its best validation epoch. ± is the standard deviation over seeds. A difference is paired, "
            "crystal by crystal and seed by seed; its 95 % interval is a bootstrap over both. Seconds are those of "
            "the training part of an epoch, the median over epochs, as found: other work on the machine makes them "
            "longer. Memory is the peak of the process, or of the GPU."
        ),
        _paragraph("This report is made by"),
        _code(command),
    ]


def _settings(section: Section) -> list[_Block]:
    """What all variants share, then what is their own."""
    recipes = [_recipe(variant) for variant in section.variants]
    shared = {key: value for key, value in recipes[0].items() if all(r.get(key) == value for r in recipes)}
    lines = [f"All: {_said(shared)}; seeds {', '.join(map(str, section.seeds))}; scored on {section.scored}."]
    for variant, recipe in zip(section.variants, recipes, strict=True):
        own = {key: value for key, value in recipe.items() if key not in shared}
        lines.append(f"{variant.name}: {_said({'model': variant.model, **variant.hyperparameters, **own})}.")
    return [_list(lines)]


def _recipe(variant: Variant) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(Recipe)}
    always = ("epochs", "lr", "optimizer", "schedule", "loss")
    said = {k: v for k, v in asdict(variant.recipe).items() if k in always or v != defaults[k]}
    return {**said, "batch_size": variant.batch_size, "precision": variant.precision}


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {f'{v:g}' if isinstance(v, float) else v}" for k, v in settings.items())


def _table(found: _Found, summaries: Sequence[Mapping[str, Any]]) -> _Block:
    unit = f", {found.unit}" if found.unit else ""
    header = ["model", f"{found.part} MAE{unit}"]
    header += [f"val MAE{unit}"] * (found.part == "test") + [f"train MAE{unit}", "seeds"]
    header += [f"difference to {found.section.variants[0].name} [95 %]", "in %"]
    header += ["convolution parameters", "share", "all parameters", "s / epoch", "peak memory, MB"]
    rows = []
    for variant, s in zip(found.variants, summaries, strict=True):
        row = [variant.name, _plus_minus(found.maes(variant))]
        row += [_plus_minus(found.maes(variant, "val_mae"))] * (found.part == "test")
        row += [_plus_minus(found.maes(variant, "train_mae")), str(s["seeds"])]
        if (gap := s["difference"]) is not None:
            mean, low, high = (f"{gap[key]:+.{decimals(s['mae'])}f}" for key in ("mean", "low", "high"))
            row += [f"{mean} [{low}, {high}]", f"{100 * s['ratio'] - 100:+.1f}"]
        else:
            row += ["", ""]
        memory = s["peak_memory_bytes"]
        row += [f"{s['conv_parameters']:,}", f"{100 * s['conv_share']:.1f} %", f"{s['parameters']:,}"]
        row += [f"{s['seconds_per_epoch']:.2f}", f"{memory / 1e6:.0f}" if memory else "?"]
        rows.append(row)
    return _grid(header, rows)


def _plus_minus(values: np.ndarray) -> str:
    places = decimals(values.mean())
    spread = f" ± {values.std(ddof=1):.{places}f}" if len(values) > 1 else ""
    return f"{values.mean():.{places}f}{spread}"


def _summary(found: _Found, variant: Variant) -> dict[str, Any]:
    runs = list(found.runs[variant.name].values())
    base = found.section.variants[0]
    base_parameters = found.first(base if found.runs[base.name] else variant).scores["conv_parameters"]
    maes, gap = found.maes(variant), found.difference(variant)
    memory = [run.scores["peak_memory_bytes"] for run in runs]
    return {
        "section": found.section.title,
        "target": found.target,
        "unit": found.unit,
        "scored": found.part,
        "variant": variant.name,
        "seeds": len(runs),
        "mae": float(maes.mean()),
        "mae_sd": float(maes.std(ddof=1)) if len(runs) > 1 else None,
        "val_mae": float(found.maes(variant, "val_mae").mean()),
        "train_mae": float(found.maes(variant, "train_mae").mean()),
        "difference": None if gap is None else asdict(gap[0]),
        "ratio": None if gap is None else 1 + gap[1],
        "conv_parameters": runs[0].scores["conv_parameters"],
        "conv_share": runs[0].scores["conv_parameters"] / base_parameters,
        "parameters": runs[0].scores["parameters"],
        "seconds_per_epoch": float(np.median(found.maes(variant, "seconds_per_epoch"))),
        "peak_memory_bytes": None if None in memory else max(memory),
    }


def _row(section: Section, key: tuple[str, int, str], run: Run) -> dict[str, Any]:
    target, seed, name = key
    scores = {k: v for k, v in run.scores.items() if k not in ("key", "name")}
    mae = float(run.errors.mean())
    start = {"section": section.title, "target": target, "seed": seed, "variant": name}
    return {**start, f"{section.scored}_mae": mae, **scores, "run": run.directory.name}


def _pictures(found: _Found, out: Path, stem: str) -> list[tuple[str, str]]:
    """(file, caption) of what this section can show."""
    shown = found.variants[: len(plots.COLOURS)]
    pictures = []

    def save(kind: str, caption: str) -> Path:
        pictures.append((f"{stem}-{kind}.png", f"{caption} ({found.section.title}, {found.quantity})."))
        return out / f"{stem}-{kind}.png"

    histories = {
        variant.name: mean_history([r.history for r in found.runs[variant.name].values()]) for variant in shown
    }
    path = save("learning", "Training loss and validation error by epoch, means over seeds")
    plots.learning_curves(path, histories, unit=found.unit, dpi=90)
    if depths := _by_depth(found):
        path = save("steps", "Error against the number of steps T; lines: CGCNN")
        plots.depth_plot(path, *depths, found.unit)
    if found.part == "val":
        return pictures
    pairs = {v.name: (found.first(v).given, found.first(v).predicted) for v in shown[:2]}
    path = save("parity", "Predicted against given values, first seed")
    plots.parity_plot(path, pairs, found.target, found.unit, dpi=90)
    atoms, elements = composition(found.data, found.part)
    errors = {variant.name: found.errors(variant) for variant in shown}
    path = save("atoms", "Error by the number of atoms in the cell, mean over seeds")
    plots.size_plot(path, _by_size(atoms, errors), found.unit)
    path = save(
        "elements", f"Error of the crystals that hold an element, of at least {MIN_WITH_ELEMENT}; mean over seeds"
    )
    common = elements[:, elements.sum(axis=0) >= MIN_WITH_ELEMENT]
    numbers = np.flatnonzero(elements.sum(axis=0) >= MIN_WITH_ELEMENT)
    by_element = {name: error @ common / common.sum(axis=0) for name, error in errors.items()}
    if len(numbers):
        plots.element_plot(path, numbers, by_element, found.unit)
    else:
        pictures.pop()
    return pictures


def mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """One row an epoch: the mean over the runs that came so far, of which patience ends some before others."""
    epochs = [[row for row in rows if row is not None] for rows in zip_longest(*histories)]
    return [{k: float(np.mean([row[k] for row in rows])) for k in rows[0]} for rows in epochs]


def _by_depth(found: _Found) -> tuple[dict[int, np.ndarray], dict[str, float]] | None:
    """T -> errors of the plain SR-CGCNN; name -> error of each CGCNN."""
    steps, layers = {}, {}
    first = found.section.variants[0]
    for variant in found.variants:
        options = {k: v for k, v in variant.hyperparameters.items() if v}
        if variant.model == "cgcnn":
            layers[variant.name] = float(found.maes(variant).mean())
        elif set(options) <= {"n_recurrent_steps"} and _training(variant) == _training(first):
            steps[int(options.get("n_recurrent_steps", 3))] = found.maes(variant)
    return (dict(sorted(steps.items())), layers) if len(steps) > 2 else None


def _training(variant: Variant) -> tuple[Any, ...]:
    return variant.recipe, variant.batch_size, variant.precision


def composition(data: GraphDataModule, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Atoms in the cell (n,), and whether a crystal holds the element of an atomic number (n, 101), of one part."""
    dataset, indices = data.parts[part]
    batch = dataset.store.batch(indices)
    crystal, numbers = batch.atom_crystal.numpy(), batch.numbers.numpy()
    atoms = np.bincount(crystal, weights=batch.weight.numpy(), minlength=len(indices))
    holds = np.zeros((len(indices), 101))
    holds[crystal, numbers] = 1.0
    return np.rint(atoms).astype(int), holds


def _by_size(atoms: np.ndarray, errors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, dict[str, float]]]:
    """Range of sizes -> (crystals, error of each model); ranges without crystals are left out."""
    groups = {}
    for low, high in SIZES:
        inside = (atoms >= low) & (atoms <= (high or atoms.max()))
        if inside.any():
            name = f"{low}–{high}" if high else f"≥ {low}"
            groups[name] = int(inside.sum()), {k: float(error[inside].mean()) for k, error in errors.items()}
    return groups


@dataclass(frozen=True)
class _Block:
    """A part of the report in both languages."""

    markdown: str
    html: str


def _heading(level: int, text: str) -> _Block:
    return _Block(f"{'#' * level} {text}", f"<h{level}>{html.escape(text)}</h{level}>")


def _paragraph(text: str) -> _Block:
    return _Block(text, f"<p>{html.escape(text)}</p>")


def _code(text: str) -> _Block:
    return _Block(f"```bash\n{text}\n```", f"<pre>{html.escape(text)}</pre>")


def _list(lines: Sequence[str]) -> _Block:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return _Block("\n".join(f"* {line}" for line in lines), f"<ul>{items}</ul>")


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> _Block:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return _Block(lines, f"<table><tr>{head}</tr>{body}</table>")


def _image(folder: Path, file: str, caption: str) -> _Block:
    data, escaped = base64.b64encode((folder / file).read_bytes()).decode(), html.escape(caption)
    image = f'<img alt="{escaped}" src="data:image/png;base64,{data}">'
    return _Block(f"![{caption}]({file})", f"<figure>{image}<figcaption>{escaped}</figcaption></figure>")


def _text(text: str) -> list[_Block]:
    return [_paragraph(" ".join(text.split()))] if text.strip() else []
