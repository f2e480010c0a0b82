"""The `evaluation:` block of a config, checked."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ..arguments import add_shortcuts, parse_words
from ..checkpoints import find_checkpoint
from ..config import build, require
from ..files import require_writable, write_json, write_text
from ..sockets import ConfigError, resolve, suggest
from ..training.build import with_shortcuts
from ..training.config import data_mapping, lay_over, read_config, to_plain, with_sizes

NAMES = (  # of the metrics, in the order of the table; base.METRICS says what computes them
    *("psnr", "ssim", "lpips", "fid", "fd", "usage", "words", "relation"),
    *("retrieval", "masked_words", "attributes", "caption", "vqa", "t2i"),
)
DEFAULT = ("psnr", "ssim", "usage", "retrieval")
PROBES = {  # key of `evaluation:` and name of the metric -> member of probes that is trained
    "masked_words": "masked_words",
    "caption": "captioning",
    "vqa": "questions",
    "t2i": "text_to_image",
}


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """LPIPS."""

    net: str = "alex"
    """alex (reported by papers), vgg (trained on) or squeeze."""
    backbone: str | None = None
    """File with torchvision's weights of that net; null: torchvision's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FIDConfig:
    """FID, in Inception only."""

    weights: str | None = None
    """weights-inception-2015-12-05-6726825d.pth; null: torch-fidelity's cache or download."""


@dataclass(frozen=True, kw_only=True)
class FDConfig:
    """Frechet distance in another feature net, called `fd_<net>`."""

    net: str = "squeeze"
    """alex, vgg, squeeze, or "pkg.module:factory" of a net from uint8 images to features."""
    weights: str | None = None
    """File of its weights; null: the net's own cache or download."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `evaluation:` may hold; everything has a default."""

    guide: dict[str, Any] | None = None
    """Text guide of the tasks with text; null: that of `lgvq:` in the config, else micro_clip."""
    limit: int | None = None
    """Test images, the first ones; null: all."""
    train_limit: int | None = None
    """Training images of the probes, the first ones; null: all, or four times `limit`."""
    batch_size: int = 32
    """Images the host sees at a time."""
    num_workers: int = 0
    """Processes that load samples."""
    seed: int = 0
    """Of every draw; equal seeds mask equal words and shuffle equally, whatever the host."""
    few_shot: int = 64
    """Training images of the few-shot attribute probe, >= 10."""
    few_shot_draws: int = 1
    """Sets of so many images, >= 1, the first then draws; results are means over them."""
    attribute_words: int = 0
    """Attributes of a data set without labels: so many of its captions' usual words; 0: none."""
    tokenizer: str = "words"
    """Of captions: words (ours), or ptb as papers use (Java)."""
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    """LPIPS."""
    fid: FIDConfig = field(default_factory=FIDConfig)
    """FID."""
    fd: FDConfig = field(default_factory=FDConfig)
    """Frechet distance in another net."""
    masked_words: dict[str, Any] = field(default_factory=dict)
    """Keys of the masked-word probe."""
    caption: dict[str, Any] = field(default_factory=dict)
    """Keys of the captioning probe."""
    vqa: dict[str, Any] = field(default_factory=dict)
    """Keys of the question probe."""
    wordnet: str | None = None
    """Folder that holds NLTK's corpora/wordnet, for WUPS; null: where NLTK looks."""
    t2i: dict[str, Any] = field(default_factory=dict)
    """Keys of the text-to-image probe."""
    clip_score: str | None = None
    """CLIP of transformers that scores generated images, a folder or a name; null: no score."""

    def __post_init__(self) -> None:
        for name in ("limit", "train_limit"):
            value = getattr(self, name)
            require(value is None or value >= 2, name, "a whole number >= 2, or null", value)
        require(self.batch_size >= 1, "batch_size", "a whole number >= 1", self.batch_size)
        require(self.num_workers >= 0, "num_workers", "a whole number >= 0", self.num_workers)
        require(self.few_shot >= 10, "few_shot", "a whole number >= 10", self.few_shot)
        draws = self.few_shot_draws
        require(draws >= 1, "few_shot_draws", "a whole number >= 1", draws)
        words = self.attribute_words
        require(words >= 0, "attribute_words", "a whole number >= 0", words)
        known = ("words", "ptb")
        require(self.tokenizer in known, "tokenizer", "words or ptb", self.tokenizer)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> EvaluationConfig:
        """Return the block `given` as an object; the keys of the probes are checked, too.

        Raises:
            ConfigError: for an unknown key, a value of another type or out of its range.

        Example:
            >>> EvaluationConfig.of({"lpips": {"net": "vgg"}}).lpips.net
            'vgg'
        """
        config = build(cls, to_plain(given or {}), "evaluation")
        for key in PROBES:
            if getattr(config, key):  # a probe's class needs torch; an empty block, no check
                config.probe(key)
        return config

    def probe(self, key: str) -> tuple[Any, Any]:
        """Return the class of the probe behind a key of :data:`PROBES`, and its config.

        Raises:
            ConfigError: if the block does not suit it.
        """
        member = resolve("bench.probes", PROBES[key])
        given = {"seed": self.seed, **getattr(self, key)}
        return member, build(member.Config, given, f"evaluation.{key}")


