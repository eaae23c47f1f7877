"""Start from a model that was trained before."""

from __future__ import annotations

import logging
import os

import torch

from ..nn import CGCNN, SRCGCNN, ModelMetadata
from ..serialization import check_parts, loaded
from .data import GraphDataModule
from .module import normalizer

logger = logging.getLogger(__name__)


def fine_tuned(
    source: CGCNN | SRCGCNN | str | os.PathLike[str], data: GraphDataModule, *, classification: bool | None = None
) -> CGCNN | SRCGCNN:
    """A copy of ``source`` to be trained on ``data``; what it keeps as it is, ``Recipe.freeze`` says.

    An output of the same target starts as it is: its weights are rescaled to the normaliser of ``data``, so that the
    first predictions are those of ``source``. Outputs of other targets start anew, from torch's random state, and the
    log says so. The metadata has the targets, units and graphs of ``data``, and mean and standard deviation of its
    training targets.

    Args:
        source: a model, a directory that ``save_model`` wrote, or a published ``.pth.tar``.
        classification: train a classifier; by default as ``source``.

    Raises:
        InputError: ``source`` cannot be read, is pruned or otherwise not what its hyperparameters say, or its graphs
            are not those of ``data``.
    """
    source = loaded(source)
    check_parts(source)  # or the copy would keep the random weights of what has another name in it
    data.check_graphs(source.metadata.graph)
    options = source.hyperparameters
    is_class = options["classification"] if classification is None else classification
    options |= {"classification": is_class, "n_targets": len(data.targets)}
    model = type(source)(**options).to(source.embedding.weight.dtype)
    model.element_table = source.element_table.clone()
    state = source.state_dict()
    outputs = {name: state.pop(name) for name in ("fc_out.weight", "fc_out.bias")}
    model.load_state_dict(state, strict=False)
    if is_class:
        model.metadata = ModelMetadata(data.targets, data.units, graph=data.graph_parameters)
    else:
        mean, std = normalizer(data.target_values("train"), data.targets)
        model.metadata = ModelMetadata(data.targets, data.units, tuple(mean), tuple(std), data.graph_parameters)
    is_same_kind = is_class == source.hyperparameters["classification"]
    known = {name: k for k, name in enumerate(source.metadata.targets) if is_same_kind}
    if anew := [name for name in data.targets if name not in known]:
        has = f"the model has {', '.join(source.metadata.targets)}"
        if not is_same_kind:
            has = f"the model is {'no' if is_class else 'a'} classifier"
        logger.warning("The output for %s starts from random weights, since %s", ", ".join(anew), has)
    with torch.no_grad():
        if is_class:
            if known and not anew:
                model.fc_out.weight.copy_(outputs["fc_out.weight"])
                model.fc_out.bias.copy_(outputs["fc_out.bias"])
            return model
        for k, old in ((k, known[name]) for k, name in enumerate(data.targets) if name in known):
            ratio = source.metadata.std[old] / std[k]
            shift = (source.metadata.mean[old] - mean[k]) / std[k]
            model.fc_out.weight[k] = outputs["fc_out.weight"][old] * ratio
            model.fc_out.bias[k] = outputs["fc_out.bias"][old] * ratio + shift
    return model
