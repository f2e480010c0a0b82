"""From YAML files to checked sections: model, data, training. Imports no torch.

files, overrides --lay_over--> one config, still with interpolations --> Sections, plain and checked
"""

import difflib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from ..arguments import KEY
from ..config import OBJECTIVES, laid_over, parse, require, with_text_guide
from ..datasets import MEMBERS
from ..sockets import ConfigError, MissingError, Problems, as_config_error, path_of, suggest
from .settings import TrainingConfig, require_installed

logger = logging.getLogger(__name__)

SECTIONS = ["model", "data", "training", "lightning", "evaluation"]
SHORT_FORMS = ["lgvq", "recipe", "objectives"]
FOREIGN = ["dataset", "trainer", "seed_everything"]  # of ViT-VQGAN and LightningCLI
TRAINER_KEYS = {"max_steps": int, "accumulate_grad_batches": int, "precision": str}  # taken over
CLI_KEYS = {"class_path": "target", "init_args": "params"}  # LightningCLI's
OURS = ("lgvq_plugin.LGVQLoss", "lgvq_plugin.loss.LGVQLoss", "lgvq_plugin.over.")
LOSS_KEYS = ("lossconfig", "loss")  # taming and nearly all; ViT-VQGAN
MODEL_KEYS = ["base_learning_rate", "learning_rate", "target", "params"]
RESOLUTION_KEYS = ("resolution", "image_size", "img_size")
DATA_SETS = ("train", "validation", "test")
MAX_WORKERS = max(64, 8 * (os.cpu_count() or 1))
"""Processes that load samples; each takes hundreds of MiB, and more would only fill the memory."""
DATA_KEYS = ["batch_size", "num_workers", "wrong_captions", *DATA_SETS]
DATA_HINT = "; give it, or --data FOLDER (images with captions)"
NAMED_WEIGHT = 0.05  # of `objectives: [masked_text]` and others that are off by default
BLOCK_EXAMPLE = "a mapping like {recipe: paper}"
RENAMED = (  # in interpolations
    (r"\bdataset\.", "data."),
    (r"\binit_args\b", "params"),
    (r"\bclass_path\b", "target"),
    (r"\bdata\.params\.", "data."),
)


