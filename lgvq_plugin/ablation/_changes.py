"""What a variant changes: nested or dotted keys, and the short forms of a plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ObjectivesConfig
from ..sockets import ConfigError, suggest
from ..training.base import lay_over, loss_key, read_config

OBJECTIVES = [field.name for field in fields(ObjectivesConfig)]
LGVQ = "model.params.lossconfig.params.lgvq"


def apply_changes(config: DictConfig, changes: Any, where: str = "changes") -> DictConfig:
    """Return `config` with the changes of one variant.

    Args:
        config: sections model, data, training.
        changes: a mapping with keys of the config, nested or dotted, and the short forms
            `recipe`, `objectives` and `lgvq`; or a list of "key=value".
        where: for messages.

    Example:
        >>> short = apply_changes(OmegaConf.create({}), {"recipe": "paper", "training.seed": 3})
        >>> short.training.seed, short.model.params.lossconfig.params.lgvq.recipe
        (3, 'paper')
    """
    if isinstance(changes, str) or not isinstance(changes, Mapping | Sequence):
        raise ConfigError(f"{where}: expected a mapping or a list of key=value, got {changes!r}")
    try:
        if not isinstance(changes, Mapping):
            return lay_over(config, read_config([], [str(change) for change in changes]))
        change = OmegaConf.create({})
        for key, value in changes.items():
            for full, part in _in_full(str(key), value, where):
                full = full.replace(".lossconfig.", f".{loss_key(config) or 'lossconfig'}.", 1)
                OmegaConf.update(change, full, _nested(part), merge=True, force_add=True)
        return lay_over(config, change)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: the changes do not fit the config: {error}") from error


def _nested(value: Any) -> Any:
    """Write out dotted keys at any depth: {"a.b": 1} as {"a": {"b": 1}}."""
    if not isinstance(value, Mapping):
        return value
    whole = OmegaConf.create({})
    for key, part in value.items():
        OmegaConf.update(whole, str(key), _nested(part), merge=True, force_add=True)
    return whole


def _in_full(key: str, value: Any, where: str) -> Iterable[tuple[str, Any]]:
    """Yield (key of the config, value) for one key of a variant."""
    head, dot, rest = key.partition(".")
    if head == "recipe":
        yield f"{LGVQ}.recipe", value
    elif key == "objectives" and not isinstance(value, Mapping):
        names = [value] if isinstance(value, str) else list(value or [])
        for name in names:
            if name not in OBJECTIVES:
                raise ConfigError(f"{where}: objectives: {name!r}{suggest(name, OBJECTIVES)}")
        for name in OBJECTIVES:
            if name not in names:
                yield f"{LGVQ}.objectives.{name}.weight", 0.0
    elif head in ("objectives", "lgvq"):
        yield LGVQ + (".objectives" if head == "objectives" else "") + dot + rest, value
    elif head in ("model", "data", "training"):
        yield key, value
    else:
        known = ["model", "data", "training", "lgvq", "recipe", "objectives", "note", "base"]
        raise ConfigError(f"{where}: no key {key!r} in a variant{suggest(head, known)}")
