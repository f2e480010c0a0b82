"""Ridge regression in closed form, its strength chosen on a part of the training images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sockets import ConfigError
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
    count = len(x)
    if count < MIN_IMAGES:
        raise ConfigError(f"a probe needs at least {MIN_IMAGES} training images, got {count}")
    for name, target in targets.items():
        if len(target) != count:
            raise ValueError(f"{count} images, but {len(target)} targets {name!r}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out, rest = order.tensor_split([int(count * HELD_OUT_SHARE)])
    solve_rest, solve = ridge_solver(x[rest]), ridge_solver(x)

    def error(target: Tensor, strength: float) -> float:
        guess = solve_rest(target[rest].double(), strength)(x[held_out])
        return float((guess - target[held_out]).square().mean())

    return {
        name: solve(target.double(), min(STRENGTHS, key=lambda s, t=target: error(t, s)))  # type: ignore[misc]
        for name, target in targets.items()
    }


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
