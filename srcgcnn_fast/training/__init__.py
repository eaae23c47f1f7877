"""Training with Lightning: data module, recipe, fit, evaluation and the CGCNN / SR-CGCNN comparison."""

from ..errors import require

for _module in ("lightning.pytorch", "matplotlib", "tqdm"):
    require(_module, "Training", extra="train")

from .calibration import calibrate, calibration_plot, coverage  # noqa: E402 (after a clear sentence)
from .compare import Comparison, compare  # noqa: E402
from .data import GraphDataModule, Split, random_split  # noqa: E402
from .evaluate import Evaluation, evaluate  # noqa: E402
from .finetune import fine_tuned  # noqa: E402
from .fit import FitResult, fit  # noqa: E402
from .module import Recipe, TrainingModule  # noqa: E402
from .report import compare_study  # noqa: E402
from .several import CrossValidation, cross_validate, train_ensemble  # noqa: E402
from .sources import prepared  # noqa: E402
from .splits import k_folds, matbench_folds, read_split  # noqa: E402
from .study import read_study  # noqa: E402

__all__ = [
    "Comparison",
    "CrossValidation",
    "Evaluation",
    "FitResult",
    "GraphDataModule",
    "Recipe",
    "Split",
    "TrainingModule",
    "calibrate",
    "calibration_plot",
    "compare",
    "compare_study",
    "coverage",
    "cross_validate",
    "evaluate",
    "fine_tuned",
    "fit",
    "k_folds",
    "matbench_folds",
    "prepared",
    "random_split",
    "read_split",
    "read_study",
    "train_ensemble",
]
