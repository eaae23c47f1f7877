"""Many runs under identical settings, each kept by what decides it, so that a study stops and goes on where it was."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..files import write_text
from ..graph import GraphParameters
from ..nn import CGCNN, SRCGCNN
from ..ops.precision import NAMES as PRECISIONS
from ..options import read_yaml
from ..serialization import load_model
from .data import GraphDataModule
from .evaluate import evaluate
from .fit import FitResult, fit, has_begun
from .metrics import decimals
from .module import Recipe

logger = logging.getLogger(__name__)

MODELS = {"cgcnn": CGCNN, "sr-cgcnn": SRCGCNN}
BUILT_IN = Path(__file__).parent / "studies"


@dataclass(frozen=True)
class Variant:
    """One model and how it is trained."""

    name: str
    model: str
    """ "cgcnn" or "sr-cgcnn"."""
    hyperparameters: dict[str, Any]
    """Arguments of its class; the number of Gaussians follows from the graphs."""
    recipe: Recipe
    batch_size: int = 256
    precision: str = "float32"
    """Of a GPU's arithmetic, as :func:`srcgcnn_fast.use_precision` names it."""

    def __post_init__(self) -> None:
        for what, value, known in (("model", self.model, MODELS), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"{self.name}: the {what} {value!r} is unknown; choose among {', '.join(known)}.")
        if self.hyperparameters.get("classification"):
            raise InputError(f"{self.name}: a study compares errors, which a classifier does not have; leave it out.")

    def build(self, nbr_fea_len: int) -> CGCNN | SRCGCNN:
        """The untrained model, with weights by torch's generator."""
        try:
            return MODELS[self.model](nbr_fea_len=nbr_fea_len, **self.hyperparameters)
        except TypeError as error:
            raise InputError(f"{self.name}: {error}; use the arguments of {MODELS[self.model].__name__}.") from error


@dataclass(frozen=True)
class Section:
    """Variants that are compared with the first of them, on every target and with every seed."""

    title: str
    variants: tuple[Variant, ...]
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    scored: str = "test"
    """ "val" where settings are chosen: the test crystals are then never looked at."""
    text: str = ""

    def runs(self) -> Iterator[tuple[str, int, Variant]]:
        """(target, seed, variant); all variants of a seed before the next seed, so that an early stop leaves pairs."""
        for seed in self.seeds:
            for target in self.targets:
                for variant in self.variants:
                    yield target, seed, variant


@dataclass(frozen=True)
class Study:
    """Sections of a report."""

    title: str
    sections: tuple[Section, ...]
    text: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target for section in self.sections for target in section.targets))

    def changed(
        self,
        targets: Sequence[str] = (),
        seeds: Sequence[int] = (),
        epochs: int | None = None,
        precision: str | None = None,
    ) -> Study:
        """The same with other targets, seeds, epochs or precision in all sections; what is empty stays.

        Raises:
            InputError: a target or seed is named twice.
        """
        _check_distinct("", targets, seeds)
        sections = [_changed(s, tuple(targets), tuple(seeds), epochs, precision) for s in self.sections]
        return replace(self, sections=tuple(sections))


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory."""

    directory: Path
    scores: dict[str, Any]
    """Parameters, errors in the target's units, seconds per epoch, peak memory."""
    history: list[dict[str, float]]
    """One row an epoch."""
    ids: list[str]
    given: np.ndarray
    """(n,) of the scored part, in the target's units."""
    predicted: np.ndarray
    """(n,)"""

    @property
    def errors(self) -> np.ndarray:
        """(n,) absolute."""
        return np.abs(self.predicted - self.given)


