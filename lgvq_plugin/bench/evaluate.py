"""`lgvq eval`: one or several checkpoints side by side; and the `evaluation:` block of a config."""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import OmegaConf

from ..arguments import add_shortcuts, parse_words
from ..checkpoints import find_checkpoint
from ..config import Block, Limit, build, laid_over, require
from ..files import remove_parts, require_writable, write_json, write_text
from ..sockets import ConfigError, resolve
from ..training.build import with_shortcuts
from ..training.config import MAX_WORKERS, data_mapping, lay_over, read_config, to_plain, with_sizes
from .foreign import find_metric, label_of
from .records import csv_text, text_table

if TYPE_CHECKING:
    from ..checkpoints.load import Checkpoint
    from .evaluation_context import Context

logger = logging.getLogger(__name__)

NAMES = (  # of the metrics, in the order of the table
    *("psnr", "ssim", "lpips", "fid", "fd", "usage", "words", "relation"),
    *("retrieval", "masked_words", "attributes", "zeroshot", "linear_probe", "knn"),
    *("captioning", "vqa", "text_to_image"),
    *("unconditional", "completion", "class_to_image", "semantic_to_image", "grounding"),
)
DEFAULT = ("psnr", "ssim", "usage", "retrieval")
TRAINED = (
    *("masked_words", "captioning", "vqa", "text_to_image"),
    *("unconditional", "class_to_image", "semantic_to_image", "grounding"),
)
"""Metrics whose probe is a network, with a block of their own in `evaluation:`."""
RESULT_NAMES = {"captioning": "caption", "text_to_image": "t2i"}
"""Metrics that result files, those of earlier versions included, know by another name."""
ARROWS = {True: "↑", False: "↓", None: " "}
TOKENIZER = Limit("words or ptb", lambda name: name in ("words", "ptb"))
WORKERS = Limit(f"at most {MAX_WORKERS} here", lambda count: count <= MAX_WORKERS)
OLD_NAMES = {"caption": "captioning", "t2i": "text_to_image", "questions": "vqa"}


def renamed(name: Any) -> Any:
    """Return the present name of a metric or key; warn if the given one is deprecated."""
    if not isinstance(name, str) or name not in OLD_NAMES:
        return name
    message = f"the name {name!r} is deprecated; use {OLD_NAMES[name]!r}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return OLD_NAMES[name]


def names_of(metrics: Iterable[str] | None) -> list[str]:
    """Return the names of metrics in the order of the table; None: the default ones.

    Those of other packages come last; they are imported.

    Raises:
        ConfigError: for an unknown name, without any, or if two have the same.

    Example:
        >>> names_of(["ssim", "psnr", "ssim"])
        ['psnr', 'ssim']
    """
    given = [renamed(name) for name in (DEFAULT if metrics is None else metrics)]
    if not given:
        raise ConfigError(f"metrics: none given; known: {', '.join(NAMES)}")
    names = [name for name in NAMES if name in given]
    for name in dict.fromkeys(name for name in given if name not in NAMES):
        find_metric(name, NAMES)
        if label_of(name) in (*NAMES, *map(label_of, names)):
            raise ConfigError(f"metrics: two are named {label_of(name)}: {name}; rename it")
        names.append(name)
    return names


def _at_least(minimum: int, more: str = "") -> Limit:
    return Limit(f"a whole number >= {minimum}{more}", lambda number: number >= minimum)


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """LPIPS."""

    net: str = "alex"
    """alex (reported by papers), vgg (used in training) or squeeze."""
    backbone: str | None = None
    """File with torchvision's weights of that net; null: torchvision's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FIDConfig:
    """FID, which always uses Inception."""

    weights: str | None = None
    """weights-inception-2015-12-05-6726825d.pth; null: torch-fidelity's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FDConfig:
    """Frechet distance in another feature net, called `fd_<net>`."""

    net: str = "squeeze"
    """alex, vgg, squeeze, or "pkg.module:factory" of a net from uint8 images to features."""
    weights: str | None = None
    """File with its weights; null: the net's own cache or download."""


@dataclass(frozen=True, kw_only=True)
class ZeroshotConfig:
    """Zero-shot classification."""

    templates: str | tuple[str, ...] = (
        "a photo of a {}.",
        "a picture of a {}.",
        "a close-up photo of a {}.",
        "a drawing of a {}.",
        "{}",
    )
    """Prompts, or one, with {} for the name of a class; their features are averaged."""
    names: dict[str, str] = field(default_factory=dict)
    """What to call the classes in prompts, by folder; null: the folder's own words."""

    def __post_init__(self) -> None:
        given = [self.templates] if isinstance(self.templates, str) else self.templates
        holds = len(given) > 0 and all(each.count("{}") == 1 for each in given)
        require(holds, "templates", "prompts with one {} each, like 'a photo of a {}.'", given)
        for key, name in self.names.items():
            holds = isinstance(name, str) and bool(name.strip())
            require(holds, f"names.{key}", "the words for this class", name)


