"""`lgvq retrofit`: an old tokenizer's checkpoint becomes an LG-VQ run.

old config --over_old_loss--> LG-VQ config --train--> DIR, a run folder like any other
old weights --load_into, checked bit by bit--^        DIR/retrofit.{json,md}: old against new

torch is imported by `retrofit`, not by this module: arguments and configs are checked without it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..arguments import add_shortcuts, parse_words
from ..config import parse
from ..files import require_writable, write_json, write_text
from ..sockets import ConfigError, Problems
from ..training.build import build_dataset, build_parts, with_shortcuts
from ..training.config import (
    Sections,
    lay_over,
    lgvq_block,
    model_section,
    read_config,
    to_plain,
)
from ..training.run import TrainResult, train
from . import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .load import Checkpoint, LoadReport

logger = logging.getLogger(__name__)

RATES = ("model.learning_rate=", "model.base_learning_rate=")
FELL = 0.5  # dB of PSNR
CHECKED = 4  # images on which old and new must agree bit by bit


@dataclass(frozen=True)
class RetrofitResult:
    """What a retrofit left behind."""

    run: TrainResult
    """The new run."""
    loaded: LoadReport | None
    """What of the old checkpoint went into the new host; None in a resumed run."""
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
    most: int = 500,
) -> RetrofitResult:
    """Train LG-VQ on from an old checkpoint, and compare old and new.

    Args:
        config: of the old run, and `training.max_steps`; a top-level `lgvq:` goes to the loss.
            Unless `training` says otherwise, the learning rate is 1e-4 at the most
            (max_learning_rate) and warms up over 100 steps (warmup_steps), for the control too.
        checkpoint: the old weights.
        folder: of the new run.
        averaged: start from the averaged weights where there are any.
        heads: folder of heads that another run exported, to start from.
        control: also train the old loss on, as many steps from the same weights, in
            `folder`/control, so that what LG-VQ does is not mixed with what more training does.
        resume: "auto" goes on with a run in `folder`.
        progress: whether to show a bar.
        most: images of the comparison.

    Raises:
        ConfigError: if the config is wrong, or the checkpoint does not fit it.
        RuntimeError: if the new host does not reconstruct bit by bit as the old one.
    """
    import torch

    from ..guides.base import build_guide
    from .load import load_host
    from .side_by_side import (
        compare_hosts,
        gently,
        over_old_loss,
        require_steps_for_host,
        shift_discriminator,
    )

    folder = Path(folder)
    require_writable(folder)
    plain = to_plain(config)
    lgvq = plain.pop("lgvq", None)
    plain["training"] = gently(plain.get("training") or {})
    _require_all(plain, lgvq)
    old = load_host(plain, checkpoint, averaged=averaged)
    shift_discriminator(plain["model"], checkpoint)
    new = {**plain, "model": over_old_loss(plain["model"], lgvq)}
    sections = Sections.from_config(new)
    require_steps_for_host(sections.training)
    guide = build_guide(parse(lgvq_block(sections.plain)).guide)  # before hours of training
    held_out = build_dataset(sections.data.validation or sections.data.train)
    images = torch.stack([_image(held_out[i]) for i in range(min(CHECKED, len(held_out)))])
    start = _Start(checkpoint, old, images, params=sections.model["params"], averaged=averaged)
    options: dict[str, Any] = {"resume": resume, "progress": progress, "prepare": start}
    start.heads = heads
    run = train(new, name=folder.name, logdir=folder.parent, **options)
    hosts, loaded, start.heads = {"old": old, "new": run.host}, start.report, None
    if control:
        plain["training"] = {k: v for k, v in plain["training"].items() if k != "heads_first"}
        hosts["control"] = train(plain, name="control", logdir=folder, **options).host
    rows = compare_hosts(
        {name: host.eval().cpu() for name, host in hosts.items()},
        held_out=held_out,
        train=build_dataset(sections.data.train),
        guide=guide.to("cpu"),
        batch_size=sections.data.batch_size,
        most=most,
    )
    result = RetrofitResult(run, loaded, rows)
    _write_report(result, checkpoint, folder, is_held_out=sections.data.validation is not None)
    return result


def _require_all(plain: dict[str, Any], lgvq: Any) -> None:
    """Report everything that is missing in one message, before the old checkpoint is read.

    Raises:
        ConfigError: if weights, data sets, captions or keys are missing.
    """
    from .side_by_side import over_old_loss

    problems = Problems()
    new: dict[str, Any] = {**plain, "model": over_old_loss(model_section(plain), lgvq)}
    sections = Sections.from_config(new, problems)
    if problems:
        build_parts(new, sections, problems)


class _Start:
    """Puts the old weights into a host before its first step, and checks that nothing is lost."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        old: nn.Module,
        images: Tensor,
        *,
        params: Mapping[str, Any],
        averaged: bool,
    ):
        self.checkpoint, self.old, self.images = checkpoint, old, images
        self.params, self.averaged = params, averaged
        self.heads: str | Path | None = None
        self.report: LoadReport | None = None

    def __call__(self, host: Any) -> None:
        from ..host import load_heads
        from .load import load_into

        self.report = load_into(host, self.checkpoint, params=self.params, averaged=self.averaged)
        logger.info("old weights: %s", self.report)
        if self.heads is not None:
            if getattr(host.loss, "alignment", None) is None:
                raise ConfigError("--heads: all weights under lgvq.objectives are 0: no heads")
            load_heads(host.loss.alignment, Path(self.heads))
        require_same(self.old, host, self.images)


