"""The contract of a text guide: captions in, frozen features out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import TextFeatures, TextTokens


class AbstractGuide(ABC):
    """A frozen text model, held outside the host's module tree.

    It is no `nn.Module`: it never enters a checkpoint, an EMA copy or a DDP bucket. Copies share
    the one network, and pickling stores how to build the guide, not its weights.

    Attributes:
        max_length: captions are cut to this many tokens, start and end included.
        token_dim: Dt, width of `TextFeatures.tokens` and of `vocabulary`.
        sentence_dim: Ds, width of `TextFeatures.sentence`.
        truncated: how many captions were cut since the guide was built.
    """

    max_length: int
    token_dim: int
    sentence_dim: int
    truncated: int = 0

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; too long ones are cut, [EOT] kept."""

    @abstractmethod
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions under `no_grad`, in float32, on :attr:`device`.

        Args:
            captions: B strings; an empty one gives start and end tokens only.
            token_mask: tokens to hide from the encoder, (B, T) bool; no feature of the result
                depends on what stood there, and `token_ids` still tells it.
        """

    @property
    @abstractmethod
    def vocabulary(self) -> Tensor:
        """The token embedding, (V, Dt), on :attr:`device`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network lies."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "AbstractGuide":
        """Move the network; returns self."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AbstractGuide":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.config)


def _rebuild(cls: type, config: dict[str, Any]) -> AbstractGuide:
    return cls(**config)
