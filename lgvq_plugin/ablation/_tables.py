"""The two tables of a report: all numbers, and all differences with their intervals."""

import math
from collections.abc import Sequence

from ._page import counted, escape, number, table
from .base import CONFIDENCE, Cell, Difference, Results


def swatch(results: Results, variant: str) -> str:
    """Return the colored square that stands for a variant in tables, legends and curves."""
    color = f"var(--s{list(results.variants).index(variant) % 10})"
    return f'<span class="swatch" style="background:{color}"></span>'


def _metric_head(cell: Cell) -> str:
    group, _, name = cell.metric.rpartition("/")
    arrow = {True: "higher is better ↑", False: "lower is better ↓", None: ""}[
        cell.higher_is_better
    ]
    unit = f" ({escape(cell.unit)})" if cell.unit else ""
    return (
        f'<th scope="col" data-metric="{escape(cell.metric)}"{_neutral(cell)}>'
        f"<small>{escape(group)}</small>{escape(name)}{unit}<small>{arrow}</small></th>"
    )


def numbers(results: Results, cells: Sequence[Cell]) -> str:
    if not cells:
        return "<p>No run is done, so there are no numbers.</p>"
    firsts = {cell.metric: cell for cell in reversed(cells)}
    metrics = list(dict.fromkeys(cell.metric for cell in cells))
    at = {(cell.data, cell.variant, cell.metric): cell for cell in cells}
    reference = results.references[0]
    rows = []
    for data in results.datasets:
        for variant in results.variants:
            name = f"<br><small>{escape(data)}</small>" if data else ""
            row = [at.get((data, variant, metric)) for metric in metrics]
            rows.append(
                f'<tr data-variant="{escape(variant)}"><th scope="row" class="sticky-narrow">'
                f"{swatch(results, variant)}{escape(variant)}{name}</th>"
                + "".join(_number_cell(c, reference, m) for c, m in zip(row, metrics, strict=True))
                + "</tr>"
            )
    heads = ['<th scope="col">variant</th>', *(_metric_head(firsts[m]) for m in metrics)]
    caption = (
        f"Mean ± standard deviation over {seeds_told(cells)}, on {images_told(cells)}. "
        f"Marked ▲ better or ▼ worse than {escape(reference)} only where the "
        f"{CONFIDENCE * 100:.0f} % bootstrap interval of the paired difference excludes zero."
    )
    controls = (
        '<div class="controls"><label>Variants <input type="search" id="find-variant" '
        'placeholder="all"></label><label>Metrics <input type="search" id="find-metric" '
        'placeholder="all"></label><label class="inline"><input type="checkbox" id="only-marked"> '
        'only metrics with a mark</label><label class="inline"><input type="checkbox" '
        'id="controls"> controls too</label></div>'
    )
    empty = '<p class="note hidden" data-empty="numbers">No variant is called so.</p>'
    return controls + table("numbers", heads, rows, caption=caption) + empty


def _number_cell(cell: Cell | None, reference: str, metric: str) -> str:
    at = f'data-metric="{escape(metric)}"'
    if cell is None or cell.mean is None:
        return f'<td {at} data-value=""><small>no run done</small></td>'
    found = cell.to(reference)
    kind = f' class="{found.verdict}"' if found and found.verdict else ""
    spread = f"± {number(cell.sd, digits=2)}" if cell.sd is not None else "one seed"
    value = f"<b>{number(cell.mean)}</b><small>{spread}</small>"
    return f'<td {at}{kind} data-value="{cell.mean}">{value}</td>'


