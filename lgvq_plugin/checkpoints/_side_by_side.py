"""Two hosts on the same held-out images: the numbers of each, and the paired difference."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets.base import collate
from ..guides.base import AbstractGuide
from ..hosts.base import encode, reconstruct
from ..metrics.codebook import CodebookUsage
from ..metrics.reconstruction import psnr_and_ssim
from ..probes.base import collect_codes
from ..sockets import resolve

UNITS = {"psnr": "dB", "perplexity": "codes"}
ENOUGH = 20  # captioned images in each split for the retrieval probe


def compare_hosts(
    old: nn.Module,
    new: nn.Module,
    *,
    held_out: Any,
    train: Any,
    guide: AbstractGuide | None,
    batch_size: int = 16,
    most: int = 500,
) -> dict[str, Any]:
    """Measure two hosts on the same images.

    Args:
        old, new: in evaluation mode, on one device.
        held_out: the data set to measure on; its first `most` samples.
        train: the data set that the retrieval probe is trained on; its first `most` samples.
        guide: for the retrieval probe; None leaves it out.
        batch_size: images at a time.
        most: how many images at the most.

    Returns:
        `{name: {"old", "new", "difference", "half_width", "n", "unit"}}`; `half_width` is that of
        the difference's 95 % interval over images, None where there is none.
    """
    images = {"old": old, "new": new}
    per_image = {
        name: _per_image(host, held_out, batch_size, most) for name, host in images.items()
    }
    rows: dict[str, Any] = {}
    for metric in ("psnr", "ssim"):
        before, after = (per_image[name][metric] for name in ("old", "new"))
        rows[f"reconstruction/{metric}"] = _paired(before, after, UNITS.get(metric, ""))
    for metric in ("usage", "perplexity"):
        before, after = (per_image[name][metric] for name in ("old", "new"))
        if not math.isnan(before):
            n = len(per_image["old"]["psnr"])
            rows[f"codebook/{metric}"] = _row(before, after, n, UNITS.get(metric, ""))
    if guide is not None:
        probes = {
            name: _retrieval(host, held_out, train, guide, batch_size, most)
            for name, host in images.items()
        }
        for key in probes["old"]:
            if "recall" in key:
                before, after = probes["old"][key], probes["new"][key]
                rows[f"retrieval/{key}"] = _row(before, after, int(probes["old"]["count"]), "")
    return rows


def as_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of :func:`compare_hosts` as a Markdown table.

    Example:
        >>> row = {"old": 1.0, "new": 2.0, "difference": 1.0, "half_width": None, "n": 3}
        >>> print(as_table({"reconstruction/psnr": {**row, "unit": ""}}))
        | metric | old | new | difference | n |
        |---|---|---|---|---|
        | reconstruction/psnr | 1.000 | 2.000 | +1.000 | 3 |
    """
    lines = ["| metric | old | new | difference | n |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        unit = f" {row['unit']}" if row["unit"] else ""
        width = f" ± {row['half_width']:.3f}" if row["half_width"] is not None else ""
        lines.append(
            f"| {name} | {row['old']:.3f}{unit} | {row['new']:.3f}{unit} | "
            f"{row['difference']:+.3f}{width}{unit} | {row['n']} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def _per_image(host: nn.Module, dataset: Any, batch_size: int, most: int) -> dict[str, Any]:
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    usage: CodebookUsage | None = None
    for batch in _batches(dataset, batch_size, most):
        images = batch["image"].to(_device(host))
        for name, values in zip(
            found, psnr_and_ssim(images, reconstruct(host, images)), strict=True
        ):
            found[name].append(values.double().cpu())
        codes = encode(host, images)
        if codes.indices is not None and codes.codebook is not None:
            usage = usage or CodebookUsage(len(codes.codebook))
            usage.update(codes.indices.cpu())
    counted = usage.compute() if usage is not None else {}
    return {name: torch.cat(values) for name, values in found.items()} | {
        name: float(counted.get(name, math.nan)) for name in ("usage", "perplexity")
    }


def _retrieval(
    host: nn.Module, held_out: Any, train: Any, guide: AbstractGuide, batch_size: int, most: int
) -> dict[str, float]:
    """Fit the probe on the training images' codes, and search among the held-out captions."""
    parts = {}
    for name, dataset in (("train", train), ("held_out", held_out)):
        batches = list(_batches(dataset, batch_size, most, captioned=True))
        captions = [caption for batch in batches for caption in batch["caption"]]
        if len(captions) < ENOUGH:
            return {}
        sentences = [
            guide.encode(captions[start : start + batch_size]).sentence.cpu()
            for start in range(0, len(captions), batch_size)
        ]
        features = collect_codes(lambda x: encode(host, x), batches, _device(host))
        parts[name] = (features, torch.cat(sentences), captions)
    probe = resolve("probes", "retrieval")(seed=0)
    probe.fit(*parts["train"][:2])
    return probe.evaluate(*parts["held_out"])


def _batches(
    dataset: Any, batch_size: int, most: int, *, captioned: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield batches of images (B, 3, H, W) in the order of the data set."""
    chosen: list[dict[str, Any]] = []
    for index in range(min(most, len(dataset))):
        sample = dataset[index]
        if not captioned or sample.get("caption"):
            chosen.append({key: sample[key] for key in ("image", "caption") if key in sample})
        if len(chosen) == batch_size:
            yield _channel_first(collate(chosen))
            chosen = []
    if chosen:
        yield _channel_first(collate(chosen))


def _channel_first(batch: dict[str, Any]) -> dict[str, Any]:
    images = batch["image"].float()
    return {
        **batch,
        "image": images if images.shape[1] == 3 else images.movedim(-1, 1).contiguous(),
    }


def _device(host: nn.Module) -> torch.device:
    return next(host.parameters()).device


def _paired(before: Tensor, after: Tensor, unit: str) -> dict[str, Any]:
    gap = after - before
    width = 1.96 * float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else None
    row = _row(float(before.mean()), float(after.mean()), len(gap), unit)
    return row | {"half_width": width}


def _row(before: float, after: float, n: int, unit: str) -> dict[str, Any]:
    gap = after - before
    return {
        "old": before,
        "new": after,
        "difference": gap,
        "half_width": None,
        "n": n,
        "unit": unit,
    }
