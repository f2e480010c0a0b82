"""The embedded guide: a tiny CLIP trained on the embedded scenes; no download."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.random import RandomState
from open_clip import CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from safetensors.torch import load, save
from torch import Tensor

from ..files import write_bytes, write_json
from ..functional import seeded
from ..sockets import ConfigError, as_config_error
from .base import UnknownWords
from .open_clip import OpenCLIPText

FOLDER = Path(__file__).parent / "_micro_clip"
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 1], "width": 16},  # a small ResNet
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
"""In open_clip's own format; context_length bounds `max_length`."""
START_SCALE = 0.1  # of token embeddings before training


class MicroCLIPGuide(OpenCLIPText):
    """The text tower of the embedded model; the image tower is only used to train it.

    It knows the words of the scenes. Other words have random embeddings, fixed by the seed and of
    the same scale: captions with them have distinct features, which carry no meaning and are
    close together (mean cosine 0.91 among names of emoji).

    Args:
        max_length: captions are cut to this many tokens, start and end included; at most 32.
        device: device of the tower; the CPU by default.

    Raises:
        ConfigError: if the package's weights are missing or broken.

    Example:
        >>> guide = MicroCLIPGuide()
        >>> guide.encode(["a red circle", ""]).sentence.shape
        torch.Size([2, 64])
    """

    image_size = CONFIG["vision_cfg"]["image_size"]

    def __init__(self, max_length: int = 30, device: torch.device | str | None = None) -> None:
        state, seed = read_weights(FOLDER)
        self._trained = {*state["token_embedding.rows"].tolist()}
        tower = unpack(state, seed)
        super().__init__(tower, self.new_tokenizer(), max_length=max_length, device=device)

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords:
        """Count the words with a token that is not in the training captions."""
        counts = Counter(word for caption in captions for word in caption.split())
        is_known = {word: self._trained.issuperset(self._tokenizer.encode(word)) for word in counts}
        unknown = Counter({word: n for word, n in counts.items() if not is_known[word]})
        examples = tuple(word for word, _ in unknown.most_common(3))
        return UnknownWords(counts.total(), unknown.total(), examples)

    @staticmethod
    def new_tokenizer() -> SimpleTokenizer:
        """Return CLIP's tokenizer with this model's context."""
        return SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])

    @staticmethod
    def new_network(seed: int) -> CustomTextCLIP:
        """Return both towers before training; the global random state is kept."""
        with seeded(seed):
            network = CustomTextCLIP(**CONFIG)
        with torch.no_grad():
            network.text.token_embedding.weight.copy_(START_SCALE * seeded_rows(seed))
        return network

    @staticmethod
    def save(network: Any, touched: Tensor, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the text tower of a trained network, and a description of it as JSON.

        Args:
            network: from :meth:`new_network`, trained.
            touched: ids of the tokens in the training captions, (R,).
            folder: folder of `weights.safetensors` and `about.json`.
            facts: the seed, and further entries of `about.json`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = save(pack(network.text, touched))
        about = {
            **facts,
            "config": CONFIG,
            "vocabulary_rows": len(touched),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        write_bytes(folder / "weights.safetensors", weights)
        write_json(folder / "about.json", about)


def seeded_rows(seed: int) -> Tensor:
    """Return a row of zero mean and unit variance for each token of the vocabulary, (V, Dt).

    Uniform draws of NumPy's frozen legacy stream: bit-identical on every machine and version.
    """
    text = CONFIG["text_cfg"]
    draws = RandomState(seed).random_sample((text["vocab_size"], text["width"]))
    return torch.from_numpy((2 * draws - 1) * 3**0.5).float()


def pack(text: TextTransformer, touched: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store: the tower in float16, with the trained rows of its vocabulary.

    Args:
        text: the trained tower.
        touched: ids of the tokens in the training captions, (R,).
    """
    state = {k: v.detach().to(torch.float16).contiguous() for k, v in text.state_dict().items()}
    rows = text.token_embedding.weight.detach()[touched]
    # The other rows follow from the seed, at the scale that training gave to these.
    state["token_embedding.scale"] = rows.std().float().reshape(1)
    state["token_embedding.rows"] = touched.to(torch.int32)
    state["token_embedding.weight"] = rows.to(torch.float16)
    return state


def unpack(state: dict[str, Tensor], seed: int) -> TextTransformer:
    """Return the text tower stored by :func:`pack`, in float32."""
    with torch.random.fork_rng(devices=[]):
        text = TextTransformer(**CONFIG["text_cfg"], output_dim=CONFIG["embed_dim"])
    state = {key: value.float() for key, value in state.items()}
    rows = state.pop("token_embedding.scale") * seeded_rows(seed)
    touched = state.pop("token_embedding.rows").long()
    state["token_embedding.weight"] = rows.index_copy(0, touched, state["token_embedding.weight"])
    text.load_state_dict(state)
    return text


def read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Return the stored tensors and the seed of the other rows.

    Raises:
        ConfigError: if a file is missing, or is not the one that was trained.
    """
    hint = "; install lgvq_plugin again"
    with as_config_error("guide micro_clip", OSError, ValueError, hint=hint):
        about = json.loads((folder / "about.json").read_text())
        weights = (folder / "weights.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != about["sha256"]:
        raise ConfigError(
            f"guide micro_clip: {folder / 'weights.safetensors'} is not the trained file (sha256 "
            "differs); install lgvq_plugin again, or run python -m lgvq_plugin.training.micro_clip"
        )
    return load(weights), about["seed"]
