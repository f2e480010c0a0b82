"""The numbers as text: a Markdown table for a README, and the summary for a terminal."""

import re
from collections.abc import Sequence

from ._page import counted, number
from ._words import images_told, sentences
from .base import CONFIDENCE, MARKS, Cell, Results


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