def read_config(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files, the later over the earlier, then `key=value` overrides.

    Raises ConfigError, which names file and line, if a file is missing, a folder or no YAML
    mapping, or if an override has no `=` or names no section.

        >>> read_config([], ["training.max_steps=5", "lgvq.stop=4"])
        {'training': {'max_steps': 5}, 'lgvq': {'stop': 4}}
    """
    parts = [_read_file(Path(path)) for path in paths]
    known = {*SECTIONS, *SHORT_FORMS, *FOREIGN, *(str(key) for part in parts for key in part)}
    for override in overrides:
        _check_override(override, known)
    kinds = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError)
    with as_config_error("the configs and overrides do not fit together", *kinds):
        return reduce(lay_over, [*parts, OmegaConf.from_dotlist([*overrides])], DictConfig({}))


def _read_file(path: Path) -> DictConfig:
    if path.is_dir():
        raise ConfigError(f"config {str(path)!r} is a folder; give a YAML file in it")
    if not path.is_file():
        hint = "; expected a YAML file first, then overrides" if "=" in str(path) else ""
        hint += suggest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise ConfigError(f"config {str(path)!r} does not exist{hint}")
    try:
        config = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: broken YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with model:, data:, training:")
    return config


def _check_override(override: str, known: Iterable[str]) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: expected key=value, for instance training.max_steps=100")
    if not KEY.fullmatch(key):
        raise ConfigError(
            f"{override!r}: {key!r} is not a key of a config, like training.max_steps; if it is a "
            "file, put it right behind its option"
        )
    head = re.split(r"[.\[]", key)[0]
    if head not in known:
        raise ConfigError(f"{override!r}: no section {head!r} in a config{suggest(head, known)}")


def lay_over(config: DictConfig, part: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Return `config` with `part` merged over it; neither is changed, nothing is resolved.

    The layouts of LightningCLI (class_path, init_args), ViT-VQGAN (dataset) and taming
    (data.params) become ours; `lgvq`, `recipe` and `objectives` at the root go to the loss as
    soon as it is one of ours. A data set, or a guide, of another target loses the old params.

        >>> below = OmegaConf.create({"data": {"train": {"target": "scenes", "params": {"a": 1}}}})
        >>> lay_over(below, {"data": {"train": {"target": "folder"}}})
        {'data': {'train': {'target': 'folder'}}}
    """
    low, high = _in_our_layout(config), _in_our_layout(part)
    _place_short_forms(low, high)
    for key in DATA_SETS:
        old, new = mapping_at(low, "data", key), mapping_at(high, "data", key).get("target")
        if new and old.get("target") not in (None, new) and (lost := old.pop("params", None)):
            message = "data.%s: %s replaces %s, whose params are dropped (%s)"
            logger.info(message, key, new, old["target"], ", ".join(map(str, lost)))
    for path, default in ((("guide",), "open_clip"), (("guides", "vision"), None)):
        old, new = (mapping_at(_block_in(node), *path) for node in (low, high))
        if new.get("use") not in (None, old.get("use", default)):
            old.clear()
    _require_mergeable(low, high)
    merged: Any = OmegaConf.merge(OmegaConf.create(low), OmegaConf.create(high))
    return merged


def _require_mergeable(low: Any, high: Any, path: str = "") -> None:
    """Raise ConfigError where one config has a list and the other a mapping."""
    if isinstance(low, dict) and isinstance(high, dict):
        for key in low.keys() & high.keys():
            _require_mergeable(low[key], high[key], f"{path}.{key}".lstrip("."))
    elif {type(low), type(high)} == {dict, list}:
        raise ConfigError(
            f"{path}: a list and a mapping cannot be merged: {low!r} and {high!r}; make both "
            "mappings, or both lists"
        )


def _in_our_layout(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in plain containers, unresolved, its foreign keys renamed."""
    renamed = _renamed(OmegaConf.to_container(as_omegaconf(config), resolve=False))
    plain = {str(key): value for key, value in renamed.items()}
    if "dataset" in plain and "data" not in plain:
        plain["data"] = plain.pop("dataset")
    if isinstance(mapping_at(plain, "data").get("params"), dict):
        plain["data"] = _flat(plain["data"])
    for node in (plain, mapping_at(plain, "model", "params", loss_key(plain), "params")):
        if isinstance(node.get("lgvq"), dict):
            node["lgvq"] = with_text_guide(node["lgvq"])
    return plain


def as_omegaconf(config: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Return `config` itself, or a mapping as OmegaConf's; ConfigError if that cannot hold it."""
    if isinstance(config, DictConfig):
        return config
    # A tensor in it, or None as a key.
    with as_config_error("the config holds what no config can", OmegaConfBaseException):
        return OmegaConf.create(dict(config))


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `data:` section with the keys of its `params:` directly in it."""
    direct = {key: value for key, value in data.items() if key not in ("target", "params")}
    return laid_over(data.get("params") or {}, direct)


def _renamed(node: Any) -> Any:
    """Rename LightningCLI's keys at any depth, and the keys that interpolations name."""
    if isinstance(node, list):
        return [_renamed(value) for value in node]
    if isinstance(node, str) and "${" in node:
        for old, new in RENAMED:
            node = re.sub(old, new, node)
    if not isinstance(node, dict):
        return node
    is_cli = isinstance(node.get("class_path"), str) or isinstance(node.get("init_args"), dict)
    return {CLI_KEYS.get(k, k) if is_cli else k: _renamed(value) for k, value in node.items()}


def mapping_at(node: Any, *keys: str | None) -> Any:
    """Return the mapping at a path; an empty one, not attached, where there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def _place_short_forms(low: dict[str, Any], high: dict[str, Any]) -> None:
    key = loss_key(high) or loss_key(low)
    targets = [mapping_at(node, "model", "params", key).get("target") for node in (high, low)]
    is_ours = str(targets[0] or targets[1]).startswith(OURS)
    if "lgvq" in high and high["lgvq"] is None and (_block_in(low) or _block_in(high)):
        raise ConfigError(
            f"lgvq: expected {BLOCK_EXAMPLE}, got null, which would change nothing; to train "
            "without LG-VQ, give the loss the target of the host's own loss"
        )
    for node in (low, high):
        if block := _pop_short_forms(node):
            for name in ("model", "params", key, "params") if key and is_ours else ():
                node[name] = mapping_at(node, name)
                node = node[name]
            node["lgvq"] = laid_over(node.get("lgvq") or {}, block)


def _pop_short_forms(node: dict[str, Any]) -> dict[str, Any]:
    """Take `lgvq`, `recipe` and `objectives` off the root; returns an `lgvq:` block."""
    block = node.pop("lgvq", None) or {}
    require(isinstance(block, dict), "lgvq", BLOCK_EXAMPLE, block)
    if "recipe" in node:
        block = {**block, "recipe": node.pop("recipe")}
    if "objectives" in node:
        given = node.pop("objectives")
        if not isinstance(given, dict):
            names = [given] if isinstance(given, str) else given
            expected = f"some of {', '.join(OBJECTIVES)}, or a mapping of them"
            require(isinstance(names, list), "objectives", expected, given)
            for name in names:
                if name not in OBJECTIVES:
                    raise ConfigError(f"objectives: {name!r}{suggest(name, OBJECTIVES)}")
            given = {name: {"weight": 0.0} for name in OBJECTIVES if name not in names}
            defaults = parse({"recipe": block.get("recipe") or "corrected"}).objectives
            for name in (n for n in names if not getattr(defaults, n).weight):
                given[name] = {"weight": NAMED_WEIGHT}
        block = laid_over(block, {"objectives": given})
    return block


def _block_in(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `lgvq:` block of one part of a config, in the loss or at the root."""
    inner = mapping_at(node, "model", "params", loss_key(node), "params", "lgvq")
    return inner or mapping_at(node, "lgvq")


@dataclass(frozen=True)
class DataSection:
    """The `data:` section; its keys are under `params:` (taming) or directly in it."""

    batch_size: int
    """Samples per process and batch."""
    train: dict[str, Any]
    """`{target, params}` of the data set to train on."""
    validation: dict[str, Any] | None = None
    """`{target, params}` of the data set to validate on, or None."""
    test: dict[str, Any] | None = None
    """`{target, params}` of the data set that only evaluation uses, or None."""
    num_workers: int = 0
    """Loading processes per training process."""
    wrong_captions: bool = False
    """Control: train with the captions of other images, see `training.data.WrongCaptions`."""


@dataclass(frozen=True)
class Sections:
    """A whole config, checked, in plain containers."""

    model: dict[str, Any]
    data: DataSection
    training: TrainingConfig
    plain: dict[str, Any]
    warnings: list[str]
    """What in the config has no effect, see :meth:`warn`."""

    @classmethod
    def from_config(
        cls, config: DictConfig | Mapping[str, Any], problems: Problems | None = None
    ) -> "Sections":
        """Check `config`; `training:` may be missing but for `max_steps`.

        Raises ConfigError for a section, key or value that is missing or unknown, unless
        `problems` is there to collect it; that section is then None in the result.
        """
        whole = lay_over(OmegaConf.create({}), config)
        plain = to_plain(whole)
        ignored, notes = _settle_root(plain, helpers_of(whole)), list[str]()
        found = Problems() if problems is None else problems
        parts: dict[str, Any] = dict.fromkeys(SECTIONS[:3])
        with found.collecting():
            model = parts["model"] = model_section(plain)
            ignored += [f"model.{k}" for k in plain["model"] if k not in (*model, "scale_lr")]
            plain["model"] = model
        with found.collecting():
            parts["data"] = data_section(plain, notes)
            ignored += [f"data.{k}" for k in _flat(plain["data"]) if k not in (*DATA_KEYS, "wrap")]
            plain["data"] = with_sizes(plain["data"], plain.get("model"), [])
        with found.collecting():
            given = plain.get("training")
            given = _require_mapping({} if given is None else given, "training")
            parts["training"] = TrainingConfig.from_dict(given)
        if problems is None:
            found.raise_any()
        if ignored:
            notes.append(f"the config's {', '.join(ignored)}: not read, no effect here")
        if "lightning" in plain:
            notes.append("the `lightning:` section is not read; `training:` takes its place")
        return cls(**parts, plain=plain, warnings=notes)

    def check_names(self) -> None:
        """Check the data sets' names and the `lgvq:` block, as far as that needs no torch.

        Raises ConfigError for an unknown data set or guide, a package that is missing, a wrong key
        or value of the block, or objectives that start after the last step.
        """
        for section in (self.data.train, self.data.validation, self.data.test):
            if section is not None:
                path_of("datasets", section["target"])
        require_installed(self.training.loggers)
        if self.training.lora is not None:
            from .lora import require_peft

            require_peft()
        given = lgvq_block(self.plain)
        block, steps = parse(given), self.training.max_steps
        for guide in (block.guide, *block.guides.values()):
            if guide.get("use") is not None:
                path_of("guides", guide["use"])
        is_on = any(own.weight for _, own in block.objectives.items())
        if "host" in self.training.freeze and block.stop not in (None, "auto"):
            self.warnings.append(
                f"training.freeze: [host] trains the heads alone, and lgvq.stop: {block.stop} ends "
                "that early; set lgvq.stop: null"
            )
        if given and is_on and block.start >= steps:
            raise ConfigError(
                f"lgvq.start: {block.start} is not before the end of training, training.max_steps: "
                f"{steps}: the objectives of LG-VQ would never be used. Lower the one or raise the "
                "other"
            )

    def warn(self) -> None:
        """Log what in the config has no effect; to be called once nothing in it is wrong."""
        for message in self.warnings:
            logger.warning("%s", message)

    def learning_rate(self, world_size: int) -> float:
        """Return the host's learning rate on `world_size` processes, and log its derivation."""
        model, training, batch = self.model, self.training, self.data.batch_size
        rate = model.get("learning_rate")
        if rate is None:
            rate, accumulate = float(model["base_learning_rate"]), training.accumulate_grad_batches
            if training.scale_lr:
                factors = (accumulate, world_size, batch, rate)
                rate = math.prod(factors)
                logger.info(
                    "learning rate %.3g = %d (accumulate_grad_batches) x %d (devices) x %d "
                    "(batch_size) x %.3g (base_learning_rate); off with training.scale_lr=false",
                    *(rate, *factors),
                )
        rate, limit = float(rate), training.max_learning_rate
        if limit is None or rate <= limit:
            return rate
        message = "learning rate %.3g instead of %.3g: the limit is training.max_learning_rate=%.3g"
        logger.info(message, limit, rate, limit)
        return limit


def _settle_root(plain: dict[str, Any], helpers: set[str]) -> list[str]:
    """Remove all but the sections: map foreign keys, refuse likely typos, return the ignored."""
    ignored, taken, own = list[str](), dict[str, Any](), plain.get("training")
    for name in [name for name in plain if name not in SECTIONS]:
        value = plain.pop(name)
        if name == "lgvq":
            raise ConfigError(
                f"lgvq: the loss {loss_section(plain).get('target')!r} takes no such block; change "
                "its target to lgvq_plugin.LGVQLoss, or lgvq_plugin.over.<its target>"
            )
        if name == "seed_everything":
            taken |= {"seed": value} if type(value) is int else {}
        elif name == "trainer" and isinstance(value, dict):
            used = {
                key: value[key]
                for key, kind in TRAINER_KEYS.items()
                if isinstance(value.get(key), kind)
                and key not in mapping_at(own)
                and value[key] != -1  # Lightning's word for no limit
            }
            if used:
                logger.info("from `trainer:`: %s", ", ".join(f"{k}={v}" for k, v in used.items()))
            taken |= used
            ignored += [f"trainer.{key}" for key in value if key not in used]
        elif name not in helpers:
            _refuse_near("no section {!r} in a config", [name[:60]], SECTIONS)
            ignored.append(name)
    scale_lr = mapping_at(plain, "model").get("scale_lr")  # taming's flag; some keep it here
    taken |= {"scale_lr": scale_lr} if isinstance(scale_lr, bool) else {}
    if taken and (own is None or isinstance(own, dict)):  # another value is reported later
        plain["training"] = {**taken, **(own or {})}
    return ignored


def helpers_of(config: DictConfig) -> set[str]:
    """Return the keys of the root beside the sections that the config's interpolations name."""
    text = OmegaConf.to_yaml(config, resolve=False)
    return {*re.findall(r"\$\{([A-Za-z_]\w*)", text)} - {*SECTIONS, *SHORT_FORMS}


def to_plain(config: DictConfig | Mapping[str, Any], *sections: str) -> dict[str, Any]:
    """Return `config` as dicts, lists and scalars, interpolations (across sections) resolved.

    Only `sections`, if any are given; others may still be `???`. Raises ConfigError if a value is
    still `???`, or an interpolation leads nowhere.
    """
    node = as_omegaconf(config)

    def resolved(value: Any) -> Any:
        if not OmegaConf.is_config(value):
            return value
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)

    try:
        if sections:
            return {key: resolved(node[key]) for key in sections if node.get(key) is not None}
        return {str(key): value for key, value in resolved(node).items()}
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error)
        raise ConfigError(f"{key} is ??? in the config; give it: {key}=VALUE") from error
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None) or "config", str(error).strip()
        hint = f"; give it: {key}=VALUE" if isinstance(error, InterpolationKeyError) else ""
        raise ConfigError(f"{key}: {reason.splitlines()[0]}{hint}") from error


