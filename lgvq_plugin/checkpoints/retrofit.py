"""`lgvq retrofit`: an old tokenizer's checkpoint becomes an LG-VQ run.

old config --over_old_loss--> LG-VQ config --train--> DIR, a run folder like any other
old weights --load_into, bit-identical--^             DIR/retrofit.{json,md}: old against new

Functions import torch, this module does not: arguments and configs are checked without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..arguments import add_shortcuts, parse_words
from ..config import laid_over, parse, require
from ..files import require_writable, write_json, write_text
from ..shipped import shipped
from ..sockets import ConfigError, Problems, suggest
from ..training.build import build_dataset, build_parts, with_shortcuts
from ..training.config import (
    LOSS_KEYS,
    OURS,
    Sections,
    lay_over,
    lgvq_block,
    loss_key,
    loss_section,
    model_section,
    read_config,
    to_plain,
)
from ..training.run import TrainResult, train
from ..training.settings import FROZEN, TRAINED, TrainingConfig
from . import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .load import Checkpoint, LoadReport

logger = logging.getLogger(__name__)

TAMING = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
GENTLE = {"max_learning_rate": 1e-4, "warmup_steps": 100}
"""Defaults of `training:` in a retrofit."""
RATES = ("model.learning_rate=", "model.base_learning_rate=")
PSNR_DROP = 0.5  # dB; a larger drop is reported
CHECKED_IMAGES = 4  # images on which old and new must be bit-identical
SHOWN = ("reconstruction/psnr", "reconstruction/ssim", "codebook/usage", "codebook/perplexity")
GAPS = {
    "new - old": ("difference", "half_width", "old"),
    "new - control": ("gain", "gain_half_width", "control"),
}
"""Title in the table: keys of the difference and half its interval, and the host compared with."""
MIN_CAPTIONED = 20  # captioned images in each split for the retrieval probe


def main(argv: Sequence[str]) -> int:
    """Run `lgvq retrofit -b CONFIG... --ckpt OLD -o DIR [options] [key=value ...]`; returns 0."""
    given, overrides = parse_words(_parser(), argv, "base")
    if given.images < 1:
        raise ConfigError(f"--images must be >= 1, got {given.images}")
    parts = [part.strip() for part in (given.freeze or "").split(",") if part.strip()]
    if not set(parts) <= set(FROZEN):
        known = f"training.freeze must be a list of some of {', '.join(FROZEN)}, got {parts}"
        raise ConfigError(f"--freeze: {known}")
    if given.heads is not None:
        require_heads(Path(given.heads))
    if given.heads_first is not None:
        overrides.append(f"training.heads_first={given.heads_first}")
    if given.freeze:
        overrides.append(f"training.freeze=[{given.freeze}]")
    if any(word.startswith(RATES) for word in overrides):  # chosen for this run
        overrides.insert(0, "training.max_learning_rate=null")
    find_checkpoint(given.ckpt)
    if given.preset is not None:
        given.base.insert(0, str(preset(given.preset)))
        overrides = [*_for_repository(given), *overrides]
    elif given.repo is not None:
        raise ConfigError("--repo goes with --preset; for a config of yours set PYTHONPATH")
    config = read_config(given.base, overrides)
    from .load import load_checkpoint

    checkpoint = load_checkpoint(given.ckpt, given.trust_pickle)
    if not given.base:
        config = lay_over(OmegaConf.create(checkpoint.require_config()), config)
    shortcuts = {"data": given.data, "max_steps": given.max_steps, "trained": given.train}
    result = retrofit(
        with_shortcuts(config, **shortcuts, overrides=overrides),
        checkpoint,
        given.output,
        averaged=given.averaged,
        heads=given.heads,
        control=given.control,
        resume=given.resume,
        progress=not given.no_progress,
        max_images=given.images,
    )
    print(as_table(result.rows))
    for line in warnings_of(result.rows):
        logger.warning("%s", line)
    logger.info("%d steps in %s; the table is in retrofit.md", result.run.steps, result.run.folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lgvq retrofit",
        description="Turn an old tokenizer's checkpoint into an LG-VQ run, and compare both.",
        epilog="key=value: training.max_steps=5000, lgvq.guide.use=micro_clip, lgvq.ramp=1000, ...",
    )
    add_shortcuts(parser, trained=[*TRAINED])
    add = parser.add_argument
    add("-b", "--base", nargs="+", action="extend", default=[], metavar="CONFIG",
        help="the old config, and others laid over it; default: the one in the checkpoint or its "
        "run folder")  # fmt: skip
    add("--preset", metavar="NAME", help="a published tokenizer, in place of -b; "
        f"one of {', '.join(presets())}")  # fmt: skip
    add("--repo", metavar="PATH", help="checkout of the code that a preset needs")
    add("--ckpt", required=True, metavar="OLD", help="the old checkpoint")
    add("-o", "--output", required=True, metavar="DIR", help="folder of the new run")
    add("--freeze", metavar="PARTS", help=f"parts to keep fixed: any of {','.join(FROZEN)}")
    add("--heads-first", type=int, metavar="N", help="only train the heads for the first N steps")
    add("--heads", metavar="DIR", help="start from the exported heads of another run")
    add("--control", action="store_true", help="also continue training with the old loss")
    add("--averaged", action="store_true", help="start from the averaged (EMA) weights")
    add("--images", type=int, default=500, help="images of the comparison (default: 500)")
    add("--resume", choices=["auto"], help="continue a run in DIR")
    add("--trust-pickle", action="store_true",
        help="unpickle fully; the file can then run any code")  # fmt: skip
    add("--no-progress", action="store_true", help="no progress bar")
    return parser


def presets() -> dict[str, Path]:
    """Return name -> config of the published tokenizers that `--preset` knows."""
    found = {name.partition("/"): path for name, path in shipped().items()}
    return {name: path for (folder, _, name), path in found.items() if folder == "presets"}


def preset(name: str) -> Path:
    """Return the config of a published tokenizer; ConfigError for an unknown name.

    >>> preset("ldm-vq-f4").name
    'ldm-vq-f4.yaml'
    """
    known = presets()
    if name not in known:
        raise ConfigError(
            f"--preset: no {name!r}{suggest(name, list(known))}. For another tokenizer give its "
            "config (-b), or attach it in its own training loop (lgvq_plugin.attach)"
        )
    return known[name]


def _for_repository(given: argparse.Namespace) -> list[str]:
    """Return overrides of a preset whose class is not this package's or taming's."""
    section = read_config([preset(given.preset)]).model
    if given.repo is not None and section.params.get("repository") is None:
        raise ConfigError(f"--repo: {given.preset} needs no checkout of other code")
    words = [] if given.repo is None else [f"model.params.path={Path(given.repo).resolve()}"]
    if OmegaConf.is_missing(section.params, "arguments"):
        from ..datasets.captions import read_json  # imports torch

        file = find_checkpoint(given.ckpt).with_name("config.json")
        try:
            saved = read_json(file)
        except ConfigError as error:
            message = f"--preset {given.preset} reads the arguments of the saved model: {error}"
            raise ConfigError(message) from error
        expected = f"the arguments of a model, which --preset {given.preset} reads"
        require(isinstance(saved, Mapping), str(file), expected, saved)
        arguments = {key: value for key, value in saved.items() if not key.startswith("_")}
        words.append(f"model.params.arguments={json.dumps(arguments)}")
    return words


def require_heads(folder: Path) -> None:
    """Raise ConfigError if `folder` cannot be one of exported heads; it is not read."""
    if not any(folder.glob("*.safetensors")):
        expected = "a folder written by `lgvq export --format heads` or save_pretrained"
        raise ConfigError(f"--heads: no heads at {str(folder)!r}; expected {expected}")


@dataclass(frozen=True)
class RetrofitResult:
    """Result of a retrofit."""

    run: TrainResult
    """The new run."""
    loaded: LoadReport | None
    """Which tensors of the old checkpoint the new host took; None in a resumed run."""
    rows: dict[str, Any]
    """Old against new on the same held-out images, by metric."""


def retrofit(
    config: DictConfig | Mapping[str, Any],
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    averaged: bool = False,
    heads: str | Path | None = None,
    control: bool = False,
    resume: str | None = None,
    progress: bool = True,
    max_images: int = 500,
) -> RetrofitResult:
    """Continue training an old checkpoint with LG-VQ, and compare old and new.

    Args:
        config: the old run's, and `training.max_steps`; a top-level `lgvq:` goes to the loss.
            Defaults of `training` are those of :func:`gently`, for the control too.
        checkpoint: the old weights.
        folder: folder of the new run.
        averaged: start from averaged weights if there are any.
        heads: folder of another run's exported heads, to start from.
        control: also continue training with the old loss, for as many steps from the same weights,
            in `folder`/control, to separate the effect of LG-VQ from that of more training.
        resume: "auto" continues a run in `folder`.
        progress: whether to show a progress bar.
        max_images: images of the comparison.

    Raises ConfigError if the config is wrong, or the checkpoint does not fit it; RuntimeError if
    the new host's reconstructions are not bit-identical to the old one's.
    """
    from ..alignment import guides_read
    from .load import load_host, load_into

    folder = Path(folder)
    require_writable(folder)
    if heads is not None:
        require_heads(Path(heads))
    plain = to_plain(config)
    lgvq = plain.pop("lgvq", None)
    plain["training"] = gently(plain.get("training") or {})
    if "host" in (plain["training"].get("freeze") or ()):
        lgvq = heads_alone(plain["model"], lgvq, control=control)
    _require_complete({**plain, "model": over_old_loss(model_section(plain), lgvq)})
    old = load_host(plain, checkpoint, averaged=averaged)
    shift_discriminator(plain["model"], checkpoint)
    new = {**plain, "model": over_old_loss(plain["model"], lgvq)}
    sections = Sections.from_config(new)
    require_steps_for_host(sections.training)
    data = {"train": sections.data.train, "test": sections.data.validation or sections.data.train}
    reports: list[LoadReport] = []

    def start(host: Any, *, heads: str | Path | None = None) -> None:
        params = new["model"]["params"]
        reports.append(load_into(host, checkpoint, params=params, averaged=averaged))
        logger.info("old weights: %s", reports[-1])
        if heads is not None:
            _load_heads(host.loss, Path(heads))
        require_same(old, host, _first_images(data["test"], CHECKED_IMAGES))

    options: dict[str, Any] = {"resume": resume, "progress": progress, "prepare": start}
    with_heads = options | {"prepare": partial(start, heads=heads)}
    run = train(new, name=folder.name, logdir=folder.parent, **with_heads)
    hosts = {"old": old, "new": run.host}
    loaded = next(iter(reports), None)
    if control:
        plain["training"].pop("heads_first", None)
        hosts["control"] = train(plain, name="control", logdir=folder, **options).host
    block = parse(lgvq_block(sections.plain))
    rows = compare_hosts(
        {name: host.eval().cpu() for name, host in hosts.items()},
        data,
        guide=dict(block.guide) if "text" in guides_read(block) else None,
        batch_size=sections.data.batch_size,
        max_images=max_images,
    )
    result = RetrofitResult(run, loaded, rows)
    _write_report(result, checkpoint, folder, is_held_out=sections.data.validation is not None)
    return result


def over_old_loss(
    model: Mapping[str, Any], lgvq: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a plain `model:` section with LG-VQ over its loss, and `lgvq` over its own block.

    Raises ConfigError if the section names no loss.

    >>> old = {"target": "m.VQModel", "params": {"lossconfig": {"target": "m.Loss"}}}
    >>> over_old_loss(old)["params"]["lossconfig"]["target"]
    'lgvq_plugin.over.m.Loss'
    """
    made = copy.deepcopy(dict(model))
    params, key = made.get("params") or {}, loss_key({"model": made})
    if key is None or "target" not in params[key]:
        raise ConfigError(
            f"model.params has no {' or '.join(LOSS_KEYS)} with a target, so there is no loss to "
            "put LG-VQ over; for such a model use lgvq_plugin.attach in your own training loop"
        )
    loss, target = params[key], str(params[key]["target"])
    if target == TAMING:
        loss["target"] = OURS[0]
    elif not target.startswith(OURS):
        loss["target"] = OURS[-1] + target
    inner = loss["params"] = loss.get("params") or {}
    inner["lgvq"] = laid_over(inner.get("lgvq") or {}, lgvq or {})
    parse(inner["lgvq"])
    params.pop("ckpt_path", None)
    return made


