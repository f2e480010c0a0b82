"""`lgvq eval`: one or several checkpoints, side by side.

torch is imported once the arguments, the configs and the checkpoints' paths are checked.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from .._arguments import add_shortcuts, parse_words
from .._files import require_writable, write_json, write_text
from ..checkpoints import find_checkpoint
from ..sockets import ConfigError
from ..training.base import (
    data_mapping,
    lay_over,
    read_config,
    to_plain,
    with_shortcuts,
    with_sizes,
)
from ._config import DEFAULT, NAMES, names_of
from ._table import as_csv, table

if TYPE_CHECKING:
    from ..checkpoints.base import Checkpoint
    from ._context import Context

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
    from .._device import choose_device
    from ..checkpoints.base import load_checkpoint, load_host
    from . import _figures
    from .base import build_context, run

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
            _figures.export(contexts[label], folder / "export", given.export)
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
    from . import _figures
    from ._codebook import answering_words

    _figures.write_reconstructions(folder / "reconstructions.png", contexts)
    if "usage" in names:
        _figures.write_usage(folder / "usage.png", contexts)
    if "t2i" in names:
        _figures.write_generated(folder / "generated.png", contexts)
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
