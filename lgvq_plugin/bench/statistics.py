"""Means over seeds, and paired differences with bootstrap intervals.

D[s, i] = metric(variant, seed s, image i) - metric(reference, seed s, image i)
mean difference = sum_s sum_i  w_s v_i D[s, i],  w = 1/S, v = 1/I
bootstrap: resample w and v from multinomials; all seeds share the same images, so images are
resampled once for all seeds (crossed, not nested).

Few seeds: with S = 3, a plain percentile interval excludes zero whenever all three differences
have the same sign, which happens by chance in a quarter of all cases. The deviations of w from 1/S
are therefore scaled by sqrt(S / (S - 1)) * t(S - 1) / z, so that the interval of a normal sample
is its t interval.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from .records import CONFIDENCE, Cell, Difference, Metric, Results

RESAMPLES = 4000


def compare(results: Results, *, resamples: int = RESAMPLES) -> list[Cell]:
    """Return one cell per data set, variant and metric, in the order of the results."""
    cells = []
    for data in results.datasets:
        table: dict[str, dict[str, dict[int, Any]]] = {}  # metric -> variant -> seed -> entry
        for run in results.runs:
            for metric, entry in run.metrics.items() if run.data == data else ():
                if entry["value"] is not None:
                    table.setdefault(metric, {}).setdefault(run.variant, {})[run.seed] = entry
        cells += [
            _cell(data, variant, metric, entries, results.references, resamples)
            for variant in results.variants
            for metric, entries in table.items()
        ]
    return cells


def _cell(
    data: str,
    variant: str,
    metric: str,
    entries: Mapping[str, Mapping[int, Metric]],
    references: Sequence[str],
    resamples: int,
) -> Cell:
    own = entries.get(variant, {})
    first = next(iter(next(iter(entries.values())).values()))
    values: dict[int, Any] = {seed: entry["value"] for seed, entry in own.items()}
    mean, sd = mean_and_sd([*values.values()])
    # Two references are compared once: the later one to the earlier one.
    others = references[: references.index(variant)] if variant in references else references
    found = [
        difference(own, entries.get(name, {}), reference=name, resamples=resamples)
        for name in others
    ]
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
    resamples: int = RESAMPLES,
) -> Difference | None:
    """Compare one metric of a variant with that of its reference.

    Args:
        own, other: seed -> entry of the metric (`value`, `per_image`, ...).
        reference: name of the other variant.
        resamples: number of bootstrap resamples.

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
    interval = bootstrap_interval(table, resamples=resamples) if is_valid else None
    low, high = interval or (None, None)
    verdict: Literal["better", "worse", ""] = ""
    higher_is_better = own[seeds[0]].get("higher_is_better")
    if interval and higher_is_better is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "better" if (value > 0) == higher_is_better else "worse"
    by_image = "images and seeds" if len(seeds) > 1 else "images"
    return Difference(
        reference=reference,
        value=value,
        low=low,
        high=high,
        paired_by=by_image if is_by_image else "seeds",
        seeds=len(seeds),
        images=table.shape[1] if is_by_image else None,
        verdict=verdict,
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


def bootstrap_interval(
    differences: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    stretch: bool = True,
) -> tuple[float, float] | None:
    """Return the percentile interval of the mean of paired differences.

    Args:
        differences: (S,), one per seed, or (S, I), one per seed and image.
        confidence: coverage, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.
        stretch: widen the interval for few seeds (see the module's docstring).

    Returns:
        (low, high), or None for a single difference.
    """
    table = np.asarray(differences, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    seeds, images = table.shape
    if seeds < 2 and images < 2:
        return None
    per_seed = _weights(images, resamples, seed + 1) @ table.T if images > 1 else table.T
    if seeds > 1:
        factor = seed_stretch(seeds, confidence=confidence) if stretch else 1.0
        weights = _weights(seeds, resamples, seed)
        means = ((1 / seeds + factor * (weights - 1 / seeds)) * per_seed).sum(axis=1)
    else:
        means = per_seed[:, 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _weights(count: int, resamples: int, seed: int) -> np.ndarray:
    """Multinomial weights, (resamples, count); each row sums to 1."""
    generator = np.random.default_rng([seed, count])
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def seed_stretch(seeds: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the factor that widens a bootstrap over few seeds to the width of a t interval.

    Example:
        >>> round(seed_stretch(3), 2), round(seed_stretch(1000), 2)
        (2.69, 1.0)
    """
    upper = (1 + confidence) / 2
    return float(math.sqrt(seeds / (seeds - 1)) * stdtrit(seeds - 1, upper) / ndtri(upper))


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation (None for fewer than two values)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or min(values) == max(values):
        return mean, None if len(values) < 2 else 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
