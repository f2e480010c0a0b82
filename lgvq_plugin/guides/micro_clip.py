"""The embedded guide: a tiny open_clip model, trained on the embedded scenes; no download."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from .._files import write_bytes, write_json
from ..sockets import ConfigError
from ._micro_clip_network import CONFIG, new_network, new_tokenizer, pack, unpack
from ._open_clip_text import OpenCLIPText
from .base import UnknownWords

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
