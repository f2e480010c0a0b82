"""Averaged weights of a host, without a copy of its modules (hooks and guides stay single)."""

import csv
import logging
import os
import signal
import struct
import threading
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..files import replacing, write_bytes, writing
from ..finite import all_finite, in_groups
from . import rng, state
from .driver import HostDriver


class Average:
    """Exponential moving average of the trainable parameters; average += (1 - decay) * gap.

    Buffers and frozen parameters are not averaged: an EMA codebook's counts would be averaged
    twice. :meth:`state_dict` fills them in from the host.

    Args:
        host: whose parameters are followed.
        decay: in (0, 1).
    """

    def __init__(self, host: nn.Module, decay: float):
        self.host, self.decay = host, decay
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in host.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move on by one step."""
        current = dict(self.host.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(current[name].detach(), 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict of the host with the averaged weights in it."""
        return {**self.host.state_dict(), **self.weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages out of what :meth:`state_dict` returned."""
        with torch.no_grad():
            for name, average in self.weights.items():
                average.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the host have the averaged weights inside the context."""
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


# -- metrics.csv: one row per logged step; a resumed run goes on in the same file ----------------


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`.

    Lightning's own CSVLogger deletes the file of the run before; this one drops only the rows
    after the step at which the run goes on.

    Args:
        folder: of the run.
        resumed_at: rows of later steps are dropped; 0 starts a new file.
    """

    def __init__(self, folder: Path, resumed_at: int = 0):
        super().__init__()
        self.path = folder / "metrics.csv"
        self._keys = ["step"]
        self._rows: list[dict[str, str]] = []
        if resumed_at > 0 and self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            # A kill or a full disk leaves half a row at the end.
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))
            rows = [row for row in reader if (row.get("step") or "").isdecimal()]
            self._rows = [row for row in rows if int(row["step"]) <= resumed_at]
            self._keys = list(reader.fieldnames or self._keys)
        self._is_behind = True  # the file has to be written as a whole before it grows

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Runs have no versions."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`; a row is on disk when the call returns."""
        row = {"step": str(step), **{key: f"{value:.8g}" for key, value in metrics.items()}}
        new = [key for key in row if key not in self._keys]
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1].update(row)
            self._is_behind = True
        else:
            self._rows.append(row)
        if new or self._is_behind:
            self._keys += new
            self._write_all()
            return
        with writing(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._keys, restval="").writerow(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Do nothing: the config lies beside the file."""

    def _write_all(self) -> None:
        with replacing(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._keys, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        self._is_behind = False


# -- Grids of images as PNG, by zlib alone: this room has no need of an image library ------------


def write_grid(path: Path, rows: list[Tensor], *, columns: int = 8, gap: int = 2) -> None:
    """Write rows of images, each (B, 3, H, W) in [-1, 1] (clamped), below each other.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_grid(folder / "a.png", [torch.zeros(2, 3, 4, 4)])
        >>> (folder / "a.png").read_bytes()[1:4]
        b'PNG'
    """
    images = torch.stack([row[:columns].detach().float().cpu() for row in rows])
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    down, across, _, height, width = pixels.shape
    shape = (gap + down * (height + gap), gap + across * (width + gap), 3)
    canvas = np.full(shape, 255, np.uint8)
    for i in range(down):
        for j in range(across):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[top : top + height, left : left + width] = pixels[i, j].transpose(1, 2, 0)
    write_bytes(path, _encode(canvas))


def _encode(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # filter 0 on every line
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bit RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


# -- What happens beside the step: metrics, validation, images, checkpoints, signals, a bar ------


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
            state.require_fit(self._saved, module.host, "ema_state_dict", str(trainer.ckpt_path))

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
                write_grid(self.folder / "images" / f"{split}_{step:08d}.png", list(rows))

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
        return state.save(trainer, self.folder / "checkpoints", step, keep)

    @contextmanager
    def _evaluating(self, trainer: pl.Trainer, module: HostDriver) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights if there are, generators put back after."""
        modes = {part: part.training for part in module.modules()}
        with ExitStack() as stack:
            stack.enter_context(rng.preserved())
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.val_step_context())
            if self._average is not None:
                stack.enter_context(self._average.in_place())
            rng.seed_all(module.settings.seed + trainer.global_rank)
            module.eval()
            try:
                yield
            finally:
                for part, mode in modes.items():
                    part.training = mode