def model_section(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked `model:` section of a plain config, unknown keys left out.

    Raises ConfigError if a key is missing, wrong, or nearly a known one.
    """
    model = plain.get("model")
    if model is None:
        raise ConfigError(f"the config has no section `model:`; it has {list(plain)}")
    if not isinstance(model, dict):
        raise ConfigError(f"model: expected a mapping with a `target:`, got {model!r:.80}")
    _refuse_near("model: no key {!r}", model, MODEL_KEYS)
    model = {key: value for key, value in model.items() if key in MODEL_KEYS}
    target = model.get("target")
    if not isinstance(target, str):
        raise ConfigError("model.target is missing: the dotted path of the host's class")
    with as_config_error("model.target", ConfigError):
        # What reads the section later, and a run's own config, name the class.
        model["target"] = path_of("hosts", target)
    params = model.get("params")
    require(params is None or isinstance(params, dict), "model.params", "a mapping", params)
    if model.get("learning_rate") is None and model.get("base_learning_rate") is None:
        own = (params or {}).get("learning_rate")  # LightningCLI's hosts take it themselves
        if own is None:
            raise ConfigError("model: give base_learning_rate, or learning_rate (not scaled)")
        model["learning_rate"] = own
    for name in ("learning_rate", "base_learning_rate"):
        if not _is_rate(rate := model.get(name)):
            raise ConfigError(f"model.{name}: a learning rate must be a number > 0, got {rate!r}")
    return model


def _is_rate(value: Any) -> bool:
    try:
        return value is None or (value is not True and 0 < float(value) < math.inf)
    except (TypeError, ValueError, OverflowError):  # YAML 1.1 reads 1e-4 as a string
        return False


def _refuse_near(message: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a key that looks like a known one; an unknown one is only warned about."""
    for key in given:
        if key not in known and difflib.get_close_matches(str(key), known, n=1, cutoff=0.75):
            raise ConfigError(f"{message.format(key)}{suggest(key, known)}")


def _require_mapping(node: Any, where: str, hint: str = "") -> Mapping[str, Any]:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {node!r:.80}{hint}")
    return node


def data_mapping(data: Any) -> Mapping[str, Any]:
    """Return `data`; raises ConfigError if it, or its `params`, is no mapping."""
    params = _require_mapping(data, "data", DATA_HINT).get("params")
    if params is not None:
        _require_mapping(params, "data.params", DATA_HINT)
    return data


def data_section(plain: Mapping[str, Any], notes: list[str] | None = None) -> DataSection:
    """Return the checked `data:` section of a plain config, see :func:`with_sizes`.

    Raises ConfigError for what is missing or unknown in it.
    """
    if plain.get("data") is None:
        raise MissingError(f"the config has no section `data:`; it has {list(plain)}{DATA_HINT}")
    data = data_mapping(plain["data"])
    given = _flat(with_sizes(data, plain.get("model"), notes))
    _refuse_near("data: no key {!r}", given, [*DATA_KEYS, "wrap"])
    for key in ("batch_size", "train"):
        if given.get(key) is None:
            hint = DATA_HINT if key == "train" else ""
            raise MissingError(f"data.{key} is missing (data.params.{key} is fine too){hint}")
    for key, minimum in (("batch_size", 1), ("num_workers", 0)):
        value = given.get(key, minimum)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"data.{key} must be a whole number >= {minimum}, got {value!r}")
    workers = given.get("num_workers", 0)
    require(workers <= MAX_WORKERS, "data.num_workers", f"at most {MAX_WORKERS} here", workers)
    is_wrong = given.get("wrong_captions", False)
    require(isinstance(is_wrong, bool), "data.wrong_captions", "true or false", is_wrong)
    for key in DATA_SETS:
        section = given.get(key)
        if section is not None and not (isinstance(section, dict) and "target" in section):
            raise ConfigError(f"data.{key}: expected a mapping with a `target:`, got {section!r}")
    return DataSection(**{key: given[key] for key in DATA_KEYS if given.get(key) is not None})


