"""Plans of ablations: a YAML file that lists only what differs between variants -> Plan of Jobs."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import OBJECTIVES, laid_over, parse, require
from ..sockets import ConfigError, suggest
from ..training.config import (
    Sections,
    lay_over,
    lgvq_block,
    loss_key,
    loss_section,
    read_config,
    to_plain,
)
from .evaluate import NAMES, EvaluationConfig, names_of
from .foreign import find_metric, label_of
from .records import Job, Plan

LGVQ = "model.params.lossconfig.params.lgvq"
PLAN_KEYS = [
    *("extends", "title", "base", "config", "seeds", "baseline", "against"),
    *("data", "variants", "evaluation", "examples"),
]
CONFIG_KEYS = ["model", "data", "training", "lgvq", "recipe", "objectives"]
OWN_KEYS = ("note", "base", "other_batches")
VARIANT_KEYS = [*CONFIG_KEYS, *OWN_KEYS]
MAX_SEEDS = 1000  # given as a number


def read_plan(
    path: str | Path, *, seeds: int | Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """Read a plan from YAML and check the config of every job.

    `seeds` replaces those of the plan: a list, or a number n for 0, ..., n - 1; `overrides` are
    `key=value` of the training config, applied last to every run.

    Raises:
        ConfigError: if the file, a key or a value is wrong, or the variants are not comparable.
    """
    path = Path(path)
    given = _read(path)
    variants = _names_to_changes(given.get("variants"), f"{path}: variants")
    has_datasets = bool(given.get("data"))
    datasets = _names_to_changes(given["data"], f"{path}: data") if has_datasets else {"": {}}
    references = _references(given, list(variants), path)
    evaluation = _evaluation(given.get("evaluation") or {}, path)
    chosen = _seeds(given.get("seeds", 3) if seeds is None else seeds, path)
    examples = int(given.get("examples", 8))
    shared: dict[str, DictConfig] = {}
    jobs: list[Job] = []
    for (data, data_changes), (variant, changes) in product(datasets.items(), variants.items()):
        where = f"{path}: {'/'.join(part for part in (data, variant) if part)}"
        own, bases = changes, given.get("base")
        if isinstance(changes, Mapping):
            own = {key: part for key, part in changes.items() if key not in OWN_KEYS}
            bases = changes.get("base") or bases
        if not bases:
            raise ConfigError(f"{where}: no `base:`; list the configs to start from")
        key = str((data, bases))
        if key not in shared:
            below = read_config(_bases(bases, path))
            for part in (given.get("config") or {}, data_changes):
                below = apply_changes(below, part, where)
            shared[key] = below
        config = apply_changes(shared[key], own, where)
        plains = [(seed, _seeded(config, seed, overrides, where)) for seed in chosen]
        _require_weights(own, plains[0][1], where)
        job = partial(Job, data=data, variant=variant, evaluation=evaluation, examples=examples)
        jobs += [job(seed=seed, config=plain) for seed, plain in plains]
    has_other = {n for n, own in variants.items() if _has_other_batches(own, f"{path}: {n}")}
    _check_comparable([job for job in jobs if job.variant not in has_other], path)
    guides = (guide for job in jobs if (guide := lgvq_block(job.config).get("guide")))
    if (guide := next(guides, None)) and "guide" not in evaluation:
        jobs = [replace(job, evaluation={**evaluation, "guide": guide}) for job in jobs]
    return Plan(
        title=str(given.get("title") or path.stem),
        references=references,
        variants={name: _described(changes) for name, changes in variants.items()},
        jobs=tuple(jobs),
    )


def apply_changes(config: DictConfig, changes: Any, where: str = "changes") -> DictConfig:
    """Return `config` (sections model, data, training) with the changes of one variant.

    `changes` is a mapping of config keys, nested or dotted, and of the short forms `recipe`,
    `objectives` and `lgvq`; or a list of "key=value". `where` starts error messages.

    Example:
        >>> short = apply_changes(OmegaConf.create({}), {"recipe": "paper", "training.seed": 3})
        >>> short.training.seed, short.model.params.lossconfig.params.lgvq.recipe
        (3, 'paper')
    """
    holds = isinstance(changes, Mapping | Sequence) and not isinstance(changes, str)
    require(holds, where, "a mapping or a list of key=value", changes)
    try:
        if not isinstance(changes, Mapping):
            return lay_over(config, read_config([], [str(change) for change in changes]))
        key_of_loss = loss_key(config) or "lossconfig"
        expanded = {
            full.replace(".lossconfig.", f".{key_of_loss}.", 1): part
            for key, value in changes.items()
            for full, part in _expanded(str(key), value, where)
        }
        return lay_over(config, _nested(expanded))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: the changes do not fit the config: {error}") from error


def _nested(value: Any) -> Any:
    """Expand dotted keys at any depth: {"a.b": 1} -> {"a": {"b": 1}}."""
    if not isinstance(value, Mapping):
        return value
    whole = OmegaConf.create({})
    for key, part in value.items():
        OmegaConf.update(whole, str(key), _nested(part), merge=True, force_add=True)
    return whole


def _expanded(key: str, value: Any, where: str) -> Iterable[tuple[str, Any]]:
    """Yield the (dotted config key, value) pairs that a key of a variant abbreviates."""
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
        raise ConfigError(f"{where}: no key {key!r} in a variant{suggest(head, VARIANT_KEYS)}")


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys of a plan, merged over those of the plan that it extends."""
    given: Any = OmegaConf.to_container(read_config([path]), resolve=False)
    for key in given:
        if key not in PLAN_KEYS:
            raise ConfigError(f"{path}: no key {key!r} in an ablation{suggest(key, PLAN_KEYS)}")
    name = given.pop("extends", None)
    if name is None:
        return given
    require(isinstance(name, str), f"{path}: extends", "the path of one plan", name)
    parent, extending = path.parent / name, (*extending, path.resolve())
    if parent.resolve() in extending:
        raise ConfigError(f"{path}: extends: {name!r} extends this plan in turn")
    below = _read(parent, extending)
    variants = below.get("variants")
    for part in (below, *(variants.values() if isinstance(variants, Mapping) else ())):
        if isinstance(part, dict) and part.get("base"):
            bases = _bases(part["base"], parent)
            part["base"] = [os.path.relpath(base, path.parent) for base in bases]
    return laid_over(below, given)


