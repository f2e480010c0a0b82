"""Train a host from a config: the run folder, Lightning's Trainer, resume, and `lgvq train`.

logs/<name>/  configs/merged.yaml  checkpoints/{last,step=...}.ckpt  metrics.csv
              images/  tensorboard/

torch and Lightning are imported by `train`, not by this module: arguments and configs are
checked without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..arguments import add_shortcuts, parse_words
from ..files import remove_parts, require_writable, write_text
from ..sockets import ConfigError, Problems
from .build import (
    Sections,
    build_host,
    build_parts,
    check_names,
    read_config,
    require_captions,
    tell_shared_images,
    tell_unknown_words,
    with_shortcuts,
)
from .quiet import quiet_lightning

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn
    from torch.utils.data import DataLoader

    from .callbacks import Signals
    from .driver import HostDriver

__all__ = ["Interrupted", "TrainResult", "build_host", "main", "train"]

logger = logging.getLogger(__name__)
NAME_OF_RUN = "LGVQ_RUN_NAME"  # tells the processes that Lightning starts what the first chose


class Interrupted(KeyboardInterrupt):
    """The user or the system stopped a run; it is saved, and the message says how to go on."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    folder: Path
    """Of the run."""
    steps: int
    """Updates in all, those before a resume included."""
    metrics: dict[str, float]
    """The last logged value of every key of metrics.csv."""
    checkpoint: Path
    """The newest one."""
    host: nn.Module
    """The trained host."""


def train(
    config: DictConfig | Mapping[str, Any],
    *,
    name: str | None = None,
    logdir: str | Path = "logs",
    resume: str | Path | None = None,
    progress: bool = True,
    prepare: Callable[[nn.Module], None] | None = None,
) -> TrainResult:
    """Train the host of `config`.

    Args:
        config: sections `model`, `data`, `training`; `base.read_config` reads them from YAML.
            Of `training` only `max_steps` has no default.
        name: of the run folder under `logdir`; a new one by default, from the time.
        logdir: where run folders lie.
        resume: "auto" goes on from the newest checkpoint of the run folder if there is one; a
            path is a checkpoint, or a run folder.
        progress: whether to show a bar.
        prepare: called with the host before a new run starts, not when one is resumed.

    Raises:
        ConfigError: if the config, the data or the checkpoint is wrong, or the first batch does
            not fit the host; a new run has written nothing then.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is saved.
        FloatingPointError: if a loss, a gradient or a weight is not finite; it names the term or
            the parameters, the step, and the last checkpoint.
    """
    problems = Problems()
    sections = Sections.of(config, problems)
    problems.raise_wrong()
    if not problems:
        check_names(sections)
    _require_resumable(resume)
    if name and resume is None and any((Path(logdir) / name / "checkpoints").glob("*.ckpt")):
        _refuse_used(Path(logdir) / name)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from .callbacks import Signals

    with Signals() as signals:
        try:
            return _train(
                config, sections, problems, name, Path(logdir), resume, progress, prepare, signals
            )
        except Interrupted:
            raise
        except (KeyboardInterrupt, SIGTERMException, SystemExit, Exception) as error:
            # An import that drops the KeyboardInterrupt fails in its own way later.
            is_other = signals.is_training and isinstance(error, Exception)
            if signals.noted is None or (is_other and not isinstance(error, SIGTERMException)):
                raise
            raise Interrupted(
                "stopped at once, without saving; go on with the newest checkpoint, if there is "
                "one: --resume auto"
                if signals.is_training
                else "stopped before the first step; nothing new to save"
            ) from error


