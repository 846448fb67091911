"""One number per sample."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import DatasetDict, Value
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from typing_extensions import override

from lightning_drm.kinds.kind import LABELS, Kind


class Regression(Kind):
    """One number per sample, learned by squared error. The score is Pearson's correlation.

    Spearman's correlation and the mean squared error are measured too. Labels are taken as they are: numbers far from 0
    or of a large spread are learned slowly, so scale them in the data.

    Example:
        >>> import torch
        >>> Regression().loss(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 2.0]))
        tensor(0.5000)
    """

    auto_class: ClassVar[Mapping[str, str]] = {
        "text": "AutoModelForSequenceClassification",
        "image": "AutoModelForImageClassification",
    }

    @override
    def encode(self, splits: DatasetDict, column: str) -> DatasetDict:
        for name, table in splits.items():
            kind = getattr(table.features[column], "dtype", "nested")
            if not kind.startswith(("int", "uint", "float", "double")):
                raise ValueError(f"Expected numbers in label column {column!r}, got {kind} in {name!r}.")
            values = np.array([np.nan if value is None else value for value in table[column][:]], dtype=float)
            if num_bad := int((~np.isfinite(values)).sum()):
                raise ValueError(
                    f"Expected a finite number in every row, but {num_bad} of the {len(table)} rows of the split "
                    f"{name!r} have none in column {column!r}."
                )
        splits = splits.cast_column(column, Value("float32"))
        return splits if column == LABELS else splits.rename_column(column, LABELS)

    @override
    def num_outputs(self, splits: DatasetDict) -> int:
        return 1

    @override
    def metrics(self, num_outputs: int) -> dict[str, Metric]:
        return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef(), "mse": MeanSquaredError()}

    @override
    def model_settings(self, num_outputs: int) -> dict[str, Any]:
        return {"num_labels": num_outputs, "problem_type": "regression"}

    @override
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits))

    @override
    def prediction(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.squeeze(-1), labels.float()

    @override
    def check(self, splits: DatasetDict, dataset: str) -> None:
        for split, table in splits.items():
            if len(set(table[LABELS][:])) < 2:
                raise ValueError(
                    f"Expected different numbers as labels in the split {split!r} of {dataset!r}, found "
                    f"{'one value only' if len(table) else 'no rows'}."
                )
