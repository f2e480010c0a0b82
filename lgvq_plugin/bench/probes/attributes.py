"""Which attributes of an image can be read from its frozen codes by a linear map."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import AbstractProbe, CodeFeatures
from .ridge import Ridge, Scaling, fit_ridges


class AttributesProbe(AbstractProbe[Mapping[str, Tensor]]):
    """Regress one-hot or multi-hot labels on the codes; answer by the largest, or by > 1/2.

    A target maps names to labels: (M,) int classes, or (M, D) of 0 and 1 where several may hold.

    Args:
        seed: of the part of the training images that chooses each ridge's strength.
    """

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        self._scaling: Scaling | None = None

    def fit(self, features: CodeFeatures, target: Mapping[str, Tensor]) -> "AttributesProbe":
        """Train one map a name on M images."""
        columns = {name: _columns(labels) for name, labels in target.items()}
        self._scaling = Scaling.of(features)
        self._ridges: dict[str, Ridge] = fit_ridges(
            self._scaling(features), columns, seed=self.seed
        )
        self._usual = {name: _answer(c.mean(0, True), target[name]) for name, c in columns.items()}
        return self

    def values(self, features: CodeFeatures, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `NAME/accuracy` and `mean_accuracy` of each image, (M,) float64; see `evaluate`.

        Raises:
            RuntimeError, ValueError: as :meth:`evaluate`.
        """
        values = {}
        for name, labels, scores in self._scored(features, target):
            right = (_answer(scores, labels) == labels).double()
            values[f"{name}/accuracy"] = right.reshape(len(right), -1).mean(dim=1)
        return values | {"mean_accuracy": torch.stack([*values.values()]).mean(dim=0)}

    def evaluate(self, features: CodeFeatures, target: Mapping[str, Tensor]) -> dict[str, float]:
        """Return `NAME/accuracy`, `NAME/majority` (always the usual answer), `mean_accuracy`.

        The accuracy of a multi-hot label is the mean over its columns. As rare columns hide in
        it, a multi-hot label also has `NAME/auc`: the chance that an image which has it scores
        above one which has not, 0.5 if the codes say nothing; mean over the columns that have
        both kinds of image.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if a name was not in the target of fit, or has another length.
        """
        results: dict[str, float] = {}
        for name, labels, scores in self._scored(features, target):
            right = _answer(scores, labels) == labels
            results[f"{name}/accuracy"] = float(right.double().mean())
            results[f"{name}/majority"] = float((self._usual[name] == labels).double().mean())
            if labels.ndim == 2:
                results[f"{name}/auc"] = _mean_auc(scores, labels.bool())
        accuracies = [value for name, value in results.items() if name.endswith("/accuracy")]
        return results | {"mean_accuracy": sum(accuracies) / max(len(accuracies), 1)}

    def _scored(
        self, features: CodeFeatures, target: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, labels and scores (M, D)."""
        if self._scaling is None:
            raise RuntimeError("AttributesProbe: call fit(...) on training images first")
        x = self._scaling(features)
        for name, labels in target.items():
            if name not in self._ridges or len(labels) != len(x):
                raise ValueError(
                    f"attribute {name!r}: expected {len(x)} labels of one of "
                    f"{sorted(self._ridges)}, got {len(labels)}"
                )
            yield name, labels, self._ridges[name](x)


def stack_labels(records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Turn the `attributes` of M samples into a target.

    Example:
        >>> stack_labels([{"count": 2, "has": [0, 1]}, {"count": 1, "has": [1, 1]}])
        {'count': tensor([2, 1]), 'has': tensor([[0, 1], [1, 1]])}
    """
    return {
        name: torch.stack([torch.as_tensor(record[name]) for record in records])
        for name in records[0]
    }


def _columns(labels: Tensor) -> Tensor:
    """Return what the ridge regresses, (M, D) float64."""
    return (F.one_hot(labels.long()) if labels.ndim == 1 else labels).double()


def _answer(scores: Tensor, like: Tensor) -> Tensor:
    """Turn scores (M, D) into labels of the shape that `like` has, but for M."""
    return scores.argmax(dim=1) if like.ndim == 1 else (scores > 0.5).to(like.dtype)


def _mean_auc(scores: Tensor, is_there: Tensor) -> float:
    """Mean area under the ROC curve of the columns of (M, D); ties count half."""
    areas = []
    for column, there in zip(scores.mT, is_there.mT, strict=True):
        gaps = (column[there][:, None] - column[~there][None, :]).round(decimals=9)
        if gaps.numel():
            areas.append(float((gaps.sign() + 1).mean() / 2))
    return sum(areas) / len(areas) if areas else float("nan")
