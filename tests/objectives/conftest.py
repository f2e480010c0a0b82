"""A tiny guide without weights on disk, and batches of codes and captions to drive objectives."""

import zlib
from dataclasses import dataclass, replace

import pytest
import torch

from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import AbstractGuide
from lgvq_plugin.objectives import Caption
from lgvq_plugin.sockets import resolve
from lgvq_plugin.types import Codes, CodeView, TextFeatures, TextTokens

PAD, START, END, HIDDEN = 0, 1, 2, 3
CODE_DIM, TOKEN_DIM, SENTENCE_DIM, CELLS = 6, 8, 5, 9


class ToyGuide(AbstractGuide):
    """Hashes pieces of at most 4 letters; a token's feature mixes in all tokens before it."""

    def __init__(self, max_length=12):
        generator = torch.Generator().manual_seed(0)
        self.max_length, self.token_dim, self.sentence_dim = max_length, TOKEN_DIM, SENTENCE_DIM
        self._vocabulary = torch.randn(40, TOKEN_DIM, generator=generator)
        self._project = torch.randn(TOKEN_DIM, SENTENCE_DIM, generator=generator)

    def tokenize(self, captions):
        ids = torch.full((len(captions), self.max_length), PAD)
        words = torch.full_like(ids, -1)
        for row, caption in enumerate(captions):
            pieces = [
                (4 + zlib.crc32(word[at : at + 4].encode()) % 36, number)
                for number, word in enumerate(caption.split())
                for at in range(0, len(word), 4)
            ][: self.max_length - 2]
            end = 1 + len(pieces)
            ids[row, 0], ids[row, end] = START, END
            for at, (piece, number) in enumerate(pieces, start=1):
                ids[row, at], words[row, at] = piece, number
        return TextTokens(ids, ids != PAD, words)

    @torch.no_grad()
    def encode(self, captions, token_mask=None):
        text = self.tokenize(captions)
        seen = text.token_ids
        if token_mask is not None:
            seen = seen.masked_fill(token_mask, HIDDEN)
        features = self._vocabulary[seen]
        causal = torch.ones(self.max_length, self.max_length).tril()
        features = features + causal @ features / causal.sum(1, keepdim=True)
        end = text.attention_mask.sum(1) - 1
        sentence = features[torch.arange(len(end)), end] @ self._project
        return TextFeatures(
            text.token_ids, text.attention_mask, text.word_ids, features, sentence, self._vocabulary
        )

    @property
    def vocabulary(self):
        return self._vocabulary

    @property
    def device(self):
        return torch.device("cpu")

    def to(self, device):
        return self

    @property
    def config(self):
        return {"max_length": self.max_length}


@dataclass(frozen=True)
class Batch:
    """An objective, what it sees, and the leaves that may get a gradient."""

    objective: torch.nn.Module
    view: CodeView
    caption: Caption

    def term(self):
        """Run the objective; the same draws in every call."""
        generator = torch.Generator().manual_seed(0)
        caption = replace(self.caption, generator=generator)
        if self.objective.draws_mask:
            strings, guide = caption.strings, caption.guide
            mask = self.objective.draw_mask(strings, caption.tokens, guide, generator)
            masked = guide.encode(strings, token_mask=mask)
            caption = replace(caption, mask=mask, masked=masked)
        return self.objective(self.view, caption)

    def but(self, **changes):
        """Change the captions ("strings") or the view ("cls", "tokens", "codes")."""
        view, caption = self.view, self.caption
        codes = replace(view.codes, codes=changes.pop("codes", view.codes.codes))
        strings = changes.pop("strings", caption.strings)
        guide = changes.pop("guide", caption.guide)
        caption = replace(
            caption,
            strings=strings,
            tokens=guide.tokenize(strings),
            guide=guide,
            features=guide.encode(strings),
        )
        return replace(self, view=replace(view, codes=codes, **changes), caption=caption)

    @property
    def leaves(self):
        return {"cls": self.view.cls, "tokens": self.view.tokens, "codes": self.view.codes.codes}


STRINGS = ["a red circle above", "two boxes", "triangles", "the green square touching a disc"]


@pytest.fixture
def batch():
    """Make a Batch: batch(name, recipe, strings=..., scale=1.0, **knobs of the objective).

    "corrected" is `corrected_v1`, which reads words and [CLS]; its successor has other defaults.
    """

    def make(name, recipe, strings=STRINGS, scale=1.0, max_length=12, **knobs):
        recipe = {"corrected": "corrected_v1"}.get(recipe, recipe)
        config = parse({"recipe": recipe, "objectives": {name: knobs}})
        guide = ToyGuide(max_length)
        torch.manual_seed(0)
        objective = resolve("objectives", name)(
            getattr(config.objectives, name), guide=guide, code_dim=CODE_DIM
        )
        objective.eval()  # dropout off, so that runs can be compared
        size = len(strings)
        cls, tokens, codes = (
            (scale * torch.randn(shape)).requires_grad_()
            for shape in ((size, TOKEN_DIM), (size, CELLS, TOKEN_DIM), (size, CELLS, CODE_DIM))
        )
        view = CodeView(Codes(codes, None, (3, 3), None), cls, tokens)
        tokens, features = guide.tokenize(strings), guide.encode(strings)
        caption = Caption(strings, tokens, features, guide, torch.Generator().manual_seed(0))
        return Batch(objective, view, caption)

    return make
