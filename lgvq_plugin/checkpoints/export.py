"""`lgvq export`: a checkpoint for the unmodified host, as a folder, for diffusers, or its heads.

torch is imported once the arguments are checked. taming's VQModel is that of diffusers:

encoder.down.I.block.J  -> encoder.down_blocks.I.resnets.J       1x1 convolutions of attentions
decoder.up.I.block.J    -> decoder.up_blocks.(last - I).resnets.J     -> linear layers
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import require
from ..datasets.splits import first_file
from ..files import remove_parts, replacing, require_writable
from ..sockets import ConfigError
from ..training.config import read_config
from . import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .load import Checkpoint

logger = logging.getLogger(__name__)

FORMATS = ("host", "safetensors", "diffusers", "heads")
TOLERANCE = 1e-4  # of latents and images, both near [-1, 1]
TOKENIZER = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
PATTERNS = (  # applied in this order to the names of encoder and decoder
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.attn\.(\d+)\.", r".\1_blocks.\2.attentions.\3."),
    (r"(resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def main(argv: Sequence[str]) -> int:
    """Run `lgvq export --ckpt C --format FORMAT -o F [-b CONFIG...]`; returns 0."""
    given = _parser().parse_args(argv)
    output, is_file = Path(given.output), given.format == "host"
    require_writable(output.parent if is_file else output)
    remove_parts(output, inside=False)
    if is_file and output.is_dir():
        raise ConfigError(f"-o {str(output)!r} is a folder; --format host writes a file")
    if not given.force and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise ConfigError(f"-o {str(output)!r} exists already; --force overwrites it")
    if given.push and is_file:
        raise ConfigError("--push uploads folders: --format safetensors, diffusers or heads")
    find_checkpoint(given.ckpt)
    given_config = read_config(given.base) if given.base else None
    from . import pretrained
    from .load import load_checkpoint, load_host, plain_or_model

    checkpoint = load_checkpoint(given.ckpt, given.trust_pickle)
    config = checkpoint.config if given_config is None else plain_or_model(given_config)
    if given.format == "heads":
        pretrained.save_heads(checkpoint, output)
    elif given.format == "host":
        tensors = host_state_dict(checkpoint, config, averaged=given.averaged)
        export_host(tensors, output, step=checkpoint.step)
    elif given.format == "diffusers":
        config = config or checkpoint.require_config()
        found = export_diffusers(checkpoint, config, output, averaged=given.averaged)
        listed = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        logger.info("compared with the host, largest differences: %s", listed)
    else:
        config = config or checkpoint.require_config()
        state = load_host(config, checkpoint, averaged=given.averaged).state_dict()
        pretrained.save_pretrained(state, config, output, numbers=_numbers(checkpoint.path))
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


def host_state_dict(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None = None, *, averaged: bool = False
) -> dict[str, Tensor]:
    """Return the tensors, or the averaged ones, under exactly the keys of the unmodified host.

    The config is needed for hosts whose own files have other key names. Raises ConfigError if the
    checkpoint does not fit the config's host, or has no averaged weights.
    """
    from ..host import is_average_of_heads
    from .load import HEADS, load_host
    from .read import EMA, split

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
    content: dict[str, Any] = {} if step is None else {"global_step": step}
    content["state_dict"] = {key: v.detach().cpu().clone() for key, v in tensors.items()}
    with replacing(path) as part:
        torch.save(content, part)
    return path


def export_diffusers(
    checkpoint: Checkpoint, config: Mapping[str, Any], folder: str | Path, *, averaged: bool = False
) -> dict[str, float]:
    """Write a folder for `diffusers.VQModel.from_pretrained`, and return what `round_trip` does.

    Raises ConfigError if diffusers is missing, or the host is not taming's VQModel; RuntimeError if
    the two models differ by 1e-4 or more; nothing is written then.
    """
    import torch

    from .load import load_host

    tensors = host_state_dict(checkpoint, config, averaged=averaged)
    params = config["model"].get("params") or {}
    resolution = int((params.get("ddconfig") or {}).get("resolution", 256))
    model = build_diffusers(tensors, resolution)
    host = load_host(config, checkpoint, averaged=averaged)
    side = min(resolution, 128)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, model.config.in_channels, side, side, generator=generator) * 2 - 1
    found = round_trip(host, model, images)
    if max(found["latents"], found["images"]) >= TOLERANCE:
        raise RuntimeError(f"diffusers' VQModel gives other results: {found}; nothing written")
    model.save_pretrained(str(folder))
    return found


def build_diffusers(state_dict: Mapping[str, Tensor], resolution: int) -> Any:
    """Return a diffusers VQModel with a taming-style tokenizer's weights, in evaluation mode.

    Raises ConfigError if diffusers is not installed, or the model is not taming's VQModel.
    """
    arguments = diffusers_config(state_dict, resolution)
    renamed = to_diffusers(state_dict)
    try:
        from diffusers import VQModel
    except ImportError as error:
        needed = "diffusers: pip install 'lgvq_plugin[diffusers]'"
        raise ConfigError(f"--format diffusers needs {needed}") from error
    model: Any = VQModel(**arguments)
    model.eval()
    shapes = [{k: v.shape for k, v in each.items()} for each in (model.state_dict(), renamed)]
    strange = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    if strange:
        differ = f"VQModel has other tensors than this host: {strange[:5]}"
        raise ConfigError(f"--format diffusers: {differ}")
    model.load_state_dict(renamed)
    return model


def diffusers_config(state_dict: Mapping[str, Tensor], resolution: int) -> dict[str, Any]:
    """Return the arguments of diffusers' VQModel for a taming-style tokenizer's tensors.

    diffusers only records the `resolution` of its images. Raises ConfigError if the tensors are not
    those of taming's VQModel.
    """
    from .load import sizes_of

    sizes = sizes_of(state_dict)
    needed = ("ch", "ch_mult", "num_res_blocks", "out_ch", "n_embed", "embed_dim", "z_channels")
    missing = [name for name in needed if name not in sizes]
    if missing or "quantize.embedding.weight" not in state_dict:
        raise ConfigError(
            "--format diffusers: diffusers' VQModel is taming's; these tensors are of another "
            f"model (no {', '.join(missing) or 'quantize.embedding.weight'})"
        )
    levels = range(len(sizes["ch_mult"]))
    has_attention = [f"encoder.down.{i}.attn.0.q.weight" in state_dict for i in levels]
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)]
    return {
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["out_ch"],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [int(sizes["ch"] * width) for width in sizes["ch_mult"]],
        "layers_per_block": sizes["num_res_blocks"],
        "latent_channels": sizes["z_channels"],
        "sample_size": resolution,
        "num_vq_embeddings": sizes["n_embed"],
        "norm_num_groups": 32,  # taming's
        "vq_embed_dim": sizes["embed_dim"],
        "scaling_factor": 1.0,
        "mid_block_add_attention": True,
    }


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a taming-style tokenizer's tensors; those of its loss are left out.

    >>> import torch
    >>> list(to_diffusers({"encoder.down.1.block.0.nin_shortcut.bias": torch.zeros(2)}))
    ['encoder.down_blocks.1.resnets.0.conv_shortcut.bias']
    """
    levels = [int(m[1]) for key in state_dict if (m := re.match(r"decoder\.up\.(\d+)\.", key))]
    last = max(levels, default=0)
    renamed = {}
    for key, value in state_dict.items():
        if not key.startswith(TOKENIZER):
            continue
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", key)
        if key.startswith(("encoder.", "decoder.")):
            for pattern, new in PATTERNS:
                name = re.sub(pattern, new, name)
        is_linear = ".attentions." in name and value.ndim == 4
        renamed[name] = value[:, :, 0, 0] if is_linear else value
    return renamed


