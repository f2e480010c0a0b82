"""Classify images by features of their codes: zero-shot, logistic regression, nearest neighbors."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sockets import ConfigError
from . import AbstractProbe
from .ridge import HELD_OUT_SHARE, MIN_IMAGES

PENALTIES = tuple(10.0**exponent for exponent in range(-4, 1))
"""Candidates for the logistic regression; features have unit variance."""
BATCH = 256
DIGITS = 9  # equal features must tie, but rows of a matrix product may differ in the last bits


def prompt_features(
    encode_text: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Return the mean feature of each class's prompts, of length 1, (K, D) (CLIP's ensembling).

    Args:
        encode_text: maps n texts to features of length 1, (n, D).
        names: K names of classes.
        templates: each has one `{}` for the name.
    """
    means = [encode_text([t.replace("{}", name) for t in templates]).mean(dim=0) for name in names]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_hits(images: Tensor, prompts: Tensor, target: Tensor, *, top: int = 1) -> Tensor:
    """Return whether the class of each image is among the `top` nearest prompts, (M,) float64.

    Args:
        images: features of M images, of length 1, (M, D).
        prompts: features of K classes, of length 1, (K, D).
        target: the class of each image, (M,).
    """
    cosines = (images.double() @ prompts.double().mT).round(decimals=DIGITS)
    best = cosines.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return (best == target[:, None]).any(dim=1).double()


def fit_logistic(
    x: Tensor, labels: Tensor, *, classes: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Minimize mean cross-entropy + penalty / 2 * |W|^2 by L-BFGS; returns weight and bias.

    It is scikit-learn's LogisticRegression with C = 1 / (penalty * M).

    Args:
        x: (M, P) float64.
        labels: (M,) int64, each below `classes`.
        classes: K.
        penalty: > 0.
    """
    basis = None
    if x.shape[1] > len(x):  # the solution is in the space that the rows span
        basis = torch.linalg.svd(x, full_matrices=False).Vh.mT
        x = x @ basis
    weight, bias = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        max_eval=1000,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = weight.detach() if basis is None else basis @ weight.detach()
    return weight, bias.detach()


class LinearProbe(AbstractProbe[Tensor, Tensor]):
    """Logistic regression on standardized features.

    The penalty minimizes the cross-entropy of a held-out fifth, drawn by `seed`; then it is fitted
    on all images.
    """

    penalty: float

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        self._fitted: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def fit(self, codes: Tensor, target: Tensor) -> "LinearProbe":
        """Train on features (M, P) and classes (M,) of M images; ConfigError for fewer than 10."""
        count, classes = len(codes), int(target.max()) + 1
        if count < MIN_IMAGES:
            raise ConfigError(f"a probe needs at least {MIN_IMAGES} training images, got {count}")
        mean = codes.double().mean(dim=0)
        scale = codes.double().std(dim=0)
        scale[scale == 0] = 1.0
        x = (codes.double() - mean) / scale
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = order.tensor_split([int(count * HELD_OUT_SHARE)])

        def error(penalty: float) -> float:
            weight, bias = fit_logistic(x[rest], target[rest], classes=classes, penalty=penalty)
            return float(F.cross_entropy(x[held_out] @ weight + bias, target[held_out]))

        self.penalty = min(PENALTIES, key=error)
        weight, bias = fit_logistic(x, target, classes=classes, penalty=self.penalty)
        self._fitted = (mean, scale, weight, bias)
        return self

    def predict(self, codes: Tensor) -> Tensor:
        """Return the class of each image, (M,); RuntimeError before :meth:`fit`."""
        if self._fitted is None:
            raise RuntimeError("LinearProbe: call fit(...) on training images first")
        mean, scale, weight, bias = self._fitted
        return ((codes.double() - mean) / scale @ weight + bias).argmax(dim=1)

    def evaluate(self, codes: Tensor, target: Tensor) -> dict[str, float]:
        """Return the `accuracy`."""
        return {"accuracy": float((self.predict(codes) == target).double().mean())}


class NearestNeighbors(AbstractProbe[Tensor, Tensor]):
    """Weighted vote of the k nearest training images, as DINO's (Caron et al. 2021).

    A neighbor votes with exp(cosine / 0.07). Features are centered on the training images' mean:
    means of codes have nearly the same direction otherwise. Of equal votes the lower class wins.
    """

    def __init__(self, *, k: int = 20, temperature: float = 0.07):
        self.k, self.temperature = k, temperature
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def fit(self, codes: Tensor, target: Tensor) -> "NearestNeighbors":
        """Keep features (M, P) and classes (M,) of M images."""
        mean = codes.double().mean(dim=0)
        self._seen = mean, F.normalize(codes.double() - mean, dim=-1), target
        return self

    def predict(self, codes: Tensor) -> Tensor:
        """Return the class of each image, (M,); RuntimeError before :meth:`fit`."""
        if self._seen is None:
            raise RuntimeError("NearestNeighbors: call fit(...) on training images first")
        mean, seen, labels = self._seen
        found = []
        for part in F.normalize(codes.double() - mean, dim=-1).split(BATCH):
            cosines = (part @ seen.mT).round(decimals=DIGITS)
            nearest = cosines.sort(dim=1, descending=True, stable=True)
            weights = (nearest.values[:, : self.k] / self.temperature).exp()
            votes = part.new_zeros(len(part), int(labels.max()) + 1)
            votes.scatter_add_(1, labels[nearest.indices[:, : self.k]], weights)
            found.append(votes.argmax(dim=1))
        return torch.cat(found)

    def evaluate(self, codes: Tensor, target: Tensor) -> dict[str, float]:
        """Return the `accuracy`."""
        return {"accuracy": float((self.predict(codes) == target).double().mean())}
