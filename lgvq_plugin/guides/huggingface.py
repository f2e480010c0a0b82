"""Any text encoder of transformers as the guide: BERT, RoBERTa, sentence encoders, T5; `[hf]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor

from ..functional import seeded
from ..sockets import ConfigError
from ._hub import cache_folder, require_reachable
from .tokens import AbstractTokenGuide, Row, require_length, with_mean_row

SENTENCES = ("mean", "first", "pooled")


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
        path = Path(model).expanduser()
        network, self._tokenizer = _load(str(path) if path.is_dir() else model, cache_dir)
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


def _load(model: str, cache_dir: str | None) -> tuple[Any, Any]:
    """Return encoder and tokenizer, from a folder, the cache, or the hub if it answers."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "guide huggingface needs transformers: pip install 'lgvq_plugin[hf]'"
        ) from error
    options: dict[str, Any] = {"cache_dir": cache_dir}
    if not Path(model).is_dir():
        cached = try_to_load_from_cache(str(model), "config.json", cache_dir=cache_dir)
        options["local_files_only"] = isinstance(cached, str)
        if not options["local_files_only"]:
            place = cache_folder(model, cache_dir)
            require_reachable(constants.ENDPOINT, f"folder or hub repository {model!r}", place)
    try:
        with seeded(0):
            network = AutoModel.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:  # a foreign folder can break in any way
        raise ConfigError(f"guide: transformers cannot load {model!r}: {error}") from error
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
