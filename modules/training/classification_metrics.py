"""How good a classifier is: from all logits and labels at once, so that the figures do not depend on batches or ranks.

Shapes: N texts, C classes, labels or numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multilabel_confusion_matrix,
    multilabel_exact_match,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from ..options import ProblemType


@dataclass(frozen=True)
class ClassificationMetrics:
    """Figures of one evaluation.

    Attributes:
        texts: N.
        figures: Single label: ``accuracy``, ``macro_f1`` (over the classes that occur, as label or prediction) and
            ``auroc`` (each class against the others, mean of the classes that have both). Multi-label, where a label is
            predicted from a probability of 0.5 on: ``exact_match``, ``macro_f1`` and ``auroc``. Regression: ``rmse``,
            ``mae`` and, of two texts or more, ``r2``. What cannot be computed is left out.
        per_class: For each class its ``precision``, ``recall``, ``f1``, ``auroc`` (``None`` if undefined) and how many
            texts have it, ``support``; empty for regression.
        confusion: Single label: [C][C] counts, a row per true class and a column per predicted one. Multi-label: for
            each label [2][2] counts. Empty for regression.
    """

    texts: int
    figures: dict[str, float]
    per_class: dict[str, dict[str, float | int | None]]
    confusion: list[Any]


def classification_metrics(
    logits: Tensor, labels: Tensor, problem_type: ProblemType, names: Sequence[str]
) -> ClassificationMetrics:
    """Compare a classifier's logits with the labels.

    Args:
        logits: float32 [N, C]; for regression the predicted numbers.
        labels: int64 [N] in [0, C), or float32 [N, C], of zeros and ones for multi-label.
        problem_type: What the labels are.
        names: Of the C classes.

    Raises:
        ValueError: If there is no text.
    """
    texts, count = logits.shape
    if not texts:
        raise ValueError("There is no text to evaluate.")
    if problem_type == "regression":
        figures = {
            "rmse": float(mean_squared_error(logits, labels, squared=False, num_outputs=1)),
            "mae": float(mean_absolute_error(logits, labels)),
        }
        if texts > 1:
            figures["r2"] = float(r2_score(logits.squeeze(1), labels.squeeze(1)))
        return ClassificationMetrics(texts, figures, {}, [])
    options: dict[str, Any]
    each: tuple[Any, ...]
    if problem_type == "single_label_classification":
        options = {"preds": logits, "target": labels, "num_classes": count}
        given = torch.nn.functional.one_hot(labels, count)
        scores = logits.softmax(-1)
        figures = {
            "accuracy": float(multiclass_accuracy(**options, average="micro")),
            "macro_f1": float(multiclass_f1_score(**options, average="macro")),
        }
        each = (multiclass_precision, multiclass_recall, multiclass_f1_score)
        precision, recall, f1 = (metric(**options, average=None) for metric in each)
        confusion = multiclass_confusion_matrix(**options)
    else:
        given, scores = labels.long(), logits.sigmoid()
        options = {"preds": scores, "target": given, "num_labels": count}
        figures = {
            "exact_match": float(multilabel_exact_match(**options)),
            "macro_f1": float(multilabel_f1_score(**options, average="macro")),
        }
        each = (multilabel_precision, multilabel_recall, multilabel_f1_score)
        precision, recall, f1 = (metric(**options, average=None) for metric in each)
        confusion = multilabel_confusion_matrix(**options)
    support = given.sum(0).tolist()
    areas = [
        float(binary_auroc(scores[:, index], given[:, index])) if 0 < support[index] < texts else None
        for index in range(count)
    ]
    if known := [area for area in areas if area is not None]:
        figures["auroc"] = sum(known) / len(known)
    per_class: dict[str, dict[str, float | int | None]] = {
        name: {
            "precision": float(precision[index]), "recall": float(recall[index]), "f1": float(f1[index]),
            "auroc": areas[index], "support": int(support[index]),
        }
        for index, name in enumerate(names)
    }  # fmt: skip
    return ClassificationMetrics(texts, figures, per_class, confusion.tolist())
