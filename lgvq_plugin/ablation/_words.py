"""What the numbers say, in sentences; nothing here that a number does not say."""

from collections.abc import Sequence
from itertools import groupby

from ._page import counted, escape, number
from .base import CONFIDENCE, Cell, Difference, Results, Run

SHOWN = 4  # metrics named in a sentence


def sentences(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Return the summary, a sentence or two of HTML for each variant and each reservation."""
    told = []
    if any(d.seeds == 1 for cell in cells for d in cell.differences if _is_judged(cell, d)):
        told.append(
            "<b>One seed</b>: an interval speaks of other images, not of another training; better "
            "and worse are said of these trainings alone."
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


def _verdict(variant: str, reference: str, data: str, cells: Sequence[Cell]) -> str:
    name = f"<b>{escape(variant)}</b>" + (f" on {escape(data)}" if data else "")
    pairs = [(cell, d) for cell in cells if (d := cell.to(reference))]
    if all(cell.mean is None for cell in cells):
        return ""  # told below: failed, or not run yet
    if not pairs:
        return f"{name}: no run to compare with {escape(reference)}."
    judged = [(cell, d) for cell, d in pairs if _is_judged(cell, d)]
    if not judged:
        return (
            f"{name} against {escape(reference)}: no interval can be given, so nothing is marked "
            f"({counted(pairs[0][1].seeds, 'seed')} and no values by image)."
        )
    parts = []
    for verdict in ("better", "worse"):
        found = [(cell, d) for cell, d in judged if d.verdict == verdict]
        if found:
            found.sort(key=lambda pair: -_clarity(pair[1]))
            named = "; ".join(_difference(cell, d) for cell, d in found[:SHOWN])
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            many = "metric" if len(found) == 1 else "metrics"
            parts.append(
                f'<span class="mark {verdict}">{verdict}</span> on {len(found)} {many} '
                f"({named}{more})"
            )
    left = tally(cells, reference)["open"]
    bare = sum(d.low is None and cell.higher_is_better is not None for cell, d in pairs)
    if left:
        parts.append(
            f"not told apart on {left}" if parts else f"not told apart on any of {left} metrics"
        )
    if bare:
        parts.append(f"no interval for {bare}")
    return f"{name} against {escape(reference)}: {', '.join(parts)}."


def _clarity(difference: Difference) -> float:
    """How many half widths of its interval a difference is away from zero."""
    if difference.low is None or difference.high is None:
        return 0.0
    return abs(difference.value) / max((difference.high - difference.low) / 2, 1e-12)


def _difference(cell: Cell, d: Difference) -> str:
    unit = f" {escape(cell.unit)}" if cell.unit else ""
    interval = f"[{number(d.low, signed=True)}, {number(d.high, signed=True)}]"
    return f"{escape(cell.metric)} {number(d.value, signed=True)}{unit} {interval}"


def _reservations(results: Results, cells: Sequence[Cell]) -> list[str]:
    told = []
    judged = [d for cell in cells for d in cell.differences if _is_judged(cell, d)]
    marked = sum(bool(d.verdict) for d in judged)
    if judged:
        expected = (1 - CONFIDENCE) * len(judged)
        told.append(
            f"{counted(len(judged), 'comparison')} at {CONFIDENCE * 100:.0f} %: {marked} marked, "
            f"where about {number(expected, digits=2)} would be if nothing differed."
        )
    failed = [run for run in results.runs if run.status == "failed"]
    missing = [run for run in results.runs if run.status == "missing"]
    for runs, word in ((failed, "failed"), (missing, "not run yet")):
        if runs:
            names = ", ".join(
                f"{escape(name)} ({counted(len([*some]), 'run')})"
                for name, some in groupby(runs, key=_place)
            )
            told.append(f'<span class="failed">{word.capitalize()}</span>: {names}.')
    told.append(_cost(results))
    return told


def _place(run: Run) -> str:
    return f"{run.data}/{run.variant}" if run.data else run.variant


def _cost(results: Results) -> str:
    """Compare seconds a step."""
    base = seconds_per_step(results, results.references[0])
    parts = []
    for variant in results.variants:
        own = seconds_per_step(results, variant)
        if base and own and variant != results.references[0]:
            parts.append(f"{escape(variant)} {own / base:.2f} ×")
    return (
        f"Time of a step, {escape(results.references[0])} = 1: {', '.join(parts)}." if parts else ""
    )


def seconds_per_step(results: Results, variant: str) -> float | None:
    """Return the mean over the runs of a variant, or None."""
    own = [
        run.cost["seconds_per_step"]
        for run in results.runs
        if run.variant == variant and run.cost.get("seconds_per_step")
    ]
    return sum(own) / len(own) if own else None
