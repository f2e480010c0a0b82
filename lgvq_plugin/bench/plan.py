"""What a variant changes: nested or dotted keys, and the short forms of a plan."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ObjectivesConfig, parse
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
from .evaluate import NAMES, EvaluationConfig
from .records import Job, Plan

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


# -- From one YAML that lists only what differs to the jobs of an ablation -----------------------


KEYS = [
    *("extends", "title", "base", "config", "seeds", "baseline", "against"),
    *("data", "variants", "evaluation", "examples"),
]
NAME = "letters, digits, dots, + and _"


def read_plan(
    path: str | Path,
    *,
    seeds: int | Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """Read a plan and check every job's config.

    Args:
        path: of the YAML.
        seeds: instead of the plan's own: a list, or a number n for 0, ..., n - 1.
        overrides: `key=value` of the training config, over everything else, for every run.

    Raises:
        ConfigError: if the file, a key or a value is wrong, or variants are not comparable.
    """
    path = Path(path)
    given = _read(path)
    variants = _named(given.get("variants"), path, "variants")
    datasets = _named(given["data"], path, "data") if given.get("data") else {"": {}}
    references = _references(given, list(variants), path)
    evaluation = _evaluation(given.get("evaluation"), path)
    chosen = _seeds(given.get("seeds", 3) if seeds is None else seeds, path)
    jobs = []
    for data, data_changes in datasets.items():
        for variant, changes in variants.items():
            where = f"{path}: {'/'.join(part for part in (data, variant) if part)}"
            config = _config(given, data_changes, changes, path, where)
            jobs += [
                Job(
                    data=data,
                    variant=variant,
                    seed=seed,
                    config=_seeded(config, seed, overrides, where),
                    evaluation=evaluation,
                    examples=int(given.get("examples", 8)),
                )
                for seed in chosen
            ]
    _check_comparable(jobs, path)
    guides = [guide for job in jobs if (guide := lgvq_block(job.config).get("guide"))]
    if guides and "guide" not in evaluation:
        jobs = [replace(job, evaluation={**evaluation, "guide": guides[0]}) for job in jobs]
    return Plan(
        title=str(given.get("title") or path.stem),
        references=references,
        variants={name: _told(changes) for name, changes in variants.items()},
        jobs=tuple(jobs),
    )


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys of the plan at `path`, merged over the plan that it extends."""
    plain = OmegaConf.to_container(read_config([path]), resolve=False)
    assert isinstance(plain, dict)
    given = {str(key): value for key, value in plain.items()}
    for key in given:
        if key not in KEYS:
            raise ConfigError(f"{path}: no key {key!r} in an ablation{suggest(key, KEYS)}")
    name = given.pop("extends", None)
    if name is None:
        return given
    if not isinstance(name, str):
        raise ConfigError(f"{path}: extends: expected the path of one plan, got {name!r}")
    parent, extending = path.parent / name, (*extending, path.resolve())
    if parent.resolve() in extending:
        raise ConfigError(f"{path}: extends: {name!r} extends this plan in turn")
    below = _read(parent, extending)
    variants = below.get("variants")
    for part in (below, *(variants.values() if isinstance(variants, Mapping) else ())):
        if isinstance(part, dict) and part.get("base"):
            bases = _bases(part["base"], parent)
            part["base"] = [os.path.relpath(base, path.parent) for base in bases]
    return _deep_merged(below, given)


def _deep_merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    both = {key: _deep_merged(below[key], above[key]) for key in below if key in above}
    return {**below, **above, **both}


def _told(changes: Any) -> dict[str, Any]:
    """What the report says of a variant."""
    if not isinstance(changes, Mapping):
        return {"note": "", "changes": list(changes)}
    rest = {key: value for key, value in changes.items() if key != "note"}
    return {"note": str(changes.get("note") or ""), "changes": rest}


def _named(given: Any, path: Path, key: str) -> dict[str, Any]:
    """Return `given` as a mapping whose keys can be names of folders."""
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"{path}: {key}: expected a mapping of names to changes, got {given!r}")
    for name in given:
        if not str(name).replace("_", "a").replace("+", "a").replace(".", "a").isalnum():
            raise ConfigError(f"{path}: {key}.{name}: a name is made of {NAME}")
    return {str(name): {} if changes is None else changes for name, changes in given.items()}


def _references(given: Mapping[str, Any], variants: list[str], path: Path) -> tuple[str, ...]:
    names = [str(given.get("baseline") or variants[0]), *(given.get("against") or [])]
    for name in names:
        if name not in variants:
            raise ConfigError(f"{path}: there is no variant {name!r}{suggest(name, variants)}")
    return tuple(dict.fromkeys(names))


