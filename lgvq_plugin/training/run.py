"""Train a host from a config: the run folder, Lightning's Trainer, resume, and `lgvq train`.

logs/<name>/  configs/merged.yaml  checkpoints/{last,step=...}.ckpt  metrics.csv
              images/  tensorboard/  wandb/ (training.logger)

torch and Lightning are imported by `train`, not by this module: arguments and configs are
checked without them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..arguments import add_shortcuts, parse_words
from ..files import remove_parts, require_writable
from ..sockets import ConfigError, Problems, as_config_error
from .build import build_parts, check_data, with_shortcuts
from .config import Sections, lay_over, read_config
from .settings import TRAINED

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn

    from .callbacks import Signals

logger = logging.getLogger(__name__)
RUN_NAME = "LGVQ_RUN_NAME"  # passes the name to the processes that Lightning starts
RANKS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")  # of Lightning and of torchrun
# `lightning` and `pytorch_lightning` share one variable for their logger: the last import sets it.
LIGHTNING = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
MACHINE = ("devices", "num_nodes", "accelerator", "strategy", "precision")  # Lightning's too
TOO_EARLY = "stopped before the first step; nothing new to save"
AT_ONCE = (
    "stopped at once, without saving; resume from the newest checkpoint, if there is one: "
    "--resume auto"
)
EXPECTED_WARNINGS = ("many workers", "in eval mode at the start", "LeafSpec")  # LPIPS is in eval


class Interrupted(KeyboardInterrupt):
    """The user or the system stopped a run; the message says how to resume it."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    folder: Path
    """The run folder."""
    steps: int
    """Total updates, those before a resume included."""
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
        config: sections `model`, `data`, `training`; `config.read_config` reads them from YAML.
            Of `training` only `max_steps` has no default.
        name: of the run folder under `logdir`; a new one by default, from the time.
        logdir: folder of run folders.
        resume: "auto" resumes from the newest sound checkpoint of the run folder if there is one;
            a path is a checkpoint, or a run folder.
        progress: whether to show a bar.
        prepare: called with the host before a new run starts, not when one is resumed.

    Raises ConfigError if the config, the data or the checkpoint is wrong, or the first batch does
    not fit the host; a new run has written nothing then; Interrupted after SIGINT or SIGTERM, once
    a checkpoint is saved; FloatingPointError if a loss, a gradient or a weight is not finite; it
    names the term or the parameters, the step, and the last checkpoint.
    """
    problems = Problems()
    sections = Sections.from_config(config, problems)
    problems.raise_wrong()
    if not problems:
        sections.check_names()
    if resume not in (None, "auto") and not Path(str(resume)).exists():
        raise ConfigError(f"--resume {str(resume)!r}: no such checkpoint or run folder")
    if resume == "auto" and not name:
        raise ConfigError("--resume auto needs --name: the run folder to resume")
    if name and resume is None:
        _refuse_used(Path(logdir) / name)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from .callbacks import Signals

    with Signals() as signals:
        run = _Run(config, sections, problems, name, Path(logdir), progress, prepare, signals)
        try:
            return run.resume(resume) if resume is not None else run.fit(None, {})
        except Interrupted:
            raise
        except (KeyboardInterrupt, SIGTERMException, SystemExit, Exception) as error:
            # An import that drops the KeyboardInterrupt fails in its own way later.
            is_other = signals.is_training and isinstance(error, Exception)
            if signals.received is None or (is_other and not isinstance(error, SIGTERMException)):
                raise
            raise Interrupted(AT_ONCE if signals.is_training else TOO_EARLY) from error


@dataclass(frozen=True)
class _Run:
    """The arguments of one call of :func:`train`."""

    config: DictConfig | Mapping[str, Any]
    sections: Sections
    problems: Problems
    name: str | None
    logdir: Path
    progress: bool
    prepare: Callable[[nn.Module], None] | None
    signals: Signals

    def resume(self, given: str | Path) -> TrainResult:
        """Resume from a checkpoint, or from the newest sound one of a run folder."""
        from . import state

        path = self.logdir / str(self.name) if given == "auto" else Path(given)
        if path.is_file():
            return self.fit(path, state.read(path))
        if not _is_child():
            remove_parts(path)
        paths = state.candidates(path)
        if not paths and given != "auto":
            raise ConfigError(f"--resume {str(path)!r}: no checkpoint in its checkpoints/")
        failed: list[ConfigError] = []
        for found in paths:
            try:
                checkpoint = state.read(found)
                if failed:
                    logger.warning("resuming from the one before it: %s", found)
                return self.fit(found, checkpoint)
            except state.CheckpointError as error:
                logger.warning("%s", error)
                failed.append(error)
        if not failed:
            return self.fit(None, {})
        message = f"{failed[0]}; no older checkpoint of {str(path)!r} can be resumed"
        raise ConfigError(message) from failed[0]

    def fit(self, found: Path | None, checkpoint: Mapping[str, Any]) -> TrainResult:
        """Train from the checkpoint at `found`, or from the start."""
        from ..datasets.base import naming_files
        from . import lora, rng, state
        from .callbacks import Stopped, TrainingCallback
        from .data import WrongCaptions
        from .driver import HostDriver

        sections = self.sections
        if self.problems:
            build_parts(self.config, sections, self.problems)  # adds what else is missing; raises
        folder = self._folder(found)
        require_writable(folder)
        if found:
            if above := state.first_recipe(checkpoint, sections.plain):
                logger.info("this run began with version 0.1: lgvq.recipe is corrected_v1")
                config = lay_over(DictConfig(self.config), above)
                return replace(self, config=config, sections=Sections.from_config(config)).fit(
                    found, checkpoint
                )
            state.check_config(checkpoint, sections.plain, found)
        rng.seed_all(sections.training.seed)
        host, dataset, validation = build_parts(self.config, sections, self.problems)
        sections.warn()
        check_data(host, dataset, validation, sections)
        if sections.data.wrong_captions:
            dataset = WrongCaptions(dataset, sections.training.seed)
        if self.prepare is not None and found is None:
            self.prepare(host)
        data, training = sections.data, sections.training
        reading: Any = {"batch_size": data.batch_size, "num_workers": data.num_workers}
        if training.lora is not None:
            reading["adapters"] = lora.inject(host, training.lora, training.seed)
        driver = HostDriver(
            host, sections.training, dataset=dataset, config=sections.plain, **reading
        )
        with _quiet_lightning():
            trainer = _trainer(sections, folder)
        del checkpoint  # Lightning reads it again
        host.learning_rate = sections.learning_rate(trainer.world_size)
        callback = TrainingCallback(
            folder, validation=validation, progress=self.progress, signals=self.signals
        )
        trainer.callbacks.append(callback)  # type: ignore[attr-defined]
        try:
            with contextlib.closing(callback), _quiet_lightning(), naming_files():
                trainer.fit(driver, ckpt_path=str(found) if found else None)
        except Stopped as stop:
            raise Interrupted(f"{stop}; resume with: --name {folder.name} --resume auto") from None
        except (ConfigError, FloatingPointError) as error:
            if not driver.latest:  # training has not begun
                raise
            saved = state.candidates(folder)
            kept = f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
            raise type(error)(f"{error}; {kept}") from error
        last = next(iter(state.candidates(folder)), found or folder)
        return TrainResult(folder, trainer.global_step, callback.metrics, last, host)

    def _folder(self, checkpoint: Path | None) -> Path:
        """Return the run's folder; all processes of a run get the same."""
        if not self.name and checkpoint is not None and checkpoint.parent.name == "checkpoints":
            return checkpoint.parent.parent
        name = self.name or _new_name()
        if self.sections.training.devices != 1:
            os.environ[RUN_NAME] = name
        if checkpoint is None and not _is_child():
            _refuse_used(self.logdir / name)
        return self.logdir / name


