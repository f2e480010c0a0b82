"""What others need of training without Lightning: read a config, build its host and its data.

Importing this imports no torch, so that errors in a config are reported at once.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import compat
from ..config import LGVQConfig, parse, require_finite_weights
from ..sockets import (
    ConfigError,
    Problems,
    building,
    check_call,
    check_numbers,
    import_target,
    instantiate,
    params_of,
    path_of,
    resolve,
)
from .config import (
    DATA_SETS,
    LOSS_KEYS,
    DataSection,
    Sections,
    data_mapping,
    data_section,
    helpers_of,
    lay_over,
    lgvq_block,
    loss_key,
    loss_section,
    model_section,
    read_config,
    to_plain,
    with_sizes,
)
from .quiet import prints_to_stderr
from .settings import FROZEN, TrainingConfig

if TYPE_CHECKING:
    from ..guides.base import AbstractGuide

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FROZEN",
    "LOSS_KEYS",
    "DataSection",
    "Sections",
    "TrainingConfig",
    "build_dataset",
    "build_host",
    "build_parts",
    "check_names",
    "data_mapping",
    "data_section",
    "lay_over",
    "lgvq_block",
    "loss_key",
    "loss_section",
    "model_section",
    "read_config",
    "to_plain",
    "with_shortcuts",
    "with_sizes",
]

logger = logging.getLogger(__name__)


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
    _check_targets(model, "model")
    loss = loss_section({"model": model})
    weights = loss.get("params") or {}
    require_finite_weights(weights, f"model.params.{loss_key({'model': model})}.params")
    weight = compat.perceptual_weight_of(loss.get("target"), weights)
    target, params = import_target(model["target"]), model.get("params") or {}
    check_call(f"model: {model['target']}", target, (), params)
    # Hosts read their configs as attributes (encoder.dim), as OmegaConf's containers allow.
    given = OmegaConf.create(params, flags={"allow_objects": True})
    with building("model", model["target"], params):
        with compat.lpips_only_if_used(weight, loss.get("target")), prints_to_stderr():
            host = target(**{str(key): value for key, value in given.items()})
        require_host = getattr(getattr(host, "loss", None), "require_host", None)
        if callable(require_host):  # LGVQLoss: say now, not at the first step, what is not found
            require_host()
    return host


OTHER_DATA = "; or give --data FOLDER (images with captions) in its place"


def build_dataset(section: Mapping[str, Any]) -> Any:
    """Build the data set `{target, params}`; the target may be a member's short name.

    Raises:
        ConfigError: if there is no such data set, it does not take the params, or is empty.

    Example:
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


def with_shortcuts(
    config: DictConfig,
    *,
    data: str | Path | None = None,
    max_steps: int | None = None,
    overrides: Sequence[str] = (),
) -> DictConfig:
    """Return `config` with what `--data` and `--max-steps` say.

    Args:
        config: read by :func:`read_config`.
        data: images with captions in any layout that `lgvq data check` knows, in place of the
            data section; its batch_size stays, and its num_workers up to the number of cores.
            Without split folders a tenth of the images is for validation.
        max_steps: for `training.max_steps`.
        overrides: the `key=value` words; those about `data` apply to the folder too. What
            `data.train.params` says of it (encoding, size, file_key, ...) holds for its other
            splits as well.

    Raises:
        ConfigError: if the folder is missing, or of no known layout.
    """
    if data is not None:
        folder = Path(data).expanduser()
        if not folder.exists():
            raise ConfigError(f"{folder} does not exist; expected a folder of images or a table")
        words = [word for word in overrides if word.startswith(("data.", "dataset."))]
        over = lay_over(OmegaConf.create({}), OmegaConf.from_dotlist(words))
        try:  # what refers to the data section is resolved before it goes
            plain = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"config: {error}") from error
        assert isinstance(plain, dict)
        sections = {str(key): plain[key] for key in plain if key not in helpers_of(config)}
        rest = {key: value for key, value in plain.items() if key != "data"}
        merged = OmegaConf.merge(rest, over)
        given = to_plain(merged, "data").get("data") or {}  # type: ignore[arg-type]
        sections["data"] = _data_of(folder, plain.get("data"), given)
        config = lay_over(OmegaConf.create(sections), {"data": given})
    if max_steps is not None:
        config = OmegaConf.merge(config, {"training": {"max_steps": max_steps}})  # type: ignore[assignment]
    return config


