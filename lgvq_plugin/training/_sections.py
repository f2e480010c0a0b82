"""From YAML files to checked sections: model, data, training."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..sockets import ConfigError, suggest
from ._settings import TrainingConfig

logger = logging.getLogger(__name__)

SECTIONS = ["model", "data", "training", "lightning"]
LOSS_KEYS = ("lossconfig", "loss")  # taming and nearly all; ViT-VQGAN
MODEL_KEYS = ["base_learning_rate", "learning_rate", "target", "params"]
DATA_KEYS = ["batch_size", "num_workers", "train", "validation", "test", "wrap"]


def read_config(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files, the later over the earlier, then `key=value` overrides.

    Raises:
        ConfigError: if a file is missing, a folder or no YAML mapping, or an override has
            no `=`; the message names the file and the line.

    Example:
        >>> read_config([], ["training.max_steps=5"]).training.max_steps
        5
    """
    parts = [_read_file(Path(path)) for path in paths]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"{override!r}: expected key=value, for instance training.max_steps=100"
            )
    try:
        parts.append(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.merge(*parts)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"the configs and overrides do not fit together: {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _read_file(path: Path) -> DictConfig:
    if path.is_dir():
        raise ConfigError(f"config {str(path)!r} is a folder; give a YAML file in it")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config {str(path)!r} does not exist{suggest(path.name, near)}")
    try:
        config = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else "?"
        raise ConfigError(f"{path}:{line}: broken YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with model:, data:, training:")
    return config


@dataclass(frozen=True)
class DataSection:
    """The `data:` section; its keys stand under `params:` (taming) or directly in it."""

    batch_size: int
    """Samples a process takes at a time."""
    train: dict[str, Any]
    """`{target, params}` of the data set to train on."""
    validation: dict[str, Any] | None = None
    """`{target, params}` of the data set to validate on, or None."""
    test: dict[str, Any] | None = None
    """`{target, params}` of the data set that only evaluation sees, or None."""
    num_workers: int = 0
    """Processes that load samples, for each training process."""


@dataclass(frozen=True)
class Sections:
    """A whole config, checked, in plain containers."""

    model: dict[str, Any]
    data: DataSection
    training: TrainingConfig
    plain: dict[str, Any]

    @classmethod
    def of(cls, config: DictConfig | Mapping[str, Any]) -> "Sections":
        """Check `config`.

        Raises:
            ConfigError: for a section, key or value that is missing or unknown.
        """
        plain = to_plain(config)
        for name in plain:
            if name not in SECTIONS:
                known = suggest(str(name), SECTIONS)
                raise ConfigError(f"no section {str(name)[:60]!r} in a config{known}")
        for name in SECTIONS[:3]:
            if not isinstance(plain.get(name), dict):
                raise ConfigError(f"the config has no section `{name}:`; it has {list(plain)}")
        if "lightning" in plain:
            logger.warning(
                "the `lightning:` section is not read (max_steps, gpus, callbacks, ...); "
                "`training:` says all of it"
            )
        training = TrainingConfig.of(plain["training"])
        return cls(model_section(plain), _data_section(plain["data"]), training, plain)

    def learning_rate(self, world_size: int) -> float:
        """Return the host's learning rate on `world_size` processes, and log how it came about."""
        rate, most = self._own_learning_rate(world_size), self.training.max_learning_rate
        if most is None or rate <= most:
            return rate
        logger.info(
            "learning rate %.3g instead of %.3g: the limit is training.max_learning_rate=%.3g",
            *(most, rate, most),
        )
        return most

    def _own_learning_rate(self, world_size: int) -> float:
        model, training = self.model, self.training
        if model.get("learning_rate") is not None:
            return float(model["learning_rate"])
        base = float(model["base_learning_rate"])
        if not training.scale_lr:
            return base
        batch, accumulate = self.data.batch_size, training.accumulate_grad_batches
        rate = accumulate * world_size * batch * base
        logger.info(
            "learning rate %.3g = %d (accumulate_grad_batches) x %d (devices) x %d (batch_size) "
            "x %.3g (base_learning_rate); off with training.scale_lr=false",
            *(rate, accumulate, world_size, batch, base),
        )
        return rate


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` as dicts, lists and scalars, interpolations resolved.

    Raises:
        ConfigError: if a value is still `???`, or an interpolation leads nowhere.
    """
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error)
        raise ConfigError(f"{key} is ??? in the config; give it: {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def model_section(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked `model:` section of a plain config; raises ConfigError."""
    model = plain.get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"the config has no section `model:`; it has {list(plain)}")
    for key in model:
        if key not in MODEL_KEYS:
            raise ConfigError(f"model: no key {key!r}{suggest(key, MODEL_KEYS)}")
    if not isinstance(model.get("target"), str):
        raise ConfigError("model.target is missing: the dotted path of the host's class")
    rates = [model.get(name) for name in ("learning_rate", "base_learning_rate")]
    if rates == [None, None]:
        raise ConfigError("model: give base_learning_rate, or learning_rate (not scaled)")
    for rate in rates:
        try:
            good = rate is None or float(rate) > 0  # YAML 1.1 reads 1e-4 as a string
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ConfigError(f"model: a learning rate must be a number > 0, got {rate!r}")
    return model


def loss_key(config: Mapping[str, Any]) -> str | None:
    """Return where `model.params` holds the host's loss: lossconfig, or loss; None for neither."""
    params = (config.get("model") or {}).get("params") or {}
    return next((key for key in LOSS_KEYS if isinstance(params.get(key), Mapping)), None)


def loss_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the host's loss, `{target, params}`; {} if there is none.

    Example:
        >>> loss_section({"model": {"params": {"loss": {"target": "torch.nn.MSELoss"}}}})
        {'target': 'torch.nn.MSELoss'}
    """
    key = loss_key(config)
    return to_plain(config["model"]["params"][key]) if key else {}


def lgvq_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `lgvq:` block of the host's loss as it is given; {} if there is none."""
    return dict((loss_section(config).get("params") or {}).get("lgvq") or {})


def _data_section(data: Mapping[str, Any]) -> DataSection:
    direct = {key: value for key, value in data.items() if key not in ("target", "params")}
    given = {**(data.get("params") or {}), **direct}
    for key in given:
        if key not in DATA_KEYS:
            raise ConfigError(f"data: no key {key!r}{suggest(key, DATA_KEYS)}")
    for key in ("batch_size", "train"):
        if given.get(key) is None:
            raise ConfigError(f"data.{key} is missing (data.params.{key} is fine too)")
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = given.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.{key} must be a whole number >= {least}, got {value!r}")
    for key in ("train", "validation", "test"):
        section = given.get(key)
        if section is not None and not (isinstance(section, dict) and "target" in section):
            raise ConfigError(f"data.{key}: expected a mapping with a `target:`, got {section!r}")
    used = ("batch_size", "train", "validation", "test", "num_workers")
    return DataSection(**{key: given[key] for key in used if given.get(key) is not None})
