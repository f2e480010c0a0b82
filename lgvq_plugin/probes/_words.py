"""A vocabulary of words, made of training sentences."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


def trim(tokens: Tensor) -> Tensor:
    """Leave out the last columns that hold padding only, (B, L) to (B, l)."""
    return tokens[:, : int((tokens != PAD).sum(dim=1).max())]


class Words:
    """Words that stand in `least` sentences at least, the most frequent first.

    Example:
        >>> words = Words(["a red star", "a ring"], least=1)
        >>> words.encode(["a blue star"], length=6).tolist()
        [[1, 4, 3, 7, 2, 0]]
        >>> words.decode([4, 6, 2, 4])
        'a ring'
    """

    def __init__(self, sentences: Iterable[str], *, least: int):
        counts = Counter(word for sentence in sentences for word in set(sentence.split()))
        known = sorted(
            (word for word in counts if counts[word] >= least), key=lambda w: (-counts[w], w)
        )
        self.known = (*SPECIAL, *known)
        self._number = {word: i for i, word in enumerate(self.known)}

    def __len__(self) -> int:
        """Return the size, special tokens included."""
        return len(self.known)

    def encode(self, sentences: Sequence[str], *, length: int) -> Tensor:
        """Return (B, length) int64: start, words (cut to fit), end, padding."""
        rows = torch.full((len(sentences), length), PAD)
        for row, sentence in zip(rows, sentences, strict=True):
            words = [self._number.get(word, UNKNOWN) for word in sentence.split()][: length - 2]
            row[: len(words) + 2] = torch.tensor([START, *words, END])
        return rows

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the words before the first end token, without special ones."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number > UNKNOWN:
                words.append(self.known[number])
        return " ".join(words)
