"""The image tower of an open_clip model as the image guide; by default that of CLIP ViT-B/32."""

from typing import Any

import open_clip
from open_clip.pretrained import list_pretrained_tags_by_model
from torch import Tensor, nn

from ..sockets import ConfigError
from .images import AbstractImageTower, Tower, TowerOptions, require_file, require_layer, square
from .open_clip import load_tower


class OpenCLIPVision(AbstractImageTower):
    """An image tower of open_clip, by default CLIP's ViT-B/32.

    Features are those of a layer, after the tower's final norm, not of the projection to the text.
    Arguments as :class:`~.images.AbstractImageTower`: `model` is a name, `hf-hub:org/name` or
    `local-dir:/path`; `pretrained` is a tag of the model, true for the tag `openai`, or the only
    one there is; `checkpoint` is a file.

    Example:
        >>> import torch
        >>> guide = OpenCLIPVision("ViT-S-32-alt", pretrained=False)
        >>> guide.encode(torch.rand(2, 3, 64, 64) * 2 - 1).patches.shape
        torch.Size([2, 49, 384])
    """

    default_model = "ViT-B-32"

    def _load(self, given: TowerOptions) -> Tower:
        weights = _weights(given)
        options: dict[str, Any] = {"cache_dir": given.cache_dir, "seed": given.seed}
        if given.image_size is not None:
            options["force_image_size"] = given.image_size
        tower: Any
        tower, _ = load_tower(given.model, weights, kind="image", **options)
        self._layer = require_layer(given.layer, _depth(tower), given.model)
        facts = tower.preprocess_cfg
        return Tower(tower, square(facts["size"]), facts["mean"], facts["std"])

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        network: Any = self._network
        trunk = getattr(network, "trunk", None)  # of timm: perhaps without a class token
        has_class = trunk is None or getattr(trunk, "cls_token", None) is not None
        result = network.forward_intermediates(
            images,
            indices=[self._layer],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_extra_tokens=has_class,
        )
        prefix = result.get("image_intermediates_prefix")
        return result["image_intermediates"][0], None if prefix is None else prefix[0][:, 0]


def _weights(given: TowerOptions) -> str | None:
    """Return the tag or file of weights, None for random ones or a model that has its own."""
    model, pretrained = given.model, given.pretrained
    if not isinstance(model, str):
        raise ConfigError(f"guides.vision.model: expected a name, got {model!r}")
    if given.checkpoint is not None:
        return str(require_file(given.checkpoint))
    if pretrained is not True:
        return pretrained or None
    name = model.replace("/", "-")
    if ":" in name or open_clip.get_model_config(name) is None:  # load_tower reports the latter
        return None
    tags = list_pretrained_tags_by_model(name)
    if "openai" in tags:
        return "openai"
    if len(tags) != 1:
        known = ", ".join(tags) or "none, so give checkpoint: PATH"
        raise ConfigError(
            f"guides.vision.pretrained: name the weights of {model!r} by their tag: {known}"
        )
    return tags[0]


def _depth(tower: Any) -> int:
    """Return the number of layers of an open_clip image tower: a ViT, one of timm, or a ResNet."""
    if hasattr(tower, "trunk"):
        return len(tower.trunk.feature_info)
    transformer: nn.Module | None = getattr(tower, "transformer", None)
    return 5 if transformer is None else len(transformer.resblocks)  # type: ignore[arg-type]