def read_study(path: str | os.PathLike[str]) -> Study:
    """A study from a YAML file, or by the name of one that comes with the package ("paper", "search", "search-muon").

    ``targets``, ``seeds``, ``scored`` and ``recipe`` (fields of :class:`Recipe`, ``batch_size`` and ``precision``) may
    stand at the top, in a section and ``recipe`` also in a variant; the innermost counts.

    Raises:
        InputError: there is no such file, or it says something that is not known.
    """
    file = BUILT_IN / f"{path}.yaml" if (BUILT_IN / f"{path}.yaml").is_file() else Path(path)
    if not file.is_file():
        names = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.yaml")))
        raise InputError(f"There is no study {path}; give a YAML file or one of: {names}.")
    content = read_yaml(file, "Reading a study")
    top = _mapping(file.name, content, ("title", "text", "targets", "seeds", "scored", "recipe", "sections"))
    sections = tuple(_section(top, section) for section in _listed(top.get("sections")))
    if not sections:
        raise InputError(f"{file} has no sections; list at least one.")
    return Study(_text(top, "title", file.stem), sections, _text(top, "text"))


def pair_study(
    targets: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    batch_size: int = 256,
    precision: str = "float32",
    n_conv: int = 3,
    n_recurrent_steps: int = 3,
    **widths: int,
) -> Study:
    """CGCNN against SR-CGCNN by one recipe.

    Raises:
        InputError: a target or seed is named twice.
    """
    _check_distinct("", targets, seeds)
    variants = (
        Variant("CGCNN", "cgcnn", {"n_conv": n_conv, **widths}, recipe, batch_size, precision),
        Variant(
            "SR-CGCNN",
            "sr-cgcnn",
            {"n_recurrent_steps": n_recurrent_steps, **widths},
            recipe,
            batch_size,
            precision,
        ),
    )
    title = "CGCNN against SR-CGCNN"
    return Study(title, (Section("Comparison", variants, tuple(targets), tuple(seeds)),))


def _changed(
    section: Section, targets: tuple[str, ...], seeds: tuple[int, ...], epochs: int | None, precision: str | None
) -> Section:
    variants = section.variants
    if epochs is not None:
        variants = tuple(replace(v, recipe=replace(v.recipe, epochs=epochs)) for v in variants)
    if precision is not None:
        variants = tuple(replace(v, precision=precision) for v in variants)
    return replace(section, variants=variants, targets=targets or section.targets, seeds=seeds or section.seeds)


def _section(top: Mapping[str, Any], content: Any) -> Section:
    keys = ("title", "text", "targets", "seeds", "scored", "recipe", "variants")
    own = _mapping("A section", content, keys)
    title = _text(own, "title")
    joined = {**top, **own}
    recipe = {**_named(title, "recipe", top), **_named(title, "recipe", own)}
    variants = tuple(_variant(name, recipe, v) for name, v in _named(title, "variants", own).items())
    targets = [str(target) for target in _listed(joined.get("targets"))]
    seeds = [_number(title, "seeds", seed, whole=True) for seed in _listed(joined.get("seeds")) or [0]]
    scored = joined.get("scored", "test")
    _check_distinct(f" in the section {title!r}", targets, seeds)
    if not (variants and targets):
        raise InputError(f"The section {title!r} needs variants and targets; name them.")
    if scored not in ("val", "test"):
        raise InputError(f"The section {title!r} is scored on {scored!r}; write val or test.")
    return Section(title, variants, tuple(targets), tuple(seeds), scored, _text(own, "text"))


def _check_distinct(where: str, targets: Sequence[str], seeds: Sequence[int]) -> None:
    """A run that counts as two would make deviations and intervals too small."""
    for what, names in (("target", targets), ("seed", seeds)):
        if twice := [name for k, name in enumerate(names) if name in names[:k]]:
            raise InputError(f"The {what} {twice[0]} is named twice{where}, which adds no run; name each once.")


def _variant(name: str, recipe: dict[str, Any], content: Any) -> Variant:
    own = dict(_named("", name, {name: content}))
    model = own.pop("model", "sr-cgcnn")
    settings = {**recipe, **_named(name, "recipe", {"recipe": own.pop("recipe", None)})}
    batch_size = _number(name, "batch_size", settings.pop("batch_size", 256), whole=True)
    precision = str(settings.pop("precision", "float32"))
    allowed = {field.name: field for field in fields(Recipe)}
    if unknown := sorted(set(settings) - set(allowed)):
        raise InputError(
            f"{name}: a recipe has no {', '.join(unknown)}; it has {', '.join(allowed)}, batch_size, precision."
        )
    given = {key: _setting(name, key, value, allowed[key].default) for key, value in settings.items()}
    return Variant(str(name), model, own, Recipe(**given), batch_size, precision)