def _train(
    config: DictConfig | Mapping[str, Any],
    sections: Sections,
    problems: Problems,
    name: str | None,
    logdir: Path,
    resume: str | Path | None,
    progress: bool,
    prepare: Callable[[nn.Module], None] | None,
    signals: Signals,
) -> TrainResult:
    from . import rng, state
    from .callbacks import Stopped, Watch
    from .driver import HostDriver

    if problems:
        build_parts(config, sections, problems)  # says what else is missing, and raises
    found, checkpoint = _find_checkpoint(resume, name, logdir) or (None, {})
    folder = _run_folder(name, found, logdir, sections)
    require_writable(folder)
    if found:
        state.check_config(checkpoint, sections.plain, found)
    rng.seed_all(sections.training.seed)
    host, dataset, validation = build_parts(config, sections, problems)
    _look_at_data(host, dataset, validation, sections)
    if prepare is not None and found is None:
        prepare(host)
    driver = HostDriver(
        host,
        sections.training,
        dataset=dataset,
        batch_size=sections.data.batch_size,
        num_workers=sections.data.num_workers,
        config=sections.plain,
    )
    with quiet_lightning():
        trainer = _trainer(sections, driver, folder, int(checkpoint.get("global_step", 0)))
    del checkpoint  # Lightning reads it again; a large one need not lie in memory meanwhile
    host.learning_rate = sections.learning_rate(trainer.world_size)
    watch = Watch(
        folder,
        validation=_validation(validation, sections, trainer),
        progress=progress,
        signals=signals,
        begin=partial(_begin, folder, sections.plain, trainer),
    )
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    try:
        with watch.guarding(), quiet_lightning():
            trainer.fit(driver, ckpt_path=str(found) if found else None)
    except Stopped as stop:
        raise Interrupted(f"{stop}; go on with: --name {folder.name} --resume auto") from None
    except (ConfigError, FloatingPointError) as error:
        if not driver.latest:  # it has not begun
            raise
        last = state.newest(folder)
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        raise type(error)(f"{error}; {kept}") from error
    last = state.newest(folder) or found or folder
    return TrainResult(folder, trainer.global_step, watch.metrics, last, host)


def _look_at_data(host: Any, dataset: Any, validation: Any, sections: Sections) -> None:
    """Refuse images without captions where heads need them; warn of what will not help."""
    alignment = getattr(host.loss, "alignment", None) if hasattr(host, "loss") else None
    if alignment is not None:
        captions = require_captions(dataset, alignment.config)
        if captions is not None:
            alignment.expects_captions = False  # a batch without any is chance
            tell_unknown_words(alignment.guide, captions)
    if validation is not None:
        tell_shared_images(dataset, validation, sections)


def _require_resumable(resume: str | Path | None) -> None:
    """Refuse a path that does not exist, before anything heavy is imported."""
    if resume is not None and str(resume) != "auto" and not Path(resume).exists():
        raise ConfigError(f"--resume {str(resume)!r}: no such checkpoint or run folder")


def _refuse_used(folder: Path) -> None:
    raise ConfigError(
        f"{str(folder)!r} holds a run already; go on with it by --resume auto, "
        "or choose another folder (--name, or -o of `lgvq retrofit`)"
    )


