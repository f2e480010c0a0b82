"""What the numbers say, in sentences; nothing here that a number does not say."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ..files import write_text
from .page import counted, data_uri, finite, number, page
from .records import (
    CONFIDENCE,
    MARKS,
    Cell,
    Difference,
    Metric,
    Results,
    Run,
    example_file,
    mean_and_sd,
)

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


# -- The numbers as text: a Markdown table for a README, and the summary for a terminal ----------


def markdown(results: Results, cells: Sequence[Cell], pictures: Sequence[str] = ()) -> str:
    """Return a table for each data set: metrics down, variants across, marks as in the page.

    Args:
        results: of all runs.
        cells: what `statistics.compare` says of them.
        pictures: paths, relative to the text's; they come last.
    """
    items = [f"- {_safe(line)}" for line in plain_sentences(results, cells)]
    parts = [f"# {_safe(results.title)}", "", *items]
    for data in results.datasets:
        own = [cell for cell in cells if cell.data == data]
        if own:
            judged = [cell for cell in own if cell.higher_is_better is not None]
            controls = [cell for cell in own if cell.higher_is_better is None]
            parts += ["", *([f"## {_safe(data)}", ""] if data else []), *_table(results, judged)]
            parts += ["", _caption(results, own)]
            if controls:
                parts += ["", "Controls, of which neither more nor less is better:", ""]
                parts += _table(results, controls)
    parts += [line for path in pictures for line in ("", f"![{path}]({path})")]
    return "\n".join(parts) + "\n"


def plain_sentences(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Return the summary without markup."""
    return [line.striptags() for line in sentences(results, cells)]


