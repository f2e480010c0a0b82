"""Means over seeds, paired differences with intervals and p-values, and their correction.

D[s, i] = metric(variant, seed s, image i) - metric(reference, seed s, image i)
        = mean + seed effect[s] + image effect[i] + residual[s, i]

Seeds and images are crossed random effects: all seeds share the same images. The mean squares of
the two-way table (seeds, images, residual) estimate the variance of the mean in two parts:

A = MS_seed / (S I)                     estimates  s2_seed / S + s2_residual / (S I)
B = max(MS_image - MS_residual, 0) / (S I)    estimates  s2_image / I

A has only S - 1 degrees of freedom. The usual remedy, a t quantile with Satterthwaite's degrees of
freedom, is too optimistic for three seeds where both parts matter: 7.8 % instead of 5 %, and ten
times the nominal rate at the level of 0.1 %, where a correction for many comparisons looks. The
p-value is therefore averaged over the true variances that the estimate A is compatible with, which
is the solution of Behrens and Fisher:

p = E_u [ p-value of mean / sqrt(A (S - 1) / u + B) ],  u ~ chi-squared with S - 1 degrees

It is the t test over seeds where B is 0, the t test over images where A is 0, and errs on the safe
side in between. A metric without per-image values has B = 0: the paired t test over seeds.

Many comparisons: one report has dozens to hundreds. The procedure of Benjamini and Hochberg bounds
the expected share of wrong marks among the marks of a report (false discovery rate) by 5 %. Holm's
would bound the probability of a single wrong mark, which three to five seeds can rarely meet for
200 comparisons. Benjamini-Hochberg holds for independent and for positively dependent tests, and
metrics of the same runs (recalls at 1, 5 and 10) are of the second kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, gammaincinv, stdtr

from .records import CONFIDENCE, Cell, Difference, Metric, Results, Verdict

NODES = 101  # of the integral over u; relative error of a p-value: 1e-6, above 1e-6


def compare(results: Results) -> list[Cell]:
    """Return one cell per data set, variant and metric, in the order of the results.

    The verdicts are those of :func:`correct` over all cells.
    """
    cells = []
    for data in results.datasets:
        table: dict[str, dict[str, dict[int, Any]]] = {}  # metric -> variant -> seed -> entry
        for run in results.runs:
            for metric, entry in run.metrics.items() if run.data == data else ():
                if entry["value"] is not None:
                    table.setdefault(metric, {}).setdefault(run.variant, {})[run.seed] = entry
        cells += [
            _cell(data, variant, metric, entries, results.references)
            for variant in results.variants
            for metric, entries in table.items()
        ]
    return correct(cells)


def correct(cells: Sequence[Cell]) -> list[Cell]:
    """Judge all comparisons of a report together, at a false discovery rate of 5 %.

    Args:
        cells: with the p-value of each difference. A difference without one, and a metric that has
            no better direction, is not counted and stays as it is.

    Returns:
        The cells with new `p_adjusted` and `verdict`, which depend on `p` only.
    """
    pairs = [(cell, d) for cell in cells for d in cell.differences]
    counted = [d.p for cell, d in pairs if d.p is not None and cell.higher_is_better is not None]
    adjusted = iter(benjamini_hochberg(counted).tolist())

    def judged(cell: Cell, d: Difference) -> Difference:
        if d.p is None or cell.higher_is_better is None:
            return d
        p = next(adjusted)
        return replace(d, p_adjusted=p, verdict=_verdict(d.value, p, cell.higher_is_better))

    return [replace(c, differences=tuple(judged(c, d) for d in c.differences)) for c in cells]


def benjamini_hochberg(p_values: Sequence[float]) -> np.ndarray:
    """Return adjusted p-values: the smallest false discovery rate at which each one is marked.

    Example:
        >>> benjamini_hochberg([0.04, 0.01, 0.5]).round(3).tolist()
        [0.06, 0.03, 0.5]
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return adjusted


def _verdict(value: float, p: float | None, higher_is_better: bool | None) -> Verdict:
    if p is None or higher_is_better is None or p > 1 - CONFIDENCE:
        return ""
    return "better" if (value > 0) == higher_is_better else "worse"


def _cell(
    data: str,
    variant: str,
    metric: str,
    entries: Mapping[str, Mapping[int, Metric]],
    references: Sequence[str],
) -> Cell:
    own = entries.get(variant, {})
    first = next(iter(next(iter(entries.values())).values()))
    values: dict[int, Any] = {seed: entry["value"] for seed, entry in own.items()}
    mean, sd = mean_and_sd([*values.values()])
    # Two references are compared once: the later one to the earlier one.
    others = references[: references.index(variant)] if variant in references else references
    found = [difference(own, entries.get(name, {}), reference=name) for name in others]
    return Cell(
        data=data,
        variant=variant,
        metric=metric,
        unit=first.get("unit") or "",
        higher_is_better=first.get("higher_is_better"),
        values=values,
        mean=mean,
        sd=sd,
        images=first.get("n"),
        differences=tuple(one for one in found if one is not None),
    )