def names_of(metrics: Iterable[str] | None) -> list[str]:
    """Check names of metrics; raises ConfigError for one that does not exist.

    Example:
        >>> names_of(["ssim", "psnr", "ssim"])
        ['psnr', 'ssim']
    """
    given = list(DEFAULT if metrics is None else metrics)
    for name in given:
        if name not in NAMES:
            raise ConfigError(f"metrics: no {name!r}{suggest(name, NAMES)}")
    if not given:
        raise ConfigError(f"metrics: none given; known: {', '.join(NAMES)}")
    return [name for name in NAMES if name in given]


# -- Results of one or several hosts as a table in the terminal, and as CSV ----------------------


ARROWS = {True: "↑", False: "↓", None: " "}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one column for each host; `*` marks the best of several.

    Args:
        results: name of a host -> what `evaluate` returned.

    Example:
        >>> row = {"value": 20.5, "n": 8, "unit": "dB", "higher_is_better": True}
        >>> print(table({"a": {"metrics": {"reconstruction/psnr": row}, "skipped": {}}}))
        metric                n          a
        reconstruction/psnr ↑ 8   20.50 dB
    """
    hosts = list(results)
    names = _names(results)
    lines = [["metric", "n", *hosts]]
    for name in names:
        rows = [results[host]["metrics"].get(name) for host in hosts]
        first = next(row for row in rows if row)
        counts = {row["n"] for row in rows if row}
        count = str(counts.pop()) if len(counts) == 1 else "differs"
        best = _best(rows, first["higher_is_better"])
        cells = [_cell(row, is_best) for row, is_best in zip(rows, best, strict=True)]
        lines.append([f"{name} {ARROWS[first['higher_is_better']]}", count, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    told = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].rjust(widths[1])]
        cells += [
            f"  {cell.rjust(width)}" for cell, width in zip(line[2:], widths[2:], strict=True)
        ]
        told.append(" ".join(cells).rstrip())
    for host in hosts:
        for name, why in results[host].get("skipped", {}).items():
            told.append(f"{host}: {name} skipped: {why}")
    return "\n".join(told)


def as_csv(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each host and metric, its settings as JSON in the last column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["host", "metric", "value", "n", "unit", "higher_is_better", "settings"])
    for host, result in results.items():
        for name, row in result["metrics"].items():
            settings = json.dumps(row.get("settings", {}), sort_keys=True, default=str)
            values = (row["value"], row["n"], row["unit"], row["higher_is_better"])
            writer.writerow([host, name, *values, settings])
    return text.getvalue()


def _names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for result in results.values():
        found |= dict.fromkeys(result["metrics"])
    return list(found)


def _best(rows: list[Any], higher: bool | None) -> list[bool]:
    values = [row["value"] for row in rows if row and math.isfinite(row["value"])]
    if higher is None or len(values) < 2 or min(values) == max(values):
        return [False] * len(rows)
    best = max(values) if higher else min(values)
    return [bool(row) and row["value"] == best for row in rows]


def _cell(row: Any, is_best: bool) -> str:
    if not row:
        return "-"
    value, unit = row["value"], row["unit"]
    digits = 2 if unit == "dB" or abs(value) >= 100 else 4
    text = (
        str(int(value)) if float(value).is_integer() and abs(value) >= 2 else f"{value:.{digits}f}"
    )
    return f"{text}{' ' + unit if unit else ''}{' *' if is_best else ''}"


# -- `lgvq eval`: one or several checkpoints, side by side ---------------------------------------


if TYPE_CHECKING:
    from ..checkpoints.load import Checkpoint
    from .evaluation_context import Context

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run `lgvq eval`.

    Args:
        argv: see `--help`.

    Returns:
        0; what went wrong is raised.
    """
    try:
        return _main(*_parse(argv))
    except KeyboardInterrupt:
        told = "interrupted; finished metrics are kept: the same command goes on from there"
        raise KeyboardInterrupt(told) from None


