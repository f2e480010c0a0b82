"""Any text or image encoder of transformers as a guide: BERT, T5, DINOv2, ViT, SigLIP; `[hf]`."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional import seeded
from ..hub import KEYS, Kind, find_cached, require_hub
from ..sockets import ConfigError, as_config_error
from .images import AbstractImageTower, Tower, TowerOptions, require_layer, square
from .tokens import AbstractTokenGuide, Row, require_length, with_mean_row

SENTENCES = ("mean", "first", "pooled")
MEMBERS = {  # name of the guide, and what prepares its input
    "text": ("huggingface", "AutoTokenizer"),
    "image": ("huggingface_vision", "AutoImageProcessor"),
}
MOST_PREFIX = 16  # class token and registers of an image encoder


class HuggingFaceGuide(AbstractTokenGuide):
    """A text encoder of transformers, frozen.

    Masked words become the tokenizer's mask token. If it has none, they become an additional row of
    the vocabulary, the mean of all. Either way they are replaced before the first layer.

    Args:
        model: name on the hub, or a folder.
        max_length: captions are cut to this many tokens, start and end included.
        sentence: feature of a caption: the mean over its tokens, the state of the first token
            ([CLS]), or the output of the model's own pooler.
        device: device of the encoder; the CPU by default.
        cache_dir: folder of downloaded weights; Hugging Face's own cache by default.
        dtype: float32, or bfloat16 for speed; features are float32 in either case.

    Raises:
        ConfigError: if transformers is missing, if the model cannot be found or loaded, or if it
            is no text encoder with a fast tokenizer.
    """

    def __init__(
        self,
        model: str,
        max_length: int = 30,
        sentence: Literal["mean", "first", "pooled"] = "mean",
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if sentence not in SENTENCES:
            raise ConfigError(f"guide.sentence: expected {'|'.join(SENTENCES)}, got {sentence!r}")
        self._source = {"model": model, "sentence": sentence, "cache_dir": cache_dir}
        self._pooling = sentence
        network, self._tokenizer = _load_text(model, cache_dir)
        positions = getattr(network.config, "max_position_embeddings", None)
        limits = (self._tokenizer.model_max_length, positions)
        self.max_length = require_length(max_length, min(int(one) for one in limits if one))
        self._words = network.get_input_embeddings().weight.shape[0]
        self.pad_id = self._tokenizer.pad_token_id or 0
        self._mask_id = self._tokenizer.mask_token_id
        if self._mask_id is None:
            self._mask_id = self._words
            network.set_input_embeddings(with_mean_row(network.get_input_embeddings()))
        self._network = network.float().eval().requires_grad_(False)
        self._set_dtype(dtype)
        self._embedding = network.get_input_embeddings()
        self.token_dim = self.sentence_dim = self.vocabulary.shape[1]
        self.to("cpu" if device is None else device)
        probe = self._network(
            input_ids=torch.tensor([_row(self._tokenizer, "")[0]], device=self.device)
        )
        if probe.last_hidden_state.shape[-1] != self.token_dim:
            raise ConfigError(
                f"guide.model: {model!r} has token embeddings of width {self.token_dim} and states "
                f"of width {probe.last_hidden_state.shape[-1]}; expected one width"
            )
        if sentence == "pooled" and getattr(probe, "pooler_output", None) is None:
            raise ConfigError(f"guide.sentence: {model!r} has no pooler; expected mean or first")

    def _rows(self, captions: Sequence[str]) -> list[Row]:
        return [_row(self._tokenizer, caption) for caption in captions]

    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        result = self._network(input_ids=ids, attention_mask=attention_mask)
        tokens = result.last_hidden_state.float()
        if self._pooling == "pooled":
            return tokens, result.pooler_output
        if self._pooling == "first":
            return tokens, tokens[:, 0]
        total = tokens.masked_fill(~attention_mask[..., None], 0.0).sum(dim=1)
        return tokens, total / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)


def _row(tokenizer: Any, caption: str) -> Row:
    encoding = tokenizer(caption)
    return encoding["input_ids"], [-1 if word is None else word for word in encoding.word_ids()]


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
        network, processor = _load_image(given)
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


def _load_text(model: str, cache_dir: str | None) -> tuple[Any, Any]:
    """Return encoder and tokenizer."""
    network, tokenizer = _load("text", model, cache_dir)
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    if not tokenizer.is_fast or _row(tokenizer, "")[1][-1:] != [-1]:
        raise ConfigError(
            f"guide.model: {model!r}: expected an encoder whose fast tokenizer ends a text with "
            "an end token, as those of BERT, RoBERTa and T5 do"
        )
    if not hasattr(network.config, "hidden_size"):
        raise ConfigError(
            f"guide.model: {model!r} is a {type(network).__name__}, no plain text encoder; "
            "for CLIP models: guide: {use: open_clip}"
        )
    return network, tokenizer


def _load_image(given: TowerOptions) -> tuple[Any, Any]:
    """Return encoder and image processor."""
    model, options = given.checkpoint or given.model, {"is_trained": bool(given.pretrained)}
    network, processor = _load("image", model, given.cache_dir, seed=given.seed, **options)
    network = getattr(network, "vision_model", network)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"guides.vision.model: {model!r} is a {type(network).__name__}, no image encoder"
        )
    return network, processor


def _load(
    kind: Kind, model: str, cache_dir: str | None, *, seed: int = 0, is_trained: bool = True
) -> tuple[Any, Any]:
    """Return encoder and tokenizer or processor, from a folder, the cache, or the hub."""
    member, preparation = MEMBERS[kind]
    try:
        import transformers
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ConfigError(
            f"guide {member} needs transformers: pip install 'lgvq_plugin[hf]'"
        ) from error
    options: dict[str, Any] = {"cache_dir": cache_dir}
    folder = Path(model).expanduser()
    if folder.is_dir():
        model = str(folder)
    else:
        options["local_files_only"] = find_cached(model, ["config.json"], cache_dir) is not None
        if not options["local_files_only"]:
            require_hub(model, f"folder or hub repository {model!r}", cache_dir, kind)
    with as_config_error(f"{KEYS[kind]}: transformers cannot load {model!r}"), seeded(seed):
        if is_trained:
            network = AutoModel.from_pretrained(model, **options)
        else:
            network = AutoModel.from_config(AutoConfig.from_pretrained(model, **options))
        return network, getattr(transformers, preparation).from_pretrained(model, **options)
