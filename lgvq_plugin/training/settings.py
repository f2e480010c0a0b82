"""The `training:` section of a config, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..sockets import ConfigError, MissingError, suggest

FROZEN = ("encoder", "decoder", "codebook")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and on what a host is trained. A step is one update of the weights.

    Example:
        >>> TrainingConfig(max_steps=10).precision
        '32-true'
    """

    max_steps: int
    """Updates in all, > 0; a resumed run counts those before it too. It has no default."""
    seed: int = 0
    """Of the weights, the order of the samples, and every draw in training."""
    scale_lr: bool = True
    """taming's rule: base_learning_rate x batch_size x devices x accumulate_grad_batches."""
    max_learning_rate: float | None = None
    """A host's learning rate above this is lowered to it; null = no limit."""
    warmup_steps: int = 0
    """Steps over which all learning rates grow linearly to their values; 0 = none."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are averaged for one step."""
    gradient_clip_val: float | None = None
    """Largest norm of an optimizer's gradient; null = no clipping, as taming."""
    precision: str = "32-true"
    """Lightning's names: 32-true, bf16-mixed, 16-mixed, bf16-true, 64-true, ..."""
    ema_decay: float | None = None
    """In (0, 1): keep averaged weights, validate with them, save them as `ema_state_dict`."""
    val_every: int | None = 1000
    """Steps between validations, the last step always has one; null = never."""
    val_batches: int | None = None
    """Validate on this many batches of each process; null = on all."""
    checkpoint_every: int | None = 1000
    """Steps between checkpoints, the last step always has one; null = only there."""
    keep_checkpoints: int | None = 3
    """How many `step=....ckpt` stay on disk beside `last.ckpt`; null = all."""
    images_every: int | None = 1000
    """Steps between grids of inputs over reconstructions; null = never."""
    log_every: int = 50
    """Steps between lines of metrics.csv."""
    devices: int | str = 1
    """Processes on this machine: a number, or "auto" for all there are."""
    num_nodes: int = 1
    """Machines."""
    accelerator: str = "auto"
    """cpu, gpu, ...; auto takes the best there is."""
    strategy: str = "auto"
    """Lightning's name; auto is ddp that tolerates unused parameters where there are several."""
    two_forward: bool = False
    """taming's scheme: a second forward pass, with the new weights, for the discriminator."""
    freeze: tuple[str, ...] = ()
    """Parts of the host that keep their weights: some of encoder, decoder, codebook."""
    heads_first: int = 0
    """For so many steps at the start only the heads of LG-VQ learn; 0 = never."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulate_grad_batches", "log_every", "num_nodes"):
            self._check(name, _is_count(getattr(self, name)), "a whole number > 0")
        for name in ("val_every", "val_batches", "checkpoint_every", "images_every"):
            value = getattr(self, name)
            self._check(name, value is None or _is_count(value), "a whole number > 0, or null")
        keep, clip, decay = self.keep_checkpoints, self.gradient_clip_val, self.ema_decay
        self._check("keep_checkpoints", keep is None or _is_count(keep), "> 0, or null")
        self._check("gradient_clip_val", clip is None or _is_positive(clip), "> 0, or null")
        self._check(
            "ema_decay", decay is None or (_is_positive(decay) and decay < 1), "in (0, 1), or null"
        )
        is_seed = self.seed == 0 or (_is_count(self.seed) and self.seed < 2**32)  # as numpy's
        self._check("seed", is_seed, "a whole number >= 0 and < 2**32")
        most, warmup = self.max_learning_rate, self.warmup_steps
        self._check("max_learning_rate", most is None or _is_positive(most), "> 0, or null")
        self._check("warmup_steps", warmup == 0 or _is_count(warmup), "a whole number >= 0")
        devices = self.devices
        self._check("devices", devices == "auto" or _is_count(devices), "a number > 0, or auto")
        first = self.heads_first
        self._check("heads_first", first == 0 or _is_count(first), "a whole number >= 0")
        is_list = isinstance(self.freeze, list | tuple) and set(self.freeze) <= set(FROZEN)
        self._check("freeze", is_list, f"a list of some of {', '.join(FROZEN)}")
        for name in ("scale_lr", "two_forward"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        for name in ("precision", "accelerator", "strategy"):
            self._check(name, isinstance(getattr(self, name), str), "a name")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"training.{name} must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "TrainingConfig":
        """Return the section `given` as an object.

        Raises:
            ConfigError: for an unknown key, a missing `max_steps` or a value out of range.

        Example:
            >>> TrainingConfig.of({"max_step": 1})
            Traceback (most recent call last):
            ...
            lgvq_plugin.sockets.ConfigError: training: no key 'max_step'; did you mean ...
        """
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(f"training: no key {key!r}{suggest(key, known)}")
        if given.get("max_steps") is None:
            raise MissingError(
                "training.max_steps is missing, the number of steps to train for: give "
                "--max-steps N, or training: {max_steps: N} in a config"
            )
        return cls(**{str(key): value for key, value in given.items()})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
