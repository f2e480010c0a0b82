"""A guide of a few lines: a word's token is its hash, its feature depends on its neighbours."""

import zlib

import torch

from lgvq_plugin.guides.base import AbstractGuide
from lgvq_plugin.types import TextFeatures, TextTokens

START, END, WORDS = 1, 2, 40


class ToyGuide(AbstractGuide):
    """Fixed random embeddings, (40, width); features mix each token with the caption's mean."""

    def __init__(self, width: int = 12, max_length: int = 8):
        self.max_length, self.token_dim, self.sentence_dim = max_length, width, width
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(WORDS, width, generator=generator)

    def tokenize(self, captions):
        ids = torch.zeros(len(captions), self.max_length, dtype=torch.int64)
        words = torch.full_like(ids, -1)
        for i, caption in enumerate(captions):
            known = caption.split()[: self.max_length - 2]
            tokens = [3 + zlib.crc32(word.encode()) % (WORDS - 3) for word in known]
            ids[i, : len(tokens) + 2] = torch.tensor([START, *tokens, END])
            words[i, 1 : len(tokens) + 1] = torch.arange(len(tokens))
        return TextTokens(ids, ids != 0, words)

    @torch.no_grad()
    def encode(self, captions, token_mask=None):
        text = self.tokenize(captions)
        seen = self.table[text.token_ids]
        if token_mask is not None:
            seen = seen.masked_fill(token_mask[..., None], 0.0)
        mean = seen.mean(dim=1, keepdim=True)
        tokens = torch.tanh(seen + 2 * mean)
        return TextFeatures(
            text.token_ids, text.attention_mask, text.word_ids, tokens, mean[:, 0], self.table
        )

    @property
    def vocabulary(self):
        return self.table

    @property
    def device(self):
        return self.table.device

    def to(self, device):
        self.table = self.table.to(device)
        return self

    @property
    def config(self):
        return {"width": self.token_dim, "max_length": self.max_length}
