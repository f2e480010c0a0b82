"""A guide without a network: a caption is the set of its words. For probes, as a control."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sockets import ConfigError
from .tokens import AbstractTokenGuide, Row, require_length

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "a an the and or but of in on at by for from to with into onto over under up down out off "
        "as is are was were be been being am it its it's this that these those there here he she "
        "his her him they their them who which what while some one two . , ; : ! ? - ' ( ) & /"
    )
)
"""Words without a feature: they say little about an image."""
PAD, START, END, MASK, FUNCTION = range(5)
LONGEST = 256


class BagOfWords(AbstractTokenGuide):
    """Sums a fixed random vector per word (feature hashing, Weinberger et al. 2009).

    As `evaluation.guide` it measures retrieval in a space that owes nothing to the text encoder
    that trained the codebook.

    Args:
        width: of the features.
        buckets: V; words are hashed to the ids from 5 on.
        max_length: longest caption in words, start and end included; the rest is cut.
        device: of the vectors.

    >>> guide = BagOfWords()
    >>> left, right, other = guide.encode(["a red dog", "the red dogs", "a cat"]).sentence
    >>> bool(left @ other < 0.3), round(float(left @ right), 3)
    (True, 1.0)
    """

    pad_id = PAD

    def __init__(
        self,
        width: int = 512,
        buckets: int = 32768,
        max_length: int = 42,
        device: str | None = None,
    ) -> None:
        for name, value, least in (("width", width, 1), ("buckets", buckets, FUNCTION + 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"guide.{name}: expected an int >= {least}, got {value!r}")
        self.max_length = require_length(max_length, LONGEST)
        self.token_dim = self.sentence_dim = width
        self._source = {"width": width, "buckets": buckets}
        draws = np.random.RandomState(0).standard_normal((buckets, width))  # frozen legacy stream
        table = F.normalize(torch.from_numpy(draws).float(), dim=-1)
        table[: FUNCTION + 1] = 0.0
        self._network = self._embedding = nn.Embedding.from_pretrained(table, freeze=True)
        self._words, self._mask_id = buckets, MASK
        self.to("cpu" if device is None else device)

    def _rows(self, captions: Sequence[str]) -> list[Row]:
        found = [WORD.findall(caption.lower()) for caption in captions]
        return [
            ([START, *map(self._id, words), END], [-1, *range(len(words)), -1]) for words in found
        ]

    def _id(self, word: str) -> int:
        if word in FUNCTION_WORDS:
            return FUNCTION
        stem = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
        return FUNCTION + 1 + zlib.crc32(stem.encode()) % (self._words - FUNCTION - 1)

    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        bags = [self._embedding(torch.unique(row)).sum(dim=0) for row in ids]
        return self._embedding(ids), F.normalize(torch.stack(bags), dim=-1)
