"""The embedded model: its size, its seeded start, and how its text half is packed and unpacked."""

from typing import Any

import torch
from numpy.random import RandomState
from open_clip import CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ..functional import seeded

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
