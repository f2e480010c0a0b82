"""The image tower of an open_clip model as the image guide; by default that of CLIP ViT-B/32."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import list_pretrained_tags_by_model
from torch import Tensor, nn

from ..sockets import ConfigError
from .images import AbstractImageTower, require_layer, square
from .open_clip import load_tower


class OpenCLIPVision(AbstractImageTower):
    """An image tower of open_clip, frozen, in float32.

    Features are those of a layer, after the tower's final norm, not of the projection to the text.

    Args:
        model: name of an open_clip model, `hf-hub:org/name` or `local-dir:/path`.
        layer: block whose output is used, from 0; negative ones count from the end, and null is the
            last.
        pretrained: a tag of the model; true is the tag `openai`, or the only one there is; false
            gives random weights, with a warning.
        checkpoint: local file of weights, in place of a tag.
        image_size: side of the images the tower reads; null is the tower's own.
        device: device of the tower; the CPU by default.
        cache_dir: folder of downloaded weights; Hugging Face's own cache by default.
        seed: seed of random weights.

    Raises:
        ConfigError: if the model, its weights or the layer do not exist.

    Example:
        >>> guide = OpenCLIPVision("ViT-S-32-alt", pretrained=False)
        >>> guide.encode(torch.rand(2, 3, 64, 64) * 2 - 1).patches.shape
        torch.Size([2, 49, 384])
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        layer: int | None = None,
        pretrained: bool | str = True,
        checkpoint: str | None = None,
        image_size: int | None = None,
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        source = {
            "model": model,
            "layer": layer,
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "image_size": image_size,
            "cache_dir": cache_dir,
            "seed": seed,
        }
        weights = _weights(model, pretrained, checkpoint)
        options = {} if image_size is None else {"force_image_size": image_size}
        tower: Any
        tower, _ = load_tower(
            model, weights, kind="image", cache_dir=cache_dir, seed=seed, **options
        )
        self._layer = require_layer(layer, _depth(tower), model)
        facts = tower.preprocess_cfg
        super().__init__(
            tower,
            source,
            size=square(facts["size"]),
            mean=facts["mean"],
            std=facts["std"],
            device=device,
        )

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


def _weights(model: str, pretrained: bool | str, checkpoint: str | None) -> str | None:
    """Return the tag or file of weights, None for random ones or a model that has its own."""
    if not isinstance(model, str):
        raise ConfigError(f"guides.vision.model: expected a name, got {model!r}")
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise ConfigError(f"guides.vision.checkpoint: no file {str(path)!r}")
        return str(path)
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