def _find_checkpoint(
    resume: str | Path | None, name: str | None, logdir: Path
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from, read and checked."""
    if resume is None:
        return None
    from . import state

    if str(resume) == "auto":
        if not name:
            raise ConfigError("--resume auto needs --name: the run folder to go on in")
        return state.newest_whole(logdir / name)
    path = Path(resume)
    if path.is_dir():
        found = state.newest_whole(path)
        if found is None:
            raise ConfigError(f"--resume {str(path)!r}: no checkpoint in its checkpoints/")
        return found
    return path, state.read(path)


def _run_folder(
    name: str | None, checkpoint: Path | None, logdir: Path, sections: Sections
) -> Path:
    """Choose the run's folder; all processes of a run choose the same."""
    is_child = os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0"
    if not name and checkpoint is not None and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    if not name:
        name = _common_name(is_child)
    if sections.training.devices != 1:
        os.environ[NAME_OF_RUN] = name
    folder = logdir / name
    if checkpoint is None and not is_child and any(folder.glob("checkpoints/*.ckpt")):
        _refuse_used(folder)
    return folder


def _common_name(is_child: bool) -> str:
    """Return a new name: the first process's, where there are several."""
    import torch

    name = [f"{datetime.now():%Y-%m-%dT%H-%M-%S}"]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(name, src=0)  # from a run before
    elif is_child:
        name = [os.environ.get(NAME_OF_RUN, "")]
        if not name[0]:
            raise ConfigError("several processes must agree on a run folder: give --name")
    return name[0]


def _trainer(sections: Sections, driver: HostDriver, folder: Path, resumed_at: int) -> pl.Trainer:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from .callbacks import MetricsFile
    from .state import AtomicCheckpointIO

    settings = sections.training
    machine: dict[str, Any] = {
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "accelerator": settings.accelerator,
        "strategy": _strategy(settings.strategy, settings.devices, settings.num_nodes),
        "precision": settings.precision,
    }
    build = partial(
        pl.Trainer,
        max_steps=settings.max_steps,
        max_epochs=-1,
        logger=[MetricsFile(folder, resumed_at)],  # it writes nothing before the first row
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,  # Stream deals the samples out itself
        limit_val_batches=0,  # Watch validates: at steps, with the generators put back
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    try:
        return build(**machine)
    except (MisconfigurationException, ValueError) as error:
        asked = ", ".join(f"{key}: {value}" for key, value in machine.items())
        raise ConfigError(f"training ({asked}) cannot be had here: {error}") from error


def _strategy(name: str, devices: int | str, num_nodes: int) -> str:
    # Two losses reach two sets of parameters, so each backward pass leaves some unused.
    is_single = devices == 1 and num_nodes == 1
    return "ddp_find_unused_parameters_true" if name in ("auto", "ddp") and not is_single else name


def _validation(
    dataset: Any, sections: Sections, trainer: pl.Trainer
) -> Callable[[], DataLoader] | None:
    """Return what makes the loader of validation batches, once the process knows its rank."""
    data, settings = sections.data, sections.training
    if dataset is None or not (settings.val_every or settings.images_every):
        return None
    from .data import validation_loader

    return lambda: validation_loader(
        dataset,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        seed=settings.seed,
        max_batches=settings.val_batches,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


def _begin(folder: Path, plain: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Make the run folder, once a first batch has passed: a failed start leaves nothing."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder)
        text = OmegaConf.to_yaml(OmegaConf.create(dict(plain)))
        write_text(folder / "configs" / "merged.yaml", text)
    if any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        at = trainer.global_step - 1
        purge: dict[str, Any] = {"purge_step": at + 1} if at > 0 else {}
        board = TensorBoardLogger(folder, name="tensorboard", version="", **purge)
        trainer.loggers = [*trainer.loggers, board]


def main(argv: list[str]) -> int:
    """Run `lgvq train`.

    Args:
        argv: `-b CONFIG... [--data FOLDER] [--max-steps N] [--name N] [--resume auto|PATH]
            [--logdir D] [key=value ...]`.

    Returns:
        0; what went wrong is raised.
    """
    parser = argparse.ArgumentParser(
        prog="lgvq train",
        description="Train a tokenizer, with or without LG-VQ, from taming-style configs.",
        epilog="key=value overrides the config, such as training.max_steps=5000",
    )
    parser.add_argument("-b", "--base", nargs="+", action="extend", required=True,
                        metavar="CONFIG", help="YAML files; later ones win")  # fmt: skip
    add_shortcuts(parser, steps=True)
    parser.add_argument("-n", "--name", help="of the run folder; default: time and config's name")
    parser.add_argument("--logdir", default="logs", help="where run folders lie (default: logs)")
    parser.add_argument("--resume", metavar="auto|PATH", help="newest checkpoint, or this one")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    given, overrides = parse_words(parser, argv, "base")
    if not given.base:
        raise ConfigError(f"-b {' '.join(overrides)}: expected a YAML file, got overrides only")
    config = with_shortcuts(
        read_config(given.base, overrides),
        data=given.data,
        max_steps=given.max_steps,
        overrides=overrides,
    )
    name, logdir = given.name, Path(given.logdir)
    stem = Path(given.base[0]).stem
    if given.resume == "auto" and not name:
        from . import state

        runs = sorted(run for run in logdir.glob(f"*_{stem}") if state.newest(run))
        name = runs[-1].name if runs else None
    is_child = os.environ.get("LOCAL_RANK", "0") != "0"
    if not name and given.resume in (None, "auto") and not is_child:
        name = f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{stem}"
    resume = None if given.resume == "auto" and not name else given.resume
    result = train(config, name=name, logdir=logdir, resume=resume, progress=not given.no_progress)
    logger.info("%d steps in %s", result.steps, result.folder)
    return 0
