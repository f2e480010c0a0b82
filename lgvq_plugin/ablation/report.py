"""The report: one self-contained HTML page of an ablation's results.

Results + Cells --> words, table, differences, curves, images, cost, runs, settings, raw numbers
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from .._files import write_text
from ._page import counted, data_uri, download, escape, finite, number, page, table
from ._tables import differences, numbers, swatch
from ._words import seconds_per_step, sentences, tally
from .base import Cell, Results, Run, mean_and_sd

LARGEST_RAW = 300_000  # values by image that the page still carries


def write_report(results: Results, cells: Sequence[Cell], path: Path, *, root: Path) -> Path:
    """Write the page.

    Args:
        results: of all runs.
        cells: what `statistics.compare` says of them.
        path: of the HTML file.
        root: folder that the examples' paths are below.

    Returns:
        `path`.
    """
    sections = [
        ("summary", "Summary", _summary(results, cells)),
        ("table", "All numbers", numbers(results, cells)),
        ("differences", "Differences", differences(results, cells)),
        ("curves", "Curves", _CURVES),
        ("images", "Reconstructions", _images(results, root)),
        ("cost", "Cost", _cost(results)),
        ("runs", "Runs", _runs(results)),
        ("settings", "Settings", _settings(results)),
        ("raw", "Raw numbers", _raw(results, cells)),
    ]
    done = sum(run.status == "done" for run in results.runs)
    lead = (
        f"<p>{counted(len(results.variants), 'variant')} × "
        f"{counted(len({run.seed for run in results.runs}), 'seed')}"
        + (f" × {counted(len(results.datasets), 'data set')}" if results.datasets != [""] else "")
        + f"; {done} of {counted(len(results.runs), 'run')} done. "
        f"Compared to <b>{escape(results.references[0])}</b>.</p>"
    )
    curves = [
        {"data": run.data, "variant": run.variant, "seed": run.seed, "curves": run.curves}
        for run in results.runs
        if run.curves
    ]
    data = {"variants": [*results.variants], "runs": curves}
    text = page(results.title, sections, lead=lead, data=data, scripts=["report.js"])
    write_text(path, text)
    return path


def _summary(results: Results, cells: Sequence[Cell]) -> str:
    reference = results.references[0]
    cards = []
    for variant, told in results.variants.items():
        own = [cell for cell in cells if cell.variant == variant]
        counts = tally(own, reference)
        if variant == reference:
            big = "reference"
        elif sum(counts.values()):
            big = (
                f'<span class="done">{counts["better"]}</span> better · '
                f'<span class="failed">{counts["worse"]}</span> worse'
            )
        else:
            big = "not judged"
        small = f"{counts['open']} not told apart" if sum(counts.values()) else ""
        cards.append(
            f'<div class="card"><h3>{swatch(results, variant)}{escape(variant)}</h3>'
            f'<div class="big">{big}</div>'
            f'<div class="note">{small}</div><div class="note">{escape(told.get("note", ""))}</div>'
            "</div>"
        )
    items = "".join(f"<li>{sentence}</li>" for sentence in sentences(results, cells))
    return f'<div class="cards">{"".join(cards)}</div><ul>{items}</ul>'


_CURVES = (
    '<div class="controls"><label>Key <select id="curve-key"></select></label>'
    '<label id="curve-data-label">Data <select id="curve-data"></select></label>'
    '<label class="inline"><input type="checkbox" id="curve-seeds" checked> each seed</label>'
    '<label class="inline"><input type="checkbox" id="curve-log"> log scale</label></div>'
    '<div class="legend" id="curve-legend"></div><div class="chart" id="curve"></div>'
    '<div class="tip" id="curve-tip" aria-live="polite"></div><p class="note" id="curve-note"></p>'
)


def _images(results: Results, root: Path) -> str:
    """The first images of one seed: the originals, then every variant's reconstructions."""
    parts = []
    for data in results.datasets:
        shown = {}
        for variant in results.variants:
            runs = [run for run in results.runs if (run.data, run.variant) == (data, variant)]
            found = next((run for run in runs if run.examples), None)
            if found is not None:
                shown[variant] = found
        if shown:
            parts.append(_image_grid(results, data, shown, root))
    return "".join(parts) or "<p>No run kept images.</p>"


def _image_grid(results: Results, data: str, shown: dict[str, Run], root: Path) -> str:
    first = next(iter(shown.values()))
    columns = min(len(run.examples) for run in shown.values())
    rows = [("original", "", [example["original"] for example in first.examples])]
    for variant, run in shown.items():
        paths = [example["reconstruction"] for example in run.examples]
        rows.append((variant, swatch(results, variant), paths))
    captions = [example.get("caption", "") for example in first.examples]
    cells = []
    for name, color, paths in rows:
        cells.append(f'<div class="name">{color}{escape(name)}</div>')
        for i, path in enumerate(paths[:columns]):
            uri = data_uri((root / path).read_bytes(), "image/png")
            cells.append(
                f'<button type="button" data-column="{i}" data-row="{escape(name)}" '
                f'data-caption="{escape(captions[i])}">'
                f'<img src="{uri}" alt="{escape(name)}, image {i + 1}"></button>'
            )
    seeds = sorted({run.seed for run in shown.values()})
    told = f"Seed {', '.join(map(str, seeds))}; the first {counted(columns, 'evaluated image')}"
    heading = f"<h3>{escape(data)}</h3>" if data else ""
    return (
        f'{heading}<div class="scroll"><div class="grid" data-columns="{columns}" '
        f'style="grid-template-columns:auto repeat({columns},max-content)">{"".join(cells)}</div>'
        f'</div><p class="note">{told}, not chosen. Click to enlarge, ← → for the next.</p>'
    )


