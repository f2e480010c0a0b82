"""From YAML files to checked sections: model, data, training."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..datasets import MEMBERS
from ..sockets import ConfigError, Problems, suggest
from ._settings import TrainingConfig

logger = logging.getLogger(__name__)

SECTIONS = ["model", "data", "training", "lightning"]
LOSS_KEYS = ("lossconfig", "loss")  # taming and nearly all; ViT-VQGAN
MODEL_KEYS = ["base_learning_rate", "learning_rate", "target", "params"]
_PACKAGE = __package__.partition(".")[0]
RESOLUTION_KEYS = ("resolution", "image_size", "img_size")
DATA_SETS = ("train", "validation", "test")
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
    def of(
        cls, config: DictConfig | Mapping[str, Any], problems: Problems | None = None
    ) -> "Sections":
        """Check `config`; `training:` may be missing but for `max_steps`.

        Args:
            config: the whole of it.
            problems: collects what is wrong in a section, which is then None in the result.

        Raises:
            ConfigError: for a section, key or value that is missing or unknown.
        """
        plain = to_plain(config)
        for name in plain:
            if name not in SECTIONS:
                known = suggest(str(name), SECTIONS)
                raise ConfigError(f"no section {str(name)[:60]!r} in a config{known}")
        if "lightning" in plain:
            logger.warning(
                "the `lightning:` section is not read (max_steps, gpus, callbacks, ...); "
                "`training:` says all of it"
            )
        found = Problems() if problems is None else problems
        parts: dict[str, Any] = dict.fromkeys(SECTIONS[:3])
        with found.collecting():
            parts["model"] = model_section(plain)
        with found.collecting():
            parts["data"] = data_section(plain)
            plain["data"] = with_sizes(plain["data"], plain.get("model"), warn=False)
        with found.collecting():
            parts["training"] = TrainingConfig.of(_section(plain, "training", default={}))
        if problems is None:
            found.raise_any()
        return cls(**parts, plain=plain)

    def learning_rate(self, world_size: int) -> float:
        """Return the host's learning rate on `world_size` processes, and log how it came about."""
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


DATA_HINT = "; give it, or --data FOLDER (images with captions)"


def _section(
    plain: Mapping[str, Any], name: str, hint: str = "", *, default: Any = None
) -> dict[str, Any]:
    section = default if plain.get(name) is None else plain[name]
    if section is None:
        raise ConfigError(f"the config has no section `{name}:`; it has {list(plain)}{hint}")
    if not isinstance(section, dict):
        raise ConfigError(f"{name}: expected a mapping, got {section!r:.80}{hint}")
    return section


def resolution_of(model: Mapping[str, Any]) -> tuple[str, int | list[int]] | None:
    """Return the key and the value of the image size that a host is built for, if it names one.

    Example:
        >>> resolution_of({"params": {"ddconfig": {"resolution": 256, "ch": 128}}})
        ('model.params.ddconfig.resolution', 256)
    """

    def search(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        yield from ((f"{path}.{key}", node[key]) for key in RESOLUTION_KEYS if key in node)
        for key, value in node.items():
            if isinstance(value, Mapping) and key not in LOSS_KEYS:
                yield from search(value, f"{path}.{key}")

    for key, value in search(model.get("params") or {}, "model.params"):
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides):
            return key, sides[0] if sides[0] == sides[1] else sides
    return None


def with_sizes(data: Mapping[str, Any], model: Any, *, warn: bool = True) -> dict[str, Any]:
    """Return the `data:` section with the host's resolution as `size` where it names none.

    Args:
        data: the section; only data sets of this package get a size.
        model: the `model:` section, if there is one.
        warn: of a size that differs from the resolution.
    """
    known = resolution_of(model) if isinstance(model, Mapping) else None
    inner = data.get("params")
    if known is None or not (inner is None or isinstance(inner, Mapping)):
        return dict(data)
    made = {key: _with_size(key, value, *known, warn=warn) for key, value in data.items()}
    if inner is not None:
        sized = {key: _with_size(key, value, *known, warn=warn) for key, value in inner.items()}
        made["params"] = sized
    return made


def _with_size(name: str, section: Any, key: str, size: int | list[int], *, warn: bool) -> Any:
    if (
        name not in DATA_SETS
        or not isinstance(section, Mapping)
        or not _is_ours(section.get("target"))
    ):
        return section
    params = dict(section.get("params") or {})
    given = params.setdefault("size", size)
    if warn and given not in (size, [size, size]):
        logger.warning(
            "data.%s: size %s, but the host is built for %s (%s); leave `size` out to train at "
            "the host's resolution",
            *(name, given, size, key),
        )
    return {**section, "params": params}


def _is_ours(target: Any) -> bool:
    """Whether a data set is one of this package, which all take `size`; imports none of them."""
    paths = {f"{_PACKAGE}.datasets.{path}" for path in MEMBERS.values()}
    return target in MEMBERS or str(target).replace(":", ".") in paths


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


def data_section(plain: Mapping[str, Any]) -> DataSection:
    """Return the checked `data:` section of a plain config, its sizes the host's resolution.

    Raises:
        ConfigError: for what is missing or unknown in it.
    """
    data = with_sizes(_section(plain, "data", DATA_HINT), plain.get("model"))
    direct = {key: value for key, value in data.items() if key not in ("target", "params")}
    given = {**(data.get("params") or {}), **direct}
    for key in given:
        if key not in DATA_KEYS:
            raise ConfigError(f"data: no key {key!r}{suggest(key, DATA_KEYS)}")
    for key in ("batch_size", "train"):
        if given.get(key) is None:
            hint = DATA_HINT if key == "train" else ""
            raise ConfigError(f"data.{key} is missing (data.params.{key} is fine too){hint}")
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = given.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.{key} must be a whole number >= {least}, got {value!r}")
    for key in DATA_SETS:
        section = given.get(key)
        if section is not None and not (isinstance(section, dict) and "target" in section):
            raise ConfigError(f"data.{key}: expected a mapping with a `target:`, got {section!r}")
    used = ("batch_size", "train", "validation", "test", "num_workers")
    return DataSection(**{key: given[key] for key in used if given.get(key) is not None})