@dataclass(frozen=True, kw_only=True)
class KNNConfig(Block):
    """Nearest neighbors."""

    k: Annotated[int, _at_least(1)] = 20
    """Training images that vote, >= 1."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Block):
    """The `evaluation:` block; everything has a default."""

    guide: dict[str, Any] | None = None
    """Text guide of the metrics with text; null: that of `lgvq:` in the config, else micro_clip."""
    limit: Annotated[int | None, _at_least(2, ", or null")] = None
    """Use only the first test images; null: all."""
    train_limit: Annotated[int | None, _at_least(2, ", or null")] = None
    """Use only the first training images for the probes; null: all, or 4 * `limit`."""
    batch_size: Annotated[int, _at_least(1)] = 32
    """Images per batch of the host."""
    num_workers: Annotated[int, _at_least(0), WORKERS] = 0
    """Processes that load samples."""
    seed: int = 0
    """Seed of all random draws, which are the same for any host."""
    few_shot: Annotated[int, _at_least(10)] = 64
    """Training images of the few-shot attribute probe, >= 10."""
    few_shot_draws: Annotated[int, _at_least(1)] = 1
    """Few-shot sets, >= 1: the first images, then random ones; results are means over them."""
    attribute_words: Annotated[int, _at_least(0)] = 0
    """Frequent words of captions used as labels of a data set without any; 0: none."""
    tokenizer: Annotated[str, TOKENIZER] = "words"
    """Tokenizer of captions: words (ours), or ptb (used by papers; needs Java)."""
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    """LPIPS."""
    fid: FIDConfig = field(default_factory=FIDConfig)
    """FID."""
    fd: FDConfig = field(default_factory=FDConfig)
    """Frechet distance in another net."""
    zeroshot: ZeroshotConfig = field(default_factory=ZeroshotConfig)
    """Zero-shot classification."""
    knn: KNNConfig = field(default_factory=KNNConfig)
    """Nearest neighbors."""
    masked_words: dict[str, Any] = field(default_factory=dict)
    """Keys of the masked-word probe."""
    captioning: dict[str, Any] = field(default_factory=dict)
    """Keys of the captioning probe."""
    vqa: dict[str, Any] = field(default_factory=dict)
    """Keys of the VQA probe."""
    wordnet: str | None = None
    """Folder that contains NLTK's corpora/wordnet, for WUPS; null: NLTK's search path."""
    text_to_image: dict[str, Any] = field(default_factory=dict)
    """Keys of the text-to-image probe."""
    unconditional: dict[str, Any] = field(default_factory=dict)
    """Keys of the probe of unconditional synthesis and completion."""
    class_to_image: dict[str, Any] = field(default_factory=dict)
    """Keys of the probe of synthesis from labels."""
    semantic_to_image: dict[str, Any] = field(default_factory=dict)
    """Keys of the probe of synthesis from semantic maps."""
    grounding: dict[str, Any] = field(default_factory=dict)
    """Keys of the grounding probe."""
    clip_score: str | None = None
    """CLIP of transformers that scores generated images, a folder or a name; null: no score."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of metrics and probes of other packages, by the last part of their path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, options in self.options.items():
            is_mapping = isinstance(options, Mapping)
            require(is_mapping, f"options.{name}", "a mapping of its arguments", options)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any] | None) -> EvaluationConfig:
        """Build it from a mapping, and check the keys of the probes too.

        Raises:
            ConfigError: for an unknown key, a value of the wrong type or out of range.

        Example:
            >>> EvaluationConfig.from_dict({"lpips": {"net": "vgg"}}).lpips.net
            'vgg'
        """
        block: dict[str, Any] = {}
        for key, value in to_plain(given or {}).items():
            block = laid_over(block, {renamed(key): value})
        config = build(cls, block, "evaluation")
        for name in TRAINED:
            if getattr(config, name):  # imports torch, so not for an empty block
                config.probe(name)
        return config

    def probe(self, name: str) -> tuple[Any, Any]:
        """Return the class and the config of a probe in :data:`TRAINED`.

        Raises:
            ConfigError: if its block is wrong.
        """
        member = resolve("bench.probes", name)
        given = {"seed": self.seed, **getattr(self, name)}
        return member, build(member.Config, given, f"evaluation.{name}")


def main(argv: list[str]) -> int:
    """Run `lgvq eval` with the arguments of `--help`; return 0."""
    try:
        return _main(*_parse(argv))
    except KeyboardInterrupt:
        message = "interrupted; finished metrics are kept: run the same command to continue"
        raise KeyboardInterrupt(message) from None


