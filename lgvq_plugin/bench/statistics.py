"""Means over seeds, and paired differences with bootstrap intervals.

D[s, i] = metric(variant, seed s, image i) - metric(reference, seed s, image i)
mean difference = sum_s sum_i  w_s v_i D[s, i],  w = 1/S, v = 1/I
bootstrap: w and v drawn anew, both from multinomials; the same images serve every seed, so
they are drawn once for all of them (crossed, not nested).

Few seeds: with S = 3 a plain percentile interval excludes zero whenever three differences have
one sign, by chance in a quarter of all cases. So the deviations of w from 1/S are stretched by
sqrt(S / (S - 1)) * t(S - 1) / z, which makes the interval of a normal sample its t interval.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri, stdtrit

from .records import CONFIDENCE, Cell, Difference, Results, Run, mean_and_sd

RESAMPLES = 4000


def seed_stretch(seeds: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the factor that widens a bootstrap over few seeds to the width of a t interval.

    Example:
        >>> round(seed_stretch(3), 2), round(seed_stretch(1000), 2)
        (2.69, 1.0)
    """
    upper = (1 + confidence) / 2
    return float(math.sqrt(seeds / (seeds - 1)) * stdtrit(seeds - 1, upper) / ndtri(upper))


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
        differences: (S,) one of each seed, or (S, I) of each seed and image.
        confidence: coverage, in (0, 1).
        resamples: bootstrap draws.
        seed: of the draws.
        stretch: widen for few seeds, as told on top of this file.

    Returns:
        (low, high); None if there is one seed and no second image, so nothing to resample.

    Example:
        >>> [round(end, 6) for end in bootstrap_interval(np.array([0.5, 0.5, 0.5]))]
        [0.5, 0.5]
        >>> bootstrap_interval(np.array([0.5])) is None
        True
    """
    table = np.asarray(differences, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    seeds, images = table.shape
    if seeds < 2 and images < 2:
        return None
    per_seed = _draws(images, resamples, seed + 1) @ table.T if images > 1 else table.T
    if seeds > 1:
        factor = seed_stretch(seeds, confidence=confidence) if stretch else 1.0
        drawn = _draws(seeds, resamples, seed)
        means = ((1 / seeds + factor * (drawn - 1 / seeds)) * per_seed).sum(axis=1)
    else:
        means = per_seed[:, 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """Weights of `count` items in each resample, (resamples, count); every row sums to 1."""
    generator = np.random.default_rng([seed, count])
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn / count


def difference(
    own: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]],
    *,
    reference: str,
    resamples: int = RESAMPLES,
) -> Difference | None:
    """Compare one metric of a variant with that of its reference.

    Args:
        own, other: seed -> the metric's entry in the evaluation (`value`, `per_image`, ...).
        reference: name of the other variant.
        resamples: bootstrap draws.

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
    if table is None:
        table = np.array([own[s]["value"] - other[s]["value"] for s in seeds], np.float64)
    images = table.shape[1] if table.ndim == 2 else None
    value = float(table.mean())
    # Seeds that all differ by the same (a code more or less) do not tell how far others would.
    tells_nothing = images is None and value != 0 and np.ptp(table) <= 1e-9 * abs(value)
    is_good = bool(np.isfinite(table).all()) and not tells_nothing
    interval = bootstrap_interval(table, resamples=resamples) if is_good else None
    low, high = interval or (None, None)
    verdict: Literal["better", "worse", ""] = ""
    higher_is_better = own[seeds[0]].get("higher_is_better")
    excludes_zero = interval is not None and (interval[0] > 0 or interval[1] < 0)
    if excludes_zero and higher_is_better is not None:
        verdict = "better" if (value > 0) == higher_is_better else "worse"
    by_images = "images and seeds" if len(seeds) > 1 else "images"
    return Difference(
        reference=reference,
        value=value,
        low=low,
        high=high,
        paired_by="seeds" if images is None else by_images,
        seeds=len(seeds),
        images=images,
        verdict=verdict,
    )


def _per_image(
    own: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]], seeds: list[int]
) -> np.ndarray | None:
    """Differences (S, I), or None unless every run has values of the same number of images.

    A metric that is not the mean of its images (a Fréchet distance, codebook usage) is paired by
    seeds, whatever else it lists.
    """
    rows = []
    for run in (own, other):
        lists = [np.asarray(run[s].get("per_image") or (), np.float64) for s in seeds]
        values = [run[s]["value"] for s in seeds]
        if len({len(row) for row in lists}) != 1 or len(lists[0]) < 2:
            return None
        if not np.allclose([row.mean() for row in lists], values, rtol=1e-3, atol=1e-6):
            return None
        rows.append(np.stack(lists))
    mine, theirs = rows
    return mine - theirs if mine.shape == theirs.shape else None


def compare(results: Results, *, resamples: int = RESAMPLES) -> list[Cell]:
    """Return a cell for every data set, variant and metric, in the order of the results."""
    cells = []
    for data in results.datasets:
        runs = [run for run in results.runs if run.data == data]
        names = list(
            dict.fromkeys(
                name
                for run in runs
                for name, entry in run.metrics.items()
                if entry.get("value") is not None
            )
        )
        table = {
            (variant, name): _by_seed(runs, variant, name)
            for variant in results.variants
            for name in names
        }
        cells += [
            _cell(data, variant, name, table, results.references, resamples)
            for variant in results.variants
            for name in names
        ]
    return cells


def _by_seed(runs: Sequence[Run], variant: str, metric: str) -> dict[int, Mapping[str, Any]]:
    found = {run.seed: run.metrics.get(metric) for run in runs if run.variant == variant}
    return {seed: row for seed, row in found.items() if row and row["value"] is not None}


def _cell(
    data: str,
    variant: str,
    metric: str,
    table: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]],
    references: Sequence[str],
    resamples: int,
) -> Cell:
    own = table[variant, metric]
    # A variant with no run that is done still has a cell: what the metric is, others tell.
    known = next(entries for (_, name), entries in table.items() if name == metric and entries)
    entry = next(iter(known.values()))
    mean, sd = mean_and_sd([entry["value"] for entry in own.values()])
    # Of two references the later is compared to the earlier, not the other way round again.
    others = references[: references.index(variant)] if variant in references else references
    found = [
        difference(own, table[reference, metric], reference=reference, resamples=resamples)
        for reference in others
    ]
    return Cell(
        data=data,
        variant=variant,
        metric=metric,
        unit=entry.get("unit") or "",
        higher_is_better=entry.get("higher_is_better"),
        values={seed: entry["value"] for seed, entry in own.items()},
        mean=mean,
        sd=sd,
        images=entry.get("n"),
        differences=tuple(one for one in found if one is not None),
    )
