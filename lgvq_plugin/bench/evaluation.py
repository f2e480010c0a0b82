"""Evaluate one host: every metric on held-out images, the tokenizer frozen.

Finished metrics are kept on disk, so that an interrupted evaluation continues where it stopped.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..alignment import Alignment
from ..config import require, verify
from ..datasets.base import naming_files
from ..encoder import SavedHeads
from ..files import write_json
from ..sockets import ConfigError, suggest
from ..training.config import data_mapping, lgvq_block, to_plain, with_sizes
from . import classification, measures
from .evaluate import NAMES, RESULT_NAMES, EvaluationConfig, names_of
from .evaluation_context import Context
from .figures import canvas, image_grid, save_figure
from .foreign import find_metric, label_of, source_of
from .measures import Row, Rows
from .metrics.perceptual import module_hash
from .metrics.reconstruction import to_uint8
from .records import read_json

logger = logging.getLogger(__name__)

METRICS: dict[str, Callable[[Context], Rows]] = {
    name: getattr(measures, name, None) or getattr(classification, name) for name in NAMES
}
UNTRAINED = ("psnr", "ssim", "lpips", "fid", "fd", "usage", "zeroshot")
"""Metrics that do not depend on the training set."""
WITH_HEADS = ("zeroshot", "linear_probe", "knn")
"""Metrics that depend on the heads, too; those of other packages may."""
OPTIONAL = ("pycocoevalcap", "torch-fidelity", "nltk")
COMMON_KEYS = ("limit", "train_limit", "seed")
KEYS = {  # keys of `evaluation:` that a metric depends on, besides the common ones and its own
    "relation": ("guide",),
    "retrieval": ("guide",),
    "masked_words": ("guide",),
    "attributes": ("few_shot", "few_shot_draws", "attribute_words"),
    "captioning": ("tokenizer",),
    "vqa": ("wordnet",),
    "text_to_image": ("guide", "fd", "clip_score"),
    "unconditional": ("fd",),
    "completion": ("unconditional", "fd"),
    "class_to_image": ("fd",),
    "semantic_to_image": ("fd",),
}


def evaluate(
    host: nn.Module,
    config: Mapping[str, Any],
    *,
    metrics: Iterable[str] | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    heads: Alignment | SavedHeads | None = None,
) -> dict[str, Any]:
    """Evaluate a host.

    Args:
        host: a tokenizer in evaluation mode; it is not changed.
        config: its `data:` section gives the images: probes train on `train`, and everything is
            measured on `test`, or on `validation` if there is no `test`.
        metrics: names in :data:`METRICS`, or those of other packages (:mod:`.foreign`); None: the
            quick ones.
        limit: use only the first test images; None: all.
        output: folder where finished metrics and probes are kept and read again by a later call
            with the same settings; None: nowhere.
        options: the `evaluation:` block, which takes precedence over that of the config.
        progress: whether to show bars.
        heads: those trained on the host, such as `handle.heads`; None: those of its loss, if any.

    Returns:
        `{"settings", "environment", "metrics", "skipped"}`. A metric is `{"value", "n", "unit",
        "higher_is_better"}`, some with `settings` and `per_image`; `skipped` has the reasons why
        requested metrics could not be computed here.

    Raises:
        ConfigError: if the config or a name is wrong, or no metric could be computed.
    """
    options = {**(options or {}), **({} if limit is None else {"limit": limit})}
    kept: Any = {"output": output, "progress": progress, "heads": heads}
    return run(build_context(host, config, options=options, **kept), names_of(metrics), output)


def build_context(
    host: nn.Module,
    config: Mapping[str, Any],
    *,
    output: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    heads: Alignment | SavedHeads | None = None,
) -> Context:
    """Return the context of a host; arguments as :func:`evaluate`."""
    if not config.get("data"):
        raise ConfigError("the config has no section `data:`, which names the images")
    plain = to_plain(config, "data", "evaluation", "model")
    given = plain.get("evaluation") or {}
    require(isinstance(given, Mapping), "evaluation", "a mapping", given)
    return Context(
        host.eval(),
        with_sizes(data_mapping(plain["data"]), plain.get("model")),
        lgvq_block(config),
        EvaluationConfig.from_dict({**given, **(options or {})}),
        folder=None if output is None else Path(output) / "probes",
        progress=progress,
        given_heads=heads,
    )


@naming_files()
def run(context: Context, names: list[str], output: str | Path | None) -> dict[str, Any]:
    """Compute the metrics of a context that are not in `output` yet; return as `evaluate`."""
    settings = _settings(context)
    functions = _functions(names, context.config.options)
    labels = {name: RESULT_NAMES.get(name, label_of(name)) for name in names}
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in names:
        label = labels[name]
        about = _settings_of_metric(settings, name)
        if name not in METRICS:
            about["source"] = source_of(functions[name])
        if name not in METRICS or name in WITH_HEADS:
            about["heads"] = context.heads_mark
        facts = json.dumps((label, settings["host"], about), sort_keys=True, default=str)
        cache_key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = None if output is None else Path(output) / "metrics" / f"{label}.json"
        found = None if path is None else _read_finished(path, cache_key)
        if found is None:
            logger.info("measuring %s", name)
            try:
                found = {key: row.to_dict() for key, row in functions[name](context).items()}
            except ConfigError as error:
                if str(error).startswith(("unknown key", "evaluation.")):
                    raise
                skipped[label] = str(error)
                logger.warning("%s skipped: %s", name, error)
                continue
            if path is not None:
                write_json(path, {"mark": cache_key, "rows": found})
        if twice := sorted(rows.keys() & found.keys()):
            raise ConfigError(f"evaluation.metrics: {name} gives {twice[0]!r} a second time")
        rows |= found
        skipped |= {
            f"{label}/{key}": value.removeprefix("skipped: ")
            for row in found.values()
            for key, value in (row.get("settings") or {}).items()
            if isinstance(value, str) and value.startswith("skipped: ")
        }
    if not rows:
        reasons: dict[str, list[str]] = {}
        for label, why in skipped.items():
            reasons.setdefault(why, []).append(label)
        listed = "; ".join(f"{', '.join(labels)}: {why}" for why, labels in reasons.items())
        raise ConfigError(f"no metric could be computed: {listed}")
    return {
        "settings": settings | {"metrics": [*labels.values()]},
        "environment": _environment(),
        "metrics": rows,
        "skipped": skipped,
    }


def _functions(
    names: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Callable[[Context], Rows]]:
    """Return each metric; raises ConfigError if one of another package refuses its options."""
    given = {label_of(key): value for key, value in options.items()}
    others = {name: label_of(name) for name in names if name not in METRICS}
    for label in sorted(given.keys() - others.values()):
        logger.warning(
            "evaluation.options.%s is not read: no such metric is measured%s",
            *(label, suggest(label, others.values())),
        )
    found = {name: find_metric(name, NAMES, given.get(label)) for name, label in others.items()}
    return METRICS | found


@dataclass(frozen=True)
class _File:
    """The file of a finished metric; `mark` is a hash of all that the rows depend on."""

    mark: str
    rows: dict[str, Row]


def _read_finished(path: Path, cache_key: str) -> dict[str, Any] | None:
    """Return a finished metric's rows if they have this cache key."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        verify(found, _File, f"{path}: the file")
    except ConfigError as error:
        raise ConfigError(f"{error}; delete the file to measure again") from error
    return found["rows"] if found["mark"] == cache_key else None