def require_same(old: nn.Module, new: nn.Module, images: Tensor) -> None:
    """Check that two hosts reconstruct images (B, 3, H, W) bit by bit alike, in eval mode.

    Raises:
        RuntimeError: if they do not; it tells the largest difference.
    """
    import torch

    from ..host import reconstruct

    modes = {part: part.training for part in new.modules()}
    device = next(old.parameters()).device
    try:
        before = reconstruct(old.eval(), images.to(device))
        after = reconstruct(new.eval(), images.to(next(new.parameters()).device)).to(device)
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not torch.equal(before, after):
        gap = float((before - after).abs().max())
        raise RuntimeError(
            f"the retrofitted {type(new).__name__} does not reconstruct as the old one does: "
            f"largest difference {gap:.3g}; some of its weights are not the checkpoint's"
        )


def _image(sample: Mapping[str, Any]) -> Tensor:
    import torch

    image = torch.as_tensor(sample["image"]).float()
    return image if image.shape[0] == 3 else image.movedim(-1, 0).contiguous()


def _write_report(
    result: RetrofitResult, checkpoint: Checkpoint, folder: Path, *, is_held_out: bool
) -> None:
    told = {
        "old": str(checkpoint.path),
        "old_step": checkpoint.step,
        "read_as": checkpoint.how,
        "new": str(result.run.checkpoint),
        "steps": result.run.steps,
        "images": "data.validation" if is_held_out else "data.train (no validation in the config)",
        "metrics": result.rows,
    }
    if result.loaded is not None:
        told["loaded"] = {
            "tensors": len(result.loaded.loaded),
            "missing": list(result.loaded.missing),
            "unexpected": list(result.loaded.unexpected),
            "mismatched": [list(entry) for entry in result.loaded.mismatched],
        }
    from .side_by_side import as_table

    text = f"# {checkpoint.path.name} and {result.run.steps} steps of LG-VQ later\n\n"
    text += f"On the images of {told['images']}; ± is half the 95 % interval over images.\n\n"
    text += as_table(result.rows) + "\n"
    text += "".join(f"\n{line}\n" for line in warnings_of(result.rows))
    write_json(folder / "retrofit.json", told)
    write_text(folder / "retrofit.md", text)


