"""From checked sections to objects: the host, its data sets, and checks on both together.

Importing this imports no torch, so that errors in a config are reported at once.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import compat
from ..config import LGVQConfig, parse, require, require_finite_weights
from ..sockets import (
    ConfigError,
    Problems,
    as_config_error,
    building,
    check_call,
    check_numbers,
    import_target,
    instantiate,
    params_of,
    resolve,
)
from .config import (
    DATA_SETS,
    LOSS_KEYS,
    OURS,
    Sections,
    helpers_of,
    lay_over,
    lgvq_block,
    loss_key,
    loss_section,
    mapping_at,
    model_section,
    to_plain,
)
from .settings import TRAINED

if TYPE_CHECKING:
    from torch import nn

    from ..guides.base import AbstractGuide

logger = logging.getLogger(__name__)

OTHER_DATA = "; or give --data FOLDER (images with captions) in its place"
CAPTION_LAYOUTS = (
    "supported layouts with captions: x.jpg with x.txt beside it; captions.jsonl, "
    "metadata.jsonl or a .csv with a caption column (folder); a line `path<TAB>caption`, or x.txt "
    "beside each image (list_file); a .txt or .json member in each sample (webdataset). "
    "`lgvq data check PATH` shows what is found; data sets of taming's own have no captions"
)
OF_TEXT = ("global_semantic", "masked_text", "relationship")
READING = ("size", "crop", "flip", "crop_size", "random_crop", "channel_first")
TRAINING_ONLY = ("root", "split", "crop", "flip")  # params that other data sets do not share
MAX_COUNTED = 20_000  # samples whose captions are counted
MAX_READ = 2_000  # captions whose words are looked up


def build_host(config: DictConfig | Mapping[str, Any]) -> nn.Module:
    """Build the host that the config's `model:` section names.

    Raises ConfigError if a target in that section does not exist, or a constructor does not take
    its params, or refuses their values.

    >>> build_host({"model": {"target": "torch.nn.Identity", "learning_rate": 0.1}})
    Identity()
    """
    model = model_section(to_plain(lay_over(DictConfig({}), config), "model"))
    _check_targets(model, "model")
    name, params, loss = model["target"], model.get("params") or {}, loss_section({"model": model})
    weights = loss.get("params") or {}
    require_finite_weights(weights, f"model.params.{loss_key({'model': model})}.params")
    weight = compat.perceptual_weight_of(loss.get("target"), weights)
    target = import_target(name)
    check_call(f"model: {name}", target, (), params)
    # Hosts read their configs as attributes (encoder.dim), as OmegaConf's containers allow.
    given = OmegaConf.create(params, flags={"allow_objects": True})
    lpips = compat.lpips_only_if_used(weight, loss.get("target"))
    # Hosts print in their constructors, and stdout is for tables.
    with building("model", name, params), lpips, contextlib.redirect_stdout(sys.stderr):
        host = target(**{str(key): value for key, value in given.items()})
        require_host = getattr(getattr(host, "loss", None), "require_host", None)
        if callable(require_host):  # LGVQLoss: report a missing quantizer before the first step
            require_host()
    return host


def _check_targets(node: Any, where: str) -> None:
    """Check what can be checked of a tree of `{target, params}` before anything is built."""
    if not isinstance(node, Mapping):
        require(not where.endswith(".lossconfig"), where, "a mapping with a `target:`", node)
        require(not (isinstance(node, float) and math.isnan(node)), where, "a number", node)
        return
    if isinstance(node.get("target"), str):
        try:
            target = import_target(node["target"])
        except ConfigError as error:
            hint = compat.explain_import(error.__cause__)
            raise ConfigError(f"{where}.target: {error}{hint}") from error
        params = params_of(node, where)
        if where in [f"model.params.{key}" for key in LOSS_KEYS]:
            _check_loss(target, params, f"{where}.params")
    elif where.endswith("lossconfig"):
        raise ConfigError(f"{where}: expected a `target:`, got keys {sorted(node)}")
    for key, value in node.items():
        _check_targets(value, f"{where}.{key}")


def _check_loss(loss: Any, params: Mapping[str, Any], where: str) -> None:
    """Check the params of the host's loss; those of its base loss if it is ours."""
    from ..loss import LGVQLoss, base_of

    if not (isinstance(loss, type) and issubclass(loss, LGVQLoss)):
        check_numbers(where, loss, params)
        return
    own = {key: value for key, value in params.items() if key not in ("base", "lgvq")}
    parse(params.get("lgvq"))
    name, params = base_of(params.get("base"), own, loss.BASE_TARGET)
    compat.check_loss(name, import_target(name), (), params, where)


