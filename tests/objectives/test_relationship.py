"""Relationship: the released cells, or pairs of words, against loops in float64."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lgvq_plugin.config import RelationshipConfig
from lgvq_plugin.functional import relationship_loss
from lgvq_plugin.objectives import Relationship
from lgvq_plugin.sockets import ConfigError


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def released_layer(codes, module):
    """LN(GELU(FC codes))."""
    linear, _, norm = module
    x = double(codes) @ double(linear.weight).T + double(linear.bias)
    erf = double(torch.erf(torch.tensor(x / np.sqrt(2))))
    x = x * (1 + erf) / 2
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return x * double(norm.weight) + double(norm.bias)


def test_paper_is_the_released_arithmetic(batch):
    given = batch("relationship", "paper")
    text = given.caption.features
    codes = released_layer(given.view.codes.codes, given.objective.project)
    cells = []
    for row in range(len(codes)):
        f = normalized(double(text.tokens[row]))
        scores = f @ normalized(double(given.view.tokens[row])).T
        pad = double((text.token_ids[row] != 0)[:, None])
        c = normalized(codes[row][scores.argmax(1)] * scores.max(1)[:, None]) * pad
        f = f * pad
        cells.append((c @ c.T - f @ f.T) ** 2)
    assert cells[0].shape == (12, 12)  # start, end, pads and diagonal are cells too
    assert given.term().value.item() == pytest.approx(np.mean(cells), abs=1e-5)


@pytest.mark.parametrize("matching", ["soft", "straight_through"])
def test_corrected_compares_pooled_words_and_raw_codes(batch, matching):
    given = batch("relationship", "corrected", matching=matching)
    text = given.caption.features
    gaps = []
    for row, string in enumerate(given.caption.strings):
        ids = text.word_ids[row].numpy()
        words = [double(text.tokens[row])[ids == w].mean(0) for w in range(len(string.split()))]
        words = normalized(np.stack(words))
        scores = words @ normalized(double(given.view.tokens[row])).T / 0.1
        share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        if matching == "straight_through":
            share = (share == share.max(1, keepdims=True)).astype(float)
        matched = normalized(share @ double(given.view.codes.codes[row]))
        gap = matched @ matched.T - words @ words.T
        gaps += [gap[i, j] ** 2 for i, j in itertools.permutations(range(len(words)), 2)]
    assert given.term().value.item() == pytest.approx(np.mean(gaps), abs=1e-5)


def test_the_released_layer(batch):
    layer = batch("relationship", "paper").objective.project
    assert [type(m).__name__ for m in layer] == ["Linear", "GELU", "LayerNorm"]
    assert layer[0].weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert not [*batch("relationship", "corrected").objective.parameters()]
    big = Relationship(
        RelationshipConfig(project=True), guide=SimpleNamespace(token_dim=512), code_dim=256
    )
    assert sum(p.numel() for p in big.parameters()) == 132_608  # "0.13 M"
    assert big.project[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert big.project[0].bias.abs().max() <= 1 / 16  # as torch has it


def test_pieces_are_one_word_when_corrected(batch):
    """A word of three pieces has no pair with itself."""
    given = batch("relationship", "corrected", ["extraordinary"])
    assert given.caption.features.attention_mask.sum() == 2 + 4
    assert given.term().value.item() == 0
    assert batch("relationship", "paper", ["extraordinary"]).term().value.item() > 0


def test_a_piece_of_id_0_is_padding_when_released(batch):
    given = batch("relationship", "paper")
    text = given.caption.features
    ids = text.token_ids.clone()
    ids[:, 2] = 0
    caption = replace(given.caption, features=replace(text, token_ids=ids))
    mask = text.attention_mask.clone()
    mask[:, 2] = False
    codes = given.objective.project(given.view.codes.codes)
    expected = relationship_loss(text.tokens, mask, given.view.tokens, codes, variant="paper")
    got = replace(given, caption=caption).term()
    assert got.value.item() == pytest.approx(expected.item(), abs=1e-7)


def test_it_can_be_learned(batch):
    """Codes free to move come to relate as the words do."""
    given = batch("relationship", "corrected")
    codes, tokens = given.view.codes.codes, given.view.tokens
    optimizer = torch.optim.Adam([codes, tokens], lr=0.05)
    first = given.term().value.item()
    for _ in range(100):
        optimizer.zero_grad()
        given.term().value.backward()
        optimizer.step()
    assert given.term().value.item() < 0.1 * first


def test_between_captions_reads_sentences_and_mean_codes(batch):
    given = batch(
        "relationship", "corrected", ["a red circle", "", "two boxes"], between="captions"
    )
    codes = normalized(double(given.view.codes.codes.mean(1))[[0, 2]])
    sentences = normalized(double(given.caption.features.sentence)[[0, 2]])
    expected = (codes[0] @ codes[1] - sentences[0] @ sentences[1]) ** 2
    assert given.term().value.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="between: expected words, or variant: pairs"):
        batch("relationship", "paper", between="captions")
