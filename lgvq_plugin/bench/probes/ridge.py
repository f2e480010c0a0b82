"""Ridge regression from frozen codes: in closed form, and as probes of attributes and captions.

The strength of each map is chosen on a part of the training images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sockets import ConfigError
from ..metrics.retrieval import retrieval_by_query
from . import AbstractProbe, Target
from .features import CodeFeatures

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Candidate penalties in units of M; feature rows have unit mean square per block."""
HELD_OUT_SHARE = 0.2
MIN_IMAGES = 10


@dataclass(frozen=True)
class Scaling:
    """Centers and scales blocks of features, so that the scale of a host's codes is irrelevant."""

    means: list[Tensor]
    lengths: list[Tensor]

    @classmethod
    def from_features(cls, features: CodeFeatures) -> "Scaling":
        """Take mean and root-mean-square row length of each block from training images."""
        means = [block.double().mean(dim=0) for block in features.blocks]
        rows = [block.double() - mean for block, mean in zip(features.blocks, means, strict=True)]
        return cls(means, [row.square().sum(dim=1).mean().sqrt() for row in rows])

    def __call__(self, features: CodeFeatures) -> Tensor:
        """Return (M, P) float64; a block that was constant in training is zero."""
        if [block.shape[1] for block in features.blocks] != [len(mean) for mean in self.means]:
            raise ValueError("these features have other widths than those of fit: another host?")
        scaled = []
        for block, mean, length in zip(features.blocks, self.means, self.lengths, strict=True):
            centered = block.double() - mean
            scaled.append(centered / length if length > 0 else torch.zeros_like(centered))
        return torch.cat(scaled, dim=1)


@dataclass(frozen=True)
class Ridge:
    """An affine map and the strength of its penalty."""

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """Map (M, P) to (M, D)."""
        return x @ self.weight + self.bias


def fit_ridges(x: Tensor, targets: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Ridge]:
    """Fit one ridge per target; all share the Gram matrix.

    The strength of each minimizes the squared error on a held-out fifth, drawn by `seed`; then it
    is fitted on all. `x` is (M, P) float64, each target (M, D).

    Raises:
        ConfigError: if M < 10.
        ValueError: if a target has another length.
    """
    held_out, rest = split_rows(len(x), seed)
    for name, target in targets.items():
        if len(target) != len(x):
            raise ValueError(f"{len(x)} images, but {len(target)} targets {name!r}")
    solve_rest, solve = ridge_solver(x[rest]), ridge_solver(x)

    def error(target: Tensor, strength: float) -> float:
        guess = solve_rest(target[rest].double(), strength)(x[held_out])
        return float((guess - target[held_out]).square().mean())

    return {
        name: solve(target.double(), min(STRENGTHS, key=lambda s, t=target: error(t, s)))  # type: ignore[misc]
        for name, target in targets.items()
    }


