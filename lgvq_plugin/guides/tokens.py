"""What guides with a network of their own share: tokenize, truncate, mask and encode captions."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError
from ..types import TextFeatures, TextTokens
from .base import AbstractGuide

logger = logging.getLogger(__name__)

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and word numbers of one caption, start and end included."""


class AbstractTokenGuide(AbstractGuide):
    """A frozen network over rows of tokens; masked words become one token id.

    The tokens of the last batch are kept: a step asks for them whole and once more with masked
    words, and a truncated caption counts once.
    """

    _network: nn.Module
    _source: Mapping[str, Any]  # constructor arguments, except max_length and device
    _words: int  # size of the vocabulary, without the row for masked words
    _pad: int
    _mask_id: int
    _last: tuple[tuple[str, ...], TextTokens] | None = None

    @property
    @abstractmethod
    def _embedding(self) -> nn.Embedding:
        """The network's token embedding."""

    @abstractmethod
    def _rows(self, captions: Sequence[str]) -> list[Row]:
        """Return token ids and word numbers of each caption, start and end included."""

    @abstractmethod
    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, Dt) and sentence (B, Ds) of ids and mask (B, T) on the device."""

    @property
    def vocabulary(self) -> Tensor:
        """Token embedding, (V, Dt), on :attr:`device`."""
        return self._embedding.weight[: self._words]

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._embedding.weight.device

    def to(self, device: torch.device | str) -> "AbstractTokenGuide":
        """Move the network; returns self."""
        self._network.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {**self._source, "max_length": self.max_length, "device": str(self.device)}

    def weights(self) -> Mapping[str, Tensor]:
        """Return the network's tensors."""
        return self._network.state_dict()

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; long ones are cut, their end token kept."""
        key = tuple(captions)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        rows = self._rows(captions)
        tokens = assemble(rows, length=self.max_length, pad=self._pad)
        if tokens.cut and not self.truncated:
            warn_of_truncation(self.max_length)
        self.truncated += tokens.cut
        self._last = key, tokens
        return tokens

    @torch.no_grad()
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions; `token_mask` (B, T) masks words, never start, end or padding."""
        text = self.tokenize(captions)
        shape, seen = tuple(text.token_ids.shape), text.token_ids
        if token_mask is not None:
            if tuple(token_mask.shape) != shape:
                raise ValueError(f"token_mask: expected {shape}, got {tuple(token_mask.shape)}")
            seen = seen.masked_fill(token_mask.cpu() & (text.word_ids >= 0), self._mask_id)
        vocabulary = self.vocabulary
        device = vocabulary.device
        attention_mask = text.attention_mask.to(device)
        if len(captions):
            with torch.autocast(device.type, enabled=False):
                tokens, sentence = self._forward(seen.to(device), attention_mask)
        else:
            tokens = vocabulary.new_zeros(*shape, self.token_dim)
            sentence = vocabulary.new_zeros(0, self.sentence_dim)
        return TextFeatures(
            token_ids=text.token_ids.to(device),
            attention_mask=attention_mask,
            word_ids=text.word_ids.to(device),
            tokens=tokens,
            sentence=sentence,
            vocabulary=vocabulary,
        )


def assemble(rows: Sequence[Row], *, length: int, pad: int) -> TextTokens:
    """Cut rows to `length`, keeping their last token, and pad the shorter ones.

    Args:
        rows: B captions; the last token of each is its end token.
        length: T.
        pad: token id of the padding.

    Returns:
        (B, T) tokens, with the number of truncated rows.

    Example:
        >>> tokens = assemble([([7, 5, 6, 9], [-1, 0, 1, -1]), ([7, 9], [-1, -1])],
        ...                   length=3, pad=0)
        >>> tokens.token_ids.tolist(), tokens.word_ids.tolist(), tokens.cut
        ([[7, 5, 9], [7, 9, 0]], [[-1, 0, -1], [-1, -1, -1]], 1)
    """
    token_ids = torch.full((len(rows), length), pad)
    word_ids = torch.full((len(rows), length), -1)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, words) in enumerate(rows):
        if len(ids) > length:
            ids, words = [*ids[: length - 1], ids[-1]], [*words[: length - 1], words[-1]]
        token_ids[row, : len(ids)] = torch.tensor(ids)
        word_ids[row, : len(words)] = torch.tensor(words)
        attention_mask[row, : len(ids)] = True
    cut = sum(len(ids) > length for ids, _ in rows)
    return TextTokens(token_ids, attention_mask, word_ids, cut)


def warn_of_truncation(max_length: int) -> None:
    """Log the first truncated caption of a guide."""
    logger.warning(
        "a caption has more than max_length = %d tokens and is cut, its end token kept; the "
        "guide's `truncated` counts further ones",
        max_length,
    )


def require_length(max_length: int, limit: int) -> int:
    """Return `max_length`; raise ConfigError unless it is an int from 3 to `limit`."""
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise ConfigError(f"guide.max_length: expected an int, got {max_length!r}")
    if not 3 <= max_length <= limit:
        raise ConfigError(
            f"guide.max_length: expected 3 to {limit}, the model's context; got {max_length}"
        )
    return max_length


def with_mean_row(embedding: nn.Embedding) -> nn.Embedding:
    """Return a frozen embedding with one more row, the mean of all: a token for masked words."""
    rows = torch.cat([embedding.weight, embedding.weight.mean(dim=0, keepdim=True)]).detach()
    return nn.Embedding.from_pretrained(rows, padding_idx=embedding.padding_idx, freeze=True)
