"""The `training:` section of a config, checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from ..sockets import ConfigError, MissingError, require_known

FROZEN = ("encoder", "decoder", "codebook", "host")
TRAINED: dict[str, tuple[str, ...]] = {
    "all": (),
    "decoder": ("encoder", "codebook"),
    "encoder": ("decoder", "codebook"),
    "heads": ("host",),
    "lora": (),  # `training.lora` says what it freezes
}
"""What `--train` freezes."""
ADAPTED = {"encoder", "decoder"}
LORA: dict[str, Any] = {"rank": 8, "alpha": 16, "parts": ["encoder", "decoder"], "targets": None}
"""Keys of `training.lora` with their defaults."""
LOGGERS = {"csv": None, "tensorboard": "train", "wandb": "wandb"}
"""Names for `training.logger`, with the extra that installs what they need."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and on what a host is trained. A step is one update of the weights."""

    max_steps: int
    """Total updates, > 0, those before a resume included. It has no default."""
    seed: int = 0
    """Seeds the weights, the order of the samples, and every random draw in training."""
    scale_lr: bool = True
    """taming's rule: base_learning_rate x batch_size x devices x accumulate_grad_batches."""
    max_learning_rate: float | None = None
    """Upper limit of the host's learning rate; null = no limit."""
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
    """Validation batches per process; null = all."""
    checkpoint_every: int | None = 1000
    """Steps between checkpoints, the last step always has one; null = only there."""
    keep_checkpoints: int | None = 3
    """Number of `step=....ckpt` kept on disk beside `last.ckpt`; null = all."""
    images_every: int | None = 1000
    """Steps between grids of inputs over reconstructions; null = never."""
    log_every: int = 50
    """Steps between lines of metrics.csv."""
    logger: str | tuple[str, ...] | None = None
    """Where metrics go besides metrics.csv, which is always written: tensorboard, wandb, a list of
    them, or csv for nothing else; null = tensorboard if it is installed."""
    devices: int | str = 1
    """Processes on this machine: a number, or "auto" for one per device."""
    num_nodes: int = 1
    """Machines."""
    accelerator: str = "auto"
    """cpu, gpu, ...; auto takes the best one available."""
    strategy: str = "auto"
    """Lightning's name; auto is ddp that tolerates unused parameters if there are several."""
    two_forward: bool = False
    """taming's scheme: a second forward pass, with the new weights, for the discriminator."""
    freeze: tuple[str, ...] = ()
    """Parts of the host that keep their weights: some of encoder, decoder, codebook; or host:
    everything but the heads of LG-VQ."""
    lora: Mapping[str, Any] | None = None
    """Low-rank adapters, which alone learn beside the heads: rank, alpha (scale x rank), parts that
    get them (encoder, decoder), and targets: a list of names of layers; null = all linear layers
    and convolutions. {} for the defaults, see `LORA`."""
    heads_first: int = 0
    """Number of steps at the start in which only the heads of LG-VQ learn; 0 = none."""

    def __post_init__(self) -> None:
        for names, is_valid, expected in CHECKS:
            for name in names.split():
                value = getattr(self, name)
                if not is_valid(value):
                    raise ConfigError(f"training.{name} must be {expected}, got {value!r}")
        if self.lora is not None:
            _check_lora(self.lora)
        require_known(self.loggers or (), LOGGERS, "training.logger: no {!r}")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts under `freeze`, and those that learn through adapters only."""
        return (*self.freeze, *(() if self.lora is None else FROZEN[:3]))

    @property
    def loggers(self) -> tuple[str, ...] | None:
        """The names under `logger`; None for the default."""
        return (self.logger,) if isinstance(self.logger, str) else self.logger and (*self.logger,)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "TrainingConfig":
        """Return the section `given` as an object.

        Raises ConfigError for an unknown key, a missing `max_steps` or a value out of range.

        >>> TrainingConfig.from_dict({"max_steps": 10}).precision
        '32-true'
        """
        require_known(given, [field.name for field in fields(cls)], "training: no key {!r}")
        if given.get("max_steps") is None:
            raise MissingError(
                "training.max_steps is missing, the number of steps to train for: give "
                "--max-steps N, or training: {max_steps: N} in a config"
            )
        return cls(**{str(key): value for key, value in given.items()})


def _check_lora(given: Mapping[str, Any]) -> None:
    require_known(given, LORA, "training.lora: no key {!r}")
    lora = {**LORA, **given}
    for key, is_valid, expected in LORA_CHECKS:
        if not is_valid(lora[key]):
            raise ConfigError(f"training.lora.{key} must be {expected}, got {lora[key]!r}")


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_natural(value: Any) -> bool:
    return _is_number(value, int) and 0 <= value < 2**63


def _is_count(value: Any) -> bool:
    return _is_natural(value) and value > 0


def _is_positive(value: Any) -> bool:
    return _is_number(value, int, float) and 0 < value < math.inf


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(v) is str for v in value)


def require_installed(names: Sequence[str] | None) -> None:
    """Raise ConfigError if a package that `training.logger` needs is missing."""
    for name in names or ():
        if not is_installed(name):
            raise ConfigError(
                f"training.logger: {name} is not installed: pip install "
                f"'lgvq_plugin[{LOGGERS[name]}]', or choose among {', '.join(LOGGERS)}"
            )


def is_installed(name: str) -> bool:
    """Whether the package of a logger is there."""
    modules = {"csv": ["csv"], "tensorboard": ["tensorboard", "tensorboardX"]}.get(name, [name])
    return any(find_spec(module) for module in modules)


LORA_CHECKS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("rank", _is_count, "a whole number > 0"),
    ("alpha", _is_positive, "> 0"),
    ("parts", lambda v: _is_names(v) and {*v} <= ADAPTED, "a list of encoder, decoder"),
    ("targets", lambda v: v is None or _is_names(v), "a list of names of layers, or null"),
]
CHECKS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("max_steps accumulate_grad_batches log_every num_nodes", _is_count, "a whole number > 0"),
    (
        "val_every val_batches checkpoint_every images_every keep_checkpoints",
        lambda v: v is None or _is_count(v),
        "a whole number > 0, or null",
    ),
    ("warmup_steps heads_first", _is_natural, "a whole number >= 0"),
    ("seed", lambda v: _is_natural(v) and v < 2**32, "a whole number >= 0 and < 2**32"),  # numpy's
    ("gradient_clip_val max_learning_rate", lambda v: v is None or _is_positive(v), "> 0, or null"),
    ("ema_decay", lambda v: v is None or (_is_positive(v) and v < 1), "in (0, 1), or null"),
    ("devices", lambda v: v == "auto" or _is_count(v), "a number > 0, or auto"),
    (
        "freeze",
        lambda v: isinstance(v, list | tuple) and {*map(str, v)} <= {*FROZEN},
        f"a list of some of {', '.join(FROZEN)}",
    ),
    (
        "logger",
        lambda v: v is None or isinstance(v, str | list | tuple),
        f"one or a list of {', '.join(LOGGERS)}, or null",
    ),
    ("lora", lambda v: v is None or isinstance(v, Mapping), f"a mapping of {', '.join(LORA)}"),
    ("scale_lr two_forward", lambda v: isinstance(v, bool), "true or false"),
    ("precision accelerator strategy", lambda v: isinstance(v, str), "a name"),
]
