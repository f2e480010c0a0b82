"""`lgvq export`: a checkpoint for the unmodified host, as a folder, for diffusers, or its heads.

torch is imported once the arguments are checked.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import require
from ..files import remove_parts, replacing, require_writable
from ..sockets import ConfigError
from ..training.config import read_config
from . import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from .load import Checkpoint

logger = logging.getLogger(__name__)

FORMATS = ("host", "safetensors", "diffusers", "heads")


def main(argv: Sequence[str]) -> int:
    """Run `lgvq export --ckpt C --format FORMAT -o F [-b CONFIG...]`; returns 0."""
    given = _parser().parse_args(argv)
    output = Path(given.output)
    _check_output(output, given.format, given.force)
    if given.push and given.format == "host":
        raise ConfigError("--push uploads folders: --format safetensors, diffusers or heads")
    find_checkpoint(given.ckpt)
    given_config = read_config(given.base) if given.base else None
    from . import pretrained
    from .load import load_checkpoint, plain_or_model

    checkpoint = load_checkpoint(given.ckpt, given.trust_pickle)
    config = checkpoint.config if given_config is None else plain_or_model(given_config)
    if given.format == "heads":
        pretrained.save_heads(checkpoint, output)
    elif given.format == "host":
        tensors = host_state_dict(checkpoint, config, averaged=given.averaged)
        export_host(tensors, output, step=checkpoint.step)
    else:
        _export_folder(checkpoint, config or checkpoint.require_config(), output, given)
    if given.push:
        logger.info("uploaded: %s", pretrained.push_to_hub(output, given.push))
    logger.info("%s written to %s", given.format, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lgvq export",
        description="Export a checkpoint: host (the unmodified host's own keys), safetensors (a "
        "folder with config and model card), diffusers (VQModel), heads (LG-VQ's heads).",
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint, run folder or saved folder")
    add("--format", required=True, choices=FORMATS, help="format of the output")
    add("-o", "--output", required=True, help="file (host) or folder (the others)")
    add("-b", "--base", nargs="+", action="extend", default=[], metavar="CONFIG",
        help="default: the config in the checkpoint or its run folder")  # fmt: skip
    add("--force", "--overwrite", action="store_true", help="overwrite existing files")
    add("--averaged", action="store_true", help="export the averaged (EMA) weights")
    add("--push", metavar="ORG/REPO", help="upload the folder to the hub")
    add("--trust-pickle", action="store_true",
        help="unpickle fully; the file can then run any code")  # fmt: skip
    return parser


def _check_output(output: Path, form: str, force: bool) -> None:
    """Refuse a path that cannot be written, or that exists already."""
    is_file = form == "host"
    require_writable(output.parent if is_file else output)
    remove_parts(output, inside=False)
    if is_file and output.is_dir():
        raise ConfigError(f"-o {str(output)!r} is a folder; --format host writes a file")
    if not force and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise ConfigError(f"-o {str(output)!r} exists already; --force overwrites it")


def _export_folder(
    checkpoint: Checkpoint, config: Mapping[str, Any], output: Path, given: argparse.Namespace
) -> None:
    from . import pretrained
    from .load import load_host

    if given.format == "diffusers":
        found = export_diffusers(checkpoint, config, output, averaged=given.averaged)
        listed = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        logger.info("compared with the host, largest differences: %s", listed)
    else:
        host = load_host(config, checkpoint, averaged=given.averaged)
        numbers = _numbers(checkpoint.path)
        pretrained.save_pretrained(host.state_dict(), config, output, numbers=numbers)


def host_state_dict(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None = None, *, averaged: bool = False
) -> dict[str, Tensor]:
    """Return the tensors, or the averaged ones, under exactly the keys of the unmodified host.

    The config is needed for hosts whose own files have other key names. Raises ConfigError if the
    checkpoint does not fit the config's host, or has no averaged weights.
    """
    from ..host import is_average_of_heads
    from .layout import EMA, split
    from .load import HEADS, load_host

    if averaged and checkpoint.averaged is None:
        raise ConfigError(f"--averaged: {str(checkpoint.path)!r} has no averaged weights")
    tensors = checkpoint.state_dict | ((averaged and checkpoint.averaged) or {})
    config = config or checkpoint.config
    if config is not None:
        host: Any = load_host(config, checkpoint, averaged=averaged)  # raises if it does not fit
        if hasattr(host, "foreign_state_dict"):
            return host.foreign_state_dict()
    else:
        logger.warning("%s has no config: its keys are not compared", checkpoint.path)
    averages = {key: v for key, v in checkpoint.aside.items() if key.startswith(EMA)}
    # Runs of earlier versions had the heads in the host's average of itself.
    averages = {key: v for key, v in averages.items() if not is_average_of_heads(key)}
    return split(tensors, HEADS)[1] | averages


def export_host(
    tensors: Mapping[str, Tensor], path: str | Path, *, step: int | None = None
) -> Path:
    """Write a checkpoint for the unmodified host: `{"state_dict": ...}`, or .safetensors."""
    import torch

    from .pretrained import write_safetensors

    path = Path(path)
    if path.suffix == ".safetensors":
        write_safetensors(tensors, path)
        return path
    own = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    content = {"state_dict": own} | ({} if step is None else {"global_step": step})
    with replacing(path) as part:
        torch.save(content, part)
    return path


def export_diffusers(
    checkpoint: Checkpoint, config: Mapping[str, Any], folder: str | Path, *, averaged: bool = False
) -> dict[str, float]:
    """Write a folder for `diffusers.VQModel.from_pretrained`, and return `diffusers.round_trip`.

    Raises ConfigError if diffusers is missing, or the host is not taming's VQModel; RuntimeError if
    the two models differ by 1e-4 or more; nothing is written then.
    """
    import torch

    from . import diffusers
    from .load import load_host

    tensors = host_state_dict(checkpoint, config, averaged=averaged)
    params = config["model"].get("params") or {}
    resolution = int((params.get("ddconfig") or {}).get("resolution", 256))
    model = diffusers.build_diffusers(tensors, resolution)
    host = load_host(config, checkpoint, averaged=averaged)
    side = min(resolution, 128)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.config.in_channels, side, side, generator=generator) * 2 - 1
    found = diffusers.round_trip(host, model, images)
    if max(found["latents"], found["images"]) >= diffusers.TOLERANCE:
        raise RuntimeError(f"diffusers' VQModel gives other results: {found}; nothing written")
    model.save_pretrained(str(folder))
    return found


def _numbers(file: Path) -> dict[str, Any] | None:
    """Return what `lgvq eval` or `lgvq retrofit` wrote beside the checkpoint, if anything."""
    places = [file.parent, file.parent.parent]
    results = [at / name for at in places for name in ("results.json", "retrofit.json")]
    found = next((path for path in results if path.is_file()), None)
    if found is None:
        return None
    from ..datasets.captions import read_json  # imports torch

    content, numbers = read_json(found), {}
    require(isinstance(content, Mapping), str(found), "a mapping with `metrics`", content)
    metrics = content.get("metrics", {})
    require(isinstance(metrics, Mapping), f"{found}: metrics", "a mapping of numbers", metrics)
    for key, row in metrics.items():
        value = row.get("value", row.get("new")) if isinstance(row, Mapping) else None
        if isinstance(value, int | float):
            numbers[key] = {**row, "value": value}
    return numbers
