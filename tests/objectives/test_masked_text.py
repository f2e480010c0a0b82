"""MaskedText: the released masks, leak included, and the corrected ones, which do not leak."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lgvq_plugin.functional import sample_token_mask, sample_truncated_ratio

LONG = [f"one two six ten cat dog sun map {name}" for name in "abcdefgh"]


class Recorder(nn.Module):
    """Stands where the decoder was: keeps what it is given, and answers with fixed logits."""

    def __init__(self, batch, length, vocabulary):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.logits = torch.randn(batch, length, vocabulary, generator=generator)

    def forward(self, text, mask, memory, vocabulary, attention_mask=None, choices=None):
        self.given = text, mask, memory, vocabulary, attention_mask
        return self.logits[mask] if choices is None else self.logits[mask][:, choices]


def recorded(given):
    """Run the objective on a recorder; return the recorder and the term."""
    text = given.caption.features
    recorder = Recorder(*text.token_ids.shape, len(text.vocabulary))
    return recorder, replace(given, objective=swap(given.objective, recorder)).term()


def swap(objective, decoder):
    objective.decoder = decoder
    return objective


def test_paper_is_the_released_arithmetic(batch):
    given = batch("masked_text", "paper", LONG)
    recorder, term = recorded(given)
    text, mask, memory, vocabulary, attention_mask = recorder.given
    features = given.caption.features
    # Full logits, smoothed over all classes, weighted mean with the released denominator.
    logits = recorder.logits.numpy().astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, features.token_ids.numpy()[..., None], -1)[..., 0]
    weight = (mask & (features.token_ids != 0)).numpy()
    expected = ((0.9 * nll - 0.1 * logp.mean(-1)) * weight).sum() / (weight.sum() + 5e-6)
    assert weight.sum() > 8
    assert term.value.item() == pytest.approx(expected, abs=1e-5)
    # What the decoder sees: features of the whole caption, pads zeroed but attended to, and [CLS].
    real = features.attention_mask
    assert torch.equal(text[real], features.tokens[real])
    assert not text[~real].any()
    assert attention_mask is None
    assert torch.equal(memory[:, 0], given.view.cls)
    assert torch.equal(memory[:, 1:], given.view.tokens)
    assert torch.equal(vocabulary, given.caption.guide.vocabulary)


def test_paper_masks_by_one_ratio_a_batch(batch):
    given = batch("masked_text", "paper", LONG)
    recorder, _ = recorded(given)
    generator = torch.Generator().manual_seed(0)
    ratio = sample_truncated_ratio(mean=0.5, deviation=0.1, low=0.1, high=0.3, generator=generator)
    text = given.caption.features
    mask = sample_token_mask(text.attention_mask, text.word_ids, ratio=ratio, generator=generator)
    assert torch.equal(recorder.given[1], mask)
    assert given.objective.config.dropout == 0.1


@pytest.mark.parametrize("vocabulary", ["seen", "full"])
def test_corrected_hides_whole_words_before_the_encoder(batch, vocabulary):
    given = batch("masked_text", "corrected", LONG, vocabulary=vocabulary)
    recorder, term = recorded(given)
    text, mask, memory, _, attention_mask = recorder.given
    features = given.caption.features
    assert mask.any(1).all()
    assert torch.equal(attention_mask, features.attention_mask)
    assert torch.equal(memory, given.view.tokens)
    again = given.caption.guide.encode(LONG, token_mask=mask)
    real = features.attention_mask
    assert torch.equal(text[real], again.tokens[real])
    logits = recorder.logits[mask].double()
    if vocabulary == "seen":  # the others have probability 0
        occurs = torch.zeros(logits.shape[1], dtype=torch.bool)
        occurs[features.token_ids[features.word_ids >= 0]] = True
        logits[:, ~occurs] = float("-inf")
    expected = nn.functional.cross_entropy(logits, features.token_ids[mask])
    assert term.value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_words_seen_in_training_stay_choices(batch):
    first, later = batch("masked_text", "corrected", LONG[:4]), LONG[4:]
    objective = first.objective.train()
    first.term()
    seen = first.caption.tokens
    expected = {*seen.token_ids[seen.word_ids >= 0].tolist()}
    assert {*objective.seen.nonzero()[:, 0].tolist()} == expected
    # In validation a batch's own words are choices too, but are not kept.
    objective.eval()
    first.but(strings=["zebra " + text for text in later]).term()
    assert {*objective.seen.nonzero()[:, 0].tolist()} == expected


def test_an_average_that_writes_the_buffer_is_read(batch):
    given = batch("masked_text", "corrected", LONG)
    given.objective.train()
    given.term()
    given.objective.seen[:] = True  # as an EMA copies buffers
    given.objective.eval()
    device = torch.device("cpu")
    assert len(given.objective._words_seen(given.caption.tokens, device)) == 40


def test_words_seen_are_in_the_state_and_may_be_missing(batch):
    given = batch("masked_text", "corrected", LONG)
    given.objective.train()
    given.term()
    state = given.objective.state_dict()
    again = batch("masked_text", "corrected", LONG).objective
    again.load_state_dict(state)
    assert torch.equal(again.seen, given.objective.seen)
    old = {key: value for key, value in state.items() if key != "seen"}
    again.load_state_dict(old)  # written before there were such words
    assert not again.seen.any()
    batch("masked_text", "corrected", LONG, vocabulary="full").objective.load_state_dict(state)


def differing(given, mask):
    """The same batch, but a word that is hidden reads otherwise (same number of pieces)."""
    strings = list(given.caption.strings)
    words = strings[0].split()
    number = int(given.caption.features.word_ids[0][mask[0]][0])
    words[number] = "bird"
    other = given.but(strings=[" ".join(words), *strings[1:]])
    before, after = given.caption.features, other.caption.features
    assert torch.equal(before.word_ids, after.word_ids)
    assert not torch.equal(before.token_ids, after.token_ids)
    return other


@pytest.mark.parametrize(("mask_at", "leaks"), [("input", False), ("output", True)])
def test_leak(batch, mask_at, leaks):
    """In the released code later tokens, the end at least, tell what stood under the mask."""
    given = batch("masked_text", "corrected", LONG, mask_at=mask_at, ratio=[0.3, 0.4])
    decoder = given.objective.decoder
    text, mask, memory, vocabulary, real = recorded(given)[0].given
    other = recorded(differing(given, mask))[0].given
    assert torch.equal(other[1], mask)
    one = decoder(text, mask, memory, vocabulary, real)
    two = decoder(other[0], mask, memory, vocabulary, real)
    assert torch.equal(one, two) is not leaks
    if leaks:
        assert not torch.allclose(one, two, atol=1e-4)


def test_recall_is_the_share_of_right_words(batch):
    given = batch("masked_text", "corrected", LONG)
    recorder, term = recorded(given)
    _, mask, *_ = recorder.given
    targets = given.caption.features.token_ids
    recorder.logits[mask] = -1.0
    right = mask.nonzero()[::2]
    for row, column in right:
        recorder.logits[row, column, targets[row, column]] = 1.0
    rest = mask.nonzero()[1::2]
    for row, column in rest:
        recorder.logits[row, column, (targets[row, column] + 1) % 40] = 1.0
    term = given.term()
    assert term.log["word_recall"].item() == pytest.approx(len(right) / int(mask.sum()))


@pytest.mark.parametrize("recipe", ["paper", "corrected"])
def test_everything_hidden(batch, recipe):
    given = batch("masked_text", recipe, mask_at="input", ratio=[1.0, 1.0])
    term = given.term()
    term.value.backward()
    assert term.value.isfinite()
    assert given.view.tokens.grad.isfinite().all()


def test_a_piece_of_id_0_is_padding_when_released(batch):
    given = batch("masked_text", "paper", LONG, ratio=[0.9, 1.0])
    text = given.caption.features
    ids = text.token_ids.clone()
    ids[:, 3] = 0
    caption = replace(given.caption, features=replace(text, token_ids=ids))
    recorder, _ = recorded(replace(given, caption=caption))
    assert not recorder.given[1][:, 3].any()
    assert not recorder.given[0][:, 3].any()


@pytest.mark.slow
def test_it_learns_from_the_image_alone(batch):
    """Four images, four one-word captions: nothing but the tokens can tell the word."""
    strings = ["alfa", "echo", "kilo", "zulu"]
    given = batch("masked_text", "corrected", strings)
    # Each image has tokens of its own kind, far from those of the others.
    tokens = 3 * torch.eye(4, 8)[:, None].expand(4, 9, 8)
    given = replace(given, view=replace(given.view, tokens=tokens))
    optimizer = torch.optim.Adam(given.objective.parameters(), lr=1e-2)
    first = given.term().value.item()
    for _ in range(80):
        optimizer.zero_grad()
        given.term().value.backward()
        optimizer.step()
    last = given.term()
    assert last.value.item() < 1.0 < math.log(4) < first  # log 4: the words, without the images
    assert last.log["word_recall"] >= 0.75