def heads_alone(
    model: Mapping[str, Any], lgvq: Mapping[str, Any] | None, *, control: bool
) -> dict[str, Any]:
    """Return the `lgvq:` block of a run whose host is frozen; a new block has no `stop`.

    Raises ConfigError for a control: the host would be the old one in both.
    """
    if control:
        frozen = "but the host is frozen: leave it out"
        raise ConfigError(f"--control continues with the old loss, {frozen}")
    has_block = str(loss_section({"model": model}).get("target")).startswith(OURS)
    return {**({} if has_block else {"stop": None}), **(lgvq or {})}


def gently(training: Any) -> Any:
    """Return a `training:` section, whose keys win, over a safe learning rate for trained weights.

    Adam's moments start at zero, so its first steps move every weight by a whole learning rate,
    whatever the gradient is: a rate that trained a host from scratch can ruin it in two of them.

    >>> gently({"max_steps": 5000, "warmup_steps": 0})
    {'max_learning_rate': 0.0001, 'warmup_steps': 0, 'max_steps': 5000}
    """
    require(isinstance(training, Mapping), "training", "a mapping", training)
    return {**GENTLE, **training}


def _require_complete(config: dict[str, Any]) -> None:
    """Report all that is missing (weights, data sets, captions, keys) before anything is loaded."""
    problems = Problems()
    sections = Sections.from_config(config, problems)
    problems.raise_wrong()
    if problems:
        build_parts(config, sections, problems)