def warnings_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say if training on has cost the host its reconstructions, and what to do.

    Example:
        >>> row = {"old": 19.6, "new": 6.6, "control": 6.5, "difference": -13.0}
        >>> warnings_of({"reconstruction/psnr": row})[0][:52]
        'PSNR fell from 19.60 to 6.60 dB, and to 6.50 dB in t'
    """
    row = rows.get("reconstruction/psnr", {})
    if not row or row["old"] - min(row["new"], row.get("control", row["new"])) < FELL:
        return []
    told = f"PSNR fell from {row['old']:.2f} to {row['new']:.2f} dB"
    if "control" not in row:
        cause = "--control would show whether LG-VQ or the training itself did that"
    else:
        told += f", and to {row['control']:.2f} dB in the control, without LG-VQ"
        if row["old"] - row["control"] < FELL:
            told = told.replace(", and to", "; it is")
            cause = "the weights of LG-VQ are too high for this host (lgvq.gradient_ratio)"
        else:
            cause = "the training itself did that, not the text"
    return [
        f"{told}: {cause}. Lower the learning rate (model.learning_rate, "
        "training.max_learning_rate), or raise training.warmup_steps"
    ]


def main(argv: Sequence[str]) -> int:
    """Run `lgvq retrofit`.

    Args:
        argv: `-b CONFIG... --ckpt OLD -o DIR [options] [key=value ...]`.

    Returns:
        0; what went wrong is raised.
    """
    given, overrides = parse_words(_parser(), argv, "base")
    if given.heads_first is not None:
        overrides.append(f"training.heads_first={given.heads_first}")
    if given.freeze:
        overrides.append(f"training.freeze=[{given.freeze}]")
    if given.images < 1:
        raise ConfigError(f"--images must be >= 1, got {given.images}")
    if any(word.startswith(RATES) for word in overrides) and not any(
        word.startswith("training.max_learning_rate=") for word in overrides
    ):
        overrides.append("training.max_learning_rate=null")  # a rate chosen for this very run
    find_checkpoint(given.ckpt)
    given_config = read_config(given.base, overrides)
    from .load import load_checkpoint
    from .side_by_side import as_table

    checkpoint = load_checkpoint(given.ckpt, given.trust_pickle)
    config = with_shortcuts(
        _config(given_config, checkpoint, is_whole=bool(given.base)),
        data=given.data,
        max_steps=given.max_steps,
        overrides=overrides,
    )
    result = retrofit(
        config,
        checkpoint,
        given.output,
        averaged=given.averaged,
        heads=given.heads,
        control=given.control,
        resume=given.resume,
        progress=not given.no_progress,
        most=given.images,
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
    parser.add_argument("-b", "--base", nargs="+", action="extend", default=[], metavar="CONFIG",
                        help="the old config (and more over it); default: the one in the "
                        "checkpoint or its run folder")  # fmt: skip
    add_shortcuts(parser, steps=True)
    parser.add_argument("--ckpt", required=True, metavar="OLD", help="the old checkpoint")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the new run"
    )
    parser.add_argument("--freeze", metavar="PARTS", help="keep encoder,decoder,codebook: any of")
    parser.add_argument("--heads-first", type=int, metavar="N", help="train the heads alone first")
    parser.add_argument("--heads", metavar="DIR", help="start from heads that another run exported")
    parser.add_argument("--control", action="store_true", help="train the old loss on as well")
    parser.add_argument("--averaged", action="store_true", help="start from the averaged weights")
    parser.add_argument("--images", type=int, default=500, help="of the comparison (default: 500)")
    parser.add_argument("--resume", choices=["auto"], help="go on with a run in DIR")
    parser.add_argument("--trust-pickle", action="store_true",
                        help="unpickle fully; whoever made the file can run code")  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _config(given: DictConfig, checkpoint: Checkpoint, *, is_whole: bool) -> DictConfig:
    if is_whole:
        return given
    if checkpoint.config is None:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} tells no config, nor does a configs/ folder "
            "beside it; give the old run's with -b CONFIG"
        )
    return lay_over(OmegaConf.create(checkpoint.config), given)