def build_dataset(section: Mapping[str, Any]) -> Any:
    """Build the data set `{target, params}`; the target may be a member's short name.

    Raises ConfigError if there is no such data set, it does not take the params, or is empty.

    >>> len(build_dataset({"target": "scenes", "params": {"length": 5}}))
    5
    """
    try:
        member = resolve("datasets", section["target"])
    except ConfigError as error:
        hint = OTHER_DATA if "." in str(section["target"]) else ""
        raise ConfigError(f"data: {error}{hint}") from error
    path, params = f"{member.__module__}.{member.__qualname__}", section.get("params")
    with building("data", section["target"], params):
        dataset = instantiate({"target": path, "params": params})
        length = len(dataset)
    if length == 0:
        raise ConfigError(f"data set {section['target']} with {section.get('params')} is empty")
    return dataset


def build_parts(
    config: DictConfig | Mapping[str, Any], sections: Sections, problems: Problems
) -> tuple[Any, Any, Any]:
    """Build host, training set, and validation set or None; report all that is missing at once.

    A part of `sections` that `problems` has an error of already is None. Raises ConfigError for
    all problems together: weights, data sets, captions, keys.
    """
    from ..alignment import build_guides, needs_captions

    host, built = None, {}
    block, optional = _alignment_block(sections), works_without_captions(sections.plain)
    if sections.model is not None:
        with problems.collecting():
            host = build_host(config)
        if host is None and block is not None:
            with problems.collecting():  # a host builds its loss before it gets to the guides
                build_guides(block)
    for name in ("train", "validation"):
        if (section := getattr(sections.data, name, None)) is not None:
            with problems.collecting():
                built[name] = _build_named(name, section, optional)
    if problems and "train" in built and block is not None and needs_captions(block):
        with problems.collecting():
            require_captions(built["train"], block, peek=True)
    problems.raise_any()
    return host, built["train"], built.get("validation")


def _build_named(name: str, section: Mapping[str, Any], optional: bool) -> Any:
    try:
        return build_dataset(with_optional_captions(section) if optional else section)
    except ConfigError as error:
        has_hint = "." not in str(section["target"]) or str(error).endswith(OTHER_DATA)
        hint = "" if has_hint else OTHER_DATA
        raise ConfigError(f"data.{name}: {str(error).removeprefix('data: ')}{hint}") from error


def works_without_captions(config: Mapping[str, Any]) -> bool:
    """Whether a plain config has objectives, and none of them needs captions.

    >>> works_without_captions({"model": {"target": "their.Host"}})
    False
    """
    try:
        block = parse(lgvq_block(config))
    except ConfigError:
        return False  # reported later
    on = {name for name, own in block.objectives.items() if own.weight}
    if not on or on & {*OF_TEXT}:
        return False  # without importing torch
    from ..alignment import needs_captions

    return not needs_captions(block)