def _described(changes: Any) -> dict[str, Any]:
    """Return what the report shows of a variant."""
    if not isinstance(changes, Mapping):
        return {"note": "", "changes": list(changes)}
    rest = {key: value for key, value in changes.items() if key != "note"}
    return {"note": str(changes.get("note") or ""), "changes": rest}


def _has_other_batches(changes: Any, where: str) -> bool:
    """Whether a variant may see other batches than the rest, as a longer training does."""
    given = changes.get("other_batches", False) if isinstance(changes, Mapping) else False
    require(isinstance(given, bool), f"{where}: other_batches", "true or false", given)
    return given


def _names_to_changes(given: Any, where: str) -> dict[str, Any]:
    """Check a mapping whose keys become names of folders."""
    is_mapping = isinstance(given, Mapping) and len(given) > 0
    require(is_mapping, where, "a mapping of names to changes", given)
    for name in given:
        if not re.fullmatch(r"[\w.+]+", str(name)):
            allowed = "letters, digits, dots, + and _"
            raise ConfigError(f"{where}.{name}: a name may contain only {allowed}")
    return {str(name): {} if changes is None else changes for name, changes in given.items()}


def _references(given: Mapping[str, Any], variants: list[str], path: Path) -> tuple[str, ...]:
    names = [str(given.get("baseline") or variants[0]), *(given.get("against") or [])]
    for name in names:
        if name not in variants:
            raise ConfigError(f"{path}: there is no variant {name!r}{suggest(name, variants)}")
    return tuple(dict.fromkeys(names))


def _seeds(given: Any, path: Path) -> list[int]:
    is_count = isinstance(given, int) and 0 < given <= MAX_SEEDS and given is not True
    seeds = list(range(given)) if is_count else given
    is_list = isinstance(seeds, Sequence) and len(seeds) > 0
    is_valid = is_list and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not is_valid or len({*seeds}) < len(seeds):
        expected = f"a number >= 1 and <= {MAX_SEEDS:,} or a list of different seeds >= 0"
        raise ConfigError(f"{path}: seeds: expected {expected}, got {given!r:.80}")
    return [*seeds]