def _safe(text: str) -> str:
    """Return text that stays text, and in its cell, wherever the Markdown is rendered.

    Example:
        >>> _safe("a|<b>")
        'a\\\\|&lt;b>'
    """
    text = " ".join(text.split())
    return re.sub(r"([|\[\]`])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _table(results: Results, cells: Sequence[Cell]) -> list[str]:
    variants = list(results.variants)
    lines = [f"| | {' | '.join(map(_safe, variants))} |", f"|---|{'---:|' * len(variants)}"]
    for metric in dict.fromkeys(cell.metric for cell in cells):
        row = {cell.variant: cell for cell in cells if cell.metric == metric}
        first = next(iter(row.values()))
        arrow = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        unit = f" ({first.unit})" if first.unit else ""
        values = [_value(row.get(variant), results.references[0]) for variant in variants]
        lines.append(f"| {_safe(metric + unit)}{arrow} | {' | '.join(values)} |")
    return lines


def _caption(results: Results, cells: Sequence[Cell]) -> str:
    seeds = max(len(cell.values) for cell in cells)
    return (
        f"Mean ± standard deviation over up to {counted(seeds, 'seed')}, on {images_told(cells)}; "
        f"▲ better or ▼ worse than {_safe(results.references[0])}: the {CONFIDENCE * 100:.0f} % "
        "bootstrap interval of the paired difference excludes zero."
    )


def _value(cell: Cell | None, reference: str) -> str:
    if cell is None or cell.mean is None:
        return "–"
    found = cell.to(reference)
    mark = MARKS[found.verdict if found else ""]
    spread = f" ± {number(cell.sd, digits=2)}" if cell.sd is not None else ""
    return f"{number(cell.mean)}{spread}{mark}"


# -- The report: one self-contained HTML page of an ablation's results ---------------------------


LARGEST_RAW = 300_000  # values by image that the page still carries
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
    """Write the page.

    Args:
        results: of all runs.
        cells: what `statistics.compare` says of them.
        path: of the HTML file.
        root: folder that the examples' paths are below.

    Returns:
        `path`.

    Raises:
        ConfigError: if an example is no picture below `root`.
    """
    sets = f" × {counted(len(results.datasets), 'data set')}" if results.datasets != [""] else ""
    lead = (
        f"{counted(len(results.variants), 'variant')} × "
        f"{counted(len({run.seed for run in results.runs}), 'seed')}{sets}; "
        f"{sum(run.status == 'done' for run in results.runs)} of "
        f"{counted(len(results.runs), 'run')} done. Compared to {results.references[0]}."
    )
    curves = [
        {"data": run.data, "variant": run.variant, "seed": run.seed, "curves": run.curves}
        for run in results.runs
        if run.curves
    ]
    text = page(
        results.title,
        "report.html",
        SECTIONS,
        lead=lead,
        data={"variants": [*results.variants], "runs": curves},
        scripts=["report.js"],
        reference=results.references[0],
        colors={variant: i % 10 for i, variant in enumerate(results.variants)},
        cards=[_card(results, cells, variant) for variant in results.variants],
        sentences=sentences(results, cells),
        **_numbers(results, cells),
        **_differences(results, cells),
        grids=_grids(results, root),
        costs=_costs(results),
        runs=[(run, run.reason or _skipped(run)) for run in results.runs],
        settings=_settings(results),
        evaluation=_evaluation(results),
        **_raw(results, cells),
    )
    write_text(path, text)
    return path


def _card(results: Results, cells: Sequence[Cell], variant: str) -> dict[str, Any]:
    counts = tally([cell for cell in cells if cell.variant == variant], results.references[0])
    return {
        "variant": variant,
        "note": results.variants[variant].get("note", ""),
        "is_reference": variant == results.references[0],
        **counts,
    }


def _numbers(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table of all numbers: a row for each data set and variant, a column for each metric."""
    metrics = {cell.metric: cell for cell in reversed(cells)}
    metrics = {name: metrics[name] for name in dict.fromkeys(cell.metric for cell in cells)}
    at = {(cell.data, cell.variant, cell.metric): cell for cell in cells}
    caption = (
        f"Mean ± standard deviation over {seeds_told(cells)}, on {images_told(cells)}. "
        f"Marked ▲ better or ▼ worse than {results.references[0]} only where the "
        f"{CONFIDENCE * 100:.0f} % bootstrap interval of the paired difference excludes zero."
    )
    rows = [
        (data, variant, {metric: at.get((data, variant, metric)) for metric in metrics})
        for data in results.datasets
        for variant in results.variants
    ]
    return {"metrics": metrics, "rows": rows, "numbers_caption": caption}


def _differences(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table of differences, each with the reach of its metric: a scale around zero."""
    found = [(cell, d) for cell in cells for d in cell.differences]
    reach: dict[tuple[str, str], float] = {}
    for cell, d in found:
        key = cell.data, cell.metric
        reach[key] = max(reach.get(key, 0.0), _reach(d))
    caption = (
        f"Variant minus reference over {span([d.seeds for _, d in found] or [0], 'seed')} and "
        f"{images_told([c for c, _ in found])}, with {CONFIDENCE * 100:.0f} % bootstrap intervals: "
        "paired by image where the metric is a mean over images (both are drawn anew), else by "
        "seed; widened for few seeds to the width of a t interval. Each metric has its own scale. "
        "No interval is given where all seeds differ by the very same."
    )
    return {
        "pairs": [(cell, d, reach[cell.data, cell.metric]) for cell, d in found],
        "pairs_caption": caption,
        "has_many": len(results.references) > 1,
    }


def _reach(d: Difference) -> float:
    ends = [abs(x) for x in (d.value, d.low, d.high) if x is not None and math.isfinite(x)]
    return max(ends, default=0.0)


def _grids(results: Results, root: Path) -> list[dict[str, Any]]:
    """The first images of one seed: the originals, then every variant's reconstructions."""
    grids = []
    for data in results.datasets:
        shown: dict[str, Run] = {}
        for variant in results.variants:
            runs = [run for run in results.runs if (run.data, run.variant) == (data, variant)]
            found = next((run for run in runs if run.examples), None)
            if found is not None:
                shown[variant] = found
        if shown:
            first = next(iter(shown.values())).examples
            columns = min(len(run.examples) for run in shown.values())
            rows = [("original", _uris([e["original"] for e in first[:columns]], root))]
            rows += [
                (variant, _uris([e["reconstruction"] for e in run.examples[:columns]], root))
                for variant, run in shown.items()
            ]
            grids.append(
                {
                    "data": data,
                    "columns": columns,
                    "rows": rows,
                    "captions": [example.get("caption", "") for example in first],
                    "seeds": sorted({run.seed for run in shown.values()}),
                }
            )
    return grids


def _uris(paths: Sequence[str], root: Path) -> list[str]:
    return [data_uri(example_file(root, path).read_bytes(), "image/png") for path in paths]


def _costs(results: Results) -> list[dict[str, Any]]:
    rows, base = [], seconds_per_step(results, results.references[0])
    for variant in results.variants:
        costs = [run.cost for run in results.runs if run.variant == variant and run.cost]
        seconds = [value for c in costs if (value := c.get("seconds_per_step"))]
        mean, sd = mean_and_sd(seconds)
        memory, _ = mean_and_sd([value for c in costs if (value := c.get("peak_memory_mib"))])
        rows.append(
            {
                "variant": variant,
                "mean": mean,
                "sd": sd,
                "ratio": mean / base if mean and base else None,
                "memory": memory,
                "runs": len(seconds),
                "device": ", ".join(sorted({str(c.get("device", "")) for c in costs})),
            }
        )
    return rows


def _skipped(run: Run) -> str:
    """Say which metrics could not be computed, and why."""
    skipped = run.evaluation.get("skipped") or {}
    return "; ".join(f"{name} skipped: {why}" for name, why in skipped.items())


def _settings(results: Results) -> list[tuple[str, str, str]]:
    """Each variant, what it changes, and its whole config."""
    return [
        (
            variant,
            _yaml(told["changes"]) if told.get("changes") else "nothing\n",
            _yaml(told["config"]) if told.get("config") else "",
        )
        for variant, told in results.variants.items()
    ]


def _evaluation(results: Results) -> dict[str, str]:
    done = next((run for run in results.runs if run.status == "done"), None)
    titles = {"settings": "Evaluation", "environment": "Environment"}
    given = {titles[name]: done.evaluation.get(name) for name in titles} if done else {}
    return {title: _yaml(value) for title, value in given.items() if value}


def _yaml(value: Any) -> str:
    plain = json.loads(json.dumps(finite(value), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=88)


def _raw(results: Results, cells: Sequence[Cell]) -> dict[str, Any]:
    """The files to download; `left_out` counts the values by image that are not in them."""
    plain = asdict(results)
    content = {"results": plain, "cells": [asdict(cell) for cell in cells]}
    metrics = [entry for run in plain["runs"] for entry in _entries(run)]
    values = sum(len(entry.get("per_image") or ()) for entry in metrics)
    is_large = values > LARGEST_RAW
    if is_large:
        for entry in metrics:
            entry["per_image"] = None
    files = {
        "results.json": (json.dumps(finite(content), default=str), "application/json"),
        "values.csv": (values_csv(results), "text/csv"),
        "differences.csv": (differences_csv(cells), "text/csv"),
    }
    downloads = {
        name: data_uri(text.encode(), f"{kind};charset=utf-8")
        for name, (text, kind) in files.items()
    }
    return {"downloads": downloads, "left_out": values if is_large else 0}


def _entries(run: dict[str, Any]) -> list[dict[str, Any]]:
    return list(run["evaluation"].get("metrics", {}).values())


def values_csv(results: Results) -> str:
    """Return one line per run and metric; the costs of a run follow its metrics."""
    rows = [
        [run.data, run.variant, run.seed, name, row.get("value"), row.get("unit"), row.get("n")]
        for run in results.runs
        for name, row in {**run.metrics, **_cost_rows(run)}.items()
    ]
    return _csv(["data", "variant", "seed", "metric", "value", "unit", "images"], rows)


def _cost_rows(run: Run) -> dict[str, Metric]:
    units = {"seconds_per_step": "s", "peak_memory_mib": "MiB"}
    cost: Mapping[str, Any] = run.cost
    return {
        f"cost/{key}": Metric(value=cost[key], unit=unit)
        for key, unit in units.items()
        if cost.get(key) is not None
    }


def differences_csv(cells: Sequence[Cell]) -> str:
    """Return one line for each difference."""
    names = ["value", "low", "high", "paired_by", "seeds", "images", "verdict"]
    rows = [
        [cell.data, cell.variant, d.reference, cell.metric, *(getattr(d, name) for name in names)]
        for cell in cells
        for d in cell.differences
    ]
    return _csv(["data", "variant", "reference", "metric", *names], rows)


def _csv(heads: list[str], rows: list[list[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return file.getvalue()
