"""From an old run's config to one of LG-VQ over the same loss."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.metrics.codebook import CodebookUsage
from ..bench.metrics.reconstruction import psnr_and_ssim
from ..bench.probes.base import collect_codes
from ..config import laid_over, parse
from ..datasets.base import collate
from ..guides.base import AbstractGuide
from ..host import encode, reconstruct
from ..sockets import ConfigError, resolve
from ..training.config import LOSS_KEYS, loss_key
from ..training.settings import FROZEN, TrainingConfig
from .load import Checkpoint

logger = logging.getLogger(__name__)

TAMING = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
GENTLE = {"max_learning_rate": 1e-4, "warmup_steps": 100}
"""What a retrofit adds to `training:`."""
OURS = ("lgvq_plugin.LGVQLoss", "lgvq_plugin.loss.LGVQLoss", "lgvq_plugin.over.")


def over_old_loss(
    model: Mapping[str, Any], lgvq: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the `model:` section with LG-VQ over its loss.

    Args:
        model: of the old config, in plain containers.
        lgvq: laid over the section's own `lgvq:` block, key by key.

    Raises:
        ConfigError: if the section names no loss.

    Example:
        >>> old = {"target": "m.VQModel", "params": {"lossconfig": {"target": "m.Loss"}}}
        >>> over_old_loss(old)["params"]["lossconfig"]["target"]
        'lgvq_plugin.over.m.Loss'
    """
    made = copy.deepcopy(dict(model))
    params = made["params"] = dict(made.get("params") or {})
    key = loss_key({"model": made})
    if key is None or "target" not in params[key]:
        raise ConfigError(
            f"model.params has no {' or '.join(LOSS_KEYS)} with a target, so there is no loss to "
            "put LG-VQ over; for such a model use lgvq_plugin.attach in a loop of your own"
        )
    loss = params[key] = dict(params[key])
    target = str(loss["target"])
    if target == TAMING:
        loss["target"] = OURS[0]
    elif not target.startswith(OURS):
        loss["target"] = OURS[-1] + target
    inner = loss["params"] = dict(loss.get("params") or {})
    block = laid_over(inner.get("lgvq") or {}, lgvq or {})
    parse(block)
    inner["lgvq"] = block
    params.pop("ckpt_path", None)
    return made


def gently(training: Any) -> Any:
    """Return a `training:` section with a safe learning rate for weights that are good already.

    The moments of Adam start anew, so its first steps move every weight by a whole learning rate,
    whatever the gradient is: a rate that trained a host from scratch ruins it in two of them.

    Args:
        training: the given section; its own keys win.

    Example:
        >>> gently({"max_steps": 5000, "warmup_steps": 0})
        {'max_learning_rate': 0.0001, 'max_steps': 5000, 'warmup_steps': 0}
    """
    if not isinstance(training, Mapping):
        return training
    return {**{k: v for k, v in GENTLE.items() if k not in training}, **training}


def require_steps_for_host(training: TrainingConfig) -> None:
    """Refuse a run in which the host would never learn.

    Raises:
        ConfigError: if `heads_first` takes all steps.
    """
    if training.heads_first >= training.max_steps:
        raise ConfigError(
            f"training.heads_first={training.heads_first} (--heads-first) leaves none of "
            f"training.max_steps={training.max_steps} to the host: it would stay as it is, and all "
            "differences 0; raise training.max_steps, or lower --heads-first"
        )
    if set(training.freeze) >= set(FROZEN):
        logger.warning("--freeze takes all of the host: it stays as it is, all differences are 0")


def shift_discriminator(model: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Count the steps until the discriminator starts from the old run's beginning."""
    key = loss_key({"model": model})
    params = model["params"][key].get("params") or {} if key else {}
    has_one = any(k.startswith("loss.discriminator.") for k in checkpoint.state_dict)
    if not (has_one and checkpoint.step and isinstance(params.get("disc_start"), int)):
        return
    shifted = max(0, params["disc_start"] - checkpoint.step)
    if shifted != params["disc_start"]:
        logger.info(
            "disc_start: %d of the old run, which made %d steps and brings its discriminator: "
            "%d of the new run",
            *(params["disc_start"], checkpoint.step, shifted),
        )
        params["disc_start"] = shifted


# -- Two hosts on the same held-out images: the numbers of each, and the paired difference -------


UNITS = {"psnr": "dB", "perplexity": "codes"}
ENOUGH = 20  # captioned images in each split for the retrieval probe


def compare_hosts(
    hosts: Mapping[str, nn.Module],
    *,
    held_out: Any,
    train: Any,
    guide: AbstractGuide | None,
    batch_size: int = 16,
    most: int = 500,
) -> dict[str, Any]:
    """Measure hosts on the same images.

    Args:
        hosts: `old` and `new`, and perhaps `control`; in evaluation mode, on one device.
        held_out: the data set to measure on; its first `most` samples.
        train: the data set that the retrieval probe is trained on; its first `most` samples.
        guide: for the retrieval probe; None leaves it out.
        batch_size: images at a time.
        most: how many images at the most.

    Returns:
        `{metric: {"old", "new", "difference", "half_width", "n", "unit"}}`: new - old, and half
        the width of its 95 % interval over images (None where there is none); with a control also
        `control`, `gain` (new - control) and `gain_half_width`.
    """
    seen = {name: _per_image(host, held_out, batch_size, most) for name, host in hosts.items()}
    count = len(seen["old"]["psnr"])
    rows: dict[str, Any] = {}
    for metric in ("psnr", "ssim"):
        values = {name: found[metric] for name, found in seen.items()}
        rows[f"reconstruction/{metric}"] = _row(values, count, UNITS.get(metric, ""))
    for metric in ("usage", "perplexity"):
        values = {name: found[metric] for name, found in seen.items()}
        if not math.isnan(values["old"]):
            rows[f"codebook/{metric}"] = _row(values, count, UNITS.get(metric, ""))
    if guide is not None:
        probes = {
            name: _retrieval(host, held_out, train, guide, batch_size, most)
            for name, host in hosts.items()
        }
        for key in probes["old"]:
            if "recall" in key:
                values = {name: found[key] for name, found in probes.items()}
                rows[f"retrieval/{key}"] = _row(values, int(probes["old"]["count"]), "")
    return rows


def as_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of :func:`compare_hosts` as a Markdown table.

    Example:
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
    probe = resolve("bench.probes", "retrieval")(seed=0)
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


def _row(values: Mapping[str, Any], count: int, unit: str) -> dict[str, Any]:
    """Return a row of numbers, or of means over images where tensors are given."""
    means = {name: float(torch.as_tensor(value).mean()) for name, value in values.items()}
    row = {**means, "difference": means["new"] - means["old"], "n": count, "unit": unit}
    row["half_width"] = _half_width(values["new"], values["old"])
    if "control" in values:
        row["gain"] = means["new"] - means["control"]
        row["gain_half_width"] = _half_width(values["new"], values["control"])
    return row


def _half_width(after: Any, before: Any) -> float | None:
    """Return half the width of the 95 % interval of a paired difference, normal theory."""
    if not isinstance(after, Tensor) or len(after) < 2:
        return None
    return 1.96 * float((after - before).std()) / math.sqrt(len(after))
