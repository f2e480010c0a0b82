"""What happens beside the step: metrics, validation, images, checkpoints, signals, a bar."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .._files import writing
from .._finite import all_finite, in_groups
from . import _checkpoint, _png, _rng
from ._driver import HostDriver
from ._ema import Average

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = 3.0
"""Between two looks at the losses on the progress bar: each waits for the device."""
BRIEF = ("train/rec_loss", "train/aeloss", "train/discloss", "train/lgvq/total")


class Stopped(Exception):
    """A signal came; the run is saved."""


class Signals:
    """SIGINT and SIGTERM, noted, and none lost: from the first moment of a run to its last.

    Before the first step a signal raises KeyboardInterrupt at once. From then on the first one is
    only noted, so that the step ends and is saved; the second raises. It is noted in any case:
    Python drops an exception that a handler raises inside a `__del__` or another callback.

    Attributes:
        noted: the number of the signal that came, or None.
        is_training: whether steps are under way.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.is_training = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        return self

    def __exit__(self, *args: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Take the signals over; again, after Lightning did."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that loads samples inherits this handler
            if number == signal.SIGTERM:
                os._exit(0)
            return  # Ctrl-C reaches it too: its parent decides
        is_first, self.noted = self.noted is None, number
        if not (is_first and self.is_training):
            raise KeyboardInterrupt
        # print() may be interrupted by the very signal, and cannot be entered twice.
        os.write(2, b"\nlgvq: stopping after this step; once more to stop at once\n")


class Watch(pl.Callback):
    """Follows a run; everything it does leaves the training's random streams as they were.

    Args:
        folder: of the run.
        validation: makes the loader of validation batches; or None.
        progress: whether to show a bar.
        signals: that stop the run.
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
        signals: Signals,
        begin: Callable[[], None] | None = None,
    ):
        self.signals = signals
        self.folder, self.progress = folder, progress
        self.validation: DataLoader | None = None
        self._make_validation, self._begin = validation, begin
        self.metrics: dict[str, float] = {}
        self._bar: Any = None
        self._shown_at = 0.0
        self._average: Average | None = None
        self._saved: dict[str, Tensor] | None = None

    # -- Lightning's hooks, in the order of a run ----------------------------------------------

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the averaged weights; they are taken when the host is on its device.

        Raises:
            ConfigError: if they do not fit the host.
        """
        self._saved = checkpoint.get("ema_state_dict")
        if self._saved is not None:
            _checkpoint.require_fit(
                self._saved, module.host, "ema_state_dict", str(trainer.ckpt_path)
            )

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """From here on a signal waits for the end of the step."""
        self.signals.is_training = True
        self.signals.take()

    def on_train_start(self, trainer: pl.Trainer, module: HostDriver) -> None:  # type: ignore[override]
        """Take the signals over again (Lightning did meanwhile), begin the averages and the bar."""
        self.signals.take()
        self.validation = self._make_validation() if self._make_validation else None
        if module.settings.ema_decay is not None:
            self._average = Average(module.host, module.settings.ema_decay)
            if self._saved is not None:
                self._average.load_state_dict(self._saved)
            elif trainer.global_step:
                logger.warning("the checkpoint has no averaged weights: the averages start anew")
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
            self._show(module)
        self._stop_if_told(trainer, module, step)
        if settings.val_every and (is_last or step % settings.val_every == 0):
            self._validate(trainer, module, step)
            self._stop_if_told(trainer, module, step)
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
        """Close the bar, however the run inside the context ends."""
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()

    # -- parts ---------------------------------------------------------------------------------

    def _stop_if_told(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        told = self.signals.noted is not None
        if trainer.world_size > 1:  # one process may have got the signal alone
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            path = self._save(trainer, module, step)
            raise Stopped(f"stopped at step {step}, saved in {path}")

    def _log_training(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        values = {key: value.float().mean().item() for key, value in module.latest.items()}
        group = trainer.optimizers[0].param_groups[0]
        values["train/lr"] = group["lr"] * module.warmup(group, step - 1)
        self._log(trainer, values, step)

    def _show(self, module: HostDriver) -> None:
        """Move the bar on, with the losses every few seconds."""
        self._bar.update()
        if (now := time.monotonic()) - self._shown_at >= SECONDS:
            self._shown_at = now
            shown = [key for key in BRIEF if key in module.latest]
            values = [module.latest[key].float().mean().item() for key in shown]
            brief = {k.split("/", 1)[1]: f"{v:.3g}" for k, v in zip(shown, values, strict=True)}
            self._bar.set_postfix(brief)

    def _log(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        self.metrics |= values
        for each in trainer.loggers:
            with writing(self.folder / str(each.name or "metrics.csv")):
                each.log_metrics(values, step)

    def _validate(self, trainer: pl.Trainer, module: HostDriver, step: int) -> None:
        if self.validation is None:
            return
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=module.device, dtype=torch.float64)
        with self._evaluating(trainer, module):
            for batch in self.validation:
                if self.signals.noted is not None and trainer.world_size == 1:
                    return  # the other processes would wait for this one
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
        """Write a checkpoint.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written then.
        """
        bad = module.nonfinite()
        if self._average is not None:
            average = self._average.weights.items()
            bad += [f"{name}, averaged" for name, value in average if not all_finite([value])]
        if trainer.world_size > 1:  # sharded weights: one process may be the only one to see it
            told = trainer.strategy.reduce_boolean_decision(bool(bad), all=False)
            bad = bad or ["of another process"] * told
        if bad:
            raise FloatingPointError(
                f"step {step}: weights are not finite: {in_groups(bad)}; they are not saved. Lower "
                "the learning rate, or clip (training.gradient_clip_val)"
            )
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
