"""From YAML files to checked sections: model, data, training.

files, overrides --lay_over--> one config, interpolations in it --Sections.of--> plain, checked
"""

import difflib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from ..arguments import KEY
from ..config import ObjectivesConfig, laid_over
from ..datasets import MEMBERS
from ..sockets import ConfigError, MissingError, Problems, suggest
from .settings import TrainingConfig

logger = logging.getLogger(__name__)

SECTIONS = ["model", "data", "training", "lightning", "evaluation"]
SHORT_FORMS = ["lgvq", "recipe", "objectives"]
FOREIGN = ["dataset", "trainer", "seed_everything"]  # of ViT-VQGAN and LightningCLI
OURS = ("lgvq_plugin.LGVQLoss", "lgvq_plugin.loss.LGVQLoss", "lgvq_plugin.over.")
OBJECTIVES = [entry.name for entry in fields(ObjectivesConfig)]
LOSS_KEYS = ("lossconfig", "loss")  # taming and nearly all; ViT-VQGAN
MODEL_KEYS = ["base_learning_rate", "learning_rate", "target", "params"]
_PACKAGE = __package__.partition(".")[0]
RESOLUTION_KEYS = ("resolution", "image_size", "img_size")
DATA_SETS = ("train", "validation", "test")
RENAMED = (  # in interpolations
    (r"\bdataset\.", "data."),
    (r"\binit_args\b", "params"),
    (r"\bclass_path\b", "target"),
    (r"\bdata\.params\.", "data."),
)
DATA_KEYS = ["batch_size", "num_workers", "train", "validation", "test", "wrap"]


