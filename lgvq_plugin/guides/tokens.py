"""Rows of token ids of unequal length become one `TextTokens`."""

import logging
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import TextFeatures, TextTokens
from .base import AbstractGuide

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and word numbers of one caption, start and end included."""


def number_words(ends: Sequence[bool]) -> list[int]:
    """Return the word number of each piece, given which pieces end a word.

    Example:
        >>> number_words([True, False, True, True])  # a | check er | board
        [0, 1, 1, 2]
    """
    numbers, word = [], 0
    for is_end in ends:
        numbers.append(word)
        word += is_end
    return numbers


def assemble(rows: Sequence[Row], *, length: int, pad: int) -> TextTokens:
    """Cut rows to `length`, their last token kept, and pad the shorter ones.

    Args:
        rows: B captions; the last token of each is its end token.
        length: T.
        pad: token id of the padding.

    Returns:
        (B, T) tokens, which tell how many rows were cut.

    Example:
        >>> tokens = assemble([([7, 5, 6, 9], [-1, 0, 1, -1]), ([7, 9], [-1, -1])],
        ...                   length=3, pad=0)
        >>> tokens.token_ids.tolist(), tokens.word_ids.tolist(), tokens.cut
        ([[7, 5, 9], [7, 9, 0]], [[-1, 0, -1], [-1, -1, -1]], 1)
    """
    token_ids = torch.full((len(rows), length), pad)
    word_ids = torch.full((len(rows), length), -1)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    cut = 0
    for row, (ids, words) in enumerate(rows):
        if len(ids) > length:
            cut += 1
            ids, words = [*ids[: length - 1], ids[-1]], [*words[: length - 1], words[-1]]
        token_ids[row, : len(ids)] = torch.tensor(ids)
        word_ids[row, : len(words)] = torch.tensor(words)
        attention_mask[row, : len(ids)] = True
    return TextTokens(token_ids, attention_mask, word_ids, cut)


# -- What guides with a network of their own share: cutting, counting, hiding; members encode ----


logger = logging.getLogger(__name__)


class AbstractTokenGuide(AbstractGuide):
    """Captions to rows of tokens, hidden words to one id, ids to features.

    The tokens of the last batch are kept: a step asks for them as they are and once more with
    words hidden, and a cut caption shall count once.
    """

    _pad: int
    _hidden: int
    _last: tuple[tuple[str, ...], TextTokens] | None = None

    @abstractmethod
    def _row(self, caption: str) -> Row:
        """Return token ids and word numbers, start and end included."""

    @abstractmethod
    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, Dt) and sentence (B, Ds) of ids and mask (B, T) on the device."""

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; too long ones are cut, the end kept."""
        key = tuple(captions)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        rows = [self._row(caption) for caption in captions]
        tokens = assemble(rows, length=self.max_length, pad=self._pad)
        if tokens.cut and not self.truncated:
            logger.warning(
                "a caption has more than max_length = %d tokens and is cut, its end token kept; "
                "the guide's `truncated` goes on counting",
                self.max_length,
            )
        self.truncated += tokens.cut
        self._last = key, tokens
        return tokens

    @torch.no_grad()
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions; `token_mask` (B, T) hides words, never start, end or padding."""
        text = self.tokenize(captions)
        shape, seen = tuple(text.token_ids.shape), text.token_ids
        if token_mask is not None:
            if tuple(token_mask.shape) != shape:
                raise ValueError(f"token_mask: expected {shape}, got {tuple(token_mask.shape)}")
            seen = seen.masked_fill(token_mask.cpu() & (text.word_ids >= 0), self._hidden)
        attention_mask = text.attention_mask.to(self.device)
        if len(captions):
            with torch.autocast(self.device.type, enabled=False):
                tokens, sentence = self._forward(seen.to(self.device), attention_mask)
        else:
            tokens = self.vocabulary.new_zeros(*shape, self.token_dim)
            sentence = self.vocabulary.new_zeros(0, self.sentence_dim)
        return TextFeatures(
            token_ids=text.token_ids.to(self.device),
            attention_mask=attention_mask,
            word_ids=text.word_ids.to(self.device),
            tokens=tokens,
            sentence=sentence,
            vocabulary=self.vocabulary,
        )
