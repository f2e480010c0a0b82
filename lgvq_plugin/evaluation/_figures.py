"""Pictures of an evaluation: reconstructions, how often codes are used, generated images."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._context import Context, as_array


def write_reconstructions(path: Path, contexts: Mapping[str, Context], *, count: int = 8) -> None:
    """Write a grid: the test images, below them each host's reconstructions."""
    rows: list[Tensor] = []
    for context in contexts.values():
        images, given = next(iter(context.pairs()))
        if not rows:
            rows.append(images[:count])
        rows.append(given[:count])
    _figure(path, rows, ["input", *contexts])


def write_usage(path: Path, contexts: Mapping[str, Context]) -> None:
    """Write how often each code is used, the most frequent first, on a logarithmic scale."""
    figure, axes = _canvas(6, 3.4)
    for name, context in contexts.items():
        codes = context.test.codes
        if codes.indices is None or codes.table is None:
            continue
        counts = torch.bincount(codes.indices.flatten(), minlength=len(codes.table))
        share = (counts.sort(descending=True).values.double() / counts.sum()).numpy()
        is_used = share > 0
        dead = int((~is_used).sum())
        label = f"{name} ({dead} of {len(share)} dead)"
        axes.plot(np.arange(1, len(share) + 1)[is_used], share[is_used], label=label, lw=1.5)
    axes.set(xlabel="code, by rank", ylabel="share of all places", yscale="log")
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)  # "$" in a name is a dollar, not mathematics
    _save(figure, path)


def write_generated(path: Path, contexts: Mapping[str, Context], *, count: int = 6) -> None:
    """Write images drawn from captions, one row for each host, the captions below."""
    made = {name: c.generated for name, c in contexts.items() if c.generated is not None}
    if not made:
        return
    captions = next(iter(made.values()))[0][:count]
    rows = [images[:count] for _, images in made.values()]
    _figure(path, rows, list(made), captions)


def export(context: Context, folder: Path, kind: str) -> None:
    """Write test images and reconstructions for other evaluators.

    Args:
        context: of the host.
        folder: gets `reals.npz` and `reconstructions.npz` (`arr_0`, (M, H, W, 3) uint8, as ADM's
            evaluator reads them), or folders of PNG files of these names.
        kind: npz or png.
    """
    pairs = [(_to_bytes(a), _to_bytes(b)) for a, b in context.pairs()]
    for name, which in (("reals", 0), ("reconstructions", 1)):
        arrays = [as_array(pair[which]) for pair in pairs]
        if kind == "npz":
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{name}.npz", np.concatenate(arrays))
            continue
        from PIL import Image

        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(picture for part in arrays for picture in part):
            Image.fromarray(picture).save(folder / name / f"{i:06d}.png")


def _to_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _figure(
    path: Path, rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[str] = ()
) -> None:
    """Draw rows of images with a label each, and a caption under each column."""
    across = max(len(row) for row in rows)
    figure, axes = _canvas(
        1.5 * across + 0.6, 1.5 * len(rows) + (0.7 if captions else 0.1), len(rows), across
    )
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            if j < len(row):
                axis.imshow(as_array(_to_bytes(row[j : j + 1]))[0], interpolation="nearest")
        axes[i][0].set_ylabel(labels[i], fontsize=9, parse_math=False)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel("\n".join(textwrap.wrap(caption, 26)), fontsize=6, parse_math=False)
    _save(figure, path)


def _canvas(width: float, height: float, down: int = 0, across: int = 0) -> Any:
    """Return a figure without a window, and its axes (a grid of them if `down` is given)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if not down:
        return figure, figure.subplots()
    return figure, figure.subplots(down, across, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
