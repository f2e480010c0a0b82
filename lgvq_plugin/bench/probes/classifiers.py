"""Classify images by features of their codes (zero-shot, logistic regression, nearest neighbors).

And generated images by their pixels: a small CNN, trained on real ones only, judges those of any
host, and its features give `fd_judge`.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import seeded
from ..metrics.reconstruction import to_uint8
from . import AbstractProbe
from .ridge import split_rows
from .trainer import ProbeConfig, fit

PENALTIES = tuple(10.0**exponent for exponent in range(-4, 1))
"""Candidates for the logistic regression; features have unit variance."""
BATCH = 256
CONFIG = ProbeConfig(steps=500, batch_size=64, learning_rate=3e-3, width=128, heads=1, dropout=0.0)
"""Training of the image judge."""
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
        held_out, rest = split_rows(len(codes), self.seed)
        classes = int(target.max()) + 1
        mean = codes.double().mean(dim=0)
        scale = codes.double().std(dim=0)
        scale[scale == 0] = 1.0
        x = (codes.double() - mean) / scale

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


class ImageJudge(nn.Module):
    """Images (B, 3, H, W) uint8 to features (B, 128); `heads` turn them into logits.

    `sizes` has by attribute the number of classes, or of columns if it is multi-hot.
    """

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after)]
            layers += [nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], n) for name, n in sizes.items()})

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, 128) float32."""
        maps = self.body(pixels.float() / 127.5 - 1)
        return maps.mean(dim=(2, 3)) + maps.amax(dim=(2, 3))

    @torch.no_grad()
    def accuracy(self, images: Tensor, target: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the accuracy of each attribute on images in [-1, 1], and their `mean`."""
        features = torch.cat([self(to_uint8(part)) for part in images.split(128)])
        results: dict[str, float] = {}
        for name, labels in target.items():
            logits = self.heads[name](features)
            answer = logits.argmax(dim=1) if labels.ndim == 1 else (logits > 0).to(labels.dtype)
            results[name] = float((answer == labels).double().mean())
        return results | {"mean": sum(results.values()) / len(results)}

    @staticmethod
    def train_on(
        images: Tensor,
        target: Mapping[str, Tensor],
        *,
        folder: Path | None = None,
        progress: bool = True,
        config: ProbeConfig = CONFIG,
    ) -> "ImageJudge":
        """Train a judge on real images (M, 3, H, W) uint8 and their labels, see `stack_labels`."""
        sizes = {n: int(v.max()) + 1 if v.ndim == 1 else v.shape[1] for n, v in target.items()}
        with seeded(config.seed):
            judge = ImageJudge(sizes)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            features = judge(images[rows])
            loss = features.new_zeros(())
            for name, labels in target.items():
                logits, wanted = judge.heads[name](features), labels[rows]
                if wanted.ndim == 1:
                    loss = loss + F.cross_entropy(logits, wanted)
                else:
                    loss = loss + F.binary_cross_entropy_with_logits(logits, wanted.float())
            return loss

        digest = hashlib.sha256(images.numpy().data).hexdigest()
        facts = [digest, {n: v.tolist() for n, v in target.items()}]
        options: dict[str, Any] = {"name": "judge", "folder": folder, "progress": progress}
        fit(judge, loss_of, len(images), config, facts=facts, **options)
        return judge.requires_grad_(False)