def difference(
    own: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]],
    *,
    reference: str,
) -> Difference | None:
    """Compare one metric of a variant with that of its reference.

    The verdict is that of this comparison alone, see :func:`correct`.

    Args:
        own, other: seed -> entry of the metric (`value`, `per_image`, ...).
        reference: name of the other variant.

    Returns:
        None if no seed is done in both.

    Example:
        >>> entry = {"value": 1.5, "higher_is_better": True, "per_image": [1.0, 2.0]}
        >>> worse = {"value": 0.5, "higher_is_better": True, "per_image": [0.0, 1.0]}
        >>> difference({0: entry}, {0: worse}, reference="baseline").verdict
        'better'
    """
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    table = _per_image(own, other, seeds)
    is_by_image = table is not None
    if table is None:
        table = np.array([[own[s]["value"] - other[s]["value"]] for s in seeds], np.float64)
    value = float(table.mean())
    # Identical differences in all seeds (one dead code less) carry no information on the spread.
    is_constant = not is_by_image and value != 0 and np.ptp(table) <= 1e-9 * abs(value)
    is_valid = bool(np.isfinite(table).all()) and not is_constant
    found = estimate(table) if is_valid and table.size > 1 else None
    low, high, p = (float(x) for x in found) if found else (None, None, None)
    by_image = "images and seeds" if len(seeds) > 1 else "images"
    return Difference(
        reference=reference,
        value=value,
        low=low,
        high=high,
        paired_by=by_image if is_by_image else "seeds",
        seeds=len(seeds),
        images=table.shape[1] if is_by_image else None,
        verdict=_verdict(value, p, own[seeds[0]].get("higher_is_better")),
        p=p,
    )


def _per_image(
    own: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]], seeds: list[int]
) -> np.ndarray | None:
    """Differences (S, I), or None unless all runs have values of the same number of images.

    A metric that is not the mean of its per-image values (a Fréchet distance) is paired by seeds.
    """
    tables = []
    for runs in (own, other):
        rows = [np.asarray(runs[s].get("per_image") or (), np.float64) for s in seeds]
        if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
            return None
        values = [runs[s]["value"] for s in seeds]
        if not np.allclose([row.mean() for row in rows], values, rtol=1e-3, atol=1e-6):
            return None
        tables.append(np.stack(rows))
    return tables[0] - tables[1] if tables[0].shape == tables[1].shape else None


class Estimate(NamedTuple):
    """Interval of the mean of a table of differences, and its two-sided p-value against zero."""

    low: float
    high: float
    p: float


def estimate(differences: np.ndarray, *, confidence: float = CONFIDENCE) -> Estimate:
    """Return the interval of the mean of paired differences, and its p-value.

    Args:
        differences: (S, I), by seed and image; I = 1 if there is one value per seed.
        confidence: coverage, in (0, 1).

    Raises:
        ValueError: if there is a single difference.

    Example:
        >>> found = estimate(np.array([[1.0], [2.0], [3.0]]))  # a paired t test
        >>> [round(value, 3) for value in found]
        [-0.484, 4.484, 0.074]
    """
    mean, spread = float(np.mean(differences)), Spread.of(differences)
    scale = float(np.sqrt(spread.seeds + spread.images))

    def excess(width: float) -> float:
        return float(spread.p_value(width * scale)) - (1 - confidence)

    half = scale * brentq(excess, 0, 1e6) if scale > 0 else 0.0
    return Estimate(mean - half, mean + half, float(spread.p_value(mean)))


def p_values(tables: np.ndarray) -> np.ndarray:
    """Return the p-value of each table, (..., S, I) -> (...)."""
    return Spread.of(tables).p_value(np.mean(tables, axis=(-2, -1)))


class Spread(NamedTuple):
    """Estimated variance of the mean of each table (see the module's docstring), arrays (...)."""

    seeds: np.ndarray  # A
    seed_degrees: int
    images: np.ndarray  # B
    image_degrees: int

    @classmethod
    def of(cls, tables: np.ndarray) -> "Spread":
        """Estimate it from tables of differences, (..., S, I)."""
        seeds, images = tables.shape[-2:]
        size = seeds * images
        if size < 2:
            raise ValueError("an interval needs at least two differences, got one")
        degrees = seeds - 1, images - 1, (seeds - 1) * (images - 1)
        centered = tables - tables.mean(axis=(-2, -1), keepdims=True)
        by_seed = images * np.square(centered.mean(axis=-1)).sum(axis=-1)
        by_image = seeds * np.square(centered.mean(axis=-2)).sum(axis=-1)
        total = np.einsum("...si,...si->...", centered, centered)
        rest = np.maximum(total - by_seed - by_image, 0)
        # Mean squares / number of values. Without degrees of freedom: 0, but for rounding errors.
        a, b, c = (
            squares / (n * size) if n else np.zeros_like(total)
            for squares, n in zip((by_seed, by_image, rest), degrees, strict=True)
        )
        return cls(a, degrees[0], np.maximum(b - c, 0), degrees[1])

    def p_value(self, mean: np.ndarray | float) -> np.ndarray:
        """Return the two-sided p-values; without any spread, 1 for a mean of zero and else 0."""
        inverse, weights = _inverse_chi_squared(self.seed_degrees)
        variance = self.seeds[..., None] * inverse + self.images[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            # Satterthwaite's degrees of freedom, given the true variance that A estimates.
            degrees = self.image_degrees * np.square(variance / self.images[..., None])
            ratio = np.abs(mean)[..., None] / np.sqrt(variance)
        tails = stdtr(np.nan_to_num(degrees, nan=1e15, posinf=1e15), -np.nan_to_num(ratio))
        return np.minimum(2 * (tails * weights).sum(axis=-1), 1)


@lru_cache(maxsize=32)
def _inverse_chi_squared(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of `degrees / u` and their weights, for u ~ chi-squared; (1, 1) without degrees.

    The trapezoidal rule over log(u), which converges exponentially for such a smooth density.
    """
    if degrees < 1:
        return np.ones(1), np.ones(1)
    least, most = 2 * gammaincinv(degrees / 2, 1e-12), chdtri(degrees, 1e-12)
    u = np.geomspace(least, most, NODES)
    weights = np.exp(degrees / 2 * np.log(u) - u / 2)
    return degrees / u, weights / weights.sum()


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation (None for fewer than two values)."""
    if not values:
        return None, None
    mean = fmean(values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, stdev(values) if len(values) > 1 else None