def read_config(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files, the later over the earlier, then `key=value` overrides.

    Raises:
        ConfigError: if a file is missing, a folder or no YAML mapping, or an override has
            no `=` or names no section; the message names the file and the line.

    Example:
        >>> read_config([], ["training.max_steps=5", "lgvq.stop=4"])
        {'training': {'max_steps': 5}, 'lgvq': {'stop': 4}}
    """
    parts = [_read_file(Path(path)) for path in paths]
    known = {*SECTIONS, *SHORT_FORMS, *FOREIGN, *(str(key) for part in parts for key in part)}
    for override in overrides:
        _check_override(override, known)
    try:
        parts.append(OmegaConf.from_dotlist(list(overrides)))
        whole = OmegaConf.create({})
        for part in parts:
            whole = lay_over(whole, part)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the configs and overrides do not fit together: {error}") from error
    return whole


def _check_override(override: str, known: Iterable[str]) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: expected key=value, for instance training.max_steps=100")
    if not KEY.fullmatch(key):
        raise ConfigError(
            f"{override!r}: {key!r} is not a key of a config, like training.max_steps; if it is a "
            "file, name it right behind its option"
        )
    head = re.split(r"[.\[]", key)[0]
    if head not in known:
        raise ConfigError(f"{override!r}: no section {head!r} in a config{suggest(head, known)}")


def lay_over(config: DictConfig, part: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Return `config` with `part` merged over it; neither is changed, nothing is resolved.

    The layouts of LightningCLI (class_path, init_args), ViT-VQGAN (dataset) and taming
    (data.params) become ours; `lgvq`, `recipe` and `objectives` at the root go to the loss as
    soon as it is one of ours. A data set, or a guide, of another target loses the old params.

    Example:
        >>> below = OmegaConf.create({"data": {"train": {"target": "scenes", "params": {"a": 1}}}})
        >>> lay_over(below, {"data": {"train": {"target": "folder"}}})
        {'data': {'train': {'target': 'folder'}}}
    """
    low, high = _in_our_layout(config), _in_our_layout(part)
    _place_short_forms(low, high)
    for key in DATA_SETS:
        _drop_replaced(_mapping(low, "data", key), _mapping(high, "data", key), f"data.{key}")
    old, new = (_mapping(_block_in(node), "guide") for node in (low, high))
    if new.get("use") not in (None, old.get("use", "open_clip")):
        old.clear()
    merged = OmegaConf.merge(OmegaConf.create(low), OmegaConf.create(high))
    assert isinstance(merged, DictConfig)
    return merged


def _in_our_layout(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in plain containers, unresolved, its foreign keys renamed."""
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    plain: Any = _renamed(OmegaConf.to_container(node, resolve=False))
    plain = {str(key): value for key, value in plain.items()}
    if "dataset" in plain and "data" not in plain:
        plain["data"] = plain.pop("dataset")
    data = plain.get("data")
    if isinstance(data, dict) and isinstance(data.get("params"), dict):
        direct = {key: value for key, value in data.items() if key not in ("target", "params")}
        plain["data"] = laid_over(data["params"], direct)
    return plain


def _renamed(node: Any) -> Any:
    """Rename LightningCLI's keys at any depth, and the places that interpolations point to."""
    if isinstance(node, list):
        return [_renamed(value) for value in node]
    if isinstance(node, str) and "${" in node:
        for old, new in RENAMED:
            node = re.sub(old, new, node)
    if not isinstance(node, dict):
        return node
    is_cli = isinstance(node.get("class_path"), str) or isinstance(node.get("init_args"), dict)
    names = {"class_path": "target", "init_args": "params"} if is_cli else {}
    return {names.get(key, key): _renamed(value) for key, value in node.items()}


def _mapping(node: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping at a path; an empty one, not attached, where there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _place_short_forms(low: dict[str, Any], high: dict[str, Any]) -> None:
    key = loss_key(high) or loss_key(low)
    targets = [_mapping(node, "model", "params", key or "").get("target") for node in (high, low)]
    is_ours = str(next((target for target in targets if target), "")).startswith(OURS)
    for node in (low, high):
        block = _pop_short_forms(node)
        if not block:
            continue
        if not (key and is_ours):
            node["lgvq"] = block
            continue
        inner = node
        for name in ("model", "params", key, "params"):
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner["lgvq"] = laid_over(inner.get("lgvq") or {}, block)


def _pop_short_forms(node: dict[str, Any]) -> Any:
    """Take `lgvq`, `recipe` and `objectives` off the root; returns an `lgvq:` block."""
    block = node.pop("lgvq", None) or {}
    if not isinstance(block, dict):
        raise ConfigError(f"lgvq: expected a mapping like {{recipe: paper}}, got {block!r}")
    if "recipe" in node:
        block = {**block, "recipe": node.pop("recipe")}
    if "objectives" in node:
        given = node.pop("objectives")
        if not isinstance(given, dict):
            names = [given] if isinstance(given, str) else given
            if not isinstance(names, list):
                raise ConfigError(
                    f"objectives: expected some of {', '.join(OBJECTIVES)}, or a mapping of them, "
                    f"got {given!r}"
                )
            for name in names:
                if name not in OBJECTIVES:
                    raise ConfigError(f"objectives: {name!r}{suggest(name, OBJECTIVES)}")
            given = {name: {"weight": 0.0} for name in OBJECTIVES if name not in names}
        block = laid_over(block, {"objectives": given})
    return block


def _drop_replaced(old: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Drop a data set's params if another target takes its place."""
    target = new.get("target")
    if not target or not old.get("target") or target == old["target"]:
        return
    dropped = old.pop("params", None) or {}
    if dropped:
        logger.info(
            "%s: %s replaces %s, whose params are dropped (%s)",
            *(where, target, old["target"], ", ".join(map(str, dropped))),
        )


def _block_in(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `lgvq:` block of one part of a config, in the loss or at the root."""
    key = loss_key(node)
    inner = _mapping(node, "model", "params", key or "", "params", "lgvq")
    return inner or _mapping(node, "lgvq")


def _read_file(path: Path) -> DictConfig:
    if path.is_dir():
        raise ConfigError(f"config {str(path)!r} is a folder; give a YAML file in it")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        is_override = "; expected a YAML file first, then overrides" if "=" in str(path) else ""
        raise ConfigError(
            f"config {str(path)!r} does not exist{is_override}{suggest(path.name, near)}"
        )
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
        whole = lay_over(OmegaConf.create({}), config)
        plain = to_plain(whole)
        _settle_root(plain, helpers_of(whole))
        if "lightning" in plain:
            logger.warning(
                "the `lightning:` section is not read (max_steps, gpus, callbacks, ...); "
                "`training:` says all of it"
            )
        scale_lr = _mapping(plain, "model").get("scale_lr")  # taming's flag; some keep it here
        if isinstance(scale_lr, bool) and _takes_more(plain, "training"):
            plain["training"] = {"scale_lr": scale_lr, **(plain.get("training") or {})}
        found = Problems() if problems is None else problems
        parts: dict[str, Any] = dict.fromkeys(SECTIONS[:3])
        with found.collecting():
            model = parts["model"] = model_section(plain)
            _warn_unread("model", [k for k in plain["model"] if k not in (*model, "scale_lr")])
            plain["model"] = model
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


def _takes_more(plain: Mapping[str, Any], section: str) -> bool:
    """Whether a section is a mapping, or missing; another value is reported when it is read."""
    return plain.get(section) is None or isinstance(plain[section], dict)


def helpers_of(config: DictConfig) -> set[str]:
    """Return the keys of the root beside the sections that the config's interpolations name."""
    return _referenced(OmegaConf.to_container(config, resolve=False)) - {*SECTIONS, *SHORT_FORMS}


def _referenced(node: Any) -> set[str]:
    """Return the keys of the root that interpolations name: `size` for `${size}`."""
    if isinstance(node, dict | list):
        values = node.values() if isinstance(node, dict) else node
        return set().union(*(_referenced(value) for value in values))
    return set(re.findall(r"\$\{([A-Za-z_]\w*)", node)) if isinstance(node, str) else set()


def _settle_root(plain: dict[str, Any], helpers: set[str]) -> None:
    """Leave the sections: map what other programs say there, refuse what may be a typing error."""
    for name in [name for name in plain if name not in SECTIONS]:
        value = plain.pop(name)
        if name in helpers:
            continue
        if name == "lgvq":
            raise ConfigError(
                f"lgvq: the loss {loss_section(plain).get('target')!r} takes no such block; change "
                "its target to lgvq_plugin.LGVQLoss, or lgvq_plugin.over.<its target>"
            )
        if name == "seed_everything":
            is_seed = isinstance(value, int) and not isinstance(value, bool)
            if is_seed and _takes_more(plain, "training"):
                plain["training"] = {"seed": value, **(plain.get("training") or {})}
        elif name == "trainer" and isinstance(value, dict) and _takes_more(plain, "training"):
            _take_trainer(plain, value)
        elif difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.75):
            raise ConfigError(f"no section {name[:60]!r} in a config{suggest(name, SECTIONS)}")
        else:
            _warn_unread("", [name])


def _take_trainer(plain: dict[str, Any], trainer: Mapping[str, Any]) -> None:
    """Take from LightningCLI's `trainer:` what means the same in `training:`."""
    same = ("max_steps", "accumulate_grad_batches", "precision")
    own = plain.get("training") or {}
    taken = {
        key: trainer[key]
        for key in same
        if key not in own
        and isinstance(trainer.get(key), str if key == "precision" else int)
        and trainer[key] != -1  # Lightning's word for no limit
    }
    if taken:
        plain["training"] = {**taken, **own}
        logger.info("taken from `trainer:`: %s", ", ".join(f"{k}={v}" for k, v in taken.items()))
    _warn_unread("trainer", [key for key in trainer if key not in taken])


def _warn_unread(section: str, names: Sequence[Any]) -> None:
    if names:
        told = ", ".join(f"{section}.{name}" if section else str(name) for name in names)
        logger.warning("the config's %s: not read, it has no effect here", told)


def to_plain(config: DictConfig | Mapping[str, Any], *sections: str) -> dict[str, Any]:
    """Return `config` as dicts, lists and scalars, interpolations resolved.

    Args:
        config: the whole, because interpolations may lead from one section to another.
        sections: return only these, where they are given; others may still be `???`.

    Raises:
        ConfigError: if a value is still `???`, or an interpolation leads nowhere.
    """
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    try:
        if sections:
            return {name: _resolved(node, name) for name in sections if node.get(name) is not None}
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error)
        raise ConfigError(f"{key} is ??? in the config; give it: {key}=VALUE") from error
    except OmegaConfBaseException as error:
        key, told = getattr(error, "full_key", None) or "config", str(error).strip()
        hint = f"; give it: {key}=VALUE" if isinstance(error, InterpolationKeyError) else ""
        raise ConfigError(f"{key}: {told.splitlines()[0]}{hint}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _resolved(node: DictConfig, name: str) -> Any:
    value = node[name]
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


def model_section(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked `model:` section of a plain config, unknown keys left out.

    Raises:
        ConfigError: if a key is missing, wrong, or nearly a known one.
    """
    model = plain.get("model")
    if model is None:
        raise ConfigError(f"the config has no section `model:`; it has {list(plain)}")
    if not isinstance(model, dict):
        raise ConfigError(f"model: expected a mapping with a `target:`, got {model!r:.80}")
    _refuse_near("model", model, MODEL_KEYS)
    model = {key: value for key, value in model.items() if key in MODEL_KEYS}
    if not isinstance(model.get("target"), str):
        raise ConfigError("model.target is missing: the dotted path of the host's class")
    params = model.get("params")
    if params is not None and not isinstance(params, dict):
        raise ConfigError(f"model.params: expected a mapping, got {params!r}")
    if model.get("learning_rate") is None and model.get("base_learning_rate") is None:
        own = (params or {}).get("learning_rate")  # LightningCLI's hosts take it themselves
        if own is None:
            raise ConfigError("model: give base_learning_rate, or learning_rate (not scaled)")
        model["learning_rate"] = own
    for name in ("learning_rate", "base_learning_rate"):
        rate = model.get(name)
        if rate is not None and not _is_rate(rate):
            raise ConfigError(f"model.{name}: a learning rate must be a number > 0, got {rate!r}")
    return model


DATA_HINT = "; give it, or --data FOLDER (images with captions)"


def _section(
    plain: Mapping[str, Any], name: str, hint: str = "", *, default: Any = None
) -> dict[str, Any]:
    section = default if plain.get(name) is None else plain[name]
    if section is None:
        raise MissingError(f"the config has no section `{name}:`; it has {list(plain)}{hint}")
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

    params = model.get("params")
    for key, value in search(params if isinstance(params, Mapping) else {}, "model.params"):
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


def _is_rate(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError, OverflowError):  # YAML 1.1 reads 1e-4 as a string
        return False


def _refuse_near(section: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that looks like a known one; what is not known at all is warned of."""
    for key in given:
        if key not in known and difflib.get_close_matches(str(key), known, n=1, cutoff=0.75):
            raise ConfigError(f"{section}: no key {key!r}{suggest(key, known)}")


def loss_key(config: Mapping[str, Any]) -> str | None:
    """Return where `model.params` holds the host's loss: lossconfig, or loss; None for neither."""
    params: Any = config
    for name in ("model", "params"):
        params = params.get(name) if isinstance(params, Mapping) else None
    if not isinstance(params, Mapping):
        return None
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
    """Return the `lgvq:` block of the host's loss, one at the root over it; {} if there is none.

    Raises:
        ConfigError: if it is no mapping.
    """
    root = config.get("lgvq")
    params = loss_section(config).get("params")
    for where, node in (("the loss's params", params), ("lgvq", root)):
        if node is not None and not isinstance(node, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {node!r}")
    block = (params or {}).get("lgvq")
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError(f"lgvq: expected a mapping like {{recipe: paper}}, got {block!r}")
    return laid_over(block or {}, to_plain(config, "lgvq")["lgvq"] if root else {})


def data_mapping(data: Any) -> Mapping[str, Any]:
    """Return `data`, checked as far as that: a mapping, as its `params` are.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"data: expected a mapping, got {data!r:.80}{DATA_HINT}")
    params = data.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise ConfigError(f"data.params: expected a mapping, got {params!r:.80}{DATA_HINT}")
    return data


def data_section(plain: Mapping[str, Any]) -> DataSection:
    """Return the checked `data:` section of a plain config, its sizes the host's resolution.

    Raises:
        ConfigError: for what is missing or unknown in it.
    """
    data = with_sizes(data_mapping(_section(plain, "data", DATA_HINT)), plain.get("model"))
    direct = {key: value for key, value in data.items() if key not in ("target", "params")}
    given = {**(data.get("params") or {}), **direct}
    _refuse_near("data", given, DATA_KEYS)
    _warn_unread("data", [key for key in given if key not in DATA_KEYS])
    for key in ("batch_size", "train"):
        if given.get(key) is None:
            hint = DATA_HINT if key == "train" else ""
            raise MissingError(f"data.{key} is missing (data.params.{key} is fine too){hint}")
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
