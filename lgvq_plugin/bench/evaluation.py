"""Finished metrics on disk, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
import logging
import platform
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import verify
from ..files import write_json
from ..sockets import ConfigError
from ..training.config import data_mapping, lgvq_block, to_plain, with_sizes
from . import measures
from .evaluate import EvaluationConfig, names_of
from .evaluation_context import Context, as_array
from .measures import Row, Rows


@dataclass(frozen=True)
class _File:
    mark: str
    rows: dict[str, Row]


class Store:
    """One JSON file a metric, with a mark of all that it depends on.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def read(self, name: str, mark: str) -> dict[str, Any] | None:
        """Return a finished metric's rows if they were made under the same mark.

        Raises:
            ConfigError: if the file holds something else.
        """
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        again = "delete the file to measure again"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            verify(found, _File, "the file")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {again}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON: {error}; {again}") from error
        return found["rows"] if found["mark"] == mark else None

    def write(self, name: str, mark: str, rows: Mapping[str, Any]) -> None:
        """Keep a finished metric's rows."""
        path = self._path(name)
        if path is not None:
            write_json(path, {"mark": mark, "rows": rows})

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"


def mark_of(*parts: Any) -> str:
    """Return a hash of plain values.

    Example:
        >>> mark_of({"a": 1, "b": 2}) == mark_of({"b": 2, "a": 1})
        True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def host_hash(host: nn.Module) -> str:
    """Return a hash of a host's own weights: those of its loss do not count."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(host.state_dict().items()):
        if not name.startswith("loss."):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


# -- Evaluate one host: every metric on held-out images, the tokenizer frozen --------------------


logger = logging.getLogger(__name__)

METRICS: dict[str, Callable[[Context], Rows]] = {
    "psnr": measures.psnr,
    "ssim": measures.ssim,
    "lpips": measures.lpips,
    "fid": measures.fid,
    "fd": measures.fd,
    "usage": measures.usage,
    "words": measures.words,
    "relation": measures.relation,
    "retrieval": measures.retrieval,
    "masked_words": measures.masked_words,
    "attributes": measures.attributes,
    "caption": measures.caption,
    "vqa": measures.vqa,
    "t2i": measures.t2i,
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


# -- Pictures of an evaluation: reconstructions, how often codes are used, generated images ------


def write_reconstructions(path: Path, contexts: Mapping[str, Context], *, count: int = 8) -> None:
    """Write a grid: the test images, below them each host's reconstructions."""
    rows: list[Tensor] = []
    for context in contexts.values():
        images, given = next(iter(context.pairs()))
        if not rows:
            rows.append(images[:count])
        rows.append(given[:count])
    _figure(path, rows, ["input", *contexts])


def write_usage(path: Path, contexts: Mapping[str, Context]) -> None:
    """Write how often each code is used, the most frequent first, on a logarithmic scale."""
    figure, axes = _canvas(6, 3.4)
    for name, context in contexts.items():
        codes = context.test.codes
        if codes.indices is None or codes.table is None:
            continue
        counts = torch.bincount(codes.indices.flatten(), minlength=len(codes.table))
        share = (counts.sort(descending=True).values.double() / counts.sum()).numpy()
        is_used = share > 0
        dead = int((~is_used).sum())
        label = f"{name} ({dead} of {len(share)} dead)"
        axes.plot(np.arange(1, len(share) + 1)[is_used], share[is_used], label=label, lw=1.5)
    axes.set(xlabel="code, by rank", ylabel="share of all places", yscale="log")
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)  # "$" in a name is a dollar, not mathematics
    _save(figure, path)


def write_generated(path: Path, contexts: Mapping[str, Context], *, count: int = 6) -> None:
    """Write images drawn from captions, one row for each host, the captions below."""
    made = {name: c.generated for name, c in contexts.items() if c.generated is not None}
    if not made:
        return
    captions = next(iter(made.values()))[0][:count]
    rows = [images[:count] for _, images in made.values()]
    _figure(path, rows, list(made), captions)


def export(context: Context, folder: Path, kind: str) -> None:
    """Write test images and reconstructions for other evaluators.

    Args:
        context: of the host.
        folder: gets `reals.npz` and `reconstructions.npz` (`arr_0`, (M, H, W, 3) uint8, as ADM's
            evaluator reads them), or folders of PNG files of these names.
        kind: npz or png.
    """
    pairs = [(_to_bytes(a), _to_bytes(b)) for a, b in context.pairs()]
    for name, which in (("reals", 0), ("reconstructions", 1)):
        arrays = [as_array(pair[which]) for pair in pairs]
        if kind == "npz":
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{name}.npz", np.concatenate(arrays))
            continue
        from PIL import Image

        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(picture for part in arrays for picture in part):
            Image.fromarray(picture).save(folder / name / f"{i:06d}.png")


def _to_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _figure(
    path: Path, rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[str] = ()
) -> None:
    """Draw rows of images with a label each, and a caption under each column."""
    across = max(len(row) for row in rows)
    figure, axes = _canvas(
        1.5 * across + 0.6, 1.5 * len(rows) + (0.7 if captions else 0.1), len(rows), across
    )
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            if j < len(row):
                axis.imshow(as_array(_to_bytes(row[j : j + 1]))[0], interpolation="nearest")
        axes[i][0].set_ylabel(labels[i], fontsize=9, parse_math=False)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel("\n".join(textwrap.wrap(caption, 26)), fontsize=6, parse_math=False)
    _save(figure, path)


def _canvas(width: float, height: float, down: int = 0, across: int = 0) -> Any:
    """Return a figure without a window, and its axes (a grid of them if `down` is given)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if not down:
        return figure, figure.subplots()
    return figure, figure.subplots(down, across, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
