"""The Lightning module around one of our models: loss, optimiser, schedule and what is logged."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from ..capture import CapturedTraining
from ..errors import InputError
from ..graph.elements import MIXES_BUILT_IN, is_built_in, without_vector
from ..graph.parameters import as_python
from ..nn import CGCNN, SRCGCNN, ModelMetadata
from ..uncertainty import DROPOUT_SCALE
from .data import GraphDataModule, Item
from .distributed import of_all, place, total
from .metrics import check_classes, classification_metrics, regression_metrics
from .optimizers import OPTIMIZERS, make_optimizer
from .prefetch import Batches

logger = logging.getLogger(__name__)

SCHEDULES = ("constant", "multistep", "cosine", "one_cycle")
LOSSES = ("mse", "mae")
_ROUNDED = 1e4
"""Mean over deviation of a target from which on rounding to single precision is 0.1 % of the deviation."""
PARTS = {
    "embedding": ("embedding",),
    "convolutions": (
        "convs",
        "shared_conv",
        "recurrent_bn1s",
        "recurrent_bn2s",
        "recurrent_norm",
        "recurrent_alpha",
    ),
    "head": ("conv_to_fc", "fcs"),
}
"""What ``Recipe.freeze`` names, and which children of a model it means; the output layer always learns."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; two models trained by one recipe can be compared.

    ``schedule`` acts once an epoch: "cosine" falls to zero after the last one, "multistep" multiplies the rate by
    ``gamma`` at every milestone; "one_cycle" acts after every batch: up to ``lr`` in the share ``warmup`` of the run,
    then down to nothing along a cosine. ``loss`` is the mean squared or absolute error of the normalised target; a
    classifier has its own. ``optimizer`` "muon" orthogonalises the steps of the convolutions' weight matrices (Jordan
    et al. 2024), as large as Adam's at the rate ``muon_lr``, and leaves the rest to AdamW with ``lr``; it needs PyTorch
    2.9. ``weight_decay`` spares biases and batch norms under "adamw" and "muon". ``ema``, such as 0.999,
    validates and keeps an exponential moving average of the weights with that decay, after n steps at most
    (1 + n) / (10 + n). ``gradient_clip`` bounds the norm of the gradient. ``patience`` ends the run after so many
    epochs without a better one. ``class_weights`` multiplies the loss of crystals of class 0 and 1; "balanced" gives
    both classes the same share. ``freeze`` keeps parts ("embedding", "convolutions", "head"), or one, as they are,
    running statistics of their batch norms included.
    """

    epochs: int = 30
    lr: float = 3e-3
    optimizer: str = "adam"
    muon_lr: float = 0.04
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    milestones: tuple[int, ...] = (100,)
    gamma: float = 0.1
    gradient_clip: float | None = None
    loss: str = "mse"
    warmup: float = 0.05
    ema: float | None = None
    patience: int | None = None
    class_weights: str | tuple[float, float] | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            plain = tuple(map(as_python, value)) if isinstance(value, tuple | list) else as_python(value)
            object.__setattr__(self, name, plain)
        for name in ("lr", "muon_lr", "weight_decay", "momentum", "gamma", "gradient_clip", "warmup", "ema"):
            value, kinds = getattr(self, name), (int, float, type(getattr(type(self), name)))  # None is one of some
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputError(f"{name} is {value!r}; give a number.")
        object.__setattr__(self, "epochs", _whole("epochs", self.epochs))
        if self.patience is not None:
            object.__setattr__(self, "patience", _whole("patience", self.patience))
        milestones = self.milestones if isinstance(self.milestones, tuple) else (self.milestones,)
        object.__setattr__(self, "milestones", tuple(_whole("milestones", epoch) for epoch in milestones))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("loss", self.loss, LOSSES)
        if self.epochs < 1:
            raise InputError(f"Training for {self.epochs} epochs does nothing; ask for at least 1.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"The learning rate {self.lr} is not a positive number.")
        if not (math.isfinite(self.muon_lr) and self.muon_lr > 0):
            raise InputError(f"Muon's learning rate {self.muon_lr} is not a positive number.")
        for name in ("weight_decay", "momentum", "gamma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"The {name} {getattr(self, name)} is not a number of at least 0.")
        if min(self.milestones, default=1) < 1:
            raise InputError(f"The milestones {self.milestones} are epochs before the first; give 1 or more.")
        if self.gradient_clip is not None and not (math.isfinite(self.gradient_clip) and self.gradient_clip > 0):
            raise InputError(
                f"A gradient_clip of {self.gradient_clip} bounds nothing; give a positive number, or None."
            )
        if not 0 < self.warmup < 1:
            raise InputError(f"A warm-up of {self.warmup} is not a share of the run; give a number between 0 and 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"The moving average's decay {self.ema} is not between 0 and 1; 0.999 is usual.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"A patience of {self.patience} epochs stops at once; ask for at least 1.")
        _check_class_weights(self.class_weights)
        object.__setattr__(self, "freeze", self.freeze if isinstance(self.freeze, tuple) else (self.freeze,))
        for part in self.freeze:
            _one_of("frozen part", part, tuple(PARTS))


class TrainingModule(pl.LightningModule):
    """Trains ``model`` by ``recipe``: squared or absolute error of the normalised target, or NLL for a classifier.

    Each epoch logs ``train_loss``, ``lr``, ``seconds`` (training part), ``crystals_per_second``, ``data_wait`` (share
    of ``seconds`` for which there was no batch to train on), ``memory_mib`` (the process's peak; on a GPU the device's)
    and the metrics of ``metrics.py`` with the prefix ``val_``, in the target's unit; of several targets
    ``val_mae_NAME`` … of each and ``val_mae_scaled``, the mean over targets of MAE over standard deviation. A missing
    target (NaN) counts neither in the loss nor in a metric. The metadata of ``model`` receives the targets, their
    units, the graph parameters, and mean and standard deviation of the training targets.

    Args:
        model: a CGCNN or SRCGCNN.
        data: what it will be trained on; its training targets alone set the normaliser.
        recipe: optimiser, schedule and epochs; ``ema``, ``patience`` and ``gradient_clip`` are what
            :func:`srcgcnn_fast.training.fit` does, and a Trainer of one's own by arguments and callbacks of its own.
        seed: of the dropout, epoch by epoch.
        captured: by CUDA graphs (:class:`srcgcnn_fast.CapturedTraining`).

    Raises:
        InputError: the number of targets is not the model's, a classifier's target is not 0 or 1, no training
            crystal has one of the targets, class weights are given to a regressor, crystals are averaged with other
            element vectors than the model's, or the model has no vector for an element.
    """

    target_mean: Tensor
    target_std: Tensor
    class_weight: Tensor | None

    def __init__(
        self, model: CGCNN | SRCGCNN, data: GraphDataModule, recipe: Recipe, seed: int = 0, *, captured: bool = False
    ) -> None:
        super().__init__()
        self.captured = captured
        self._captured: CapturedTraining | None = None
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self.classification = bool(model.hyperparameters["classification"])
        is_mixed = any(part.dataset.store.is_mixed for part in data.parts.values())
        if is_mixed and not is_built_in(model.element_table):
            raise InputError(f"Some crystals are disordered: {MIXES_BUILT_IN}")
        _check_elements(model.element_table, data)
        given = data.target_values("train")
        mean, std = self._normaliser(given, data.targets)
        if self.classification:
            for part in data.parts:
                check_classes(data.target_values(part))
        self.incomplete = bool(np.isnan(given).any())
        self.register_buffer("target_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("target_std", torch.tensor(std, dtype=torch.float32))
        self.register_buffer("class_weight", self._class_weight(given), persistent=False)
        model.train()  # which Lightning leaves to others, and a loaded model is not
        self._frozen, self._stopped = _freeze(model, recipe.freeze)
        extra = {name: value for name, value in model.metadata.extra.items() if name != DROPOUT_SCALE}
        model.metadata = ModelMetadata(data.targets, data.units, tuple(mean), tuple(std), data.graph_parameters, extra)
        self.has_begun = False
        """To train, or to load a checkpoint."""
        self.save_hyperparameters(
            {"model": type(model).__name__, "hyperparameters": model.hyperparameters, **asdict(recipe), "seed": seed}
        )
        self._trained: float | None = None
        self._predicted: list[Tensor] = []
        self._given: list[Tensor] = []

    def _normaliser(self, targets: np.ndarray, names: tuple[str, ...]) -> tuple[list[float], list[float]]:
        expected = 1 if self.classification else self.model.hyperparameters["n_targets"]
        if targets.shape[1] != expected:
            raise InputError(f"The model has {expected} target(s), the data {targets.shape[1]}; make them agree.")
        if self.classification:
            return [0.0], [1.0]
        for name, column in zip(names, targets.T, strict=True):
            _warn_of_rounding(name, column[~np.isnan(column)])
        return normalizer(targets, names)

    def _class_weight(self, targets: np.ndarray) -> Tensor | None:
        """(2,): factors of the loss, None where every crystal counts once."""
        given = self.recipe.class_weights
        if given is None:
            return None
        if not self.classification:
            raise InputError("Class weights are for a classifier; leave them out, or train with classification.")
        if given != "balanced":
            return torch.tensor(given, dtype=torch.float32)
        counts = np.bincount(targets[:, 0].astype(int), minlength=2)
        if not counts.all():
            raise InputError("The training set holds one class only, so its classes cannot be balanced.")
        return torch.from_numpy((counts.sum() / (2 * counts)).astype(np.float32))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Of network ``output`` (B, T) or (B, 2) against ``target`` (B, T) in its own units; NaN is not counted."""
        if self.classification:
            label = target[:, 0].long()
            if self.class_weight is None:
                return nn.functional.nll_loss(output, label)
            each = nn.functional.nll_loss(output, label, reduction="none")
            return (self.class_weight.to(each)[label] * each).mean()
        error = nn.functional.mse_loss if self.recipe.loss == "mse" else nn.functional.l1_loss
        wanted = (target - self.target_mean) / self.target_std
        if not self.incomplete:
            return error(output, wanted)
        present = torch.isfinite(wanted)
        return error(output, torch.where(present, wanted, output.detach()), reduction="sum") / present.sum()

    def train(self, mode: bool = True) -> TrainingModule:
        """As always, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for child in getattr(self, "_frozen", ()):
            child.eval()
        return self

    def thaw(self) -> None:
        """Give the frozen parts their gradients back."""
        for parameter in self._stopped:
            parameter.requires_grad_(True)

    def values(self, output: Tensor) -> Tensor:
        """(B, T) in the target's units, or (B, 1) P(class 1)."""
        if self.classification:
            return output[:, 1:].exp()
        return output * self.target_std + self.target_mean

    def transfer_batch_to_device(self, batch: Item, device: torch.device, dataloader_idx: int) -> Item:
        graphs, target, index = batch
        if graphs.device == device:  # its loader has moved it, and its cache stays
            return batch
        return graphs.to(device, non_blocking=True), target.to(device, non_blocking=True), index

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.has_begun = True

    def on_fit_start(self) -> None:
        from .callbacks import RunFiles

        if any(isinstance(callback, RunFiles) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        left = [name for name in ("ema", "patience") if getattr(self.recipe, name) is not None]
        if self.recipe.gradient_clip is not None and self.trainer.gradient_clip_val is None:
            left.append("gradient_clip")
        if left:
            logger.warning(
                "fit does the recipe's %s, and this Trainer does not; give it callbacks.", " and ".join(left)
            )

    def on_train_start(self) -> None:
        if self.captured:
            self._captured = CapturedTraining(self.model)
        self.has_begun = True
        for loader in (self.trainer.train_dataloader, self.trainer.val_dataloaders):
            if isinstance(loader, Batches):
                loader.device = self.device

    def on_train_end(self) -> None:
        self._captured = None  # its graphs hold the memory of their steps, and weights where they are now

    def on_train_epoch_start(self) -> None:
        self._losses = _Losses()
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # the scheduler has stepped when the epoch ends
        self._waited = self._data_wait()
        self._started, self._trained = time.perf_counter(), None

    def training_step(self, batch: Item, batch_idx: int) -> Tensor:
        if batch_idx == 0:  # after the loader drew its own numbers, so that a resumed run has the same dropout
            rank, world_size = place(self.trainer)
            torch.manual_seed((self.seed * 1_000_003 + self.current_epoch) * world_size + rank)
        graphs, target, _ = batch
        loss = self.loss((self._captured or self.model)(graphs), target)
        shared, counted = self._share(loss, target)
        self._losses.add(counted, len(target))
        return shared

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """As the optimiser does, without what it makes ready for gradients that stay."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def __setattr__(self, name: str, value: Any) -> None:
        """As always; where Lightning notes which hook runs, some thirty times a step, without looking for tensors."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _share(self, loss: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of the loss of the whole batch, so that the mean over processes is that loss; and per
        crystal, so that the sum over all crystals is that loss times their number."""
        _, world_size = place(self.trainer)
        if world_size == 1:
            return loss, loss
        own = torch.stack([torch.isfinite(target).sum(), torch.full_like(target[0, 0], len(target))]).to(loss)
        values, crystals = own / total(own)
        return loss * (world_size * values), loss * (values / crystals)

    def on_validation_epoch_start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._trained = time.perf_counter()  # validation runs inside the training epoch
        self._predicted, self._given = [], []

    def validation_step(self, batch: Item, batch_idx: int) -> None:
        graphs, target, _ = batch
        self._predicted.append(self.values(self.model(graphs)))
        self._given.append(target.clone())  # it may be part of the batch's memory

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val_{name}": value for name, value in self._scores().items()})

    def on_test_epoch_start(self) -> None:
        self._predicted, self._given = [], []

    def test_step(self, batch: Item, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test_{name}": value for name, value in self._scores().items()})

    def predict_step(self, batch: Item, batch_idx: int) -> Tensor:
        return self.values(self.model(batch[0]))

    def on_train_epoch_end(self) -> None:
        loss_sum, crystals = total(torch.tensor(self._losses.sums(), device=self.device)).tolist()
        loss = loss_sum / crystals
        if not math.isfinite(loss):
            raise InputError(
                f"The training loss is {loss} in epoch {self.current_epoch + 1}; "
                "try a lower learning rate or gradient_clip."
            )
        seconds = (self._trained or time.perf_counter()) - self._started  # an epoch may go without validation
        self.log_dict(
            {
                "train_loss": loss,
                "lr": self._lr,
                "seconds": seconds,
                "crystals_per_second": crystals / seconds,
                "data_wait": (self._data_wait() - self._waited) / seconds,
                "memory_mib": peak_memory(self.device),
            }
        )

    def _data_wait(self) -> float:
        """Seconds for which training stood still because there was no batch yet, since the loader was made."""
        return float(getattr(self.trainer.train_dataloader, "waited", 0.0))

    def configure_optimizers(self) -> Any:
        recipe, optimizer = self.recipe, make_optimizer(self.model, self.recipe)
        schedules = torch.optim.lr_scheduler
        if recipe.schedule == "cosine":
            return [optimizer], [schedules.CosineAnnealingLR(optimizer, recipe.epochs)]
        if recipe.schedule == "multistep":
            return [optimizer], [schedules.MultiStepLR(optimizer, list(recipe.milestones), recipe.gamma)]
        if recipe.schedule == "one_cycle":
            steps = int(self.trainer.estimated_stepping_batches)
            if steps == 1:
                raise InputError("A run of a single step has no cycle; train longer, or choose another schedule.")
            peaks = [group["lr"] for group in optimizer.param_groups]
            # PyTorch divides by the steps before the peak less one: a warm-up of exactly one step begins at the peak.
            share = recipe.warmup * (1 - 1e-9) if recipe.warmup * steps == 1 else recipe.warmup
            cycle = schedules.OneCycleLR(optimizer, peaks, steps, pct_start=share, cycle_momentum=False)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]
        return optimizer

    def _scores(self) -> dict[str, float]:
        predicted, given = of_all(self._predicted), of_all(self._given)
        if self.classification:
            return classification_metrics(predicted, given)
        return regression_metrics(predicted, given, self.model.metadata.targets, self.target_std)


# Lightning asks for its arguments at every step, which takes longer to find out than the loss.
TrainingModule.training_step.__signature__ = inspect.signature(TrainingModule.training_step)  # type: ignore[attr-defined]


class _Losses:
    """The losses of an epoch's batches: nothing is computed with them, let alone waited for, before its end."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._counts: list[int] = []
        self._joined: list[Tensor] = []

    def add(self, loss: Tensor, count: int) -> None:
        """The mean over ``count`` crystals, ()."""
        self._losses.append(loss.detach())
        self._counts.append(count)
        if len(self._losses) == 1024:  # a number of its own takes 512 bytes of a GPU
            self._join()

    def _join(self) -> None:
        if self._losses:
            self._joined.append(torch.stack(self._losses))
            self._losses = []

    def sums(self) -> tuple[float, int]:
        """Of all crystals' losses, added in float32 one batch after the other, and their number."""
        self._join()
        losses = torch.cat(self._joined)
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))  # NumPy has no bfloat16
        added = np.float32(0)
        for loss, count in zip(losses.cpu().numpy(), self._counts, strict=True):
            added += loss * np.float32(count)
        return float(added), sum(self._counts)