def split_rows(count: int, seed: int) -> tuple[Tensor, ...]:
    """Draw a fifth of the training images to hold out, and the rest; ConfigError for too few."""
    if count < MIN_IMAGES:
        raise ConfigError(f"a probe needs at least {MIN_IMAGES} training images, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.tensor_split([int(count * HELD_OUT_SHARE)])


def ridge_solver(x: Tensor) -> Callable[[Tensor, float], Ridge]:
    """Return solve(y, strength): argmin_W |(x - mean) W - (y - mean)|^2 + strength M |W|^2.

    It works in the smaller space, features or images, and factors the matrix once per strength.
    """
    count, width = x.shape
    mean = x.mean(dim=0)
    rows = x - mean
    is_primal = width <= count
    gram = rows.mT @ rows if is_primal else rows @ rows.mT
    factors: dict[float, Tensor] = {}

    def solve(y: Tensor, strength: float) -> Ridge:
        if strength not in factors:
            penalty = torch.full((len(gram),), strength * count, dtype=gram.dtype)
            factors[strength] = torch.linalg.cholesky(gram + penalty.diag())
        centered = y - y.mean(dim=0)
        if is_primal:
            weight = torch.cholesky_solve(rows.mT @ centered, factors[strength])
        else:
            weight = rows.mT @ torch.cholesky_solve(centered, factors[strength])
        return Ridge(weight, y.mean(dim=0) - mean @ weight, strength)

    return solve


class RidgeProbe(AbstractProbe[CodeFeatures, Target]):
    """Affine maps of the features; `seed` draws the held-out part that chooses their strengths."""

    _ridges: dict[str, Ridge]

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        self._scaling: Scaling | None = None

    def _fit(self, codes: CodeFeatures, wanted: Mapping[str, Tensor]) -> None:
        self._scaling = Scaling.from_features(codes)
        self._ridges = fit_ridges(self._scaling(codes), wanted, seed=self.seed)

    def _scaled(self, codes: CodeFeatures) -> Tensor:
        if self._scaling is None:
            raise RuntimeError(f"{type(self).__name__}: call fit(...) on training images first")
        return self._scaling(codes)


Labels = Mapping[str, Tensor]
"""By attribute: (M,) int classes, or (M, D) of 0 and 1 where several may apply."""


class AttributesProbe(RidgeProbe[Labels]):
    """Regress one-hot or multi-hot labels on the codes; predict the largest, or those > 1/2.

    `seed` draws the held-out part that chooses each ridge's strength.
    """

    def fit(self, codes: CodeFeatures, target: Labels) -> "AttributesProbe":
        """Train one map per attribute on M images."""
        columns = {
            name: (F.one_hot(labels.long()) if labels.ndim == 1 else labels).double()
            for name, labels in target.items()
        }
        self._fit(codes, columns)
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
        x = self._scaled(codes)
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


class RetrievalProbe(RidgeProbe[Tensor]):
    """Predict an image's sentence feature from its codes, and rank by cosine.

    `ks` are those of the recalls; `seed` draws the held-out part that chooses the ridge's strength.
    """

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0):
        super().__init__(seed=seed)
        self.ks = tuple(ks)

    @property
    def strength(self) -> float:
        """The ridge's strength chosen by :meth:`fit`."""
        return self._ridges["sentence"].strength

    def fit(self, codes: CodeFeatures, target: Tensor) -> "RetrievalProbe":
        """Train on M images.

        The target is the guide's sentence features, (M, Ds), or (M, n, Ds) with n captions per
        image, which are averaged.
        """
        sentences = F.normalize(target.double(), dim=-1)
        if sentences.ndim == 3:
            sentences = F.normalize(sentences.mean(dim=1), dim=-1)
        self._text_mean = sentences.mean(dim=0)
        self._fit(codes, {"sentence": sentences - self._text_mean})
        return self

    def evaluate(
        self, codes: CodeFeatures, target: Tensor, captions: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, the ridge's `strength` and the `count` of images."""
        values = self.values(codes, target, captions)
        means = {name: float(value.mean()) for name, value in values.items()}
        return means | {"strength": self.strength, "count": float(len(codes))}

    def values(
        self, codes: CodeFeatures, target: Tensor, captions: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Retrieve among the M captions for each of the M images, and vice versa.

        The target is the sentence feature of one caption per held-out image, (M, Ds). Of these
        `captions` equal ones are all relevant; None: captions with identical features are. Returns
        `image_to_text/recall@k`, `image_to_text/mean_rank`, the same for `text_to_image`, and
        `chance@1` (expected recall at 1 without information) of each image, (M,) float64.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if the numbers of images, features and captions differ.
        """
        x = self._scaled(codes)
        if target.ndim != 2 or len(target) != len(codes):
            raise ValueError(
                f"expected one sentence feature for each of {len(codes)} images, "
                f"got {tuple(target.shape)}"
            )
        guesses = F.normalize(self._ridges["sentence"](x), dim=-1)
        sentences = F.normalize(target.double(), dim=-1) - self._text_mean
        similarity = guesses @ F.normalize(sentences, dim=-1).mT
        # Equal codes must tie, but rows of a matrix product may differ in the last bits.
        similarity = similarity.round(decimals=9)
        same = _is_same_caption(target, captions)
        results = {}
        for direction, matrix in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
            for name, value in retrieval_by_query(matrix, same, self.ks).items():
                results[f"{direction}/{name}"] = value
        return results | {"chance@1": same.double().mean(dim=1)}


def _is_same_caption(sentences: Tensor, captions: Sequence[str] | None) -> Tensor:
    """Return which pairs have the same caption, (M, M) bool."""
    if captions is None:
        group = torch.unique(sentences, dim=0, return_inverse=True)[1]
    else:
        if len(captions) != len(sentences):
            raise ValueError(f"{len(sentences)} sentence features, but {len(captions)} captions")
        numbers: dict[str, int] = {}
        group = torch.tensor([numbers.setdefault(c, len(numbers)) for c in captions])
    return group[:, None] == group[None, :]
