"""Low-rank adapters (LoRA) on a trained host's layers, by peft.

inject: encoder.conv.weight -> encoder.conv.{base_layer.weight, lora_A.default, lora_B.default}
merge:  what a run saved -> the host's own keys, weight + alpha / rank x B A; needs no peft
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError
from . import rng
from .settings import LORA

BASE, ADAPTER = ".base_layer.", ".lora_"


def require_peft() -> None:
    """Raise ConfigError if peft is missing."""
    if find_spec("peft") is None:
        raise ConfigError("training.lora needs peft: pip install 'lgvq_plugin[lora]'")


def inject(host: nn.Module, given: Mapping[str, Any], seed: int) -> list[nn.Parameter]:
    """Add adapters to the encoder and decoder of `host`, and return their parameters.

    The host computes the same as before, to the bit. The weights of the layers still get gradients,
    which a host may read; what is frozen is the driver's business. Raises ConfigError if peft is
    missing, or a part has no layer to adapt.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    lora, added = {**LORA, **given}, list[nn.Parameter]()
    with rng.preserved():
        torch.manual_seed(seed)
        for name in lora["parts"]:
            part = dict(host.named_children()).get(name)
            paths = [] if part is None else _layers(part, lora["targets"])
            if part is None or not paths:
                wanted = f"{lora['targets']} in its " if lora["targets"] else ""
                raise ConfigError(
                    f"training.lora: {type(host).__name__} has no layers to adapt: no {wanted}"
                    f"{name!r} with linear layers or convolutions inside (training.lora.parts, "
                    "training.lora.targets)"
                )
            wants = {p: p.requires_grad for p in part.parameters()}
            exactly = "|".join(map(re.escape, paths))  # peft takes a list as endings of names
            config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=exactly)
            inject_adapter_in_model(config, part)
            for parameter in part.parameters():
                parameter.requires_grad_(wants.get(parameter, True))
            added += [p for p in part.parameters() if p not in wants]
    return added


def _layers(part: nn.Module, targets: list[str] | None) -> list[str]:
    """Return the paths of the layers that get adapters."""
    return [
        path
        for path, layer in part.named_modules()
        if path
        and isinstance(layer, nn.Linear | nn.Conv2d)
        and getattr(layer, "groups", 1) == 1
        and (targets is None or any(f".{path}".endswith(f".{name}") for name in targets))
    ]


def merge(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return tensors of a run under the host's own keys, its adapters added to the weights.

    Tensors without adapters are returned as they are. Raises ConfigError if `config`, the run's,
    does not say how the adapters are scaled.
    """
    if not any(ADAPTER in key for key in tensors):
        return dict(tensors)
    lora = ((config or {}).get("training") or {}).get("lora")
    if lora is None:
        raise ConfigError("the checkpoint has LoRA adapters, but no config with `training.lora`")
    alpha, merged = {**LORA, **lora}["alpha"], dict[str, Tensor]()
    for key, value in tensors.items():
        if ADAPTER in key:
            continue
        layer, base, name = key.partition(BASE)
        down = tensors.get(f"{layer}.lora_A.default.weight") if base else None
        if down is not None and name == "weight":
            up = tensors[f"{layer}.lora_B.default.weight"].flatten(1).double()
            delta = up @ down.flatten(1).double() * (alpha / len(down))
            value = (value.double() + delta.view(value.shape)).to(value.dtype)
        merged[f"{layer}.{name}" if base else key] = value
    return merged