def _span(values: Sequence[int], noun: str) -> str:
    low, high = min(values), max(values)
    return counted(low, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def seeds_told(cells: Sequence[Cell]) -> str:
    return _span([len(cell.values) for cell in cells if cell.values] or [0], "seed")


def images_told(cells: Sequence[Cell]) -> str:
    """Return "512 images", or a range where metrics count other things too."""
    counts = [cell.images for cell in cells if cell.images] or [0]
    return _span(counts, "image") + ("" if len({*counts}) == 1 else " (or questions, or words)")


def _neutral(cell: Cell) -> str:
    """Mark a control: a metric of which neither more nor less is better."""
    return " data-neutral" if cell.higher_is_better is None else ""


def differences(results: Results, cells: Sequence[Cell]) -> str:
    pairs = [(cell, d) for cell in cells for d in cell.differences]
    if not pairs:
        return "<p>There is nothing to compare: no seed is done in a variant and its reference.</p>"
    reach: dict[tuple[str, str], float] = {}
    for cell, d in pairs:
        ends = [abs(x) for x in (d.value, d.low, d.high) if x is not None and math.isfinite(x)]
        key = cell.data, cell.metric
        reach[key] = max([reach.get(key, 0.0), *ends])
    rows = [_difference_row(results, cell, d, reach[cell.data, cell.metric]) for cell, d in pairs]
    has_many = len(results.references) > 1
    heads = ['<th scope="col">metric</th>', '<th scope="col" class="text">variant</th>']
    heads += ['<th scope="col" class="text">against</th>'] if has_many else []
    heads += ['<th scope="col">difference</th>', '<th scope="col">around zero</th>']
    heads += [
        '<th scope="col" class="text">verdict</th>',
        '<th scope="col" class="text">paired</th>',
    ]
    caption = (
        f"Variant minus reference over {_span([d.seeds for _, d in pairs], 'seed')} and "
        f"{images_told([c for c, _ in pairs])}, with {CONFIDENCE * 100:.0f} % bootstrap intervals: "
        "paired by image where the metric is a mean over images (both are drawn anew), else by "
        "seed; widened for few seeds to the width of a t interval. Each metric has its own scale. "
        "No interval is given where all seeds differ by the very same."
    )
    variants = "".join(f"<option>{escape(v)}</option>" for v in results.variants)
    controls = (
        '<div class="controls"><label>Find <input type="search" id="find-difference" '
        f'placeholder="metric"></label><label>Variant <select id="which-variant"><option value="">'
        f'all</option>{variants}</select></label><label class="inline"><input type="checkbox" '
        'id="only-clear"> only better or worse</label><label class="inline"><input '
        'type="checkbox" id="pair-controls"> controls too</label></div>'
    )
    empty = '<p class="note hidden" data-empty="pairs">No difference is like that.</p>'
    return controls + table("pairs", heads, rows, caption=caption) + empty


def _difference_row(results: Results, cell: Cell, d: Difference, reach: float) -> str:
    unit = f" {escape(cell.unit)}" if cell.unit else ""
    interval = "no interval"
    if d.low is not None:
        interval = f"{number(d.low, signed=True)} to {number(d.high, signed=True)}"
    is_neutral = cell.higher_is_better is None
    verdict = d.verdict or (
        "neutral" if is_neutral else "open" if d.low is not None else "not judged"
    )
    mark = f'<span class="mark {d.verdict}">{verdict}</span>'
    paired = counted(d.seeds, "seed") + (f", {counted(d.images, 'image')}" if d.images else "")
    name = breakable(cell.metric) + (f"<small>{escape(cell.data)}</small>" if cell.data else "")
    has_many = len(results.references) > 1
    return (
        f'<tr data-variant="{escape(cell.variant)}" data-verdict="{d.verdict}"'
        f"{_neutral(cell)}>"
        f'<td class="sticky-narrow">{name}</td>'
        f'<td class="text">{swatch(results, cell.variant)}{escape(cell.variant)}</td>'
        + (f'<td class="text">{escape(d.reference)}</td>' if has_many else "")
        + f'<td data-value="{d.value}"><b>{number(d.value, signed=True)}</b>{unit}'
        f"<small>{interval}</small></td>"
        f'<td data-value="{d.value / (reach or 1)}">{_whisker(d, reach)}</td>'
        f'<td class="text">{mark}</td><td class="text">{paired}</td></tr>'
    )


def breakable(metric: str) -> str:
    """Return the name of a metric, which may break after a slash or an underscore."""
    return escape(metric).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _whisker(d: Difference, reach: float) -> str:
    def x(value: float) -> str:
        return f"{120 + 110 * value / (reach or 1):.1f}"

    lines = '<line class="zero" x1="120" y1="1" x2="120" y2="21"></line>'
    if d.low is not None and d.high is not None:
        lines += f'<line x1="{x(d.low)}" y1="11" x2="{x(d.high)}" y2="11"></line>'
        for end in (d.low, d.high):
            lines += f'<line x1="{x(end)}" y1="7" x2="{x(end)}" y2="15"></line>'
    dot = f'<circle cx="{x(d.value)}" cy="11" r="4.5"></circle>' if math.isfinite(d.value) else ""
    label = f'role="img" aria-label="{d.verdict or "open"}"'
    return f'<svg class="whisker {d.verdict}" viewBox="0 0 240 22" {label}>{lines}{dot}</svg>'
