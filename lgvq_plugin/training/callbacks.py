"""What happens beside the training step: logs, validation, images, checkpoints, signals, EMA."""

import csv
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

from ..files import remove_parts, replacing, write_text, writing
from ..functional import all_finite, in_groups
from . import rng, state
from .data import validation_loader
from .driver import HostDriver
from .settings import is_installed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BAR_SECONDS = 3.0
"""Time between updates of the losses on the progress bar: each one waits for the device."""
PROJECT = "lgvq"
"""Of Weights & Biases, unless WANDB_PROJECT names another one."""
ON_BAR = ("train/rec_loss", "train/aeloss", "train/discloss", "train/lgvq/total")


class Stopped(Exception):
    """A signal came; the run is saved."""


class TrainingCallback(pl.Callback):
    """Logs, validates, draws and saves; leaves the training's random generators unchanged.

    Nothing is written into the run's `folder` before the first batch has passed. `validation` is
    the data set to validate on, or None; `metrics` holds the last value of every key.
    """

    def __init__(self, folder: Path, *, validation: Any, progress: bool, signals: "Signals"):
        self.folder, self.progress, self.signals = folder, progress, signals
        self._dataset, self._resumed_at = validation, 0
        self._validation: DataLoader | None = None
        self.metrics: dict[str, float] = {}
        self._loggers: list[Any] | None = None
        self._bar: Any = None
        self._shown_at = 0.0
        self._ema: EMA | None = None
        self._saved: dict[str, Tensor] | None = None
        self._is_validation_due = False  # a signal came before it, or during it

    # Lightning's hooks, in the order of a run.

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the EMA weights until the host is on its device, if they fit it."""
        self._is_validation_due = checkpoint.get("is_validation_due") is True
        self._saved = checkpoint.get("ema_state_dict")
        if self._saved is not None:
            with module.checking():
                state.require_fit(self._saved, module.host, "ema_state_dict")

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """From here on a signal waits for the end of the step."""
        self.signals.is_training = True
        self.signals.install()

    def on_train_start(self, trainer: pl.Trainer, module: HostDriver) -> None:  # type: ignore[override]
        """Install the signal handlers again (Lightning replaced them), start the EMA and bar."""
        self.signals.install()
        settings, self._resumed_at = module.settings, trainer.global_step
        if self._dataset is not None and (settings.val_every or settings.images_every):
            self._validation = validation_loader(
                self._dataset,
                batch_size=module.batch_size,
                num_workers=module.num_workers,
                seed=settings.seed,
                max_batches=settings.val_batches,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        if settings.ema_decay is not None:
            self._ema = EMA(module.host, settings.ema_decay)
            if self._saved is not None:
                self._ema.load_state_dict(self._saved)
            elif trainer.global_step:
                logger.warning("the checkpoint has no EMA weights: averaging starts again here")
        if self.progress and trainer.is_global_zero:
            at: Any = {"total": settings.max_steps, "initial": self._resumed_at}
            self._bar = tqdm(**at, unit="step", dynamic_ncols=True)
        if self._is_validation_due:  # of the step at which a signal ended the run
            self._loggers = self._begin(module) if trainer.is_global_zero else []
            self._validate(trainer, module, self._resumed_at)
            self._stop_if_signaled(trainer, module, self._resumed_at)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: HostDriver, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step, do what is due."""
        if self._loggers is None:
            self._loggers = self._begin(module) if trainer.is_global_zero else []
        if not module.has_stepped:
            return
        settings, step = module.settings, trainer.global_step

        def is_due(every: int | None) -> bool:
            return every is not None and (step % every == 0 or step >= settings.max_steps)

        if self._ema is not None:
            self._ema.update()
        if step == 1 or is_due(settings.log_every):
            group = trainer.optimizers[0].param_groups[0]
            rate = group["lr"] * module.warmup(group, step - 1)
            values = {key: value.float().mean().item() for key, value in module.latest.items()}
            self._log({**values, "train/lr": rate}, step)
        if self._bar is not None:
            self._show(module)
        if is_due(settings.images_every) and trainer.is_global_zero:
            self._draw(trainer, module, batch, step)
        self._is_validation_due = self._validation is not None and is_due(settings.val_every)
        if self._is_validation_due:
            self._validate(trainer, module, step)
        self._stop_if_signaled(trainer, module, step)
        if is_due(settings.checkpoint_every or settings.max_steps):
            self._save(trainer, module, step)

    def _begin(self, module: HostDriver) -> list[Any]:
        """Make the run folder, and return the loggers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.folder)
        text = OmegaConf.to_yaml(OmegaConf.create(module.config))
        write_text(self.folder / "configs" / "merged.yaml", text)
        at: Any = {"resumed_at": self._resumed_at, "config": module.config}
        others = open_loggers(module.settings.loggers, self.folder, **at)
        return [MetricsFile(self.folder, self._resumed_at), *others]

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the EMA weights, and whether this step has not been validated yet."""
        checkpoint["is_validation_due"] = self._is_validation_due
        if self._ema is not None:
            checkpoint["ema_state_dict"] = self._ema.state_dict()

    def close(self) -> None:
        """Close the bar and the loggers, however the run ended."""
        if self._bar is not None:
            self._bar.close()
        for each in self._loggers or []:
            each.finalize("")

    def _stop_if_signaled(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        # One of several processes may have got the signal alone.
        if _on_any(trainer, self.signals.received is not None):
            path = self._save(trainer, module, step)
            raise Stopped(f"stopped at step {step}, saved in {path}")

    def _show(self, module: HostDriver) -> None:
        """Advance the bar; update its losses every few seconds."""
        self._bar.update()
        if (now := time.monotonic()) - self._shown_at >= BAR_SECONDS:
            self._shown_at, log = now, module.latest
            shown = {key.split("/", 1)[1]: log[key] for key in ON_BAR if key in log}
            self._bar.set_postfix({k: f"{v.float().mean().item():.3g}" for k, v in shown.items()})

    def _log(self, values: dict[str, float], step: int) -> None:
        self.metrics |= values
        for each in self._loggers or []:
            with writing(self.folder / str(each.name or "metrics.csv")):
                each.log_metrics(values, step)

    def _validate(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        """Validate, unless a signal ends the run first; it is then due when the run resumes."""
        is_last = step >= module.settings.max_steps
        if self._validation is None:
            return
        if not is_last and _on_any(trainer, self.signals.received is not None):
            return
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=module.device, dtype=torch.float64)
        with self._evaluating(trainer, module):
            for batch in self._validation:
                is_alone = trainer.world_size == 1
                if self.signals.received is not None and is_alone and not is_last:
                    return  # the other processes would wait for this one
                batch = trainer.strategy.batch_to_device(batch)
                size = len(next(iter(batch.values())))
                count += size
                for key, value in module.evaluate(batch).items():
                    sums[key] = sums.get(key, 0) + value.to(count).mean() * size
        if trainer.world_size > 1:
            for value in (count, *(sums[key] for key in sorted(sums))):
                torch.distributed.all_reduce(value)
        self._is_validation_due = False
        self._log({key: (value / count).item() for key, value in sums.items()}, step)

    def _draw(self, trainer: pl.Trainer, module: HostDriver, batch: Any, step: int) -> None:
        batches = {"train": batch}
        if self._validation is not None:
            batches["val"] = next(iter(self._validation))
        with self._evaluating(trainer, module):
            for split, some in batches.items():
                rows = module.reconstruct(trainer.strategy.batch_to_device(some))
                write_grid(self.folder / "images" / f"{split}_{step:08d}.png", rows)

    def _save(self, trainer: pl.Trainer, module: HostDriver, step: int) -> Path:
        """Write a checkpoint; FloatingPointError instead if a weight is not finite."""
        bad = module.nonfinite()
        if self._ema is not None:
            averages = self._ema.weights.items()
            bad += [f"{name}, averaged" for name, value in averages if not all_finite([value])]
        if _on_any(trainer, bool(bad)):  # of sharded weights one process may see it alone
            raise FloatingPointError(
                f"step {step}: weights are not finite: {in_groups(bad or ['on another process'])}; "
                "they are not saved. Lower the learning rate, or clip (training.gradient_clip_val)"
            )
        keep = module.settings.keep_checkpoints
        return state.save(trainer, self.folder / "checkpoints", step, keep)

    @contextmanager
    def _evaluating(self, trainer: pl.Trainer, module: HostDriver) -> Iterator[None]:
        """Eval mode, no gradients, EMA weights if there are any; everything restored after."""
        modes = {part: part.training for part in module.modules()}
        averages = nullcontext() if self._ema is None else self._ema.applied()
        amp = trainer.precision_plugin.val_step_context()
        with rng.preserved(), torch.no_grad(), amp, averages:
            rng.seed_all(module.settings.seed + trainer.global_rank)
            module.eval()
            try:
                yield
            finally:
                for part, mode in modes.items():
                    part.training = mode


def _on_any(trainer: pl.Trainer, holds: bool) -> bool:
    """Whether something holds on any process; all of them must ask."""
    if trainer.world_size == 1:
        return holds
    return trainer.strategy.reduce_boolean_decision(holds, all=False)


class EMA:
    """Exponential moving average of the trainable parameters, without a copy of the modules.

    Buffers and frozen parameters are not averaged (an EMA codebook's counts would be averaged
    twice); :meth:`state_dict` takes them from the host. With a `decay` in (0, 1), a step is
    average += (1 - decay) * (parameter - average).
    """

    def __init__(self, host: nn.Module, decay: float):
        self.host, self.decay = host, decay
        named = host.named_parameters()
        self.weights = {name: p.detach().clone() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Average over one more step."""
        current = dict(self.host.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(current[name].detach(), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict of the host with the averaged weights in it."""
        return {**self.host.state_dict(), **self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages out of what :meth:`state_dict` returned."""
        for name, average in self.weights.items():
            average.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the host the averaged weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        current = dict(self.host.named_parameters())
        for name, average in self.weights.items():
            kept = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(kept)


class Signals:
    """Handles SIGINT and SIGTERM from the first moment of a run to its last.

    Before the first step (`is_training`) a signal raises KeyboardInterrupt at once. After it the
    first one is only noted, so that the step ends and is saved; the second raises. Its number is
    in `received` in any case: Python drops what a handler raises in a `__del__` or a callback.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_training = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *args: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the signal handlers; again after Lightning installed its own."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that loads samples inherits this handler
            if number == signal.SIGTERM:
                os._exit(0)
            return  # Ctrl-C reaches it too: its parent decides
        is_first, self.received = self.received is None, number
        if not (is_first and self.is_training):
            raise KeyboardInterrupt
        # print() may be interrupted by this very signal, and is not reentrant.
        os.write(2, b"\nlgvq: stopping after this step; signal again to stop at once\n")


def open_loggers(
    names: Sequence[str] | None, folder: Path, *, resumed_at: int, config: Mapping[str, Any]
) -> list[Any]:
    """Return Lightning's loggers of a run; `names` None: TensorBoard's if it is installed.

    Rows of an interrupted run after step `resumed_at` are dropped by TensorBoard; Weights & Biases
    continues the same run.
    """
    if names is None:
        names = ["tensorboard"] if is_installed("tensorboard") else []
    loggers: list[Any] = []
    if "tensorboard" in names:
        from lightning.pytorch.loggers import TensorBoardLogger

        purge: Any = {"purge_step": resumed_at + 1} if resumed_at else {}
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", **purge))
    if "wandb" in names:
        loggers.append(_wandb(folder, resumed_at, config))
    return loggers


def _wandb(folder: Path, resumed_at: int, config: Mapping[str, Any]) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    class Wandb(WandbLogger):
        """Ends its run with the training, so that another one can follow in the same process."""

        def finalize(self, status: str) -> None:
            super().finalize(status)
            if is_ours:
                self.experiment.finish()

    is_ours = wandb.run is None  # else a sweep, or the user's own script, began one
    earlier = sorted(folder.glob("wandb/*run-*-*"), key=os.path.getmtime) if resumed_at else []
    id: Any = {"id": earlier[-1].name.rpartition("-")[2], "resume": "allow"} if earlier else {}
    with rng.preserved():  # the id of a new run is drawn
        made = Wandb(
            name=folder.name,
            save_dir=folder,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            config=dict(config),
            **id,
        )
        made.experiment  # noqa: B018 - begins the run
    return made


class MetricsFile:
    """Writes `metrics.csv`: a row per logged step, on disk when the call returns.

    Lightning's CSVLogger deletes the file of an interrupted run; this drops only the rows after
    step `resumed_at`, where the run resumes; 0 starts a new file.
    """

    name = "metrics.csv"

    def __init__(self, folder: Path, resumed_at: int = 0):
        self.path = folder / self.name
        self._keys, self._rows = ["step"], list[dict[str, str]]()
        self._has_all = False  # whether the file holds all rows and keys, and can be appended to
        if resumed_at > 0 and self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            # A kill or a full disk leaves half a row at the end.
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))
            for row in reader:
                if (row.get("step") or "").isdecimal() and int(row["step"]) <= resumed_at:
                    self._rows.append(row)
            self._keys = list(reader.fieldnames or self._keys)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add to the row of `step`."""
        row = {"step": str(step), **{key: f"{value:.8g}" for key, value in metrics.items()}}
        new = [key for key in row if key not in self._keys]
        self._keys += new
        if is_same := bool(self._rows) and self._rows[-1]["step"] == row["step"]:
            self._rows[-1].update(row)
        else:
            self._rows.append(row)
        if self._has_all and not (new or is_same):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._keys, restval="").writerow(row)
            return
        with replacing(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._keys, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        self._has_all = True

    def finalize(self, status: str) -> None:
        """Do nothing: every row is on disk."""


def write_grid(path: Path, rows: tuple[Tensor, ...], *, columns: int = 8, gap: int = 2) -> None:
    """Write rows of images, each (B, 3, H, W) in [-1, 1] (clamped), below each other as a PNG."""
    images = [row[:columns].detach().float().cpu().clamp(-1, 1) for row in rows]
    grid = {"nrow": len(images[0]), "padding": gap, "pad_value": 1.0}
    with replacing(path) as part, part.open("wb") as file:
        save_image(torch.cat(images) / 2 + 0.5, file, format="png", **grid)