def _cost(results: Results) -> str:
    rows, base = [], seconds_per_step(results, results.references[0])
    for variant in results.variants:
        costs = [run.cost for run in results.runs if run.variant == variant and run.cost]
        seconds = [c["seconds_per_step"] for c in costs if c.get("seconds_per_step")]
        mean, sd = mean_and_sd(seconds)
        memory, _ = mean_and_sd([c["peak_memory_mib"] for c in costs if c.get("peak_memory_mib")])
        ratio = mean / base if mean and base else None
        device = ", ".join(sorted({str(c.get("device", "")) for c in costs}))
        rows.append(
            f'<tr><th scope="row">{swatch(results, variant)}{escape(variant)}</th>'
            f'<td data-value="{mean or ""}"><b>{number(mean)}</b>'
            f"<small>± {number(sd, digits=2)}</small></td>"
            f'<td data-value="{ratio or ""}">{number(ratio, digits=3)}</td>'
            f'<td data-value="{memory or ""}">{number(memory)}</td>'
            f'<td data-value="{len(seconds)}">{len(seconds)}</td>'
            f'<td class="text">{escape(device)}</td></tr>'
        )
    names = ("variant", "seconds a step", f"× {results.references[0]}", "peak memory, MiB", "runs")
    heads = [f'<th scope="col">{escape(name)}</th>' for name in names]
    caption = (
        "Wall time from the first to the last step, with validations and checkpoints, by steps; "
        "other work on the machine is in it. Memory: the GPU's if there is one, else the process's."
    )
    return table(
        "costs", [*heads, '<th scope="col" class="text">device</th>'], rows, caption=caption
    )


def _runs(results: Results) -> str:
    rows = [
        f'<tr><th scope="row">{escape("/".join(p for p in (run.data, run.variant) if p))}</th>'
        f'<td>{run.seed}</td><td class="text {run.status}">{run.status}</td>'
        f"<td>{number(run.cost.get('steps'))}</td>"
        f'<td class="text">{escape(run.reason or _skipped(run))}</td></tr>'
        for run in results.runs
    ]
    heads = ["<th>variant</th>", "<th>seed</th>", '<th class="text">status</th>', "<th>steps</th>"]
    caption = f"All {counted(len(results.runs), 'run')} of the plan; none is left out."
    return table("all-runs", [*heads, '<th class="text">reason</th>'], rows, caption=caption)


def _skipped(run: Run) -> str:
    """Say which metrics could not be computed, and why."""
    skipped = run.evaluation.get("skipped") or {}
    return "; ".join(f"{name} skipped: {why}" for name, why in skipped.items())


def _settings(results: Results) -> str:
    parts = []
    for variant, told in results.variants.items():
        changes = told.get("changes") or {}
        text = _yaml(changes) if changes else "nothing\n"
        full = _yaml(told["config"]) if told.get("config") else ""
        whole = f"<details><summary>whole config</summary><pre>{escape(full)}</pre></details>"
        parts.append(
            f"<h3>{swatch(results, variant)}{escape(variant)}: what it changes</h3>"
            f"<pre>{escape(text)}</pre>{whole if full else ''}"
        )
    done = next((run for run in results.runs if run.status == "done"), None)
    for name in ("settings", "environment"):
        given = done.evaluation.get(name) if done else None
        if given:
            title = "Evaluation" if name == "settings" else "Environment"
            parts.append(f"<h3>{title}</h3><pre>{escape(_yaml(given))}</pre>")
    return "".join(parts)


def _yaml(value: Any) -> str:
    plain = json.loads(json.dumps(finite(value), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=88)


def _raw(results: Results, cells: Sequence[Cell]) -> str:
    plain = asdict(results)
    content = {"results": plain, "cells": [asdict(cell) for cell in cells]}
    metrics = [entry for run in plain["runs"] for entry in _entries(run)]
    values = sum(len(entry.get("per_image") or ()) for entry in metrics)
    if values > LARGEST_RAW:
        for entry in metrics:
            entry["per_image"] = None
    left_out = (
        f" {values:,} values by image are in results.json alone." if values > LARGEST_RAW else ""
    )
    return (
        "<p>The numbers of this page, as they are before rounding.</p>"
        f"<p>{download('results.json', json.dumps(finite(content)), 'application/json')} "
        f"{download('values.csv', values_csv(results), 'text/csv')} "
        f"{download('differences.csv', differences_csv(cells), 'text/csv')}</p>"
        f'<p class="note">values.csv: one line for each run and metric. differences.csv: one for '
        f"each paired difference.{left_out}</p>"
    )


def _entries(run: dict[str, Any]) -> list[dict[str, Any]]:
    return list(run["evaluation"].get("metrics", {}).values())


def values_csv(results: Results) -> str:
    """Return one line per run and metric; the costs of a run follow its metrics."""
    rows = [
        [run.data, run.variant, run.seed, name, row.get("value"), row.get("unit"), row.get("n")]
        for run in results.runs
        for name, row in (run.metrics | _costs(run)).items()
    ]
    return _csv(["data", "variant", "seed", "metric", "value", "unit", "images"], rows)


def _costs(run: Run) -> dict[str, dict[str, Any]]:
    units = {"seconds_per_step": "s", "peak_memory_mib": "MiB"}
    cost: Mapping[str, Any] = run.cost
    return {
        f"cost/{key}": {"value": cost[key], "unit": unit}
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
