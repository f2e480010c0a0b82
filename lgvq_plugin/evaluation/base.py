"""Evaluate one host: every metric on held-out images, the tokenizer frozen.

config --> test and training images --host--> codes, reconstructions --metrics, probes--> rows
"""

import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..sockets import ConfigError
from ..training.base import data_mapping, lgvq_block, to_plain, with_sizes
from . import _alignment, _codebook, _downstream, _reconstruction
from ._config import EvaluationConfig, names_of
from ._context import Context
from ._rows import Rows
from ._store import Store, host_hash, mark_of

logger = logging.getLogger(__name__)

METRICS: dict[str, Callable[[Context], Rows]] = {
    "psnr": _reconstruction.psnr,
    "ssim": _reconstruction.ssim,
    "lpips": _reconstruction.lpips,
    "fid": _reconstruction.fid,
    "fd": _reconstruction.fd,
    "usage": _codebook.usage,
    "words": _codebook.words,
    "relation": _codebook.relation,
    "retrieval": _alignment.retrieval,
    "masked_words": _alignment.masked_words,
    "attributes": _alignment.attributes,
    "caption": _downstream.caption,
    "vqa": _downstream.vqa,
    "t2i": _downstream.t2i,
}
OWN_KEYS = {  # the keys of `evaluation:` that a metric depends on, beside those of all
    "lpips": ("lpips",),
    "fid": ("fid",),
    "fd": ("fd",),
    "relation": ("guide",),
    "retrieval": ("guide",),
    "masked_words": ("guide", "masked_words"),
    "attributes": ("few_shot", "few_shot_draws", "attribute_words"),
    "caption": ("caption", "tokenizer"),
    "vqa": ("vqa", "wordnet"),
    "t2i": ("guide", "t2i", "fd", "clip_score"),
}
COMMON_KEYS = ("limit", "train_limit", "seed")


def evaluate(
    host: nn.Module,
    config: Mapping[str, Any],
    *,
    metrics: Iterable[str] | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a host.

    Args:
        host: a tokenizer in evaluation mode; it is not changed.
        config: whose `data:` section names the images: probes train on `train`, and everything
            is measured on `test`, or on `validation` if there is none.
        metrics: names of :data:`METRICS`; None takes the quick ones.
        limit: test images, the first ones; None: all.
        output: folder where finished metrics and probes are kept; a later call with the same
            settings reads them. None keeps nothing.
        options: the `evaluation:` block, over that of the config.
        progress: whether to show bars.

    Returns:
        `{"settings", "environment", "metrics", "skipped"}`. A metric is `{"value", "n", "unit",
        "higher_is_better"}`, some with `settings` and `per_image`; `skipped` says why a metric
        that was asked for could not be computed here.

    Raises:
        ConfigError: if the config or a name is wrong, or no metric at all could be computed.
    """
    context = build_context(
        host, config, limit=limit, output=output, options=options, progress=progress
    )
    return run(context, names_of(metrics), output)


def build_context(
    host: nn.Module,
    config: Mapping[str, Any],
    *,
    limit: int | None,
    output: str | Path | None,
    options: Mapping[str, Any] | None,
    progress: bool,
) -> Context:
    """Return the context of a host; arguments as :func:`evaluate`."""
    data = config.get("data")
    if not data:
        raise ConfigError("the config has no section `data:`, which names the images")
    plain = to_plain(config, "data", "evaluation", "model")
    given = plain.get("evaluation") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"evaluation: expected a mapping, got {given!r}")
    block = {**given, **(options or {})}
    if limit is not None:
        block["limit"] = limit
    return Context(
        host.eval(),
        with_sizes(data_mapping(plain["data"]), plain.get("model")),
        lgvq_block(config),
        EvaluationConfig.of(block),
        folder=None if output is None else Path(output) / "probes",
        progress=progress,
    )


def run(context: Context, names: list[str], output: str | Path | None) -> dict[str, Any]:
    """Compute the metrics of a context, those that are on disk already aside."""
    store = Store(None if output is None else Path(output) / "metrics")
    settings = settings_of(context)
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        mark = mark_of(name, settings["host"], _part(settings, name))
        found = store.read(name, mark)
        if found is None:
            logger.info("measuring %s", name)
            try:
                found = {key: row.plain() for key, row in METRICS[name](context).items()}
            except ConfigError as error:
                if str(error).startswith(("unknown key", "evaluation.")):
                    raise
                skipped[name] = str(error)
                logger.warning("%s skipped: %s", name, error)
                continue
            store.write(name, mark, found)
        rows |= found
        skipped |= _left_out(name, found)
    if not rows:
        reasons: dict[str, list[str]] = {}
        for name, why in skipped.items():
            reasons.setdefault(why, []).append(name)
        told = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        raise ConfigError(f"no metric could be computed: {told}")
    return {
        "settings": settings | {"metrics": names},
        "environment": environment(),
        "metrics": rows,
        "skipped": skipped,
    }


def _left_out(name: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the parts of a metric that could not be computed, as its settings tell."""
    return {
        f"{name}/{key}": told.removeprefix("skipped: ")
        for row in rows.values()
        for key, told in (row.get("settings") or {}).items()
        if isinstance(told, str) and told.startswith("skipped: ")
    }


def settings_of(context: Context) -> dict[str, Any]:
    """Return all that the numbers depend on, plain."""
    section = context._data.get("train")
    return {
        "host": {"class": type(context.host).__name__, "weights": host_hash(context.host)},
        "test": context.test_section,
        "train": dict(section) if section else None,
        "evaluation": asdict(context.config) | {"guide": context.guide_config},
    }


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings that one metric depends on."""
    keys = (*COMMON_KEYS, *OWN_KEYS.get(name, ()))
    block = {key: settings["evaluation"][key] for key in keys}
    is_trained = name not in ("psnr", "ssim", "lpips", "fid", "fd", "usage")
    train = settings["train"] if is_trained else None
    return {"test": settings["test"], "train": train, "evaluation": block}


def environment() -> dict[str, Any]:
    """Return versions and the machine."""
    names = ("lgvq_plugin", "torch", "torchmetrics", "torchvision", "open_clip_torch")
    versions: dict[str, str | None] = {}
    for name in (*names, "pycocoevalcap", "torch-fidelity", "nltk"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": versions,
    }
