"""The numbers as text: a Markdown table for a README, and the summary for a terminal."""

import html
import re
from collections.abc import Sequence

from ._page import counted, number
from ._words import sentences
from .base import CONFIDENCE, Cell, Results


def markdown(results: Results, cells: Sequence[Cell]) -> str:
    """Return a table for each data set: metrics down, variants across, marks as in the page."""
    parts = [f"# {results.title}", "", *(f"- {line}" for line in plain_sentences(results, cells))]
    for data in results.datasets:
        own = [cell for cell in cells if cell.data == data]
        if own:
            parts += ["", *([f"## {data}", ""] if data else []), *_table(results, own)]
    return "\n".join(parts) + "\n"


def plain_sentences(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Return the summary without markup."""
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in sentences(results, cells)]


def _table(results: Results, cells: Sequence[Cell]) -> list[str]:
    variants = list(results.variants)
    lines = [f"| | {' | '.join(variants)} |", f"|---|{'---:|' * len(variants)}"]
    for metric in dict.fromkeys(cell.metric for cell in cells):
        row = {cell.variant: cell for cell in cells if cell.metric == metric}
        first = next(iter(row.values()))
        arrow = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        unit = f" ({first.unit})" if first.unit else ""
        values = [_value(row.get(variant), results.references[0]) for variant in variants]
        lines.append(f"| {metric}{unit}{arrow} | {' | '.join(values)} |")
    seeds = max(len(cell.values) for cell in cells)
    images = max((cell.images or 0 for cell in cells), default=0)
    lines += [
        "",
        f"Mean ± standard deviation over up to {counted(seeds, 'seed')}, on up to "
        f"{counted(images, 'image')}; ▲ better or ▼ worse than {results.references[0]}: the "
        f"{CONFIDENCE * 100:.0f} % bootstrap interval of the paired difference excludes zero.",
    ]
    return lines


def _value(cell: Cell | None, reference: str) -> str:
    if cell is None or cell.mean is None:
        return "–"
    found = cell.to(reference)
    mark = {"better": " ▲", "worse": " ▼", "": ""}[found.verdict if found else ""]
    spread = f" ± {number(cell.sd, digits=2)}" if cell.sd is not None else ""
    return f"{number(cell.mean)}{spread}{mark}"
