"""Ridge regression in closed form, its strength chosen on a part of the training images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sockets import ConfigError
from .base import CodeFeatures

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Penalties to choose from, in units of M; the feature rows have unit mean square per block."""
HELD_SHARE = 0.2
LEAST_IMAGES = 10


@dataclass(frozen=True)
class Scaling:
    """Shifts and scales blocks of features, so that a host's code scale does not matter."""

    means: list[Tensor]
    lengths: list[Tensor]

    @classmethod
    def of(cls, features: CodeFeatures) -> "Scaling":
        """Take mean and root-mean-square row length of each block from training images."""
        means = [block.double().mean(dim=0) for block in features.blocks]
        rows = [block.double() - mean for block, mean in zip(features.blocks, means, strict=True)]
        return cls(means, [row.square().sum(dim=1).mean().sqrt() for row in rows])

    def __call__(self, features: CodeFeatures) -> Tensor:
        """Return (M, P) float64; a block that was constant in training stays zero."""
        if [block.shape[1] for block in features.blocks] != [len(mean) for mean in self.means]:
            raise ValueError("these features have other widths than those of fit: another host?")
        parts = zip(features.blocks, self.means, self.lengths, strict=True)
        return torch.cat(
            [
                (block.double() - mean) / length if length > 0 else torch.zeros_like(block).double()
                for block, mean, length in parts
            ],
            dim=1,
        )


@dataclass(frozen=True)
class Ridge:
    """An affine map with the strength it was fitted at."""

    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """Map (M, P) to (M, D)."""
        return x @ self.weight + self.bias


def fit_ridges(x: Tensor, targets: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Ridge]:
    """Fit one ridge a target; all share the Gram matrix.

    The strength of each is the one of least squared error on a fifth of the images; then it is
    fitted again on all.

    Args:
        x: (M, P) float64.
        targets: (M, D) each.
        seed: of the choice of the fifth.

    Raises:
        ConfigError: if M is below 10.
        ValueError: if a target has another length.
    """
    count = len(x)
    if count < LEAST_IMAGES:
        raise ConfigError(f"a probe needs at least {LEAST_IMAGES} training images, got {count}")
    for name, target in targets.items():
        if len(target) != count:
            raise ValueError(f"{count} images, but {len(target)} targets {name!r}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held, rest = order.split([int(count * HELD_SHARE), count - int(count * HELD_SHARE)])
    solve = ridge_solver(x[rest])
    errors: dict[str, list[float]] = {name: [] for name in targets}
    for strength in STRENGTHS:
        for name, target in targets.items():
            guess = solve(target[rest].double(), strength)(x[held])
            errors[name].append(float((guess - target[held]).square().mean()))
    solve = ridge_solver(x)
    chosen = {name: STRENGTHS[error.index(min(error))] for name, error in errors.items()}
    return {name: solve(target.double(), chosen[name]) for name, target in targets.items()}


def ridge_solver(x: Tensor) -> Callable[[Tensor, float], Ridge]:
    """Return solve(y, strength): argmin_W |(x - mean) W - (y - mean)|^2 + strength M |W|^2.

    It works in the smaller of the two spaces, features or images, and factors the matrix once a
    strength.
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