def normalizer(targets: np.ndarray, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each column of ``targets`` (n, T), NaN left out; 1 for a constant.

    Raises:
        InputError: a column has no value.
    """
    for name, column in zip(names, targets.T, strict=True):
        if np.isnan(column).all():
            raise InputError(f"No training crystal has a value of {name}; leave it out, or split otherwise.")
    given = targets.astype(np.float32)  # as they are trained on; in float64 the deviation of 0.3, 0.3, … is not quite 0
    std = np.where(np.nanmax(given, axis=0) > np.nanmin(given, axis=0), np.nanstd(targets, axis=0), 0.0)
    return np.nanmean(targets, axis=0).tolist(), np.where(std > 0, std, 1.0).tolist()


def _warn_of_rounding(name: str, values: np.ndarray) -> None:
    if not len(values) or values.max() == values.min():
        return
    mean, std = float(values.mean()), float(values.std())
    if abs(mean) > _ROUNDED * std:
        logger.warning(
            "%s is %.6g ± %.2g, and single precision has steps of %.1g there; subtract what all crystals have, such as "
            "energies of the elements",
            name, mean, std, np.spacing(np.float32(abs(mean))),
        )  # fmt: skip


def _freeze(model: nn.Module, parts: tuple[str, ...]) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Stop the gradient of ``parts``; returns their modules in eval mode and the parameters that learnt."""
    children = [getattr(model, name, None) for part in parts for name in PARTS[part]]
    modules = [child.eval() for child in children if isinstance(child, nn.Module)]
    parameters = [p for module in modules for p in module.parameters()]
    parameters += [child for child in children if isinstance(child, nn.Parameter)]
    stopped = [p for p in parameters if p.requires_grad]
    for parameter in stopped:
        parameter.requires_grad_(False)
    return modules, stopped


def peak_memory(device: torch.device) -> float:
    """MiB: the most that this process has held so far, or that PyTorch has held on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _check_elements(table: Tensor, data: GraphDataModule) -> None:
    stores = {id(part.dataset): part.dataset.store.lacking(table) for part in data.parts.values()}
    for dataset, indices in data.parts.values():
        lacking = stores[id(dataset)]
        if bad := lacking.keys() & (indices.tolist() if lacking else ()):
            name = dataset.store.ids[min(bad)] + (f", one of {len(bad)} such crystals," if len(bad) > 1 else "")
            raise InputError(without_vector(name, lacking[min(bad)]))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise InputError(f"{name} is {value!r}; give a whole number of epochs.")
    return int(value)


def _check_class_weights(weights: Any) -> None:
    if weights is None or weights == "balanced":
        return
    good = isinstance(weights, tuple) and len(weights) == 2 and all(math.isfinite(w) and w > 0 for w in weights)
    if not good:
        raise InputError(f"The class weights {weights!r} are neither two positive numbers nor 'balanced'.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"The {name} {value!r} is unknown; choose among {', '.join(allowed)}.")
