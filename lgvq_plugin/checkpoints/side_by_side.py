"""Compare hosts on the same held-out images: the numbers of each, and the paired differences."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bench.evaluation import evaluate

SHOWN = ("reconstruction/psnr", "reconstruction/ssim", "codebook/usage", "codebook/perplexity")
MIN_CAPTIONED = 20  # captioned images in each split for the retrieval probe


def compare_hosts(
    hosts: Mapping[str, nn.Module],
    data: Mapping[str, Any],
    *,
    guide: Mapping[str, Any] | None,
    batch_size: int = 16,
    max_images: int = 500,
) -> dict[str, Any]:
    """Measure hosts on the same images, the first `max_images`, as `lgvq eval` does.

    Args:
        hosts: `old` and `new`, and optionally `control`; in evaluation mode, on one device.
        data: `{target, params}` of `test`, and of `train` for the retrieval probe.
        guide: the `lgvq.guide` block for the retrieval probe; None leaves it out.
        batch_size: images per batch.
        max_images: number of images of each split.

    Returns:
        `{metric: {"old", "new", "difference", "half_width", "n", "unit"}}`: new - old, and half
        the width of its 95 % interval over images (None if there is none); with a control also
        `control`, `gain` (new - control) and `gain_half_width`.
    """
    limit = max(max_images, 2)
    options = {"limit": limit, "train_limit": limit, "batch_size": batch_size, "guide": guide}
    metrics = ["psnr", "ssim", "usage", *(["retrieval"] if guide is not None else [])]
    found = {
        name: evaluate(host, {"data": data}, metrics=metrics, options=options, progress=False)
        for name, host in hosts.items()
    }
    compared: dict[str, Any] = {}
    for metric in found["old"]["metrics"]:
        rows = {name: result["metrics"].get(metric) for name, result in found.items()}
        if all(rows.values()) and (metric in SHOWN or _is_recall(metric, rows["old"])):
            compared[metric] = _differences(rows)
    return compared


def _is_recall(metric: str, row: Mapping[str, Any]) -> bool:
    is_recall = metric.startswith("retrieval/") and "recall" in metric
    return is_recall and min(row["n"], row["settings"]["train_images"]) >= MIN_CAPTIONED


def _differences(rows: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: row["value"] for name, row in rows.items()}
    made = {**values, "difference": values["new"] - values["old"]}
    made |= {"n": rows["old"]["n"], "unit": rows["old"]["unit"]}
    made["half_width"] = _half_width(rows["new"], rows["old"])
    if "control" in rows:
        made["gain"] = values["new"] - values["control"]
        made["gain_half_width"] = _half_width(rows["new"], rows["control"])
    return made


def _half_width(after: Mapping[str, Any], before: Mapping[str, Any]) -> float | None:
    """Return half the width of the 95 % interval of a paired difference, by normal theory."""
    if "per_image" not in after or after["n"] < 2:
        return None
    pairs = torch.tensor([after["per_image"], before["per_image"]], dtype=torch.float64)
    return 1.96 * float((pairs[0] - pairs[1]).std()) / math.sqrt(after["n"])


def as_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of :func:`compare_hosts` as a Markdown table.

    >>> row = {"old": 1.0, "new": 2.0, "difference": 1.0, "half_width": None, "n": 3}
    >>> print(as_table({"reconstruction/psnr": {**row, "unit": "dB"}}))
    | metric | old | new | new - old | n |
    |---|---|---|---|---|
    | reconstruction/psnr (dB) | 1.000 | 2.000 | +1.000 | 3 |
    """
    has_control = any("control" in row for row in rows.values())
    names = ["old", *(["control"] if has_control else []), "new"]
    gaps = [("new - old", "difference", "half_width")]
    gaps += [("new - control", "gain", "gain_half_width")] if has_control else []
    header = ["metric", *names, *(title for title, _, _ in gaps), "n"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for metric, row in rows.items():
        cells = [f"{metric} ({row['unit']})" if row["unit"] else metric]
        cells += [f"{row[name]:.3f}" for name in names]
        for _, gap, width in gaps:
            half = "" if row[width] is None else f" ± {row[width]:.3f}"
            cells.append(f"{row[gap]:+.3f}{half}")
        lines.append(f"| {' | '.join([*cells, str(row['n'])])} |")
    return "\n".join(lines)