def _main(given: argparse.Namespace, overrides: list[str]) -> int:
    names = names_of(_split(given.metrics))
    _check_outputs(given)
    for path in given.ckpt:
        find_checkpoint(path)
    given_config = read_config(given.base, overrides)
    from ..checkpoints.load import load_checkpoint, load_host
    from ..device import choose_device
    from . import evaluation
    from .evaluation import build_context, run

    checkpoints = [load_checkpoint(path) for path in given.ckpt]
    labels = _labels(given.names, checkpoints)
    config = with_shortcuts(
        _config(given_config, checkpoints[0], is_whole=bool(given.base)),
        data=given.data,
        overrides=overrides,
    )
    if config.get("data") is not None:  # the size of the images is the host's
        model = to_plain(_host_config(config, checkpoints[0]), "model").get("model")
        config.data = with_sizes(data_mapping(to_plain(config, "data")["data"]), model)
    results: dict[str, dict[str, Any]] = {}
    contexts: dict[str, Context] = {}
    for label, checkpoint in zip(labels, checkpoints, strict=True):
        folder = _folder(given.output, label, checkpoint, many=len(labels) > 1)
        host = load_host(
            _host_config(config, checkpoint),
            checkpoint,
            device=choose_device(given.device),
            averaged=given.averaged,
        )
        # The guide is the one of the config for all hosts, or a comparison would not be fair.
        contexts[label] = build_context(
            host,
            config,
            limit=given.limit,
            output=folder,
            options=None,
            progress=not given.no_progress,
        )
        logger.info("evaluating %s (%s)", label, checkpoint.path)
        results[label] = run(contexts[label], names, folder)
        results[label]["settings"]["checkpoint"] = str(checkpoint.path)
        write_json(folder / "results.json", results[label])
        _pictures(folder, {label: contexts[label]}, names)
        if given.export:
            evaluation.export(contexts[label], folder / "export", given.export)
    _summarize(given, results, contexts, names)
    return 0


def _check_outputs(given: argparse.Namespace) -> None:
    """Refuse, before hours of work, places that cannot be written or hold something already."""
    if given.output:
        require_writable(Path(given.output))
    for option in ("json", "csv"):
        path = getattr(given, option)
        if path is None:
            continue
        require_writable(Path(path).parent)
        if Path(path).is_dir():
            raise ConfigError(f"--{option} {path!r} is a folder; give a file")
        if Path(path).exists() and not given.force:
            raise ConfigError(f"--{option} {path!r} exists already; --force writes over it")


def _summarize(
    given: argparse.Namespace,
    results: Mapping[str, Mapping[str, Any]],
    contexts: Mapping[str, Context],
    names: Sequence[str],
) -> None:
    print(table(results))
    first = next(iter(results.values()))
    content = first if len(results) == 1 else {"hosts": dict(results)}
    if given.json:
        write_json(Path(given.json), content)
    if given.csv:
        write_text(Path(given.csv), as_csv(results))
    if len(results) > 1 and given.output:
        folder = Path(given.output)
        write_json(folder / "results.json", content)
        write_text(folder / "results.csv", as_csv(results))
        _pictures(folder, contexts, names)