def _settings(context: Context) -> dict[str, Any]:
    """Return all that the numbers depend on, plain."""
    section = context.data.get("train")
    block = asdict(context.config) | {"guide": context.guide_config}
    weights = module_hash(context.host, skip="loss.")  # the weights of its loss do not count
    return {
        "host": {"class": type(context.host).__name__, "weights": weights},
        "test": context.test_section,
        "train": dict(section) if section else None,
        "evaluation": {RESULT_NAMES.get(key, key): value for key, value in block.items()},
    }


def _settings_of_metric(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    block = dict(settings["evaluation"])  # of another package's metric, which may read any key
    if name in METRICS:
        keys = {RESULT_NAMES.get(key, key) for key in (name, *COMMON_KEYS, *KEYS.get(name, ()))}
        block = {key: value for key, value in block.items() if key in keys}
    train = None if name in UNTRAINED else settings["train"]
    return {"test": settings["test"], "train": train, "evaluation": block}


def _environment() -> dict[str, Any]:
    names = ("lgvq_plugin", "torch", "torchmetrics", "torchvision", "open_clip_torch")
    versions: dict[str, str | None] = dict.fromkeys((*names, *OPTIONAL))
    for name in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": versions,
    }


def write_figures(folder: Path, contexts: Mapping[str, Context], names: Sequence[str]) -> None:
    """Write the figures of these metrics and, for a single host, words.json."""
    images: list[np.ndarray] = []
    for context in contexts.values():
        pair = next(iter(context.pairs()))
        images += [_to_arrays(part[:8]) for part in (pair if not images else pair[1:])]
    image_grid(folder / "reconstructions.png", images, ["input", *contexts])
    if "usage" in names:
        _usage_curves(folder / "usage.png", contexts)
    made = {label: c.generated for label, c in contexts.items() if c.generated is not None}
    if "text_to_image" in names and made:
        captions = next(iter(made.values()))[0][:6]
        rows = [_to_arrays(images[:6]) for _, images in made.values()]
        image_grid(folder / "generated.png", rows, [*made], captions)
    if "words" in names and len(contexts) == 1:
        try:
            words = measures.words_of_codes(*contexts.values())
        except ConfigError:
            return  # reported as the reason why the metric was skipped
        write_json(folder / "words.json", words)


def _usage_curves(path: Path, contexts: Mapping[str, Context]) -> None:
    """Plot how often each code is used, the most frequent first, on a logarithmic scale."""
    figure, ((axes,),) = canvas(6, 3.4)
    for name, context in contexts.items():
        codes = context.test.codes
        if codes.indices is None or codes.table is None:
            continue
        counts = torch.bincount(codes.indices.flatten(), minlength=len(codes.table))
        share = (counts.sort(descending=True).values.double() / counts.sum()).numpy()
        is_used = share > 0
        label = f"{name} ({(~is_used).sum()} of {len(share)} dead)"
        axes.plot(np.arange(1, len(share) + 1)[is_used], share[is_used], label=label, lw=1.5)
    axes.set(xlabel="code, by rank", ylabel="share of all positions", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def export(context: Context, folder: Path, kind: str) -> None:
    """Write test images and reconstructions for other evaluators.

    `kind` npz: `reals.npz` and `reconstructions.npz` (`arr_0`, (M, H, W, 3) uint8, the format of
    ADM's evaluator); png: folders of PNG files with these names.
    """
    pairs = [[_to_arrays(part) for part in pair] for pair in context.pairs()]
    for name, parts in zip(("reals", "reconstructions"), zip(*pairs, strict=True), strict=True):
        images = np.concatenate(parts)
        (folder / name if kind == "png" else folder).mkdir(parents=True, exist_ok=True)
        if kind == "npz":
            np.savez(folder / f"{name}.npz", images)
        else:
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / name / f"{number:06d}.png")


def _to_arrays(images: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) in [-1, 1] as (B, H, W, 3) uint8."""
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