def _seeds(given: Any, path: Path) -> list[int]:
    seeds = list(range(given)) if isinstance(given, int) else given
    seeds = list(seeds) if isinstance(seeds, tuple | range) else seeds
    good = isinstance(seeds, list) and seeds and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not good or len({*seeds}) < len(seeds):
        raise ConfigError(f"{path}: seeds: expected a number > 0 or a list of seeds, got {given!r}")
    return seeds


def _evaluation(given: Any, path: Path) -> dict[str, Any]:
    """Check the plan's `evaluation:`: `metrics`, and keys of an evaluation block."""
    if not isinstance(given or {}, Mapping):
        raise ConfigError(f"{path}: evaluation: expected a mapping, got {given!r}")
    evaluation = to_plain(given or {})
    metrics = evaluation.get("metrics")
    for name in metrics if isinstance(metrics, list) else [metrics] * (metrics is not None):
        if name not in NAMES:
            raise ConfigError(f"{path}: evaluation.metrics: {name!r}{suggest(str(name), NAMES)}")
    try:
        EvaluationConfig.of({key: v for key, v in evaluation.items() if key != "metrics"})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return evaluation | ({"metrics": [metrics]} if isinstance(metrics, str) else {})


def _config(
    given: Mapping[str, Any], data_changes: Any, changes: Any, path: Path, where: str
) -> DictConfig:
    """Merge base, common config, and the changes of the data set and of the variant."""
    own = dict(changes) if isinstance(changes, Mapping) else changes
    bases = given.get("base") or []
    if isinstance(own, dict):
        own.pop("note", None)
        bases = own.pop("base", None) or bases
    if not bases:
        raise ConfigError(f"{where}: no `base:`: name the configs to start from")
    config = read_config(_bases(bases, path))
    for part in (given.get("config") or {}, data_changes, own):
        config = apply_changes(config, part, where)
    return config


def _bases(given: Any, path: Path) -> list[Path]:
    """Return the configs that a `base:` lists: next to the plan, else in the working directory."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: base: expected the path of a config or a list, got {given!r}")
    return [
        beside if (beside := path.parent / name).exists() or not Path(name).exists() else Path(name)
        for name in names
    ]


def _seeded(config: DictConfig, seed: int, overrides: Sequence[str], where: str) -> dict[str, Any]:
    """Return the plain config of one seed, checked; the heads get the seed too."""
    given = read_config([], overrides)
    if OmegaConf.select(given, "training.seed") is not None:
        raise ConfigError("training.seed is the plan's: give --seeds, or `seeds:` in the plan")
    changed = lay_over(lay_over(config, given), {"training": {"seed": seed}})
    try:
        plain = Sections.from_config(changed).plain
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    loss, block = loss_section(plain), lgvq_block(plain)
    target = str(loss.get("target", ""))
    has_heads = target == "lgvq_plugin.LGVQLoss" or target.startswith("lgvq_plugin.over.")
    if block and not has_heads:
        raise ConfigError(
            f"{where}: changes of `lgvq`, but the loss {target!r} takes none; "
            "base: a config whose loss is LG-VQ's (*_lgvq.yaml)"
        )
    if has_heads:
        try:
            parse(block)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        own = {**(loss.get("params") or {}), "lgvq": {"seed": seed, **block}}
        plain["model"]["params"] |= {loss_key(plain): {**loss, "params": own}}
    return plain


def _check_comparable(jobs: Sequence[Job], path: Path) -> None:
    """Refuse variants of one data set and seed that do not see the same batches."""
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        other = first.setdefault((job.data, job.seed), job)
        mine, theirs = _batches(job.config), _batches(other.config)
        for key, value in mine.items():
            if value != theirs[key]:
                raise ConfigError(
                    f"{path}: {job.variant} has {key} {value!r}, {other.variant} {theirs[key]!r}; "
                    "variants must see the same batches: set it under `config:` for all, or "
                    "under `data:` for a data set of its own"
                )


def _batches(config: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the batches of a run, and how many there are."""
    data = config["data"].get("params") or config["data"]
    training = config["training"]
    return {
        **{f"data.{key}": data.get(key) for key in ("train", "validation", "test", "batch_size")},
        "training.max_steps": training.get("max_steps"),
        "training.accumulate_grad_batches": training.get("accumulate_grad_batches", 1),
    }