def _data_of(folder: Path, old: Any, over: Mapping[str, Any]) -> dict[str, Any]:
    section = old if isinstance(old, Mapping) else {}
    params = section.get("params")
    given = {**(params if isinstance(params, Mapping) else {}), **section}
    batch_size = given.get("batch_size")
    if batch_size is None:
        batch_size = 8
        logger.info("--data: batch_size 8, as the config gives none (data.batch_size=N)")
    workers = given.get("num_workers")
    if not isinstance(workers, int):
        workers = 2 * batch_size if isinstance(batch_size, int) else 0  # taming's default
    sets = _sets_of(folder, over)
    logger.info(
        "--data %s in place of the config's data section: %s",
        folder,
        "; ".join(f"{name}: {made['target']} {made['params']}" for name, made in sets.items()),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"batch_size": batch_size, "num_workers": min(workers, cores or 1), **sets}


OF_TRAINING = ("root", "split", "crop", "flip")


def _sets_of(folder: Path, over: Mapping[str, Any]) -> dict[str, Any]:
    """Return train, validation and test as `{target, params}`, overrides laid over them."""
    from ..datasets.base import recognize

    layout = recognize(folder)
    splits = {name: dict(params) for name, params in layout.splits.items()}
    inner = folder / "train"
    known = inspect.signature(resolve("datasets", layout.member)).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if {"train", "validation"} & {*splits} == {"train"} and inner.is_dir():
        inside = recognize(inner, layout.member).splits
        splits = {**splits, "all": dict(inside["all"])} if "all" in inside else splits
    whole = splits.pop("all", None)
    if whole is not None and "holdout" in known:
        splits |= {name: {**whole, "split": name} for name in ("train", "validation")}
    elif whole is not None:
        splits.setdefault("train", whole)
    if "train" in splits and ("crop" in known or takes_all):
        splits["train"].setdefault("crop", "random")
    own = {name: _params_in(over.get(name)) for name in DATA_SETS}
    shared = {key: value for key, value in own["train"].items() if key not in OF_TRAINING}
    splits = {name: {**params, **shared, **own[name]} for name, params in splits.items()}
    if whole is not None and "validation" in splits:
        try:
            build_dataset({"target": layout.member, "params": splits["validation"]})
        except ConfigError as error:
            logger.warning("--data: no validation: %s", error)
            del splits["validation"]
    elif "validation" not in splits:
        logger.warning("--data %s: no validation images; metrics are of training alone", folder)
    as_text = {
        name: {k: os.path.abspath(v) if isinstance(v, Path) else v for k, v in params.items()}
        for name, params in splits.items()
    }
    return {
        name: {"target": layout.member, "params": as_text[name]}
        for name in ("train", "validation", "test")
        if name in as_text
    }


def _params_in(section: Any) -> dict[str, Any]:
    params = section.get("params") if isinstance(section, Mapping) else None
    return dict(params) if isinstance(params, Mapping) else {}


def build_parts(
    config: DictConfig | Mapping[str, Any], sections: Sections, problems: Problems
) -> tuple[Any, Any, Any]:
    """Build host, training and validation data set; all that is missing is said at once.

    Args:
        config: as it was given, for the host.
        sections: of it, checked; a part that `problems` has an error of is None.
        problems: what was found so far.

    Returns:
        Host, training set, and validation set or None.

    Raises:
        ConfigError: for all problems together: weights, data sets, captions, keys.
    """
    host = None
    if sections.model is not None:
        with problems.collecting():
            host = build_host(config)
        from ..guides.base import build_guide

        if host is None and (block := _alignment_block(sections)) is not None:
            with problems.collecting():  # a host builds its loss before it gets to the guide
                build_guide(block.guide)
    built: dict[str, Any] = {}
    for name in ("train", "validation"):
        section = getattr(sections.data, name) if sections.data is not None else None
        if section is not None:
            with problems.collecting():
                built[name] = _build_named(name, section)
    if problems and "train" in built and (block := _alignment_block(sections)) is not None:
        with problems.collecting():
            require_captions(built["train"], block, peek=True)
    problems.raise_any()
    return host, built["train"], built.get("validation")


def _build_named(name: str, section: Mapping[str, Any]) -> Any:
    try:
        return build_dataset(section)
    except ConfigError as error:
        is_told = "." not in str(section["target"]) or str(error).endswith(OTHER_DATA)
        hint = "" if is_told else OTHER_DATA
        raise ConfigError(f"data.{name}: {str(error).removeprefix('data: ')}{hint}") from error


def _alignment_block(sections: Sections) -> LGVQConfig | None:
    """Return the `lgvq:` block of a loss that has heads; None for a host's own loss."""
    from ..loss import is_on

    loss = loss_section({"model": sections.model}) if sections.model is not None else {}
    if not str(loss.get("target")).startswith(("lgvq_plugin.LGVQLoss", "lgvq_plugin.over.")):
        return None
    try:
        block = parse(lgvq_block({"model": sections.model}))
    except ConfigError:
        return None  # the host's constructor has said so
    return block if is_on(block) else None