def _pictures(folder: Path, contexts: Mapping[str, Context], names: Sequence[str]) -> None:
    """Write the figures that go with the metrics, and the words of the codes."""
    from . import evaluation
    from .measures import answering_words

    evaluation.write_reconstructions(folder / "reconstructions.png", contexts)
    if "usage" in names:
        evaluation.write_usage(folder / "usage.png", contexts)
    if "t2i" in names:
        evaluation.write_generated(folder / "generated.png", contexts)
    if "words" in names and len(contexts) == 1:
        try:
            words = answering_words(next(iter(contexts.values())))
        except ConfigError:
            return  # told where the metric was skipped
        write_json(folder / "words.json", words)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="lgvq eval",
        description="Measure tokenizers on held-out images: the same protocol for a baseline and "
        "an LG-VQ model. Finished metrics are kept; the same command goes on where it stopped.",
        epilog="key=value overrides the config, such as evaluation.caption.steps=200",
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}  # --ckpt A B, or --ckpt A --ckpt B
    add(
        "-b",
        "--base",
        **several,
        default=[],
        metavar="CONFIG",
        help="names the images (data:) and the options (evaluation:); what it leaves out is the "
        "first checkpoint's",
    )
    add_shortcuts(parser)
    add("--ckpt", **several, required=True, metavar="C", help="one, or several for a comparison")
    add("--names", **several, metavar="N", help="what the checkpoints are called in the table")
    add(
        "--metrics",
        help=f"by comma, or all; known: {', '.join(NAMES)}; default: {','.join(DEFAULT)}",
    )
    add("--limit", type=int, metavar="N", help="first N test images (and 4 N training images)")
    add(
        "-o",
        "--output",
        metavar="DIR",
        help="for results, figures, probes; default: beside the run, or in lgvq_evaluation/ here "
        "if the run cannot be written to",
    )
    add("--json", metavar="F", help="write the results there, too")
    add("--csv", metavar="F", help="write them as CSV, settings included")
    add("--force", action="store_true", help="write over what is at --json and --csv")
    add("--export", choices=("npz", "png"), help="images and reconstructions, for other tools")
    add("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    add("--averaged", action="store_true", help="take averaged (EMA) weights where there are any")
    add("--no-progress", action="store_true", help="no progress bars")
    given, overrides = parse_words(parser, argv, "base", "ckpt")
    if given.limit is not None and given.limit < 2:
        parser.error(f"--limit: expected a whole number >= 2, got {given.limit}")
    return given, overrides


def _split(metrics: str | None) -> list[str] | None:
    if metrics is None:
        return None
    if metrics.strip() == "all":
        return list(NAMES)
    return [name.strip() for name in metrics.split(",") if name.strip()]


def _config(given: Any, checkpoint: Checkpoint, *, is_whole: bool) -> Any:
    if "data" in given or (is_whole and checkpoint.config is None):
        return given
    if checkpoint.config is None:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r} tells no config; give one with -b CONFIG"
        )
    return lay_over(OmegaConf.create(checkpoint.config), given)


def _host_config(config: Any, checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's own config where it has one: -b then names data and options only."""
    return config if checkpoint.config is None else checkpoint.config


def _labels(names: list[str] | None, checkpoints: list[Checkpoint]) -> list[str]:
    """Name the columns: as told, else by run folder or file, numbered where two are equal."""
    if names is not None:
        if len(names) != len(checkpoints) or len(set(names)) != len(names):
            raise ConfigError(
                f"--names: expected {len(checkpoints)} different names, got {' '.join(names)}"
            )
        return names
    found: list[str] = []
    for checkpoint in checkpoints:
        path = checkpoint.path
        label = path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
        found.append(label if label not in found else f"{label} ({len(found) + 1})")
    return found


def _folder(output: str | None, label: str, checkpoint: Checkpoint, *, many: bool) -> Path:
    """Return where a checkpoint's results go."""
    if output is not None:
        return Path(output) / label if many else Path(output)
    path = checkpoint.path
    folder = path.parent / f"{path.stem}_evaluation"
    if path.parent.name == "checkpoints":
        folder = path.parent.parent / "evaluation" / path.stem
    try:
        require_writable(folder)
    except OSError as error:  # a colleague's run, say
        here = Path("lgvq_evaluation") / label
        logger.warning("%s: %s; results go to %s", error.filename, error.strerror, here)
        return here
    return folder