def with_optional_captions(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{target, params}` that takes images without captions too, if the data set can."""
    known = inspect.signature(resolve("datasets", section["target"])).parameters
    given = dict(section.get("params") or {})
    params = {"need_captions": False, **given} if "need_captions" in known else given
    return {**section, "params": params}


def _alignment_block(sections: Sections) -> LGVQConfig | None:
    """Return the `lgvq:` block of a loss that has heads; None for a host's own loss."""
    from ..loss import is_on

    config = {"model": sections.model}
    if sections.model is None or not str(loss_section(config).get("target")).startswith(OURS):
        return None
    try:
        block = parse(lgvq_block(config))
    except ConfigError:
        return None  # the host's constructor reports it
    return block if is_on(block) else None


def check_data(host: Any, dataset: Any, validation: Any, sections: Sections) -> None:
    """Refuse images without captions where heads need them; warn about doubtful data.

    Raises ConfigError if no training image has a caption.
    """
    alignment = getattr(getattr(host, "loss", None), "alignment", None)
    if alignment is not None and alignment.needs_captions:
        captions = require_captions(dataset, alignment.config)
        if captions is not None:
            alignment.expects_captions = False  # a batch without any is chance
            _warn_of_unknown_words(alignment.guide, captions)
    if validation is not None:
        _warn_of_shared_images(dataset, validation, sections)


def require_captions(dataset: Any, block: LGVQConfig, *, peek: bool = False) -> list[str] | None:
    """Return up to 2,000 captions of the training set, and log how many images have any.

    None if only the batches show them; `peek` reads the first sample of such a data set. Raises
    ConfigError if no image has a caption.
    """
    from ..datasets.base import CaptionedImages

    total, key = len(dataset), block.caption_key
    if not isinstance(dataset, CaptionedImages) or key not in (None, "caption", "captions"):
        if peek and not {"caption", "captions", "text", "txt", key} & {*dataset[0]}:
            raise ConfigError(f"data.train: its samples have no captions; {CAPTION_LAYOUTS}")
        return None
    looked = range(0, total, max(1, total // MAX_COUNTED))
    found = [texts for i in looked if (texts := [t for t in dataset.captions_of(i) if t.strip()])]
    if not found:
        raise ConfigError(
            f"data.train: none of its {total:,} images has a caption, so the objectives of LG-VQ "
            f"have nothing to learn from; {CAPTION_LAYOUTS}. To train without text, use the "
            "host's own loss"
        )
    share = f"{len(found):,}"
    if len(looked) < total:
        share = f"about {100 * len(found) / len(looked):.0f} %"
    logger.info("%s of %s training images have captions", share, f"{total:,}")
    return [text for texts in found[:MAX_READ] for text in texts][:MAX_READ]


def _warn_of_unknown_words(guide: AbstractGuide, captions: list[str]) -> None:
    counts = guide.unknown_words(captions)
    if counts is None or counts.unknown == 0:
        return
    share = counts.unknown / counts.words
    logger.log(
        logging.WARNING if share > 0.05 else logging.INFO,
        "the guide does not know %.0f %% of the words in the captions (%s): they get random "
        "embeddings without meaning. micro_clip knows the words of the embedded scenes only; for "
        "real images use guide: {use: open_clip, pretrained: PATH or tag} or "
        "{use: huggingface, model: PATH or name}",
        100 * share,
        ", ".join(counts.examples),
    )


def _warn_of_shared_images(train: Any, validation: Any, sections: Sections) -> None:
    files, held_out = _files_of(train), _files_of(validation)
    total, data = len(validation), sections.data
    if files is not None and held_out is not None:
        known = {*files}
        shared = len([file for file in held_out if file in known])
    else:
        shared = total if _images_of(data.train) == _images_of(data.validation or {}) else 0
    if shared:
        logger.warning(
            "data.validation: %s of its %s images are training images, so validation does not "
            "measure held-out images; give each its `split` (train, validation) or its own root",
            *(f"{shared:,}", f"{total:,}"),
        )


def _files_of(dataset: Any) -> list[str] | None:
    paths = [getattr(record, "path", None) for record in getattr(dataset, "records", [])]
    files = [os.path.abspath(path) for path in paths if isinstance(path, Path)]
    return files if files and len(files) == len(paths) else None


def _images_of(section: Mapping[str, Any]) -> Any:
    """Return target and params of a data set, without those that leave its images the same."""
    params = {k: v for k, v in mapping_at(section, "params").items() if k not in READING}
    return section.get("target"), params


def with_shortcuts(
    config: DictConfig,
    *,
    data: str | Path | None = None,
    max_steps: int | None = None,
    trained: str | None = None,
    overrides: Sequence[str] = (),
) -> DictConfig:
    """Return `config` with the values of `--data`, `--max-steps` and `--train`.

    `data` holds images with captions in any layout that `lgvq data check` knows. It replaces the
    data section, of which batch_size stays, and num_workers up to the number of cores; without
    split folders a tenth of the images is for validation. `key=value` words about `data` apply to
    it too, those in `data.train.params` (encoding, size, file_key, ...) to all its splits.
    `trained` is a key of `settings.TRAINED`; with `heads` they never stop (`lgvq.stop: null`).
    Raises ConfigError if the folder is missing, or of no known layout, or if `trained` contradicts
    the config.
    """
    if data is not None:
        config = _with_folder(config, Path(data).expanduser(), overrides)
    if max_steps is not None:
        config = lay_over(config, {"training": {"max_steps": max_steps}})
    return config if trained is None else _with_trained(config, trained, overrides)


def _with_trained(config: DictConfig, trained: str, overrides: Sequence[str]) -> DictConfig:
    given = {key: OmegaConf.select(config, f"training.{key}") for key in ("freeze", "heads_first")}
    freeze = [*(given["freeze"] or ())]
    lora = OmegaConf.select(config, "training.lora")
    if lora is not None and trained != "lora":
        raise ConfigError(
            f"--train {trained}, but training.lora trains adapters: use --train lora, or leave "
            "training.lora out"
        )
    if freeze and {*freeze} != {*TRAINED[trained]}:
        fixed = [*TRAINED[trained]] if trained != "lora" else "all but its adapters"
        raise ConfigError(
            f"--train {trained} freezes {fixed}, but training.freeze (--freeze) is "
            f"{freeze}; give only one of them"
        )
    if trained == "heads" and given["heads_first"]:
        raise ConfigError(
            f"--train heads: the host never learns, but training.heads_first (--heads-first) is "
            f"{given['heads_first']}, after which it would; give only one of them"
        )
    section: dict[str, Any] = {"freeze": [*TRAINED[trained]]}
    if trained == "lora" and lora is None:
        section["lora"] = {}
    config = lay_over(config, {"training": section})
    is_ours = str(loss_section(config).get("target")).startswith(OURS)
    if trained == "heads" and is_ours and not any(w.startswith("lgvq.stop=") for w in overrides):
        config = lay_over(config, {"lgvq": {"stop": None}})
    return config


def _with_folder(config: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist; expected a folder of images or a table")
    words = [word for word in overrides if word.startswith(("data.", "dataset."))]
    over = lay_over(DictConfig({}), OmegaConf.from_dotlist(words))
    with as_config_error("config", OmegaConfBaseException):
        # What refers to the data section is resolved before it goes.
        plain: Any = OmegaConf.to_container(config, resolve=True)
    old = plain.pop("data", None)
    merged: Any = OmegaConf.merge(plain, over)
    given = to_plain(merged, "data").get("data") or {}
    sections = {str(key): plain[key] for key in plain if key not in helpers_of(config)}
    optional = works_without_captions(plain)
    sections["data"] = _data_of(folder, old if isinstance(old, dict) else {}, given, optional)
    return lay_over(OmegaConf.create(sections), {"data": given})


def _data_of(
    folder: Path, old: Mapping[str, Any], over: Mapping[str, Any], optional: bool
) -> dict[str, Any]:
    given = {**mapping_at(old, "params"), **old}
    batch_size, workers = given.get("batch_size"), given.get("num_workers")
    if batch_size is None:
        batch_size = 8
        logger.info("--data: batch_size 8, as the config gives none (data.batch_size=N)")
    if not isinstance(workers, int):
        workers = 2 * batch_size if isinstance(batch_size, int) else 0  # taming's default
    sets = _sets_of(folder, over, optional)
    listed = "; ".join(f"{name}: {made['target']} {made['params']}" for name, made in sets.items())
    logger.info("--data %s in place of the config's data section: %s", folder, listed)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"batch_size": batch_size, "num_workers": min(workers, cores or 1), **sets}


def _sets_of(folder: Path, over: Mapping[str, Any], optional: bool) -> dict[str, Any]:
    """Return train, validation and test as `{target, params}`, overrides laid over them.

    `optional`: images without captions are taken too.
    """
    from ..datasets.base import recognize

    layout = recognize(folder)
    splits = {name: dict(params) for name, params in layout.splits.items()}
    inner = folder / "train"
    known = inspect.signature(resolve("datasets", layout.member)).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if {"train", "validation"} & {*splits} == {"train"} and inner.is_dir():
        inside = recognize(inner, layout.member).splits
        splits |= {"all": dict(inside["all"])} if "all" in inside else {}
    whole = splits.pop("all", None)
    if whole is not None and "holdout" in known:
        splits |= {name: {**whole, "split": name} for name in ("train", "validation")}
    elif whole is not None:
        splits.setdefault("train", whole)
    if "train" in splits and ("crop" in known or takes_all):
        splits["train"].setdefault("crop", "random")
    own = {name: mapping_at(over.get(name), "params") for name in DATA_SETS}
    shared = {key: value for key, value in own["train"].items() if key not in TRAINING_ONLY}
    sets: dict[str, dict[str, Any]] = {}
    for name in [name for name in DATA_SETS if name in splits]:
        params = {**splits[name], **shared, **own[name]}
        params = {k: os.path.abspath(v) if isinstance(v, Path) else v for k, v in params.items()}
        sets[name] = {"target": layout.member, "params": params}
        if optional:
            sets[name] = with_optional_captions(sets[name])
    if whole is not None and "validation" in sets:
        try:
            build_dataset(sets["validation"])
        except ConfigError as error:
            logger.warning("--data: no validation: %s", error)
            del sets["validation"]
    elif "validation" not in sets:
        logger.warning("--data %s: no validation images; only training metrics are logged", folder)
    return sets
