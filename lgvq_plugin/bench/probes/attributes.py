"""Which attributes of an image a linear map can read from its frozen codes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import AbstractProbe
from .features import CodeFeatures
from .ridge import Scaling, fit_ridges

Labels = Mapping[str, Tensor]
"""By attribute: (M,) int classes, or (M, D) of 0 and 1 where several may apply."""


class AttributesProbe(AbstractProbe[CodeFeatures, Labels]):
    """Regress one-hot or multi-hot labels on the codes; predict the largest, or those > 1/2.

    `seed` draws the held-out part that chooses each ridge's strength.
    """

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        self._scaling: Scaling | None = None

    def fit(self, codes: CodeFeatures, target: Labels) -> "AttributesProbe":
        """Train one map per attribute on M images."""
        columns = {
            name: (F.one_hot(labels.long()) if labels.ndim == 1 else labels).double()
            for name, labels in target.items()
        }
        self._scaling = Scaling.from_features(codes)
        self._ridges = fit_ridges(self._scaling(codes), columns, seed=self.seed)
        self._majority = {
            name: _predict(column.mean(0, True), target[name]) for name, column in columns.items()
        }
        return self

    def evaluate(self, codes: CodeFeatures, target: Labels) -> dict[str, float]:
        """Return `NAME/accuracy`, `NAME/majority` (the most frequent label), `mean_accuracy`.

        The accuracy of a multi-hot label is the mean over its columns, in which rare ones hardly
        count. So it also has `NAME/auc`, the area under the ROC curve: 0.5 if the codes have no
        information; mean over the columns that have both kinds of image.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if a name was not in the target of fit, or has another length.
        """
        results: dict[str, float] = {}
        for name, labels, scores in self._scored(codes, target):
            right = _predict(scores, labels) == labels
            results[f"{name}/accuracy"] = float(right.double().mean())
            results[f"{name}/majority"] = float((self._majority[name] == labels).double().mean())
            if labels.ndim == 2:
                results[f"{name}/auc"] = _mean_auc(scores, labels.bool())
        accuracies = [value for name, value in results.items() if name.endswith("/accuracy")]
        return results | {"mean_accuracy": sum(accuracies) / max(len(accuracies), 1)}

    def values(self, codes: CodeFeatures, target: Labels) -> dict[str, Tensor]:
        """Return `NAME/accuracy` and `mean_accuracy` of each image, (M,) float64."""
        values = {}
        for name, labels, scores in self._scored(codes, target):
            right = (_predict(scores, labels) == labels).double()
            values[f"{name}/accuracy"] = right.reshape(len(right), -1).mean(dim=1)
        return values | {"mean_accuracy": torch.stack([*values.values()]).mean(dim=0)}

    def _scored(self, codes: CodeFeatures, target: Labels) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, labels and scores (M, D)."""
        if self._scaling is None:
            raise RuntimeError("AttributesProbe: call fit(...) on training images first")
        x = self._scaling(codes)
        for name, labels in target.items():
            if name not in self._ridges or len(labels) != len(x):
                raise ValueError(
                    f"attribute {name!r}: expected {len(x)} labels of one of "
                    f"{sorted(self._ridges)}, got {len(labels)}"
                )
            yield name, labels, self._ridges[name](x)


def stack_labels(records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Turn the `attributes` of M samples into labels.

    Example:
        >>> stack_labels([{"count": 2, "has": [0, 1]}, {"count": 1, "has": [1, 1]}])
        {'count': tensor([2, 1]), 'has': tensor([[0, 1], [1, 1]])}
    """
    return {
        name: torch.stack([torch.as_tensor(record[name]) for record in records])
        for name in records[0]
    }


def _predict(scores: Tensor, like: Tensor) -> Tensor:
    """Turn scores (M, D) into labels of the kind of `like`."""
    return scores.argmax(dim=1) if like.ndim == 1 else (scores > 0.5).to(like.dtype)


def _mean_auc(scores: Tensor, is_there: Tensor) -> float:
    """Return the mean area under the ROC curve of the columns of (M, D); ties count half."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.round(decimals=9).numpy(), axis=0))
    yes, no = is_there.sum(dim=0), (~is_there).sum(dim=0)
    wins = (ranks * is_there).sum(dim=0) - yes * (yes + 1) / 2
    areas = (wins / (yes * no))[(yes > 0) & (no > 0)]
    return float(areas.mean())