def _refuse_used(folder: Path) -> None:
    if any(folder.glob("checkpoints/*.ckpt")):
        raise ConfigError(
            f"{str(folder)!r} holds a run already; resume it with --resume auto, "
            "or choose another folder (--name, or -o of `lgvq retrofit`)"
        )


def _is_child() -> bool:
    return any(os.environ.get(name, "0") != "0" for name in RANKS)


def _new_name(stem: str = "") -> str:
    """Return the name of a new run: the same in all its processes, or ConfigError."""
    name = [f"{datetime.now():%Y-%m-%dT%H-%M-%S}{stem and '_' + stem}"]
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(name, src=0)  # by a run before, in this process
    elif _is_child():
        name = [os.environ.get(RUN_NAME, "")]
        if not name[0]:
            raise ConfigError("several processes must agree on a run folder: give --name")
    return name[0]


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hide Lightning's notes (devices, tips, `Trainer.fit stopped`); its warnings pass."""
    loggers = [logging.getLogger(name) for name in LIGHTNING]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for known in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", f".*{known}")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _trainer(sections: Sections, folder: Path) -> pl.Trainer:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from .state import AtomicCheckpointIO

    settings = sections.training
    machine: dict[str, Any] = {key: getattr(settings, key) for key in MACHINE}
    if settings.strategy in ("auto", "ddp") and (settings.devices, settings.num_nodes) != (1, 1):
        # Two losses reach two sets of parameters, so each backward pass leaves some unused.
        machine["strategy"] = "ddp_find_unused_parameters_true"
    wanted = ", ".join(f"{key}: {value}" for key, value in machine.items())
    failed = f"training ({wanted}) is not available here"
    with as_config_error(failed, MisconfigurationException, ValueError):
        return pl.Trainer(
            **machine,
            max_steps=settings.max_steps,
            max_epochs=-1,
            logger=False,  # TrainingCallback logs, validates and saves: at steps, with the
            limit_val_batches=0,  # generators restored, and writes nothing before the first step
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # Stream distributes the samples itself
            default_root_dir=folder,
        )


