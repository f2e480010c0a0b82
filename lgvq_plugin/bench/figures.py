"""The report as two PNG files, for a README or a paper.

numbers.png: a panel per metric, a row per variant, a tick per seed
images.png: originals and the reconstructions of every variant
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replacing
from .page import example_file, number
from .records import Cell, Results

TITLES = {
    "reconstruction/psnr": "PSNR",
    "codebook/usage": "codebook usage",
    "retrieval/image_to_text/recall@5": "image → text R@5",
    "retrieval/text_to_image/recall@5": "text → image R@5",
    "attributes/linear/mean_accuracy": "attributes, linear probe",
    "attributes/few_shot/mean_accuracy": "attributes, few-shot",
    "masked_words/leak_free/mask_1/recall@5": "1 masked word, R@5",
    "masked_words/leak_free/mask_3/recall@5": "3 masked words, R@5",
    "caption/cider_d": "captions, CIDEr-D",
    "vqa/accuracy": "VQA accuracy",
    "t2i/bits_per_code": "bits per code, given text",
    "t2i/text_gain": "text gain per code",
}
"""Metrics with a panel, and its title; a plan with none of them gets panels for its first ones."""
COLUMNS = 4
COLORS = {"better": "#07855a", "worse": "#b3263f", "": "#5b6675"}


def write_figures(results: Results, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write numbers.png and images.png to `folder`, or one of each per data set (numbers_DATA.png).

    `cells` are what `statistics.compare` returns; the examples' paths are relative to `folder`.
    Returns the paths of the figures; a figure without content is not written.
    """
    written = []
    for data in results.datasets:
        suffix = f"_{data}.png" if data else ".png"
        own = [c for c in cells if c.data == data and c.mean is not None]
        shown = [c for c in own if c.metric in TITLES] or [
            c for c in own if c.higher_is_better is not None
        ]
        if shown:
            written.append(_numbers(results, shown, folder / f"numbers{suffix}"))
        if found := results.examples(data):
            files = [[example_file(folder, name) for name in row] for row in found.rows.values()]
            rows = [[Image.open(file) for file in row] for row in files]
            path = folder / f"images{suffix}"
            written.append(image_grid(path, rows, [*found.rows], found.captions))
    return written


def _numbers(results: Results, cells: Sequence[Cell], path: Path) -> Path:
    """Draw a panel per metric; a dot is the mean, its color the verdict."""
    available = list(dict.fromkeys(c.metric for c in cells))
    metrics = [name for name in TITLES if name in available] or available[: len(TITLES)]
    variants, reference = list(results.variants), results.references[0]
    rows = math.ceil(len(metrics) / COLUMNS)
    height = rows * (0.55 + 0.24 * len(variants)) + 0.35
    figure, axes = canvas(2.9 * COLUMNS, height, rows, COLUMNS)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        found = {c.variant: c for c in cells if c.metric == metric}
        _panel(axis, found, variants, reference)
        if axis.get_subplotspec().colspan.start:
            axis.set_yticklabels([])
    seeds = max(len(c.values) for c in cells)
    counts = sorted({c.images for c in cells if c.images}) or [0]
    values = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    figure.supxlabel(
        f"{f'{seeds} seeds and their mean' if seeds > 1 else 'One seed'}, {values} values each; "
        f"green ▲ better, red ▼ worse than {reference} (false discovery rate 5 %); "
        "△ ▽ only the uncorrected 95 % interval excludes zero",
        fontsize=8,
    )
    return save_figure(figure, path)


def _panel(axis: Any, found: Mapping[str, Cell], variants: Sequence[str], reference: str) -> None:
    for place, variant in enumerate(variants):
        cell = found.get(variant)
        if cell is None or cell.mean is None:
            continue
        difference = cell.to(reference)
        verdict = difference.verdict if difference else ""
        color = COLORS[verdict]
        values = [*cell.values.values()]
        axis.plot(values, [place] * len(values), "|", color=color, ms=9, mew=1.3)
        axis.plot([cell.mean], [place], "o", color=color, ms=6)
        text, at = number(cell.mean) + cell.mark(reference), ("axes fraction", "data")
        axis.annotate(text, (1.02, place), xycoords=at, va="center", fontsize=8, color=color)
    if reference in found:
        axis.axvline(found[reference].mean, color=COLORS[""], lw=0.8, ls=":")
    axis.set_yticks(range(len(variants)), variants, fontsize=8)
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=4)
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    cell = next(iter(found.values()))
    arrow = {True: " ↑", False: " ↓", None: ""}[cell.higher_is_better]
    unit = f", {cell.unit}" if cell.unit else ""
    axis.set_title(TITLES.get(cell.metric, cell.metric) + unit + arrow, fontsize=8)


def image_grid(
    path: Path, rows: Sequence[Any], labels: Sequence[str], captions: Sequence[str] = ()
) -> Path:
    """Draw labeled rows of images (H, W, 3), with a caption below each column; return the path."""
    across, height = max(map(len, rows)), 0.7 if captions else 0.1
    figure, axes = canvas(1.3 * across + 0.5, 1.3 * len(rows) + height, len(rows), across)
    for line, row, label in zip(axes, rows, labels, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for axis, image in zip(line, row, strict=False):
            axis.imshow(image, interpolation="nearest")
        line[0].set_ylabel(label, fontsize=9)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel("\n".join(textwrap.wrap(caption, 24)[:4]), fontsize=6)
    return save_figure(figure, path)


def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """Return a figure without a window, and its grid of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG; return the path."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a "$" in a caption is not math
        text.set_parse_math(False)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
    return path
