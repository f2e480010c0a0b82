"""Checkpoint files: written whole or not at all, read as plain containers."""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .._fields import differing
from .._files import replacing
from ..sockets import ConfigError
from ._driver import STATE

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves beside the target and renames, so that a kill leaves the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read `path`, on the CPU, refusing anything that could run code."""
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """Return the checkpoint at `path`.

    Raises:
        ConfigError: if there is none, or it is damaged or not one to resume from.
    """
    if not path.is_file():
        raise ConfigError(f"no checkpoint {str(path)!r}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ConfigError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    if not isinstance(checkpoint, dict) or "optimizer_states" not in checkpoint:
        raise ConfigError(
            f"checkpoint {str(path)!r} holds no optimizers, so no run can be resumed from it; "
            "start from its weights with model.params.ckpt_path=..., if the host takes that"
        )
    return checkpoint


def save(trainer: Any, folder: Path, step: int, keep: int | None) -> Path:
    """Save `step=....ckpt` and `last.ckpt`; all processes must call it.

    Args:
        trainer: Lightning's.
        folder: of the run's checkpoints.
        step: in the file's name.
        keep: how many `step=....ckpt` stay; None = all.

    Returns:
        The path of last.ckpt.
    """
    path = folder / f"step={step:08d}.ckpt"
    trainer.save_checkpoint(path, weights_only=False)  # False = optimizers too
    if trainer.is_global_zero:
        with replacing(folder / LAST) as part:
            try:
                os.link(path, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, part)
        steps = sorted(folder.glob("step=*.ckpt"))
        for stale in steps[:-keep] if keep is not None else []:
            stale.unlink()
    return folder / LAST


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, or None."""
    last = run / "checkpoints" / LAST
    if last.is_file():
        return last
    return max((run / "checkpoints").glob("step=*.ckpt"), default=None)


def check_config(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume another host's run.

    Raises:
        ConfigError: if the `model:` sections differ; it names the keys.
    """
    before = (checkpoint.get(STATE) or {}).get("config")
    if before is None:
        return
    differ = differing({"model": before.get("model")}, {"model": config.get("model")})
    if differ:
        raise ConfigError(
            f"checkpoint {str(path)!r} is of another config: {', '.join(differ[:5])}; resume with "
            "the config in the run's folder, or start a new run under another --name"
        )
