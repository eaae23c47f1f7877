"""Training with Lightning: data module, recipe, fit, evaluation and the CGCNN / SR-CGCNN comparison."""

from ..errors import require

for _module in ("lightning.pytorch", "matplotlib", "tqdm"):
    require(_module, "Training", extra="train")

from .compare import Comparison, compare  # noqa: E402 (a clear sentence comes before the import error)
from .data import GraphDataModule, Split, random_split  # noqa: E402
from .evaluate import Evaluation, evaluate  # noqa: E402
from .fit import FitResult, fit  # noqa: E402
from .module import Recipe, TrainingModule  # noqa: E402
from .report import compare_study  # noqa: E402
from .sources import prepared  # noqa: E402
from .study import read_study  # noqa: E402

__all__ = [
    "Comparison",
    "Evaluation",
    "FitResult",
    "GraphDataModule",
    "Recipe",
    "Split",
    "TrainingModule",
    "compare",
    "compare_study",
    "evaluate",
    "fit",
    "prepared",
    "random_split",
    "read_study",
]
