"""What others need of training without Lightning: read a config, build its host and its data.

Importing this imports no torch, so that errors in a config are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from .. import compat
from ..config import parse
from ..sockets import ConfigError, import_target, instantiate, path_of, resolve
from ._quiet import prints_to_stderr
from ._sections import (
    LOSS_KEYS,
    DataSection,
    Sections,
    lgvq_block,
    loss_key,
    loss_section,
    model_section,
    read_config,
    to_plain,
)
from ._settings import TrainingConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LOSS_KEYS",
    "DataSection",
    "Sections",
    "TrainingConfig",
    "build_dataset",
    "build_host",
    "check_names",
    "lgvq_block",
    "loss_key",
    "loss_section",
    "read_config",
    "to_plain",
]


REFUSALS = (ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError)
"""What constructors raise at values they cannot take: 7 channels in 32 groups, a negative size."""


def build_host(config: DictConfig | Mapping[str, Any]) -> nn.Module:
    """Build the host that the config's `model:` section names.

    Raises:
        ConfigError: if a target in that section does not exist, or a constructor does not take
            its params, or refuses their values.

    Example:
        >>> build_host({"model": {"target": "torch.nn.Identity", "learning_rate": 0.1}})
        Identity()
    """
    section = config.get("model")
    model = model_section(to_plain({"model": section} if section is not None else {}))
    _check_targets(model, "model")
    loss = loss_section({"model": model})
    weight = compat.perceptual_weight_of(loss.get("target"), loss.get("params"))
    try:
        with compat.lpips_only_if_used(weight, loss.get("target")), prints_to_stderr():
            host = instantiate(model)
        require_host = getattr(getattr(host, "loss", None), "require_host", None)
        if callable(require_host):  # LGVQLoss: say now, not at the first step, what is not found
            require_host()
        return host
    except TypeError as error:
        # Constructors inside the host's own (its loss, its encoder) get params of the config too.
        if "unexpected keyword argument" in str(error) or "required" in str(error):
            raise ConfigError(f"model.params do not fit: {error}") from error
        raise
    except ConfigError:
        raise
    except REFUSALS as error:
        raise ConfigError(
            f"model: {model['target']} cannot be built with its params: "
            f"{type(error).__name__}: {error}; --debug shows where"
        ) from error


def build_dataset(section: Mapping[str, Any]) -> Any:
    """Build the data set `{target, params}`; the target may be a member's short name.

    Raises:
        ConfigError: if there is no such data set, it does not take the params, or is empty.

    Example:
        >>> len(build_dataset({"target": "scenes", "params": {"length": 5}}))
        5
    """
    member = resolve("datasets", section["target"])
    path = f"{member.__module__}.{member.__qualname__}"
    dataset = instantiate({"target": path, "params": section.get("params")})
    if len(dataset) == 0:
        raise ConfigError(f"data set {section['target']} with {section.get('params')} is empty")
    return dataset


def check_names(sections: Sections) -> None:
    """Check the data sets' names and the `lgvq:` block, as far as that needs no torch.

    Raises:
        ConfigError: for a data set that is neither a member nor a dotted path, or a key or value
            of the block that is wrong.
    """
    data = sections.data
    for section in (data.train, data.validation, data.test):
        if section is not None:
            path_of("datasets", section["target"])
    parse(lgvq_block(sections.plain))


def _check_targets(node: Any, where: str) -> None:
    if isinstance(node, Mapping):
        if isinstance(node.get("target"), str):
            try:
                import_target(node["target"])
            except ConfigError as error:
                hint = compat.explain_import(error.__cause__)
                raise ConfigError(f"{where}.target: {error}{hint}") from error
        elif where.endswith("lossconfig"):
            raise ConfigError(f"{where}: expected a `target:`, got keys {sorted(node)}")
        for key, value in node.items():
            _check_targets(value, f"{where}.{key}")
