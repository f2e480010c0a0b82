"""What happens beside the step: metrics, validation, images, checkpoints, signals, a bar."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import _checkpoint, _png, _rng
from ._driver import HostDriver
from ._ema import Average

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal came; the run is saved."""


class Watch(pl.Callback):
    """Follows a run; everything it does leaves the training's random streams as they were.

    Args:
        folder: of the run.
        validation: makes the loader of validation batches; or None.
        progress: whether to show a bar.
        begin: called after the first batch, before anything is written.

    Attributes:
        metrics: the last value of every key.
    """

    def __init__(
        self,
        folder: Path,
        *,
        validation: Callable[[], DataLoader] | None,
        progress: bool,
        begin: Callable[[], None] | None = None,
    ):
        self.folder, self.progress = folder, progress
        self.validation: DataLoader | None = None
        self._make_validation, self._begin = validation, begin
        self.metrics: dict[str, float] = {}
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._bar: Any = None
        self._average: Average | None = None
        self._saved: dict[str, Tensor] | None = None

    # -- Lightning's hooks, in the order of a run ----------------------------------------------

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the averaged weights; they are taken when the host is on its device."""
        self._saved = checkpoint.get("ema_state_dict")

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the signals over."""
        self._take_signals()

    def on_train_start(self, trainer: pl.Trainer, module: HostDriver) -> None:  # type: ignore[override]
        """Take the signals over again (Lightning did meanwhile), begin the averages and the bar."""
        self._take_signals()
        self.validation = self._make_validation() if self._make_validation else None
        if module.settings.ema_decay is not None:
            self._average = Average(module.host, module.settings.ema_decay)
            if self._saved is not None:
                self._average.load_state_dict(self._saved)
        if self.progress and trainer.is_global_zero:
            total, done = module.settings.max_steps, trainer.global_step
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: HostDriver, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step, do what is due."""
        if self._begin is not None:
            self._begin()
            self._begin = None
        if not module.has_stepped:
            return
        settings, step = module.settings, trainer.global_step
        is_last = step >= settings.max_steps
        if self._average is not None:
            self._average.update()
        if step == 1 or is_last or step % settings.log_every == 0:
            self._log_training(trainer, module, step)
        if self._bar is not None:
            self._bar.update()
        self._stop_if_told(trainer, module, step)
        if settings.val_every and (is_last or step % settings.val_every == 0):
            self._validate(trainer, module, step)
        if settings.images_every and (is_last or step % settings.images_every == 0):
            self._draw(trainer, module, batch, step)
        if is_last or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
            self._save(trainer, module, step)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Lay the averaged weights beside the current ones."""
        if self._average is not None:
            checkpoint["ema_state_dict"] = self._average.state_dict()

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Give signals back, and close the bar, however the run inside the context ends."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._bar is not None:
                self._bar.close()

    # -- parts ---------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        """Lightning would stop between two batches, with nothing saved."""
        for number in self._handlers:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end
        self._signal = number

    def _stop_if_told(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        told = self._signal is not None
        if trainer.world_size > 1:  # one process may have got the signal alone
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            path = self._save(trainer, module, step)
            raise Stopped(f"stopped at step {step}, saved in {path}")

    def _log_training(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        values = {key: value.float().mean().item() for key, value in module.latest.items()}
        values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self._log(trainer, values, step)
        if self._bar is not None:
            shown = ("train/rec_loss", "train/aeloss", "train/discloss", "train/lgvq/total")
            brief = {key.split("/", 1)[1]: values[key] for key in shown if key in values}
            self._bar.set_postfix({key: f"{value:.3g}" for key, value in brief.items()})

    def _log(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        self.metrics |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _validate(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        if self.validation is None:
            return
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=module.device, dtype=torch.float64)
        with self._evaluating(trainer, module):
            for batch in self.validation:
                batch = trainer.strategy.batch_to_device(batch)
                size = len(next(iter(batch.values())))
                count += size
                for key, value in module.evaluate(batch).items():
                    mean = value.to(count).mean() * size
                    sums[key] = sums[key] + mean if key in sums else mean
        if trainer.world_size > 1:
            for value in (count, *(sums[key] for key in sorted(sums))):
                torch.distributed.all_reduce(value)
        self._log(trainer, {key: (value / count).item() for key, value in sums.items()}, step)

    def _draw(self, trainer: pl.Trainer, module: HostDriver, batch: Any, step: int) -> None:
        if not trainer.is_global_zero:
            return
        batches = {"train": batch}
        if self.validation is not None:
            batches["val"] = next(iter(self.validation))
        with self._evaluating(trainer, module):
            for split, some in batches.items():
                rows = module.reconstruct(trainer.strategy.batch_to_device(some))
                _png.write_grid(self.folder / "images" / f"{split}_{step:08d}.png", list(rows))

    def _save(self, trainer: pl.Trainer, module: HostDriver, step: int) -> Path:
        keep = module.settings.keep_checkpoints
        return _checkpoint.save(trainer, self.folder / "checkpoints", step, keep)

    @contextmanager
    def _evaluating(self, trainer: pl.Trainer, module: HostDriver) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights if there are, generators put back after."""
        modes = {part: part.training for part in module.modules()}
        with ExitStack() as stack:
            stack.enter_context(_rng.preserved())
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.val_step_context())
            if self._average is not None:
                stack.enter_context(self._average.in_place())
            _rng.seed_all(module.settings.seed + trainer.global_rank)
            module.eval()
            try:
                yield
            finally:
                for part, mode in modes.items():
                    part.training = mode
