"""An image encoder of transformers as the image guide: DINOv2, ViT, CLIP, SigLIP; `[hf]`."""

from math import isqrt
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor

from ..functional import seeded
from ..sockets import ConfigError
from ._hub import cache_folder, require_reachable
from .images import AbstractImageTower, Tower, TowerOptions, require_layer, square

MOST_PREFIX = 16  # class token and registers


class HuggingFaceVision(AbstractImageTower):
    """An image encoder of transformers, of CLIP and the like the image tower; DINOv2 by default.

    Arguments as :class:`~.images.AbstractImageTower`: `model` is a name on the hub or a folder of
    `save_pretrained` with its image processor, `checkpoint` such a folder. Without a `layer` the
    last block is followed by the encoder's final norm if it has one; other layers have no norm.
    """

    default_model = "facebook/dinov2-base"

    def _load(self, given: TowerOptions) -> Tower:
        folder = given.checkpoint
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise ConfigError(f"guides.vision.checkpoint: no folder {folder!r}")
        if not given.pretrained:
            self._warn_of_random_weights()
        network, processor = _load(given)
        own = getattr(network.config, "image_size", None)
        size = square(given.image_size or own or _side(processor.size))
        self._arguments: dict[str, Any] = {}
        if own is not None and size != square(own):
            self._arguments["interpolate_pos_encoding"] = True
        depth = getattr(network.config, "num_hidden_layers", None)
        depth = depth or len(getattr(network.config, "depths", ())) or 1
        self._layer = given.layer
        if given.layer is not None:
            self._layer = require_layer(given.layer, depth, given.model)
        return Tower(network, size, processor.image_mean, processor.image_std)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        result = self._network(
            pixel_values=images, output_hidden_states=self._layer is not None, **self._arguments
        )
        states = result.last_hidden_state
        if self._layer is not None:
            states = result.hidden_states[self._layer + 1]  # the first ones are the embeddings
        if states.ndim == 4:
            return states, None
        height, width = self._grid(states.shape[1], images)
        prefix = states.shape[1] - height * width
        patches = states[:, prefix:].mT.unflatten(2, (height, width))
        return patches, states[:, 0] if prefix else None

    def _grid(self, length: int, images: Tensor) -> tuple[int, int]:
        """Return (h, w) of the patches among `length` tokens."""
        config: Any = self._network.config
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int):
            height, width = (side // patch for side in images.shape[2:])
            if 0 <= length - height * width <= MOST_PREFIX:
                return height, width
        if isqrt(length) ** 2 != length:
            raise ValueError(f"its {length} tokens are no grid of patches")
        return isqrt(length), isqrt(length)


def _side(size: Any) -> int:
    """Return the size of an image processor: {"height", "width"} or {"shortest_edge"}."""
    sizes = [value for value in dict(size).values() if value]
    return int(sizes[0])


def _load(given: TowerOptions) -> tuple[Any, Any]:
    """Return encoder and image processor, from a folder, the cache, or the hub if it answers."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ConfigError(
            "guide huggingface_vision needs transformers: pip install 'lgvq_plugin[hf]'"
        ) from error
    model, cache_dir = given.checkpoint or given.model, given.cache_dir
    options: dict[str, Any] = {"cache_dir": cache_dir}
    path = Path(model).expanduser()
    if path.is_dir():
        model = str(path)
    else:
        cached = try_to_load_from_cache(model, "config.json", cache_dir=cache_dir)
        options["local_files_only"] = isinstance(cached, str)
        if not options["local_files_only"]:
            sought = f"folder or hub repository {model!r}"
            require_reachable(
                constants.ENDPOINT, sought, cache_folder(model, cache_dir), kind="image"
            )
    try:
        with seeded(given.seed):
            if given.pretrained:
                network = AutoModel.from_pretrained(model, **options)
            else:
                network = AutoModel.from_config(AutoConfig.from_pretrained(model, **options))
        processor = AutoImageProcessor.from_pretrained(model, **options)
    except Exception as error:  # a foreign folder can break in any way
        raise ConfigError(f"guides.vision: transformers cannot load {model!r}: {error}") from error
    network = getattr(network, "vision_model", network)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"guides.vision.model: {model!r} is a {type(network).__name__}, no image encoder"
        )
    return network, processor
