"""Where a run's metrics go besides metrics.csv: TensorBoard, Weights & Biases. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .settings import LOGGERS

PROJECT = "lgvq"
"""Of Weights & Biases, unless WANDB_PROJECT names another one."""


def require_installed(names: Sequence[str] | None) -> None:
    """Raise ConfigError if a package that `training.logger` needs is missing."""
    for name in names or ():
        if not _is_installed(name):
            raise ConfigError(
                f"training.logger: {name} is not installed: pip install "
                f"'lgvq_plugin[{LOGGERS[name]}]', or choose among {', '.join(LOGGERS)}"
            )


def open_loggers(
    names: Sequence[str] | None, folder: Path, *, resumed_at: int, config: Mapping[str, Any]
) -> list[Any]:
    """Return Lightning's loggers of a run; `names` None: TensorBoard's if it is installed.

    Rows of an interrupted run after step `resumed_at` are dropped by TensorBoard; Weights & Biases
    continues the same run.
    """
    if names is None:
        names = ["tensorboard"] if _is_installed("tensorboard") else []
    loggers: list[Any] = []
    if "tensorboard" in names:
        from lightning.pytorch.loggers import TensorBoardLogger

        purge: Any = {"purge_step": resumed_at + 1} if resumed_at else {}
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", **purge))
    if "wandb" in names:
        loggers.append(_wandb(folder, resumed_at, config))
    return loggers


def _is_installed(name: str) -> bool:
    modules = {"csv": ["csv"], "tensorboard": ["tensorboard", "tensorboardX"]}.get(name, [name])
    return any(find_spec(module) for module in modules)


def _wandb(folder: Path, resumed_at: int, config: Mapping[str, Any]) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    from . import rng

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
