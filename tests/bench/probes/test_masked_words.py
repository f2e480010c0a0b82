"""Masked words: codes that tell the words give them back; the leaky protocol needs no codes."""

from typing import ClassVar

import pytest
import torch

from lgvq_plugin.bench.probes.language import MaskedWordsConfig, MaskedWordsProbe, mask_words
from lgvq_plugin.bench.probes.trainer import generator_at
from lgvq_plugin.guides.base import AbstractGuide
from lgvq_plugin.types import TextFeatures, TextTokens

CONFIG = MaskedWordsConfig(
    steps=120, batch_size=32, width=32, heads=2, depth=1, dropout=0.0, learning_rate=1e-2
)


class CausalGuide(AbstractGuide):
    """A token a word; its feature is the sum of the random embeddings of the words so far."""

    max_length, token_dim, sentence_dim = 16, 24, 24
    fingerprint = "toy"
    config: ClassVar = {}

    def __init__(self):
        self.numbers = {}
        self.table = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))

    @property
    def vocabulary(self):
        return self.table

    @property
    def device(self):
        return torch.device("cpu")

    def to(self, device):
        return self

    def weights(self):
        return {"table": self.table}

    def tokenize(self, captions):
        ids = torch.zeros(len(captions), 16, dtype=torch.long)
        words = torch.full((len(captions), 16), -1)
        for row, caption in enumerate(captions):
            for i, word in enumerate(caption.split()[:15]):
                ids[row, i] = self.numbers.setdefault(word, len(self.numbers) + 1)
                words[row, i] = i
        return TextTokens(ids, words >= 0, words)

    def encode(self, captions, token_mask=None):
        tokens = self.tokenize(captions)
        seen = self.table[tokens.token_ids]
        if token_mask is not None:
            seen = seen.masked_fill(token_mask[..., None], 0.0)
        states = seen.cumsum(dim=1)
        return TextFeatures(
            tokens.token_ids,
            tokens.attention_mask,
            tokens.word_ids,
            states,
            states[:, -1],
            self.table,
        )


@pytest.fixture
def captions(train, test):
    """Color and shape, with a word behind them that leaks them in a causal guide."""
    return [[f"a {t[0].split()[1]} {t[0].split()[2]} here"] for t in train.captions], [
        f"a {t[0].split()[1]} {t[0].split()[2]} here" for t in test.captions
    ]


@pytest.mark.slow
def test_it_needs_the_codes(train, test, captions):
    """Hidden: one of "a", color, shape, "here"; without codes color and shape are luck, 1 in 4."""
    probe = MaskedWordsProbe(CausalGuide(), CONFIG)
    got = probe.fit(train.codes, captions[0], progress=False).evaluate(test.codes, captions[1])
    assert got["mask_1/recall@1"] > 0.9
    assert got["mask_3/recall@1"] > 0.9
    assert got["shuffled/mask_1/recall@1"] < 0.8  # (2 + 2/4) / 4 = 0.625 expected
    assert got["mask_1/words"] == 64
    assert got["mask_3/words"] == 3 * 64
    assert got["mask_1/recall@5"] >= got["mask_1/recall@1"]


@pytest.mark.parametrize("protocol", ["leak_free", "leaky"])
def test_only_the_leaky_protocol_knows_what_is_hidden(train, captions, protocol):
    short = MaskedWordsConfig(steps=3, width=16, heads=1, depth=1)
    probe = MaskedWordsProbe(CausalGuide(), short, protocol=protocol)
    probe.fit(train.codes, captions[0], progress=False)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 1] = True
    codes = train.codes.codes(torch.tensor([0]))
    one, other = (probe._logits([f"a {c} star here"], hidden, [codes])[0] for c in ("red", "blue"))
    assert torch.equal(one, other) == (protocol == "leak_free")


@pytest.mark.parametrize("number", [1, 3])
def test_whole_words_are_hidden_and_one_is_left(number):
    ids = torch.tensor([[-1, 0, 0, 1, 2, 2, 3, 4, -1], [-1, 0, 1, -1, -1, -1, -1, -1, -1]])
    tokens = TextTokens(ids, ids >= 0, ids)
    counts = torch.zeros(5)
    for seed in range(300):
        mask = mask_words(tokens, torch.full((2,), number), generator_at(seed, 0))
        assert not mask[ids < 0].any()
        words = {int(w) for w in ids[0][mask[0]]}
        assert len(words) == number
        assert all(mask[0][ids[0] == w].all() for w in words)
        assert len({int(w) for w in ids[1][mask[1]]}) == 1
        counts[list(words)] += 1
    assert (counts / 300 - number / 5).abs().max() < 0.12  # every word alike


def test_words_unknown_to_training_are_never_found(train, captions):
    probe = MaskedWordsProbe(CausalGuide(), MaskedWordsConfig(steps=1, width=16, heads=1, depth=1))
    probe.fit(train.codes, captions[0], progress=False)
    strange = ["zebra okapi quokka dingo"] * len(train.codes)
    got = probe.recall(train.codes, strange, masked=1)
    assert got["recall@5"] == 0
    assert got["words"] == len(train.codes)


def test_short_captions_are_left_out_and_the_seed_fixes_the_words(train, captions):
    probe = MaskedWordsProbe(CausalGuide(), MaskedWordsConfig(steps=1, width=16, heads=1, depth=1))
    probe.fit(train.codes, captions[0], progress=False)
    texts = ["a red star here"] * 100 + ["red star"] * 156
    first = probe.recall(train.codes, texts, masked=3, seed=1)
    assert first["words"] == 300
    assert first == probe.recall(train.codes, texts, masked=3, seed=1)


def test_another_protocol_is_told():
    with pytest.raises(ValueError, match="leak_free"):
        MaskedWordsProbe(CausalGuide(), protocol="free")