def _main(given: argparse.Namespace, overrides: list[str]) -> int:
    words = None if given.metrics is None else given.metrics.replace(",", " ").split()
    names = names_of(NAMES if words == ["all"] else words)
    _check_outputs(given)
    for path in given.ckpt:
        find_checkpoint(path)
    given_config = read_config(given.base, overrides)
    from ..arguments import choose_device
    from ..checkpoints.load import load_checkpoint, load_host
    from ..checkpoints.pretrained import heads_of
    from . import evaluation

    checkpoints = [load_checkpoint(path) for path in given.ckpt]
    labels = _labels(given.names, checkpoints)
    first = checkpoints[0]
    whole = _config(given_config, first, is_whole=bool(given.base))
    config = with_shortcuts(whole, data=given.data, overrides=overrides)
    if config.get("data") is not None:  # the host determines the image size
        own = config if first.config is None else first.config
        model = to_plain(own, "model").get("model")
        config.data = with_sizes(data_mapping(to_plain(config, "data")["data"]), model)
    limit = {} if given.limit is None else {"limit": given.limit}
    options: Any = {"options": limit, "progress": not given.no_progress}
    device = choose_device(given.device)
    results: dict[str, dict[str, Any]] = {}
    contexts: dict[str, Context] = {}
    for label, checkpoint in zip(labels, checkpoints, strict=True):
        folder = _folder(given.output, label, checkpoint, many=len(labels) > 1)
        for place in (folder, folder / "metrics", folder / "probes"):
            remove_parts(place, inside=False)
        # A checkpoint's own config builds its host; -b then gives data and options only.
        own = config if checkpoint.config is None else checkpoint.config
        host = load_host(own, checkpoint, device=device, averaged=given.averaged)
        heads = heads_of(checkpoint, averaged=given.averaged)
        # The config's guide is used for all hosts, or they would not be comparable.
        context = evaluation.build_context(host, config, output=folder, heads=heads, **options)
        contexts[label] = context
        logger.info("evaluating %s (%s)", label, checkpoint.path)
        results[label] = evaluation.run(context, names, folder)
        results[label]["settings"]["checkpoint"] = str(checkpoint.path)
        write_json(folder / "results.json", results[label])
        evaluation.write_figures(folder, {label: context}, names)
        if given.export:
            evaluation.export(context, folder / "export", given.export)
    print(table(results))
    _write_results(given, results)
    if len(results) > 1 and given.output:
        evaluation.write_figures(Path(given.output), contexts, names)
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="lgvq eval",
        description="Measure tokenizers on held-out images, with the same protocol for a baseline "
        "and an LG-VQ model. Finished metrics are kept; the same command continues where it "
        "stopped.",
        epilog="key=value overrides the config, such as evaluation.captioning.steps=200",
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}  # --ckpt A B, or --ckpt A --ckpt B
    metrics = f"comma-separated, or all; known: {', '.join(NAMES)}, or pkg.module:function; "
    metrics += f"default: {','.join(DEFAULT)}"
    base = "config with the images (data:) and the options (evaluation:); missing sections are "
    output = "for results, figures and probes; default: next to the run, or ./lgvq_evaluation/ if "
    add("-b", "--base", **several, default=[], metavar="CONFIG",
        help=base + "taken from the first checkpoint")  # fmt: skip
    add_shortcuts(parser)
    add("--ckpt", **several, required=True, metavar="C", help="one, or several to compare")
    add("--names", **several, metavar="N", help="names of the checkpoints in the table")
    add("--metrics", help=metrics)
    add("--limit", type=int, metavar="N", help="first N test images (and 4 N training images)")
    add("-o", "--output", metavar="DIR", help=output + "the run is not writable")
    add("--json", metavar="F", help="also write the results to this file")
    add("--csv", metavar="F", help="also write them as CSV, settings included")
    add("--force", action="store_true", help="overwrite the files of --json and --csv")
    add("--export", choices=("npz", "png"), help="write images and reconstructions for other tools")
    add("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    add("--averaged", action="store_true", help="use EMA weights where available")
    add("--no-progress", action="store_true", help="no progress bars")
    given, overrides = parse_words(parser, argv, "base", "ckpt")
    if given.limit is not None and given.limit < 2:
        parser.error(f"--limit: expected a whole number >= 2, got {given.limit}")
    return given, overrides


def _check_outputs(given: argparse.Namespace) -> None:
    """Refuse output paths that are not writable or exist already, before hours of work."""
    if given.output:
        require_writable(Path(given.output))
        remove_parts(Path(given.output), inside=False)
    for option in ("json", "csv"):
        path = getattr(given, option)
        if path is None:
            continue
        require_writable(Path(path).parent)
        if Path(path).is_dir():
            raise ConfigError(f"--{option} {path!r} is a folder; give a file")
        if Path(path).exists() and not given.force:
            raise ConfigError(f"--{option} {path!r} exists already; --force overwrites it")
        remove_parts(Path(path))


def _config(given: Any, checkpoint: Checkpoint, *, is_whole: bool) -> Any:
    if "data" in given or (is_whole and checkpoint.config is None):
        return given
    if checkpoint.config is None:
        path = str(checkpoint.path)
        raise ConfigError(f"checkpoint {path!r} has no config; give one with -b CONFIG")
    return lay_over(OmegaConf.create(checkpoint.config), given)


def _labels(names: list[str] | None, checkpoints: list[Checkpoint]) -> list[str]:
    """Return the given names, else those of run folders or files, numbered if equal."""
    if names is not None:
        if len(names) != len(checkpoints) or len(set(names)) != len(names):
            count = len(checkpoints)
            raise ConfigError(f"--names: expected {count} different names, got {' '.join(names)}")
        return names
    found: list[str] = []
    for checkpoint in checkpoints:
        path = checkpoint.path
        label = path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
        found.append(label if label not in found else f"{label} ({len(found) + 1})")
    return found


def _folder(output: str | None, label: str, checkpoint: Checkpoint, *, many: bool) -> Path:
    """Return the folder of a checkpoint's results."""
    if output is not None:
        return Path(output) / label if many else Path(output)
    path = checkpoint.path
    folder = path.parent / f"{path.stem}_evaluation"
    if path.parent.name == "checkpoints":
        folder = path.parent.parent / "evaluation" / path.stem
    try:
        require_writable(folder)
    except OSError as error:  # such as another user's run
        here = Path("lgvq_evaluation") / label
        logger.warning("%s: %s; results go to %s", error.filename, error.strerror, here)
        return here
    return folder


def _write_results(given: argparse.Namespace, results: Mapping[str, Mapping[str, Any]]) -> None:
    several = len(results) > 1
    content = {"hosts": dict(results)} if several else next(iter(results.values()))
    folder = Path(given.output) if given.output and several else None
    for path in (given.json, folder and folder / "results.json"):
        if path:
            write_json(Path(path), content)
    for path in (given.csv, folder and folder / "results.csv"):
        if path:
            write_text(Path(path), as_csv(results))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one column per host; `*` marks the best of several.

    Args:
        results: by host, what `evaluate` returned.

    Example:
        >>> row = {"value": 20.5, "n": 8, "unit": "dB", "higher_is_better": True}
        >>> print(table({"a": {"metrics": {"reconstruction/psnr": row}, "skipped": {}}}))
        metric                 n         a
        reconstruction/psnr ↑  8  20.50 dB
    """
    lines = [["metric", "n", *results]]
    for name in dict.fromkeys(name for result in results.values() for name in result["metrics"]):
        rows = [result["metrics"].get(name) for result in results.values()]
        better = next(row for row in rows if row)["higher_is_better"]
        counts = {row["n"] for row in rows if row}
        best = _best(rows, better)
        count = str(counts.pop()) if len(counts) == 1 else "differs"
        lines.append([f"{name} {ARROWS[better]}", count, *(_cell(row, best) for row in rows)])
    skipped = [
        f"{host}: {name} skipped: {why}"
        for host, result in results.items()
        for name, why in result.get("skipped", {}).items()
    ]
    return "\n".join([text_table(lines), *skipped])


def _best(rows: list[Any], higher: bool | None) -> float:
    """Return the best of several different values, or nan."""
    values = [row["value"] for row in rows if row and math.isfinite(row["value"])]
    if higher is None or len({*values}) < 2:
        return math.nan
    return max(values) if higher else min(values)


def _cell(row: Any, best: float) -> str:
    if not row:
        return "-"
    value, unit = row["value"], row["unit"]
    digits = 2 if unit == "dB" or abs(value) >= 100 else 4
    is_count = float(value).is_integer() and abs(value) >= 2
    text = str(int(value)) if is_count else f"{value:.{digits}f}"
    return f"{text}{' ' + unit if unit else ''}{' *' if value == best else ''}"


def as_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line per host and metric; its settings are JSON in the last column."""
    keys = ("value", "n", "unit", "higher_is_better")
    rows = []
    for host, result in results.items():
        for name, row in result["metrics"].items():
            settings = json.dumps(row.get("settings", {}), sort_keys=True, default=str)
            rows.append([host, name, *(row[key] for key in keys), settings])
    return csv_text(["host", "metric", *keys, "settings"], rows)
