"""taming's VQModel as diffusers' VQModel: the same network under other names.

encoder.down.I.block.J  -> encoder.down_blocks.I.resnets.J       1x1 convolutions of attentions
decoder.up.I.block.J    -> decoder.up_blocks.(last - I).resnets.J     -> linear layers
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError
from .load import sizes_of

TOLERANCE = 1e-4  # of latents and images, both near [-1, 1]
NORM_GROUPS = 32  # taming's are fixed
RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
TOKENIZER = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def diffusers_config(state_dict: Mapping[str, Tensor], resolution: int) -> dict[str, Any]:
    """Return the arguments of diffusers' VQModel for a taming-style tokenizer's tensors.

    Args:
        state_dict: of the host.
        resolution: of its images, noted in the file.

    Raises:
        ConfigError: if the tensors are not those of taming's VQModel.
    """
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
        "norm_num_groups": NORM_GROUPS,
        "vq_embed_dim": sizes["embed_dim"],
        "scaling_factor": 1.0,
        "mid_block_add_attention": True,
    }


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a taming-style tokenizer's tensors; those of its loss are left out.

    Raises:
        ConfigError: if there is a tensor that diffusers' VQModel has no place for.

    Example:
        >>> list(to_diffusers({"encoder.down.1.block.0.nin_shortcut.bias": torch.zeros(2)}))
        ['encoder.down_blocks.1.resnets.0.conv_shortcut.bias']
    """
    levels = [int(m[1]) for key in state_dict if (m := re.match(r"decoder\.up\.(\d+)\.", key))]
    last = max(levels, default=0)
    renamed = {}
    for key, value in state_dict.items():
        if not key.startswith(TOKENIZER):
            continue
        name = _renamed(key, last)
        if name is None:
            raise ConfigError(f"--format diffusers: VQModel has no place for {key}")
        is_linear = ".attentions." in name and value.ndim == 4
        renamed[name] = value[:, :, 0, 0] if is_linear else value
    return renamed


def _renamed(key: str, last: int) -> str | None:
    side, _, rest = key.partition(".")
    if side not in ("encoder", "decoder"):
        return key
    if rest.startswith(("conv_in.", "conv_out.")):
        return key
    if rest.startswith("norm_out."):
        return f"{side}.conv_norm_out.{rest.removeprefix('norm_out.')}"
    if match := re.fullmatch(r"mid\.block_([12])\.(\w+)\.(\w+)", rest):
        return _joined(f"{side}.mid_block.resnets.{int(match[1]) - 1}", RESNET, match[2], match[3])
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
        return _joined(f"{side}.mid_block.attentions.0", ATTENTION, match[1], match[2])
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest):
        level = int(match[2]) if match[1] == "down" else last - int(match[2])
        return _in_level(f"{side}.{match[1]}_blocks.{level}", match[3])
    return None


def _in_level(block: str, rest: str) -> str | None:
    if match := re.fullmatch(r"block\.(\d+)\.(\w+)\.(\w+)", rest):
        return _joined(f"{block}.resnets.{match[1]}", RESNET, match[2], match[3])
    if match := re.fullmatch(r"attn\.(\d+)\.(\w+)\.(\w+)", rest):
        return _joined(f"{block}.attentions.{match[1]}", ATTENTION, match[2], match[3])
    if match := re.fullmatch(r"(down|up)sample\.conv\.(\w+)", rest):
        return f"{block}.{match[1]}samplers.0.conv.{match[2]}"
    return None


def _joined(block: str, names: Mapping[str, str], part: str, kind: str) -> str | None:
    return f"{block}.{names[part]}.{kind}" if part in names else None


def build_diffusers(state_dict: Mapping[str, Tensor], resolution: int) -> Any:
    """Return a diffusers VQModel with a taming-style tokenizer's weights, in evaluation mode.

    Raises:
        ConfigError: if diffusers is not installed, or the model is not taming's VQModel.
    """
    arguments = diffusers_config(state_dict, resolution)
    renamed = to_diffusers(state_dict)
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ConfigError(
            "--format diffusers needs diffusers: pip install 'lgvq_plugin[diffusers]'"
        ) from error
    model: Any = VQModel(**arguments)
    model.eval()
    wanted = model.state_dict()
    strange = sorted(set(wanted) ^ set(renamed))
    strange += [key for key in wanted if key in renamed and wanted[key].shape != renamed[key].shape]
    if strange:
        raise ConfigError(
            f"--format diffusers: VQModel has other tensors than this host: {strange[:5]}"
        )
    model.load_state_dict(renamed)
    return model


@torch.no_grad()
def round_trip(host: nn.Module, model: Any, images: Tensor) -> dict[str, float]:
    """Return the largest differences between a host and its diffusers twin.

    Latents before the codebook, and images of the same codes: a code that flips between two
    equally near ones is no error of either.

    Args:
        host: taming's VQModel, in evaluation mode.
        model: from :func:`build_diffusers`.
        images: (B, 3, H, W).

    Returns:
        `latents`, `images`, and `same_codes`, the share of positions with equal codes.
    """
    twin: Any = host
    latents = twin.quant_conv(twin.encoder(images))
    theirs = model.encode(images).latents
    quant, _, info = twin.quantize(latents)
    their_info = model.quantize(theirs)[2]
    decoded = model.decode(quant, force_not_quantize=True).sample
    same = info[-1].reshape(-1) == their_info[-1].reshape(-1)
    return {
        "latents": float((latents - theirs).abs().max()),
        "images": float((twin.decode(quant) - decoded).abs().max()),
        "same_codes": float(same.double().mean()),
    }
