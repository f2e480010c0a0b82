"""What others need of training without Lightning: read a config, build its host and its data."""

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import compat
from .._loss_parts import base_of
from ..config import parse
from ..loss import LGVQLoss
from ..sockets import (
    ConfigError,
    building,
    check_call,
    check_numbers,
    import_target,
    instantiate,
    params_of,
    resolve,
)
from ._quiet import prints_to_stderr
from ._sections import (
    LOSS_KEYS,
    DataSection,
    Sections,
    lay_over,
    lgvq_block,
    loss_key,
    loss_section,
    model_section,
    read_config,
    to_plain,
)
from ._settings import TrainingConfig

__all__ = [
    "LOSS_KEYS",
    "DataSection",
    "Sections",
    "TrainingConfig",
    "build_dataset",
    "build_host",
    "lay_over",
    "lgvq_block",
    "loss_key",
    "loss_section",
    "read_config",
    "to_plain",
]


def build_host(config: DictConfig | Mapping[str, Any]) -> nn.Module:
    """Build the host that the config's `model:` section names.

    Raises:
        ConfigError: if a target in that section does not exist, or a constructor does not take
            its params, or refuses their values.

    Example:
        >>> build_host({"model": {"target": "torch.nn.Identity", "learning_rate": 0.1}})
        Identity()
    """
    whole = lay_over(OmegaConf.create({}), config)
    model = model_section(to_plain(whole, "model"))
    compat.patch()
    _check_targets(model, "model")
    weight = (loss_section({"model": model}).get("params") or {}).get("perceptual_weight", 1.0)
    target, params = import_target(model["target"]), model.get("params") or {}
    check_call(f"model: {model['target']}", target, (), params)
    # Hosts read their configs as attributes (encoder.dim), as OmegaConf's containers allow.
    given = OmegaConf.create(params, flags={"allow_objects": True})
    with building("model", model["target"], params):
        with compat.lpips_only_if_used(float(weight)), prints_to_stderr():
            host = target(**{str(key): value for key, value in given.items()})
        require_host = getattr(getattr(host, "loss", None), "require_host", None)
        if callable(require_host):  # LGVQLoss: say now, not at the first step, what is not found
            require_host()
    return host


def build_dataset(section: Mapping[str, Any]) -> Any:
    """Build the data set `{target, params}`; the target may be a member's short name.

    Raises:
        ConfigError: if there is no such data set, it does not take the params, or is empty.

    Example:
        >>> len(build_dataset({"target": "scenes", "params": {"length": 5}}))
        5
    """
    compat.patch()
    try:
        member = resolve("datasets", section["target"])
    except ConfigError as error:
        raise ConfigError(f"data: target: {error}") from error
    path, params = f"{member.__module__}.{member.__qualname__}", section.get("params")
    with building("data", section["target"], params):
        dataset = instantiate({"target": path, "params": params})
        length = len(dataset)
    if length == 0:
        raise ConfigError(f"data set {section['target']} with {section.get('params')} is empty")
    return dataset


def _check_targets(node: Any, where: str) -> None:
    """Check what can be checked of a tree of `{target, params}` before anything is built."""
    if not isinstance(node, Mapping):
        if where.endswith(tuple(f".{key}" for key in LOSS_KEYS[:1])):
            raise ConfigError(f"{where}: expected a mapping with a `target:`, got {node!r}")
        if isinstance(node, float) and math.isnan(node):
            raise ConfigError(f"{where}: expected a number, got {node!r}")
        return
    if isinstance(node.get("target"), str):
        try:
            target = import_target(node["target"])
        except ConfigError as error:
            raise ConfigError(f"{where}.target: {error}") from error
        params = params_of(node, where)
        if where in [f"model.params.{key}" for key in LOSS_KEYS]:
            _check_loss(node["target"], target, params, f"{where}.params")
    elif where.endswith("lossconfig"):
        raise ConfigError(f"{where}: expected a `target:`, got keys {sorted(node)}")
    for key, value in node.items():
        _check_targets(value, f"{where}.{key}")


def _check_loss(name: str, loss: Any, params: Mapping[str, Any], where: str) -> None:
    """Check the params of the host's loss, those of the base loss if it is ours."""
    if isinstance(loss, type) and issubclass(loss, LGVQLoss):
        own = {key: value for key, value in params.items() if key not in ("base", "lgvq")}
        parse(params.get("lgvq"))
        name, params = base_of(params.get("base"), own, loss.BASE_TARGET)
        loss = import_target(name)
        compat.check_loss(name, loss, (), params, where)
    else:
        check_numbers(where, loss, params)
