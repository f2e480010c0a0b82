"""The embedded model: its size, its seeded start, and how its text half is packed and unpacked."""

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
from torch import Tensor, nn

from ..files import write_bytes, write_json
from ..functional import seeded
from ..sockets import ConfigError
from .base import UnknownWords
from .open_clip import OpenCLIPText

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 1], "width": 16},  # a small ResNet
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
"""In open_clip's own format; context_length bounds `max_length`."""

START_SCALE = 0.1  # of token embeddings before training
STORED = torch.float16


def new_tokenizer() -> SimpleTokenizer:
    """Return CLIP's tokenizer for this model's context."""
    return SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def new_network(seed: int) -> CustomTextCLIP:
    """Return both towers as they are before training; the global random stream stays."""
    with seeded(seed):
        network = CustomTextCLIP(**CONFIG)
    with torch.no_grad():
        rows = START_SCALE * seeded_rows(seed)
        network.text.token_embedding.weight.copy_(rows)
    return network


def seeded_rows(seed: int) -> Tensor:
    """Return a row of zero mean and unit variance for each token of the vocabulary, (V, Dt).

    Drawn by NumPy's frozen legacy stream and uniform, so that every machine and version gets the
    same bits.
    """
    text = CONFIG["text_cfg"]
    draws = RandomState(seed).random_sample((text["vocab_size"], text["width"]))
    return torch.from_numpy((2 * draws - 1) * 3**0.5).float()


def pack(text: TextTransformer, touched: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store: the text tower in float16, and of its vocabulary only the
    rows that training touched.

    Args:
        text: the trained tower.
        touched: ids of the tokens in the training captions, (R,).
    """
    state = {k: v.detach().to(STORED).contiguous() for k, v in text.state_dict().items()}
    rows = text.token_embedding.weight.detach()[touched]
    # The other rows follow from the seed at the spread that training gave to these.
    state["token_embedding.scale"] = rows.std().float().reshape(1)
    state["token_embedding.rows"] = touched.to(torch.int32)
    state["token_embedding.weight"] = rows.to(STORED)
    return state


def unpack(state: dict[str, Tensor], seed: int) -> TextTransformer:
    """Return the text tower behind :func:`pack`, in float32."""
    text = new_text()
    state = {key: value.float() for key, value in state.items()}
    rows = state.pop("token_embedding.scale") * seeded_rows(seed)
    touched = state.pop("token_embedding.rows").long()
    state["token_embedding.weight"] = rows.index_copy(0, touched, state["token_embedding.weight"])
    text.load_state_dict(state)
    return text


def new_text() -> nn.Module:
    """Return the text tower alone, its weights to be loaded."""
    with torch.random.fork_rng(devices=[]):
        return TextTransformer(**CONFIG["text_cfg"], output_dim=CONFIG["embed_dim"])


# -- The embedded guide: a tiny open_clip model, trained on the embedded scenes; no download -----


FOLDER = Path(__file__).parent / "_micro_clip"


class MicroCLIPGuide(OpenCLIPText):
    """The text tower of the embedded model; the image tower only took part in its training.

    Its words are those of the scenes. Others get a random embedding, fixed by the seed and of the
    same spread: captions with them have features that tell them apart, yet say nothing more, and
    lie close together (mean cosine 0.91 among names of emoji).

    Args:
        max_length: tokens a caption is cut to, start and end included; 32 at most.
        device: where the tower goes; the CPU if not given.

    Raises:
        ConfigError: if the package's weights are missing or broken.

    Example:
        >>> guide = MicroCLIPGuide()
        >>> guide.encode(["a red circle", ""]).sentence.shape
        torch.Size([2, 64])
    """

    def __init__(self, max_length: int = 30, device: torch.device | str | None = None) -> None:
        state, seed = read_weights(FOLDER)
        self._trained = {*state["token_embedding.rows"].tolist()}
        tower = unpack(state, seed)
        super().__init__(tower, new_tokenizer(), max_length=max_length, device=device)

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {"max_length": self.max_length, "device": str(self.device)}

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords:
        """Count the words with a token that the training captions did not have."""
        counts = Counter(word for caption in captions for word in caption.split())
        unknown = Counter(
            {
                word: count
                for word, count in counts.items()
                if not self._trained.issuperset(self._tokenizer.encode(word))
            }
        )
        examples = tuple(word for word, _ in unknown.most_common(3))
        return UnknownWords(counts.total(), unknown.total(), examples)

    # What the training script needs, so that open_clip is imported in this folder only.
    image_size = CONFIG["vision_cfg"]["image_size"]
    new_network = staticmethod(new_network)
    new_tokenizer = staticmethod(new_tokenizer)

    @staticmethod
    def save(network: Any, touched: Tensor, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the text half of a trained network, and what is known of it as JSON.

        Args:
            network: as :meth:`new_network` gives it, trained.
            touched: ids of the tokens in the training captions, (R,).
            folder: where `weights.safetensors` and `about.json` go.
            facts: seed and whatever else is worth keeping.
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


def read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Return the stored tensors and the seed of the rest.

    Raises:
        ConfigError: if a file is missing or is not the one that was trained.
    """
    try:
        about = json.loads((folder / "about.json").read_text())
        weights = (folder / "weights.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"guide micro_clip: {error}; install lgvq_plugin again") from error
    if hashlib.sha256(weights).hexdigest() != about["sha256"]:
        raise ConfigError(
            f"guide micro_clip: {folder / 'weights.safetensors'} is not the trained file (sha256 "
            f"differs); install lgvq_plugin again, or run python -m {_TRAINING}"
        )
    return load(weights), about["seed"]


_TRAINING = f"{__package__.partition('.')[0]}.training.micro_clip"
