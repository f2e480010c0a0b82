"""Results of one or several hosts as a table in the terminal, and as CSV."""

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

ARROWS = {True: "↑", False: "↓", None: " "}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one column for each host; `*` marks the best of several.

    Args:
        results: name of a host -> what `evaluate` returned.

    Example:
        >>> row = {"value": 20.5, "n": 8, "unit": "dB", "higher_is_better": True}
        >>> print(table({"a": {"metrics": {"reconstruction/psnr": row}, "skipped": {}}}))
        metric                n          a
        reconstruction/psnr ↑ 8   20.50 dB
    """
    hosts = list(results)
    names = _names(results)
    lines = [["metric", "n", *hosts]]
    for name in names:
        rows = [results[host]["metrics"].get(name) for host in hosts]
        first = next(row for row in rows if row)
        counts = {row["n"] for row in rows if row}
        count = str(counts.pop()) if len(counts) == 1 else "differs"
        best = _best(rows, first["higher_is_better"])
        cells = [_cell(row, is_best) for row, is_best in zip(rows, best, strict=True)]
        lines.append([f"{name} {ARROWS[first['higher_is_better']]}", count, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    told = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].rjust(widths[1])]
        cells += [
            f"  {cell.rjust(width)}" for cell, width in zip(line[2:], widths[2:], strict=True)
        ]
        told.append(" ".join(cells).rstrip())
    for host in hosts:
        for name, why in results[host].get("skipped", {}).items():
            told.append(f"{host}: {name} skipped: {why}")
    return "\n".join(told)


def as_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each host and metric, its settings as JSON in the last column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["host", "metric", "value", "n", "unit", "higher_is_better", "settings"])
    for host, result in results.items():
        for name, row in result["metrics"].items():
            settings = json.dumps(row.get("settings", {}), sort_keys=True, default=str)
            values = (row["value"], row["n"], row["unit"], row["higher_is_better"])
            writer.writerow([host, name, *values, settings])
    return text.getvalue()


def _names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for result in results.values():
        found |= dict.fromkeys(result["metrics"])
    return list(found)


def _best(rows: list[Any], higher: bool | None) -> list[bool]:
    values = [row["value"] for row in rows if row and math.isfinite(row["value"])]
    if higher is None or len(values) < 2 or min(values) == max(values):
        return [False] * len(rows)
    best = max(values) if higher else min(values)
    return [bool(row) and row["value"] == best for row in rows]


def _cell(row: Any, is_best: bool) -> str:
    if not row:
        return "-"
    value, unit = row["value"], row["unit"]
    digits = 2 if unit == "dB" or abs(value) >= 100 else 4
    text = (
        str(int(value)) if float(value).is_integer() and abs(value) >= 2 else f"{value:.{digits}f}"
    )
    return f"{text}{' ' + unit if unit else ''}{' *' if is_best else ''}"