def _setting(name: str, key: str, value: Any, default: Any) -> Any:
    if key == "milestones":
        return tuple(_number(name, key, epoch, whole=True) for epoch in _listed(value))
    if isinstance(value, list) or isinstance(default, tuple):
        return tuple(_listed(value))
    if isinstance(default, str) or key == "class_weights" or (value is None and default is None):
        return value
    return _number(name, key, value, whole=isinstance(default, int) or key == "patience")


def _number(name: str, key: str, value: Any, whole: bool = False) -> Any:
    kind = "whole number" if whole else "number"
    try:
        number = float(value) if isinstance(value, str) else value  # YAML takes 1e-3 for a text
        if isinstance(number, bool) or (whole and int(number) != number):
            raise ValueError(f"no {kind}")
        float(number)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {key} is {value!r}; write a {kind}.") from error
    return int(number) if whole else number


def _text(content: Mapping[str, Any], key: str, default: str = "") -> str:
    """YAML takes 2024 for a number."""
    value = content.get(key)
    return default if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    """One may be written without brackets."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _named(what: str, key: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{what}: {key} is {found!r}; write a name and a value a line.".removeprefix(": "))
    return found


def _mapping(what: str, content: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{what} holds no names with values; it may hold {', '.join(keys)}.")
    if unknown := sorted(map(str, set(content) - set(keys))):
        raise InputError(f"{what} says {', '.join(unknown)}; it may hold {', '.join(keys)}.")
    return content


Runs = dict[tuple[str, int, str], Run]
"""(target, seed, name of the variant) -> run, of one section."""


def run_study(
    study: Study,
    data: Mapping[str, GraphDataModule],
    directory: Path,
    tell: Callable[[str], None] | None = None,
    accelerator: str = "auto",
) -> Iterator[tuple[Section, Runs]]:
    """Do what is not done yet, section by section; yields each section with its runs when all were tried.

    Args:
        data: one for each target of the study, with the same parts for all seeds.
        directory: where runs are kept; a study that shares some with another finds them there.
        tell: receives one line a run: its error and the time left.
        accelerator: where to train, as for :func:`fit`; a run that is done elsewhere is not done again.

    Raises:
        InputError: a run failed, which stops no other, or could not begin.
    """
    total = sum(len(list(section.runs())) for section in study.sections)
    done, spent, trained, failed = 0, 0.0, 0, []
    for section in study.sections:
        runs: Runs = {}
        for target, seed, variant in section.runs():
            started = time.perf_counter()
            place, is_new = find(variant, data[target], directory, seed)
            done += 1
            try:
                result = run(variant, data[target], place, seed, section.scored, accelerator)
            except InputError as error:
                if not has_begun(place):  # it says what stands against all
                    raise
                failed.append(f"{variant.name}, {target}, seed {seed}: {error}")
                logger.warning("%s", failed[-1])
                continue
            runs[target, seed, variant.name] = result
            if is_new:
                trained, spent = trained + 1, spent + time.perf_counter() - started
            if tell is not None:
                mae = result.errors.mean()
                left = f", about {spent / trained * (total - done) / 60:.0f} min left" if trained else ""
                tell(
                    f"{done}/{total} {section.title}: {variant.name}, {target}, seed {seed}: "
                    f"{section.scored} MAE {mae:.{decimals(mae)}f}{left if is_new else ', as before'}"
                )
        yield section, runs
    if failed:
        raise InputError(f"{len(failed)} of {total} runs failed, at first {failed[0]}")


def kept_runs(section: Section, data: Mapping[str, GraphDataModule], directory: Path) -> Runs:
    """The runs of a section that are finished, without doing any."""
    runs: Runs = {}
    for target, seed, variant in section.runs():
        place, _ = find(variant, data[target], directory, seed)
        if (place / f"{section.scored}_predictions.csv").is_file() and (place / "scores.json").is_file():
            runs[target, seed, variant.name] = read_run(place, section.scored)
    return runs


def find(variant: Variant, data: GraphDataModule, directory: Path, seed: int) -> tuple[Path, bool]:
    """Where the run is kept, and whether it has still to be done."""
    key = _key(variant, data, seed)
    place = directory / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return place, not (place / "scores.json").is_file()


def run(variant: Variant, data: GraphDataModule, place: Path, seed: int, scored: str, accelerator: str = "auto") -> Run:
    """Train and score once; a finished run is read, an interrupted one resumed.

    Raises:
        InputError: the data have no crystals to score on.
    """
    if scored == "test" and not len(data.parts["test"].indices):
        raise InputError("There are no test crystals; give a test set, or score the section on val.")
    data.batch_size, data.seed = variant.batch_size, seed
    if not (place / "scores.json").is_file():
        torch.manual_seed(seed)
        model = variant.build(data.graph_parameters.n_gaussians())
        resume = (place / "last.ckpt").exists()
        if not resume:
            shutil.rmtree(place, ignore_errors=True)
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        _reset_peak_memory(on_gpu)
        where: dict[str, Any] = {"accelerator": accelerator, "precision": variant.precision}
        result = fit(model, data, place, variant.recipe, seed=seed, resume=resume, **where)
        scores = {"name": variant.name, **_scores(result, data, on_gpu), "key": _key(variant, data, seed)}
        evaluate(result.model, data, "val").write(place / "val_predictions.csv")
        write_text(place / "scores.json", json.dumps(scores, indent=2) + "\n")
    if scored == "test" and not (place / "test_predictions.csv").is_file():
        evaluate(load_model(place / "model"), data, "test").write(place / "test_predictions.csv")
    return read_run(place, scored)


def read_run(place: Path, scored: str) -> Run:
    """What :func:`run` left in its directory."""
    scores = json.loads((place / "scores.json").read_bytes())
    history = _read_table(place / "metrics.csv")
    epochs = [{name: float(value) for name, value in row.items()} for row in history]
    rows = _read_table(place / f"{scored}_predictions.csv")
    columns = list(rows[0])
    values = np.array([[float(row[c]) for c in columns[1:3]] for row in rows])
    return Run(place, scores, epochs, [row["id"] for row in rows], values[:, 0], values[:, 1])


def _read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(variant: Variant, data: GraphDataModule, seed: int) -> dict[str, Any]:
    """What decides the numbers of a run. Only what departs from a default is named, so a new option keeps old runs."""
    with torch.random.fork_rng(devices=[]):
        model = variant.build(data.graph_parameters.n_gaussians())
        standard = type(model)().hyperparameters
    recipe = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    return {
        "srcgcnn_fast": __version__,
        "model": type(model).__name__,
        "hyperparameters": {k: v for k, v in model.hyperparameters.items() if v != standard[k]},
        "recipe": {k: v for k, v in json.loads(json.dumps(asdict(variant.recipe))).items() if v != _plain(recipe[k])},
        "batch_size": variant.batch_size,
        **({} if variant.precision == "float32" else {"precision": variant.precision}),
        "seed": seed,
        "targets": list(data.targets),
        "graph": {k: v for k, v in asdict(data.graph_parameters).items() if v != getattr(GraphParameters(), k)},
        "data": data.fingerprint(),
        "graphs": data.graph_fingerprint(),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _scores(result: FitResult, data: GraphDataModule, on_gpu: bool) -> dict[str, Any]:
    train = evaluate(result.model, data, "train")
    return {
        "conv_parameters": result.model.count_conv_parameters(),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "train_mae": train.metrics["mae"],
        "val_mae": result.best["val_mae"],
        "best_epoch": int(result.best["epoch"]),
        "seconds_per_epoch": float(np.median([row["seconds"] for row in result.history])),
        "wall_seconds": result.seconds,
        "peak_memory_bytes": _peak_memory(on_gpu),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def _reset_peak_memory(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from what is held now
    except OSError as error:
        logger.info("The peak memory is that of all runs so far: %s", error)


def _peak_memory(on_gpu: bool) -> int | None:
    """Bytes: of the GPU, or resident of this process, since the last reset; None where neither is told."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_bytes().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"VmHWM")), None)