def round_trip(host: nn.Module, model: Any, images: Tensor) -> dict[str, float]:
    """Return the largest differences of `latents` and `images` (B, 3, H, W) between two models.

    They are taming's VQModel, in evaluation mode, and :func:`build_diffusers`'s. Latents are
    compared before the codebook, and images for the same codes: a code that flips between two
    equally near ones is an error of neither; `same_codes` is the share of equal ones.
    """
    import torch

    ours: Any = host
    with torch.no_grad():
        latents = ours.quant_conv(ours.encoder(images))
        theirs = model.encode(images).latents
        quant, _, info = ours.quantize(latents)
        their_info = model.quantize(theirs)[2]
        shown = ours.decode(quant)
        decoded = model.decode(quant, force_not_quantize=True).sample
    same = info[-1].reshape(-1) == their_info[-1].reshape(-1)
    return {
        "latents": float((latents - theirs).abs().max()),
        "images": float((shown - decoded).abs().max()),
        "same_codes": float(same.double().mean()),
    }


def _numbers(file: Path) -> dict[str, Any] | None:
    """Return what `lgvq eval` or `lgvq retrofit` wrote beside the checkpoint, if anything."""
    names = ("results.json", "retrofit.json")
    found = first_file(at / name for at in (file.parent, file.parent.parent) for name in names)
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