CAPTION_LAYOUTS = (
    "layouts with captions that are read: x.jpg with x.txt beside it; captions.jsonl, "
    "metadata.jsonl or a .csv with a caption column (folder); a line `path<TAB>caption`, or x.txt "
    "beside each image (list_file); a .txt or .json member in each sample (webdataset). "
    "`lgvq data check PATH` shows what is found; data sets of taming's own have no captions"
)
COUNTED = 20_000  # samples whose captions are looked at
READ = 2_000  # captions whose words are looked up


def require_captions(dataset: Any, block: LGVQConfig, *, peek: bool = False) -> list[str] | None:
    """Return some captions of the training set, and log how many images have any.

    Args:
        dataset: of training.
        block: the `lgvq:` block.
        peek: read the first sample of a data set that does not tell its captions otherwise.

    Returns:
        Up to 2,000 captions; None if only the batches can tell.

    Raises:
        ConfigError: if no image has a caption.
    """
    from ..datasets.base import CaptionedImages

    total = len(dataset)
    if not isinstance(dataset, CaptionedImages) or block.caption_key not in (
        None,
        "caption",
        "captions",
    ):
        keys = {"caption", "captions", "text", "txt", block.caption_key}
        if peek and not keys & {*dataset[0]}:
            raise ConfigError(f"data.train: its samples have no captions; {CAPTION_LAYOUTS}")
        return None
    looked = range(0, total, max(1, total // COUNTED))
    found = [texts for i in looked if (texts := [t for t in dataset.captions_of(i) if t.strip()])]
    if not found:
        raise ConfigError(
            f"data.train: none of its {total:,} images has a caption, so the objectives of LG-VQ "
            f"have nothing to learn from; {CAPTION_LAYOUTS}. To train without text, use the "
            "host's own loss"
        )
    if len(looked) == total:
        logger.info("%s of %s training images have captions", f"{len(found):,}", f"{total:,}")
    else:
        share = len(found) / len(looked)
        logger.info("about %.0f %% of %s training images have captions", 100 * share, f"{total:,}")
    return [text for texts in found[:READ] for text in texts][:READ]


def tell_unknown_words(guide: AbstractGuide, captions: list[str]) -> None:
    """Warn if a guide does not know the words of the captions, as the embedded one may not."""
    counts = guide.unknown_words(captions)
    if counts is None or counts.unknown == 0:
        return
    share = counts.unknown / counts.words
    log = logger.warning if share > 0.05 else logger.info
    log(
        "the guide does not know %.0f %% of the words in the captions (%s): they get random "
        "embeddings, which say nothing of their meaning. micro_clip knows the words of the "
        "embedded scenes only; for real images use guide: {use: open_clip, pretrained: PATH or "
        "tag} or {use: huggingface, model: PATH or name}",
        100 * share,
        ", ".join(counts.examples),
    )


def tell_shared_images(train: Any, validation: Any, sections: Sections) -> None:
    """Warn if validation images are training images."""
    files = [_files_of(dataset) for dataset in (train, validation)]
    if files[0] is not None and files[1] is not None:
        known = {*files[0]}
        shared, total = sum(file in known for file in files[1]), len(files[1])
    else:
        same = _images_of(sections.data.train) == _images_of(sections.data.validation or {})
        shared, total = (len(validation), len(validation)) if same else (0, 1)
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
    """Return what says which images a data set has."""
    reading = ("size", "crop", "flip", "crop_size", "random_crop", "channel_first")
    params = {k: v for k, v in (section.get("params") or {}).items() if k not in reading}
    return section.get("target"), params


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
    block = lgvq_block(sections.plain)
    parse(block)
    guide = block.get("guide") or {}
    if isinstance(guide, Mapping) and guide.get("use") is not None:
        path_of("guides", guide["use"])


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
            hint = compat.explain_import(error.__cause__)
            raise ConfigError(f"{where}.target: {error}{hint}") from error
        params = params_of(node, where)
        if where in [f"model.params.{key}" for key in LOSS_KEYS]:
            _check_loss(node["target"], target, params, f"{where}.params")
    elif where.endswith("lossconfig"):
        raise ConfigError(f"{where}: expected a `target:`, got keys {sorted(node)}")
    for key, value in node.items():
        _check_targets(value, f"{where}.{key}")


def _check_loss(name: str, loss: Any, params: Mapping[str, Any], where: str) -> None:
    """Check the params of the host's loss, those of the base loss if it is ours."""
    from ..loss import LGVQLoss, base_of

    if isinstance(loss, type) and issubclass(loss, LGVQLoss):
        own = {key: value for key, value in params.items() if key not in ("base", "lgvq")}
        parse(params.get("lgvq"))
        name, params = base_of(params.get("base"), own, loss.BASE_TARGET)
        loss = import_target(name)
        compat.check_loss(name, loss, (), params, where)
    else:
        check_numbers(where, loss, params)
