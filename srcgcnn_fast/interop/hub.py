"""Models in the layout of the Hugging Face Hub: ``config.json``, ``model.safetensors`` and a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import require
from ..graph.batch import GraphBatch
from ..nn import CGCNN, SRCGCNN
from ..serialization import load_model, save_model

_hub = require("huggingface_hub", "A model on the Hugging Face Hub", "hub")

_FILES = ("config.json", "model.safetensors")
_CARD = """\
---
library_name: srcgcnn_fast
tags: [materials-science, crystal-graph, {tag}]
---

# {kind}

Predicts, from a crystal structure:

| target | unit | mean and std of the training set |
| --- | --- | --- |
{targets}

Graphs: up to {graph.max_neighbors} neighbours within {graph.radius:g} Å. {parameters} parameters, of which
{conv_parameters} in the convolutions.
{extra}
## Use

```python
import srcgcnn_fast as sf
from srcgcnn_fast.interop.hub import HubModel

model = HubModel.from_pretrained("owner/name").model  # or a directory
sf.predict(model, "my_cifs/")
```

Please cite {citation}
"""
_CITATIONS = {
    "CGCNN": "T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).",
    "SRCGCNN": "S. Bhattacharjee, arXiv:2605.01304 (2026), and T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 "
    "(2018).",
}


class HubModel(nn.Module, _hub.ModelHubMixin):  # type: ignore[misc, name-defined]
    """A model with the Hub's ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The directory is that of :func:`srcgcnn_fast.save_model` with a model card, so ``load_model`` reads it too.

    Args:
        model: the one that the attribute ``model`` keeps.
    """

    model: CGCNN | SRCGCNN

    def __init__(self, model: CGCNN | SRCGCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: GraphBatch) -> Tensor:
        """That of the model."""
        out: Tensor = self.model(batch)
        return out

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the model and its card; ``options`` are those of the Hub's mixin, such as ``push_to_hub=True``.

        A card that is there stays, unless it is as it was written for the model that is replaced.
        """
        card = Path(save_directory) / "README.md"
        is_outdated = _is_generated(card)
        address: str | None = super().save_pretrained(save_directory, **options)
        if is_outdated:
            self.generate_model_card().save(card)
        return address

    def _save_pretrained(self, save_directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".new-") as scratch:
            written = save_model(self.model, Path(scratch) / "model")
            for name in _FILES:
                (written / name).replace(save_directory / name)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_unused: Any,
    ) -> HubModel:
        where = model_id
        if not Path(model_id).is_dir():
            where = _hub.snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=_FILES,
            )
        return cls(load_model(where)).eval()

    def generate_model_card(self, *_: Any, **__: Any) -> Any:
        """Targets, units, normaliser, graph, size, and what ``metadata.extra`` holds (data set, MAE, citation)."""
        model, metadata = self.model, self.model.metadata
        kind = type(model).__name__
        columns = zip(metadata.targets, metadata.units, metadata.mean, metadata.std, strict=True)
        targets = [f"| {name} | {unit or '-'} | {mean:.6g}, {std:.6g} |" for name, unit, mean, std in columns]
        extra = "".join(f"\n* {key}: {_plain(value)}" for key, value in metadata.extra.items())
        text = _CARD.format(
            tag=kind.lower(),
            kind=kind,
            targets="\n".join(targets),
            graph=metadata.graph,
            parameters=sum(p.numel() for p in model.parameters()),
            conv_parameters=model.count_conv_parameters(),
            extra=f"{extra}\n" if extra else "",
            citation=_CITATIONS[kind],
        )
        return _hub.ModelCard(text)


def _is_generated(card: Path) -> bool:
    """Does the card say what it would for the model beside it, no more and no less?"""
    try:
        text = card.read_text(encoding="utf-8")
        return text == str(HubModel(load_model(card.parent)).generate_model_card())
    except (OSError, ValueError):  # there is no card, or no model
        return False


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(x)}" for key, x in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
