"""A guide without a network: a caption is the set of its words. For probes, as a control."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sockets import ConfigError
from ..types import TextFeatures, TextTokens
from .base import AbstractGuide

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at by for from to with into onto over under up down out off as is "
    "are was were be been being am it its it's this that these those there here he she his her him "
    "they their them who which what while some one two".split()
)
"""Words without a feature: they say little about an image."""
SPECIAL = 2  # ids of padding and of words without a feature


class BagOfWords(AbstractGuide):
    """Sums a fixed random vector per word (feature hashing, Weinberger et al. 2009).

    As `evaluation.guide` it measures retrieval in a space that owes nothing to the text encoder
    that trained the codebook.

    Args:
        width: of the features.
        buckets: V; words are hashed to ids below it.
        max_length: longest caption in words; the rest is cut.

    >>> guide = BagOfWords()
    >>> left, right, other = guide.encode(["a red box", "the box is red", "a dog"]).sentence
    >>> round(float(left @ right), 3), bool(left @ other < 0.3)
    (1.0, True)
    """

    def __init__(self, width: int = 512, buckets: int = 32768, max_length: int = 40) -> None:
        for name, value, least in (
            ("width", width, 1),
            ("buckets", buckets, SPECIAL + 1),
            ("max_length", max_length, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"guide bag_of_words: {name} must be >= {least}, got {value!r}")
        self.max_length, self.token_dim, self.sentence_dim = max_length, width, width
        self.buckets = buckets
        draws = np.random.RandomState(0).standard_normal((buckets, width))  # frozen legacy stream
        table = F.normalize(torch.from_numpy(draws).float(), dim=-1)
        table[:SPECIAL] = 0.0
        self._vocabulary = table

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Return one token per word, (B, max_length)."""
        ids = torch.zeros(len(captions), self.max_length, dtype=torch.int64)
        words = torch.full_like(ids, -1)
        cut = []
        for row, caption in enumerate(captions):
            found = WORD.findall(caption.lower())
            if len(found) > self.max_length:
                cut.append(caption)
            for at, word in enumerate(found[: self.max_length]):
                ids[row, at], words[row, at] = self._id(word), at
        self.count_truncated(cut)
        return TextTokens(ids, ids != 0, words, len(cut))

    def _id(self, word: str) -> int:
        if word in FUNCTION_WORDS:
            return 1
        stem = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
        return SPECIAL + zlib.crc32(stem.encode()) % (self.buckets - SPECIAL)

    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Return the words' vectors, and the normalized sum over distinct words as sentence."""
        text = self.tokenize(captions)
        device = self.device
        seen = text.token_ids if token_mask is None else text.token_ids.masked_fill(token_mask, 0)
        bags = [torch.unique(row) for row in seen]
        table = self._vocabulary
        sums = [table[bag.to(device)].sum(dim=0) for bag in bags]
        sentence = torch.stack(sums) if sums else table.new_zeros(0, self.sentence_dim)
        return TextFeatures(
            token_ids=text.token_ids.to(device),
            attention_mask=text.attention_mask.to(device),
            word_ids=text.word_ids.to(device),
            tokens=table[seen.to(device)],
            sentence=F.normalize(sentence, dim=-1),
            vocabulary=table,
        )

    @property
    def vocabulary(self) -> Tensor:
        """Vectors of the words, (V, width); zeros for padding and function words."""
        return self._vocabulary

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._vocabulary.device

    def to(self, device: torch.device | str) -> "BagOfWords":
        """Move the vectors; returns self."""
        self._vocabulary = self._vocabulary.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {"width": self.token_dim, "buckets": self.buckets, "max_length": self.max_length}