def main(argv: list[str]) -> int:
    """Run `lgvq train -b CONFIG... [options] [key=value ...]`; returns 0, errors are raised."""
    parser = argparse.ArgumentParser(
        prog="lgvq train",
        description="Train a tokenizer, with or without LG-VQ, from taming-style configs.",
        epilog="key=value overrides the config, such as training.max_steps=5000",
    )
    add = parser.add_argument
    add("-b", "--base", nargs="+", action="extend", required=True, metavar="CONFIG",
        help="YAML files; later ones win")  # fmt: skip
    add_shortcuts(parser, trained=[*TRAINED])
    add("-n", "--name", help="run folder; default: time and name of the config")
    add("--logdir", default="logs", help="folder of run folders (default: logs)")
    add("--resume", metavar="auto|PATH", help="newest checkpoint, or this one")
    add("--no-progress", action="store_true", help="show no progress bar")
    given, overrides = parse_words(parser, argv, "base")
    if not given.base:
        raise ConfigError(f"-b {' '.join(overrides)}: expected a YAML file, got overrides only")
    shortcuts = {"data": given.data, "max_steps": given.max_steps, "trained": given.train}
    config = with_shortcuts(read_config(given.base, overrides), **shortcuts, overrides=overrides)
    name, resume, stem = given.name, given.resume, Path(given.base[0]).stem
    if resume == "auto" and not name:
        runs = sorted(Path(given.logdir).glob(f"*_{stem}/checkpoints/*.ckpt"))
        name, resume = (runs[-1].parents[1].name, resume) if runs else (None, None)
    if not name and resume is None:
        name = _new_name(stem)
    options = {"logdir": given.logdir, "resume": resume, "progress": not given.no_progress}
    result = train(config, name=name, **options)
    logger.info("%d steps in %s", result.steps, result.folder)
    return 0
