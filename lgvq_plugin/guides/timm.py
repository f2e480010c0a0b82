"""An image tower of timm as the image guide: DINOv2, SigLIP, ConvNeXt, ResNet and others."""

import inspect
from typing import Any

import timm
from torch import Tensor, nn

from ..functional import seeded
from ..hub import find_cached, require_hub
from ..sockets import ConfigError, as_config_error, suggest
from .images import AbstractImageTower, Tower, TowerOptions, require_file, require_layer, square

FILES = ("model.safetensors", "pytorch_model.bin")


class TimmGuide(AbstractImageTower):
    """A model of timm without its classifier, by default DINOv2 ViT-B/14.

    Arguments as :class:`~.images.AbstractImageTower`: `model` with or without a tag, `checkpoint` a
    file. The model's final norm is applied to the layer; stages of a ResNet count as blocks.

    Example:
        >>> import torch
        >>> guide = TimmGuide("vit_tiny_patch16_224", pretrained=False, image_size=64)
        >>> features = guide.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
        >>> features.patches.shape, features.grid, features.summary.shape
        (torch.Size([2, 16, 192]), (4, 4), torch.Size([2, 192]))
    """

    default_model = "vit_base_patch14_dinov2.lvd142m"

    def _load(self, given: TowerOptions) -> Tower:
        overlay = _overlay(given)
        if overlay is None:
            self._warn_of_random_weights()
        network: Any = _create(given, overlay)
        if not hasattr(network, "forward_intermediates"):
            raise ConfigError(
                f"guides.vision.model: timm gives no features of layers of {given.model!r}"
            )
        self._layer = require_layer(given.layer, len(network.feature_info), given.model)
        known = inspect.signature(network.forward_intermediates).parameters
        options: dict[str, Any] = {"intermediates_only": True, "norm": True, "stop_early": True}
        options |= {"output_fmt": "NCHW", "return_prefix_tokens": True}
        self._arguments = {key: value for key, value in options.items() if key in known}
        # Of the prefix only the class token is read, which comes first; registers follow.
        self._has_class = getattr(network, "cls_token", None) is not None
        facts = network.pretrained_cfg
        size = square(given.image_size or facts["input_size"][1:])
        return Tower(network, size, facts["mean"], facts["std"])

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        network: Any = self._network
        (found,) = network.forward_intermediates(images, indices=[self._layer], **self._arguments)
        if isinstance(found, Tensor):
            return found, None
        patches, prefix = found
        return patches, prefix[:, 0] if self._has_class else None


def _overlay(given: TowerOptions) -> dict[str, Any] | None:
    """Return what the weights' source changes in timm's config of them; None for random weights.

    Raises:
        ConfigError: if the weights are neither here nor available from the network within seconds.
    """
    model, cache_dir = given.model, given.cache_dir
    if not isinstance(model, str) or not timm.is_model(model):
        hint = suggest(model, timm.list_models()).partition(" Known:")[0]
        raise ConfigError(
            f"guides.vision.model: no timm model {model!r}{hint} timm.list_models() lists all"
        )
    if given.checkpoint is not None:
        return {"file": str(require_file(given.checkpoint))}
    if not given.pretrained:
        return None
    try:
        facts = timm.get_pretrained_cfg(model)
    except RuntimeError:  # no such tag
        facts = None
    if facts is None or not (facts.hf_hub_id or facts.url):
        tags = ", ".join(timm.list_pretrained(f"{model.partition('.')[0]}.*")) or "none"
        raise ConfigError(
            f"guides.vision.model: timm has no weights of {model!r}; with weights: {tags}; or give "
            "checkpoint: PATH"
        )
    if facts.hf_hub_id:
        files = (facts.hf_hub_filename,) if facts.hf_hub_filename else FILES
        if not find_cached(facts.hf_hub_id, files, cache_dir):
            sought = f"timm model {model!r} (hub repository {facts.hf_hub_id})"
            require_hub(facts.hf_hub_id, sought, cache_dir, "image")
    return {}


def _create(given: TowerOptions, overlay: dict[str, Any] | None) -> nn.Module:
    model, image_size = given.model, given.image_size
    options: dict[str, Any] = {"num_classes": 0, "cache_dir": given.cache_dir}
    options |= {"pretrained": overlay is not None, "pretrained_cfg_overlay": overlay or None}
    with as_config_error(f"guides.vision: timm cannot load {model!r}"), seeded(given.seed):
        if image_size is not None:
            try:  # transformers need it to build their position embeddings
                return timm.create_model(model, img_size=image_size, **options)
            except TypeError as error:
                if "img_size" not in str(error):  # else one for images of any size
                    raise
        return timm.create_model(model, **options)
