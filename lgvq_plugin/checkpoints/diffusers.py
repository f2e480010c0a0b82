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


def build_diffusers(state_dict: Mapping[str, Tensor], resolution: int) -> Any:
    """Return a diffusers VQModel with a taming-style tokenizer's weights, in evaluation mode.

    Raises ConfigError if diffusers is not installed, or the model is not taming's VQModel.
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
    shapes = [{k: v.shape for k, v in each.items()} for each in (model.state_dict(), renamed)]
    strange = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    if strange:
        raise ConfigError(
            f"--format diffusers: VQModel has other tensors than this host: {strange[:5]}"
        )
    model.load_state_dict(renamed)
    return model


def diffusers_config(state_dict: Mapping[str, Tensor], resolution: int) -> dict[str, Any]:
    """Return the arguments of diffusers' VQModel for a taming-style tokenizer's tensors.

    diffusers only records the `resolution` of its images. Raises ConfigError if the tensors are not
    those of taming's VQModel.
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
        "norm_num_groups": 32,  # taming's
        "vq_embed_dim": sizes["embed_dim"],
        "scaling_factor": 1.0,
        "mid_block_add_attention": True,
    }


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a taming-style tokenizer's tensors; those of its loss are left out.

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


@torch.no_grad()
def round_trip(host: nn.Module, model: Any, images: Tensor) -> dict[str, float]:
    """Return the largest differences of `latents` and `images` (B, 3, H, W) between two models.

    They are taming's VQModel, in evaluation mode, and :func:`build_diffusers`'s. Latents are
    compared before the codebook, and images for the same codes: a code that flips between two
    equally near ones is an error of neither; `same_codes` is the share of equal ones.
    """
    ours: Any = host
    latents = ours.quant_conv(ours.encoder(images))
    theirs = model.encode(images).latents
    quant, _, info = ours.quantize(latents)
    their_info = model.quantize(theirs)[2]
    decoded = model.decode(quant, force_not_quantize=True).sample
    same = info[-1].reshape(-1) == their_info[-1].reshape(-1)
    return {
        "latents": float((latents - theirs).abs().max()),
        "images": float((ours.decode(quant) - decoded).abs().max()),
        "same_codes": float(same.double().mean()),
    }
