"""What the numbers say, in sentences; nothing here that a number does not say."""

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from ._page import counted, number
from .base import CONFIDENCE, Cell, Difference, Results, Run

SHOWN = 4  # metrics named in a sentence


def sentences(results: Results, cells: Sequence[Cell]) -> list[Markup]:
    """Return the summary, a sentence or two of HTML for each variant and each reservation."""
    told: list[Markup] = []
    if any(d.seeds == 1 for cell in cells for d in cell.differences if _is_judged(cell, d)):
        told.append(
            Markup(
                "<b>One seed</b>: an interval speaks of other images, not of another training; "
                "better and worse are said of these trainings alone."
            )
        )
    for i, reference in enumerate(results.references):
        for data in results.datasets:
            for variant in results.variants:
                own = [c for c in cells if (c.data, c.variant) == (data, variant)]
                if variant not in results.references[: i + 1]:
                    told.append(_verdict(variant, reference, data, own))
    return [sentence for sentence in [*told, *_reservations(results, cells)] if sentence]


def tally(cells: Sequence[Cell], reference: str) -> dict[str, int]:
    """Count cells of one variant by verdict; `open` has an interval with zero in it.

    Example:
        >>> tally([], "baseline")
        {'better': 0, 'worse': 0, 'open': 0}
    """
    found = [d for cell in cells if (d := cell.to(reference)) and _is_judged(cell, d)]
    verdicts = [d.verdict or "open" for d in found]
    return {name: verdicts.count(name) for name in ("better", "worse", "open")}


def _is_judged(cell: Cell, difference: Difference) -> bool:
    return difference.low is not None and cell.higher_is_better is not None


def _verdict(variant: str, reference: str, data: str, cells: Sequence[Cell]) -> Markup:
    name = Markup("<b>{}</b>{}").format(variant, f" on {data}" if data else "")
    pairs = [(cell, d) for cell in cells if (d := cell.to(reference))]
    if all(cell.mean is None for cell in cells):
        return Markup("")  # told below: failed, or not run yet
    if not pairs:
        return Markup("{}: no run to compare with {}.").format(name, reference)
    judged = [(cell, d) for cell, d in pairs if _is_judged(cell, d)]
    if not judged:
        return Markup(
            "{} against {}: no interval can be given, so nothing is marked "
            "({} and no values by image)."
        ).format(name, reference, counted(pairs[0][1].seeds, "seed"))
    parts: list[str] = []
    for verdict in ("better", "worse"):
        found = [(cell, d) for cell, d in judged if d.verdict == verdict]
        if found:
            found.sort(key=lambda pair: -_clarity(pair[1]))
            named = "; ".join(_difference(cell, d) for cell, d in found[:SHOWN])
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            parts.append(
                Markup('<span class="mark {0}">{0}</span> on {1} ({2}{3})').format(
                    verdict, counted(len(found), "metric"), named, more
                )
            )
    left = tally(cells, reference)["open"]
    bare = sum(d.low is None and cell.higher_is_better is not None for cell, d in pairs)
    if left:
        parts.append(
            f"not told apart on {left}" if parts else f"not told apart on any of {left} metrics"
        )
    if bare:
        parts.append(f"no interval for {bare}")
    return Markup("{} against {}: {}.").format(name, reference, Markup(", ").join(parts))


def _clarity(difference: Difference) -> float:
    """How many half widths of its interval a difference is away from zero."""
    if difference.low is None or difference.high is None:
        return 0.0
    return abs(difference.value) / max((difference.high - difference.low) / 2, 1e-12)


def _difference(cell: Cell, d: Difference) -> str:
    unit = f" {cell.unit}" if cell.unit else ""
    interval = f"[{number(d.low, signed=True)}, {number(d.high, signed=True)}]"
    return f"{cell.metric} {number(d.value, signed=True)}{unit} {interval}"


def _reservations(results: Results, cells: Sequence[Cell]) -> list[Markup]:
    told: list[Markup] = []
    judged = [d for cell in cells for d in cell.differences if _is_judged(cell, d)]
    marked = sum(bool(d.verdict) for d in judged)
    if judged:
        expected = number((1 - CONFIDENCE) * len(judged), digits=2)
        told.append(
            Markup(
                f"{counted(len(judged), 'comparison')} at {CONFIDENCE * 100:.0f} %: {marked} "
                f"marked, where about {expected} would be if nothing differed."
            )
        )
    failed = [run for run in results.runs if run.status == "failed"]
    missing = [run for run in results.runs if run.status == "missing"]
    for runs, word in ((failed, "Failed"), (missing, "Not run yet")):
        if runs:
            names = ", ".join(
                f"{name} ({counted(len([*some]), 'run')})"
                for name, some in groupby(runs, key=_place)
            )
            told.append(Markup('<span class="failed">{}</span>: {}.').format(word, names))
    told.append(_cost(results))
    return told


def _place(run: Run) -> str:
    return f"{run.data}/{run.variant}" if run.data else run.variant


def _cost(results: Results) -> Markup:
    """Compare seconds a step."""
    reference = results.references[0]
    base = seconds_per_step(results, reference)
    parts = [
        f"{variant} {own / base:.2f} ×"
        for variant in results.variants
        if variant != reference and base and (own := seconds_per_step(results, variant))
    ]
    if not parts:
        return Markup("")
    return Markup("Time of a step, {} = 1: {}.").format(reference, ", ".join(parts))


def seconds_per_step(results: Results, variant: str) -> float | None:
    """Return the mean over the runs of a variant, or None."""
    costs = [run.cost for run in results.runs if run.variant == variant]
    own = [seconds for cost in costs if (seconds := cost.get("seconds_per_step"))]
    return sum(own) / len(own) if own else None


def span(values: Sequence[int], noun: str) -> str:
    """Return "3 seeds", or "2 to 3 seeds"."""
    low, high = min(values), max(values)
    return counted(low, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def seeds_told(cells: Sequence[Cell]) -> str:
    """Return "3 seeds", or a range."""
    return span([len(cell.values) for cell in cells if cell.values] or [0], "seed")


def images_told(cells: Sequence[Cell]) -> str:
    """Return "512 images", or a range where metrics count other things too."""
    counts = [cell.images for cell in cells if cell.images] or [0]
    return span(counts, "image") + ("" if len({*counts}) == 1 else " (or questions, or words)")
