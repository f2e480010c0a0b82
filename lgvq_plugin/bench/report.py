"""The report of an ablation: an HTML page, its summary in sentences, Markdown and CSV tables."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..files import write_text
from .page import counted, data_uri, example_file, finite, fragment, page
from .records import CONFIDENCE, FAINT_MARKS, Cell, Difference, Results, csv_text
from .statistics import mean_and_sd

LEVEL = f"{CONFIDENCE * 100:.0f}"
RATE = f"false discovery rate of {(1 - CONFIDENCE) * 100:.0f} %"
MAX_PER_IMAGE = 300_000  # per-image values in the page
SECTIONS = {
    "summary": "Summary",
    "table": "All numbers",
    "differences": "Differences",
    "curves": "Curves",
    "images": "Reconstructions",
    "cost": "Cost",
    "runs": "Runs",
    "settings": "Settings",
    "raw": "Raw numbers",
}


def write_report(results: Results, cells: Sequence[Cell], path: Path, *, root: Path) -> Path:
    """Write the page to `path` and return it.

    `cells` are what `statistics.compare` returns; the examples' paths are relative to `root`.

    Raises:
        ConfigError: if an example is not a PNG file below `root`.
    """
    runs, reference = results.runs, results.references[0]
    sets = f" × {counted(len(results.datasets), 'data set')}" if results.datasets != [""] else ""
    lead = (
        f"{counted(len(results.variants), 'variant')} × "
        f"{counted(len({run.seed for run in runs}), 'seed')}{sets}; "
        f"{sum(run.status == 'done' for run in runs)} of {counted(len(runs), 'run')} done. "
        f"Compared to {reference}."
    )
    keys = ("data", "variant", "seed", "curves")
    curves = [{key: getattr(run, key) for key in keys} for run in runs if run.curves]
    cards = [
        {"variant": name, "note": shown.get("note", ""), "is_reference": name == reference}
        | tally([cell for cell in cells if cell.variant == name], reference)
        for name, shown in results.variants.items()
    ]
    text = page(
        results.title,
        "report.html",
        SECTIONS,
        lead=lead,
        data={"variants": [*results.variants], "runs": curves},
        scripts=["report.js"],
        reference=reference,
        colors={variant: i % 10 for i, variant in enumerate(results.variants)},
        cards=cards,
        sentences=sentences(results, cells),
        **_numbers(results, cells),
        **_differences(results, cells),
        grids=_grids(results, root),
        costs=_costs(results),
        runs=runs,
        variants=results.variants,
        evaluation=_done(results),
        **_raw(results, cells),
    )
    write_text(path, text)
    return path


# -- The summary ---------------------------------------------------------------------------------


def sentences(results: Results, cells: Sequence[Cell]) -> list[Markup]:
    """Return the summary: a sentence of HTML per variant, then the caveats."""
    judged = [d for cell in cells for d in cell.differences if _is_judged(cell, d)]
    comparisons = []
    for i, reference in enumerate(results.references):
        for data in results.datasets:
            for variant in results.variants:
                own = [c for c in cells if (c.data, c.variant) == (data, variant)]
                has_mean = any(cell.mean is not None for cell in own)
                if has_mean and variant not in results.references[: i + 1]:
                    comparisons.append(_comparison(variant, reference, data, own))
    undone: dict[str, Counter[str]] = {"Failed": Counter(), "Not run yet": Counter()}
    for run in results.runs:
        if run.status != "done":
            word = "Failed" if run.status == "failed" else "Not run yet"
            undone[word][f"{run.data}/{run.variant}".lstrip("/")] += 1
    lines = fragment(
        "summary.html",
        comparisons=comparisons,
        judged=judged,
        rate=RATE,
        alpha=1 - CONFIDENCE,
        confidence=LEVEL,
        undone=undone,
        base=results.references[0],
        costs=[r for r in _costs(results) if r["ratio"] and r["variant"] != results.references[0]],
    ).splitlines()
    return [Markup(line) for line in lines if line.strip()]


def _comparison(variant: str, reference: str, data: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what a sentence is about: a variant's pairs with a reference, clear ones first."""
    pairs = [(cell, d) for cell in cells if (d := cell.to(reference))]
    judged = [(cell, d) for cell, d in pairs if _is_judged(cell, d)]
    judged.sort(key=lambda pair: -_clarity(pair[1]))
    return {"names": (variant, data, reference), "pairs": pairs, "judged": judged}


