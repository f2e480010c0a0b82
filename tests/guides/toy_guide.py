"""A guide without a network: random vectors for words, mixed from left to right."""

import zlib

import torch

from lgvq_plugin.guides.base import AbstractGuide
from lgvq_plugin.types import TextFeatures, TextTokens

WORDS, START, END, PAD, HIDDEN = 500, 500, 501, 502, 503


class ToyGuide(AbstractGuide):
    """Words are split at blanks; a token's feature is the mean of the embeddings up to it."""

    def __init__(self, width: int = 6, max_length: int = 8, seed: int = 0):
        self.seed, self.max_length = seed, max_length
        self.token_dim = self.sentence_dim = width
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(HIDDEN + 1, width, generator=generator)

    def tokenize(self, captions):
        rows, words, cut = [], [], 0
        for caption in captions:
            ids = [zlib.crc32(word.encode()) % WORDS for word in caption.split()]
            cut += len(ids) > self.max_length - 2
            ids = ids[: self.max_length - 2]
            fill = self.max_length - 2 - len(ids)
            rows.append([START, *ids, END, *[PAD] * fill])
            words.append([-1, *range(len(ids)), -1, *[-1] * fill])
        token_ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, self.max_length)
        word_ids = torch.tensor(words, dtype=torch.int64).reshape(-1, self.max_length)
        self.truncated += cut
        return TextTokens(token_ids, token_ids != PAD, word_ids, cut)

    def encode(self, captions, token_mask=None):
        text = self.tokenize(captions)
        seen = text.token_ids
        if token_mask is not None:
            seen = seen.masked_fill(token_mask & (text.word_ids >= 0), HIDDEN)
        steps = torch.arange(1, self.max_length + 1)[:, None]
        tokens = self._table[seen].cumsum(dim=1) / steps
        end = text.attention_mask.sum(dim=1) - 1
        sentence = tokens[torch.arange(len(tokens)), end]
        return TextFeatures(
            text.token_ids, text.attention_mask, text.word_ids, tokens, sentence, self.vocabulary
        )

    @property
    def vocabulary(self):
        return self._table[:HIDDEN]

    @property
    def device(self):
        return torch.device("cpu")

    def to(self, device):
        return self

    @property
    def config(self):
        return {"width": self.token_dim, "max_length": self.max_length, "seed": self.seed}