def resolution_of(model: Any) -> tuple[str, int | list[int]] | None:
    """Return key and value of the image size that a host is built for, if it names one.

    >>> resolution_of({"params": {"ddconfig": {"resolution": 256, "ch": 128}}})
    ('model.params.ddconfig.resolution', 256)
    """

    def search(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        inner = mapping_at(node)
        yield from ((f"{path}.{key}", inner[key]) for key in RESOLUTION_KEYS if key in inner)
        for key, value in inner.items():
            if key not in LOSS_KEYS:
                yield from search(value, f"{path}.{key}")

    for key, value in search(mapping_at(model, "params"), "model.params"):
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides):
            return key, sides[0] if sides[0] == sides[1] else sides
    return None


def with_sizes(
    data: Mapping[str, Any], model: Any, notes: list[str] | None = None
) -> dict[str, Any]:
    """Return the `data:` section with the host's resolution as `size` where it names none.

    Only data sets of this package get one. `notes` collects the warnings of other sizes, which are
    logged if it is None.
    """
    made = dict(data)
    if (known := resolution_of(model)) is None:
        return made
    key, size = known
    folder = f"{__package__.partition('.')[0]}.datasets."
    ours = {*MEMBERS, *(f"{folder}{path}" for path in MEMBERS.values())}  # these all take `size`
    for name in DATA_SETS:
        section = mapping_at(data, name)
        if str(section.get("target")).replace(":", ".") not in ours:
            continue
        params = {"size": size, **(section.get("params") or {})}
        made[name] = {**section, "params": params}
        if params["size"] not in (size, [size, size]):
            note = (
                f"data.{name}: size {params['size']}, but the host is built for {size} ({key}); "
                "leave `size` out to train at the host's resolution"
            )
            logger.warning("%s", note) if notes is None else notes.append(note)
    if isinstance(data.get("params"), Mapping):
        made["params"] = with_sizes(data["params"], model, notes)
    return made


def loss_key(config: Mapping[str, Any]) -> str | None:
    """Return where `model.params` holds the host's loss: lossconfig, or loss; None for neither."""
    params = mapping_at(config, "model", "params")
    return next((key for key in LOSS_KEYS if isinstance(params.get(key), Mapping)), None)


def loss_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the host's loss, `{target, params}`; {} if there is none.

    >>> loss_section({"model": {"params": {"loss": {"target": "torch.nn.MSELoss"}}}})
    {'target': 'torch.nn.MSELoss'}
    """
    key = loss_key(config)
    return to_plain(config["model"]["params"][key]) if key else {}


def lgvq_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `lgvq:` block of the host's loss, one at the root over it; {} if there is none.

    Raises ConfigError if it is no mapping.
    """
    root, params = config.get("lgvq"), loss_section(config).get("params")
    block = params.get("lgvq") if isinstance(params, Mapping) else None
    for where, node in (("the loss's params", params), ("lgvq", root), ("lgvq", block)):
        require(node is None or isinstance(node, Mapping), where, BLOCK_EXAMPLE, node)
    whole = laid_over(block or {}, to_plain(config, "lgvq")["lgvq"] if root else {})
    return with_text_guide(whole)
