"""Rows of token ids of unequal length become one `TextTokens`."""

from collections.abc import Sequence

import torch

from ..types import TextTokens

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
