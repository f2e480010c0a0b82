"""Pictures for a README or a paper: what the page shows, as two PNG files.

numbers.png: a panel for each metric, a row for each variant, a dot for each seed
images.png: originals and every variant's reconstructions
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .page import number
from .records import MARKS, Cell, Results, Run, example_file

NUMBERS, IMAGES = "numbers.png", "images.png"
SHOWN = {
    "reconstruction/psnr": "PSNR",
    "codebook/usage": "codebook usage",
    "retrieval/image_to_text/recall@5": "image → text R@5",
    "retrieval/text_to_image/recall@5": "text → image R@5",
    "attributes/linear/mean_accuracy": "attributes, linear probe",
    "attributes/few_shot/mean_accuracy": "attributes, few-shot",
    "masked_words/leak_free/mask_1/recall@5": "1 hidden word, R@5",
    "masked_words/leak_free/mask_3/recall@5": "3 hidden words, R@5",
    "caption/cider_d": "captions, CIDEr-D",
    "vqa/accuracy": "questions, accuracy",
    "t2i/bits_per_code": "bits a code, given text",
    "t2i/text_gain": "of which text tells",
}
"""Metrics with a panel, and its title; where a plan has none of them, its first ones have."""
COLUMNS = 4
COLORS = {"better": "#07855a", "worse": "#b3263f", "": "#5b6675"}


def write_figures(results: Results, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write `numbers.png` and `images.png`, with the data set's name before the dot if it has one.

    Args:
        results: of all runs; the paths of their examples are below `folder`.
        cells: what `statistics.compare` says of them.
        folder: of the pictures.

    Returns:
        The paths of what there was anything to draw of.
    """
    written = []
    for data in results.datasets:
        own = [c for c in cells if c.data == data and c.mean is not None]
        shown = [c for c in own if c.metric in SHOWN] or [
            c for c in own if c.higher_is_better is not None
        ]
        if shown:
            written.append(_numbers(results, shown, folder / _named(NUMBERS, data)))
        rows = _examples(results, data)
        if rows:
            written.append(_images(rows, folder, folder / _named(IMAGES, data)))
    return written


def _named(name: str, data: str) -> str:
    stem, _, suffix = name.partition(".")
    return f"{stem}_{data}.{suffix}" if data else name


def _numbers(results: Results, cells: Sequence[Cell], path: Path) -> Path:
    """Draw a panel for each metric; a filled dot is the mean, its color the verdict."""
    there = list(dict.fromkeys(c.metric for c in cells))
    metrics = [metric for metric in SHOWN if metric in there] or there[: len(SHOWN)]
    variants, reference = list(results.variants), results.references[0]
    down = math.ceil(len(metrics) / COLUMNS)
    height = 0.55 + 0.24 * len(variants)
    figure, axes = _canvas(2.9 * COLUMNS, down * height + 0.35, down, COLUMNS)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        found = {c.variant: c for c in cells if c.metric == metric}
        for place, variant in enumerate(variants):
            cell = found.get(variant)
            if cell is None or cell.mean is None:
                continue
            difference = cell.to(reference)
            verdict = difference.verdict if difference else ""
            color = COLORS[verdict]
            axis.plot(
                [*cell.values.values()], [place] * len(cell.values), "|", color=color, ms=9, mew=1.3
            )
            axis.plot([cell.mean], [place], "o", color=color, ms=6)
            axis.annotate(
                number(cell.mean) + MARKS[verdict],
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=color,
            )
        if reference in found:
            axis.axvline(found[reference].mean, color=COLORS[""], lw=0.8, ls=":")
        axis.set_yticks(range(len(variants)), variants, fontsize=8)
        axis.set_ylim(len(variants) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(_title(found), fontsize=8)
        if axis.get_subplotspec().colspan.start:
            axis.set_yticklabels([])
    figure.supxlabel(_caption(cells, reference), fontsize=8)
    return _save(figure, path)


def _title(found: dict[str, Cell]) -> str:
    cell = next(iter(found.values()))
    arrow = {True: " ↑", False: " ↓", None: ""}[cell.higher_is_better]
    name = SHOWN.get(cell.metric, cell.metric)
    return name + (f", {cell.unit}" if cell.unit else "") + arrow


def _caption(cells: Sequence[Cell], reference: str) -> str:
    seeds = max(len(c.values) for c in cells)
    images = sorted({c.images for c in cells if c.images})
    told = f"{images[0]:,}" if images[:1] == images[-1:] else f"{images[0]:,} to {images[-1]:,}"
    many = f"Each of {seeds} seeds and the mean" if seeds > 1 else "One seed"
    return (
        f"{many}, {told} values each; green ▲ better, red ▼ worse than {reference}: "
        "the 95 % interval of the paired difference excludes zero"
    )


def _examples(results: Results, data: str) -> dict[str, Run]:
    """Return the first run with examples of each variant."""
    found: dict[str, Run] = {}
    for run in results.runs:
        if run.data == data and run.examples:
            found.setdefault(run.variant, run)
    return found


def _images(runs: dict[str, Run], root: Path, path: Path) -> Path:
    from matplotlib.image import imread

    first = next(iter(runs.values()))
    across = min(len(run.examples) for run in runs.values())
    rows = [("original", [one["original"] for one in first.examples])]
    rows += [(name, [one["reconstruction"] for one in run.examples]) for name, run in runs.items()]
    figure, axes = _canvas(1.3 * across + 0.4, 1.3 * len(rows) + 0.7, len(rows), across)
    for line, (name, paths) in zip(axes, rows, strict=True):
        for axis, image in zip(line, paths, strict=False):
            axis.imshow(imread(example_file(root, image)), interpolation="nearest")
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=9)
    for axis, one in zip(axes[-1], first.examples, strict=False):
        axis.set_xlabel("\n".join(textwrap.wrap(one.get("caption", ""), 24)[:4]), fontsize=6)
    return _save(figure, path)


def _canvas(width: float, height: float, down: int, across: int) -> Any:
    """Return a figure without a window, and its grid of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # "$" in a caption is a dollar, not mathematics
        text.set_parse_math(False)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
    return path