def _is_judged(cell: Cell, difference: Difference) -> bool:
    return difference.low is not None and cell.higher_is_better is not None


def _clarity(d: Difference) -> float:
    """Distance of a difference from zero, in half widths of its interval."""
    assert d.low is not None
    assert d.high is not None
    return abs(d.value) / max((d.high - d.low) / 2, 1e-12)


def tally(cells: Sequence[Cell], reference: str) -> dict[str, int]:
    """Count the metrics of a variant: better, worse, and open (not significant)."""
    found = [d for cell in cells if (d := cell.to(reference)) and _is_judged(cell, d)]
    verdicts = [d.verdict or "open" for d in found]
    return {name: verdicts.count(name) for name in ("better", "worse", "open")}


# -- The sections of the page --------------------------------------------------------------------


def _numbers(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table of all numbers: a row per data set and variant, a column per metric."""
    metrics: dict[str, Cell] = {}
    for cell in cells:
        metrics.setdefault(cell.metric, cell)
    at = {(cell.data, cell.variant, cell.metric): cell for cell in cells}
    rows = [
        (data, variant, {metric: at.get((data, variant, metric)) for metric in metrics})
        for data in results.datasets
        for variant in results.variants
    ]
    return {"metrics": metrics, "rows": rows, "numbers_caption": _caption(results, cells, cells)}


def _differences(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table of differences, each with the half width of its metric's scale around zero."""
    pairs = [(cell, d) for cell in cells for d in cell.differences]
    reach: dict[tuple[str, str], float] = {}
    for cell, d in pairs:
        ends = [abs(x) for x in (d.value, d.low, d.high) if x is not None and math.isfinite(x)]
        reach[cell.data, cell.metric] = max([reach.get((cell.data, cell.metric), 0.0), *ends])
    return {
        "pairs": [(cell, d, reach[cell.data, cell.metric]) for cell, d in pairs],
        "pairs_of": (_span([d.seeds for _, d in pairs], "seed"), _images([c for c, _ in pairs])),
        "confidence": LEVEL,
        "correction": _correction(cells),
        "alpha": 1 - CONFIDENCE,
        "has_many": len(results.references) > 1,
        "faint": [*FAINT_MARKS.values()],
    }


def _caption(results: Results, shown: Sequence[Cell], cells: Sequence[Cell]) -> str:
    """The caption of a table of the cells `shown`, corrected together with all `cells`."""
    seeds = _span([len(cell.values) for cell in shown if cell.values], "seed")
    return (
        f"Mean ± standard deviation over {seeds}, on {_images(shown)}. ▲ better or ▼ worse than "
        f"{results.references[0]}: {_correction(cells)}. △ or ▽: only the "
        f"{LEVEL} % interval of the paired difference, uncorrected, excludes zero."
    )


def _correction(cells: Sequence[Cell]) -> str:
    count = sum(_is_judged(cell, d) for cell in cells for d in cell.differences)
    return (
        f"significant at a {RATE} over the {counted(count, 'comparison')} of this report "
        "(Benjamini–Hochberg)"
    )


def _span(values: Sequence[int], noun: str) -> str:
    """Return "3 seeds", or "2 to 3 seeds"."""
    low, high = min(values, default=0), max(values, default=0)
    return counted(low, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def _images(cells: Sequence[Cell]) -> str:
    counts = {cell.images for cell in cells if cell.images}
    return _span([*counts], "image") + (" (or questions, or words)" if len(counts) > 1 else "")


def _grids(results: Results, root: Path) -> list[dict[str, Any]]:
    """The first images of one seed per data set: originals, then reconstructions per variant."""
    grids = []
    for data in results.datasets:
        if found := results.examples(data):
            rows = {
                name: [data_uri(example_file(root, path).read_bytes(), "image/png") for path in own]
                for name, own in found.rows.items()
            }
            grids.append({**vars(found), "data": data, "rows": rows})
    return grids


def _costs(results: Results) -> list[dict[str, Any]]:
    """Step time and memory per variant."""
    rows: list[dict[str, Any]] = []
    for variant in results.variants:
        costs = [run.cost for run in results.runs if run.variant == variant and run.cost]
        seconds = [value for cost in costs if (value := cost.get("seconds_per_step"))]
        mean, sd = mean_and_sd(seconds)
        memory, _ = mean_and_sd([value for c in costs if (value := c.get("peak_memory_mib"))])
        device = ", ".join(sorted({str(cost.get("device", "")) for cost in costs}))
        rows.append({"variant": variant, "mean": mean, "sd": sd, "memory": memory,
                     "runs": len(seconds), "device": device})  # fmt: skip
    base = next(row["mean"] for row in rows if row["variant"] == results.references[0])
    for row in rows:
        row["ratio"] = row["mean"] / base if row["mean"] and base else None
    return rows


def _done(results: Results) -> Mapping[str, Any]:
    """Return the evaluation of the first finished run, or {}."""
    return next((run.evaluation for run in results.runs if run.status == "done"), {})


def _raw(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The files to download; `left_out` counts per-image values that are not in them."""
    plain = asdict(results)
    metrics = [
        row for run in plain["runs"] for row in run["evaluation"].get("metrics", {}).values()
    ]
    values = sum(len(row.get("per_image") or ()) for row in metrics)
    is_large = values > MAX_PER_IMAGE
    for row in metrics if is_large else ():
        row["per_image"] = None
    content = {"results": plain, "cells": [asdict(cell) for cell in cells]}
    files = [
        ("results.json", "application/json", json.dumps(finite(content), default=str)),
        ("values.csv", "text/csv", values_csv(results)),
        ("differences.csv", "text/csv", differences_csv(cells)),
    ]
    downloads = {n: data_uri(text.encode(), f"{kind};charset=utf-8") for n, kind, text in files}
    return {"downloads": downloads, "left_out": values if is_large else 0}


# -- Files next to the page ----------------------------------------------------------------------


def markdown(results: Results, cells: Sequence[Cell], pictures: Sequence[str] = ()) -> str:
    """Return the summary and a table per data set: a row per metric, a column per variant.

    `cells` are what `statistics.compare` returns, `pictures` paths relative to the Markdown file.
    """
    tables = []
    for data in results.datasets:
        own = [cell for cell in cells if cell.data == data]
        judged: dict[str, dict[str, Cell]] = {}
        controls: dict[str, dict[str, Cell]] = {}
        for cell in own:
            rows = controls if cell.higher_is_better is None else judged
            rows.setdefault(cell.metric, {})[cell.variant] = cell
        if own:
            tables.append((data, judged, controls, _caption(results, own, cells)))
    return fragment(
        "report.md",
        title=results.title,
        sentences=sentences(results, cells),
        tables=tables,
        variants=[*results.variants],
        reference=results.references[0],
        pictures=pictures,
    )


def values_csv(results: Results) -> str:
    """Return a line per run and metric; the costs of a run follow its metrics."""
    rows: list[list[Any]] = []
    for run in results.runs:
        place = [run.data, run.variant, run.seed]
        for name, row in run.metrics.items():
            rows.append([*place, name, row.get("value"), row.get("unit"), row.get("n")])
        for key, unit in (("seconds_per_step", "s"), ("peak_memory_mib", "MiB")):
            if (cost := run.cost.get(key)) is not None:
                rows.append([*place, f"cost/{key}", cost, unit, None])
    return csv_text(["data", "variant", "seed", "metric", "value", "unit", "images"], rows)


def differences_csv(cells: Sequence[Cell]) -> str:
    """Return a line per difference.

    `verdict` follows `p_adjusted` (Benjamini-Hochberg over all comparisons of the report); `low`,
    `high` and `p` are those of the comparison alone.
    """
    names = ["value", "low", "high", "paired_by", "seeds", "images", "verdict", "p", "p_adjusted"]
    rows = [
        [cell.data, cell.variant, d.reference, cell.metric, *(getattr(d, name) for name in names)]
        for cell in cells
        for d in cell.differences
    ]
    return csv_text(["data", "variant", "reference", "metric", *names], rows)


def summary(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return results and differences without per-image values and curves."""
    runs = []
    for run in results.runs:
        shown = {key: getattr(run, key) for key in ("data", "variant", "seed", "status", "reason")}
        metrics = {
            name: {key: row.get(key) for key in ("value", "n", "unit", "higher_is_better")}
            for name, row in run.metrics.items()
        }
        runs.append({**shown, "cost": run.cost, "metrics": metrics})
    return {
        "title": results.title,
        "references": list(results.references),
        "variants": {
            name: {key: shown.get(key) for key in ("note", "changes")}
            for name, shown in results.variants.items()
        },
        "environment": _done(results).get("environment"),
        "runs": runs,
        "differences": [
            {"data": cell.data, "variant": cell.variant, "metric": cell.metric, **asdict(d)}
            for cell in cells
            for d in cell.differences
        ],
    }