def require_steps_for_host(training: TrainingConfig) -> None:
    """Raise ConfigError if `heads_first` takes all steps, so that the host would never learn."""
    if training.heads_first >= training.max_steps:
        raise ConfigError(
            f"training.heads_first={training.heads_first} (--heads-first) leaves none of "
            f"training.max_steps={training.max_steps} to the host: it would not change; raise "
            "training.max_steps, or lower --heads-first"
        )
    is_frozen = training.lora is None and {*training.freeze} >= {*FROZEN} - {"host"}
    if "host" in training.freeze or is_frozen:
        logger.warning("the whole host is frozen: it does not change, all differences are 0")


def shift_discriminator(model: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Count the steps until the discriminator starts from the old run's beginning."""
    key = loss_key({"model": model})
    params = model["params"][key].get("params") or {} if key else {}
    has_one = any(k.startswith("loss.discriminator.") for k in checkpoint.state_dict)
    start = params.get("disc_start")
    if has_one and checkpoint.step and isinstance(start, int) and start > 0:
        params["disc_start"] = max(0, start - checkpoint.step)
        message = "disc_start: %d in the new run, as the old one made %d of its %d steps and its "
        message += "discriminator is loaded"
        logger.info(message, params["disc_start"], checkpoint.step, start)


def _load_heads(loss: Any, folder: Path) -> None:
    from ..encoder import load_heads

    if getattr(loss, "alignment", None) is None:
        raise ConfigError("--heads: all weights under lgvq.objectives are 0: no heads")
    load_heads(loss.alignment, folder)


def require_same(old: nn.Module, new: nn.Module, images: Tensor) -> None:
    """Raise RuntimeError unless both reconstruct images (B, 3, H, W) bit-identically."""
    import torch

    from ..encoder import evaluating
    from ..host import reconstruct

    with evaluating(old, new):
        before, after = (
            reconstruct(host, images.to(next(host.parameters()).device)).cpu()
            for host in (old, new)
        )
    if not torch.equal(before, after):
        gap = float((before - after).abs().max())
        raise RuntimeError(
            f"the retrofitted {type(new).__name__} does not reconstruct as the old one does: "
            f"largest difference {gap:.3g}; some of its weights are not the checkpoint's"
        )


def _first_images(section: Mapping[str, Any], count: int) -> Tensor:
    """Return the first images of a data set, (count or fewer, C, H, W)."""
    from ..bench.probes.features import channels_first
    from ..datasets.base import collate

    dataset = build_dataset(section)
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    return channels_first(collate(samples)["image"])


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
    from ..bench.evaluation import evaluate

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
        if not all(rows.values()) or not _is_shown(metric, rows["old"]):
            continue
        row = compared[metric] = {name: own["value"] for name, own in rows.items()}
        row |= {"n": rows["old"]["n"], "unit": rows["old"]["unit"]}
        for gap, width, before in GAPS.values():
            if before in rows:
                row[gap] = row["new"] - row[before]
                row[width] = _half_width(rows["new"], rows[before])
    return compared


def _is_shown(metric: str, row: Mapping[str, Any]) -> bool:
    if metric.startswith("retrieval/") and "recall" in metric:
        return min(row["n"], row["settings"]["train_images"]) >= MIN_CAPTIONED
    return metric in SHOWN


def _half_width(after: Mapping[str, Any], before: Mapping[str, Any]) -> float | None:
    """Return half the width of the 95 % interval of a paired difference, by normal theory."""
    import torch

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
    names = ["old", "control", "new"] if has_control else ["old", "new"]
    gaps = {title: keys for title, keys in GAPS.items() if keys[2] in names}
    lines = [f"| {' | '.join(['metric', *names, *gaps, 'n'])} |"]
    lines.append("|---" * (len(names) + len(gaps) + 2) + "|")
    for metric, row in rows.items():
        cells = [f"{metric} ({row['unit']})" if row["unit"] else metric]
        cells += [f"{row[name]:.3f}" for name in names]
        for gap, width, _ in gaps.values():
            half = "" if row[width] is None else f" ± {row[width]:.3f}"
            cells.append(f"{row[gap]:+.3f}{half}")
        lines.append(f"| {' | '.join([*cells, str(row['n'])])} |")
    return "\n".join(lines)


def _write_report(
    result: RetrofitResult, checkpoint: Checkpoint, folder: Path, *, is_held_out: bool
) -> None:
    report = {
        "old": str(checkpoint.path),
        "old_step": checkpoint.step,
        "read_as": checkpoint.how,
        "new": str(result.run.checkpoint),
        "steps": result.run.steps,
        "images": "data.validation" if is_held_out else "data.train (no validation in the config)",
        "metrics": result.rows,
    }
    if (loaded := result.loaded) is not None:
        others = {kind: getattr(loaded, kind) for kind in ("missing", "unexpected", "mismatched")}
        report["loaded"] = {"tensors": len(loaded.loaded), **others}
    paragraphs = [
        f"# {checkpoint.path.name}, and after {result.run.steps} steps of LG-VQ",
        f"On the images of {report['images']}; ± is half the 95 % interval over images.",
        as_table(result.rows),
        *warnings_of(result.rows),
    ]
    write_json(folder / "retrofit.json", report)
    write_text(folder / "retrofit.md", "\n\n".join(paragraphs) + "\n")


def warnings_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning if the host's reconstructions became worse, with the cause and a fix.

    >>> row = {"old": 19.6, "new": 6.6, "control": 6.5, "difference": -13.0}
    >>> warnings_of({"reconstruction/psnr": row})[0][:52]
    'PSNR fell from 19.60 to 6.60 dB, and to 6.50 dB in t'
    """
    row = rows.get("reconstruction/psnr", {})
    if not row or row["old"] - min(row["new"], row.get("control", row["new"])) < PSNR_DROP:
        return []
    found = f"PSNR fell from {row['old']:.2f} to {row['new']:.2f} dB"
    if "control" not in row:
        cause = "--control shows whether LG-VQ or the training itself is the cause"
    elif row["old"] - row["control"] < PSNR_DROP:
        found += f"; it is {row['control']:.2f} dB in the control, without LG-VQ"
        cause = "the weights of LG-VQ are too high for this host (lgvq.gradient_ratio)"
    else:
        found += f", and to {row['control']:.2f} dB in the control, without LG-VQ"
        cause = "the training itself is the cause, not the text"
    fix = "Lower the learning rate (model.learning_rate, training.max_learning_rate), or raise"
    return [f"{found}: {cause}. {fix} training.warmup_steps"]