def _evaluation(given: Any, path: Path) -> dict[str, Any]:
    """Check `evaluation:`, an evaluation block plus `metrics`."""
    require(isinstance(given, Mapping), f"{path}: evaluation", "a mapping", given)
    evaluation = to_plain(given)
    metrics = evaluation.get("metrics")
    if metrics is not None and not isinstance(metrics, list):
        evaluation["metrics"] = metrics = [metrics]
    try:
        config = EvaluationConfig.from_dict({k: v for k, v in evaluation.items() if k != "metrics"})
        options = {label_of(key): value for key, value in config.options.items()}
        for name in names_of(metrics):
            if name not in NAMES:  # before hours of training
                find_metric(name, NAMES, options.get(label_of(name)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return evaluation


def _bases(given: Any, path: Path) -> list[Path]:
    """Return the configs of a `base:`, relative to the plan or else to the working directory."""
    names = [given] if isinstance(given, str) else given
    are_paths = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(are_paths, f"{path}: base", "the path of a config or a list", given)
    return [
        near if (near := path.parent / name).exists() or not Path(name).exists() else Path(name)
        for name in names
    ]


def _seeded(config: DictConfig, seed: int, overrides: Sequence[str], where: str) -> dict[str, Any]:
    """Return the checked, plain config of one seed; the heads get the seed, too."""
    given = read_config([], overrides)
    if OmegaConf.select(given, "training.seed") is not None:
        raise ConfigError("training.seed comes from the plan: use --seeds, or `seeds:` in the plan")
    changed = lay_over(lay_over(config, given), {"training": {"seed": seed}})
    try:
        plain = Sections.from_config(changed).plain
        loss, block = loss_section(plain), lgvq_block(plain)
        target = str(loss.get("target", ""))
        if target == "lgvq_plugin.LGVQLoss" or target.startswith("lgvq_plugin.over."):
            parse(block)
            own = {**(loss.get("params") or {}), "lgvq": {"seed": seed, **block}}
            plain["model"]["params"] |= {loss_key(plain): {**loss, "params": own}}
        elif block:
            raise ConfigError(
                f"changes of `lgvq`, but the loss {target!r} takes none; "
                "base: a config whose loss is LG-VQ's (*_lgvq.yaml)"
            )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return plain


def _require_weights(changes: Any, config: Mapping[str, Any], where: str) -> None:
    """Refuse a list of objectives of which one has weight 0: it would be the others alone."""
    names = changes.get("objectives") if isinstance(changes, Mapping) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list):
        return
    block = parse(lgvq_block(config))
    weights = {name: own.weight for name, own in block.objectives.items()}
    for name in names:
        if not weights[name]:
            raise ConfigError(
                f"{where}: objectives: {name} has weight 0 in recipe {block.recipe}; set "
                f"lgvq.objectives.{name}.weight, for instance to 0.05"
            )


def _check_comparable(jobs: Sequence[Job], path: Path) -> None:
    """Refuse variants that do not see the same batches as others with their data set and seed."""
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        other = first.setdefault((job.data, job.seed), job)
        mine, theirs = _batches(job.config), _batches(other.config)
        for key, value in mine.items():
            if value != theirs[key]:
                raise ConfigError(
                    f"{path}: {job.variant} has {key} {value!r}, {other.variant} {theirs[key]!r}; "
                    "variants must see the same batches: set it under `config:` for all, under "
                    "`data:` for a data set of its own, or say other_batches: true in a variant "
                    "that is a control of another length"
                )


def _batches(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the batches of a run and their number."""
    data = config["data"].get("params") or config["data"]
    training = config["training"]
    return {
        **{f"data.{key}": data.get(key) for key in ("train", "validation", "test", "batch_size")},
        "training.max_steps": training.get("max_steps"),
        "training.accumulate_grad_batches": training.get("accumulate_grad_batches", 1),
    }
