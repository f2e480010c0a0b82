"""GlobalSemantic: the released loss, and what the corrected recipe adds to it."""

import math

import numpy as np
import pytest
import torch

from lgvq_plugin.functional import (
    global_semantic_loss,
    pool_phrases,
    pool_words,
    word_semantic_loss,
)
from lgvq_plugin.objectives import NegativeQueue


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def scores_of(given):
    """Cosines of all images with all captions, by NumPy."""
    projection = given.objective.project
    image = double(given.view.cls) @ double(projection.weight).T + double(projection.bias)
    return normalized(image) @ normalized(double(given.caption.features.sentence)).T


def nll(scores):
    return np.log(np.exp(scores).sum(1)) - np.diag(scores)


def test_paper_is_the_released_arithmetic(batch):
    given = batch("global_semantic", "paper")
    scores = np.exp(scores_of(given))
    expected = -np.log(np.diag(scores) / (scores.sum(1) + 1e-6)).mean()
    term = given.term()
    assert term.value.item() == pytest.approx(expected, abs=1e-5)
    assert term.log["temperature"] == 1.0


def test_corrected_is_symmetric_at_its_temperature(batch):
    given = batch("global_semantic", "corrected")
    scores = scores_of(given) / 0.07
    expected = (nll(scores).mean() + nll(scores.T).mean()) / 2
    assert given.term().value.item() == pytest.approx(expected, rel=1e-5)


def test_the_same_caption_is_no_negative(batch):
    strings = ["a red circle", "two boxes", "a  red circle"]
    corrected = batch("global_semantic", "corrected", strings, symmetric=False, temperature=1.0)
    scores = scores_of(corrected)
    rows = [[0, 1], [0, 1, 2], [1, 2]]
    expected = np.mean(
        [np.log(np.exp(scores[i, k]).sum()) - scores[i, i] for i, k in enumerate(rows)]
    )
    assert corrected.term().value.item() == pytest.approx(expected, abs=1e-5)
    paper = batch("global_semantic", "paper", strings)
    assert paper.term().value.item() == pytest.approx(nll(scores_of(paper)).mean(), abs=1e-5)


def test_temperature_learns_and_stays_in_range(batch):
    given = batch("global_semantic", "corrected")
    parameter = given.objective.log_temperature
    given.term().value.backward()
    assert parameter.grad.abs() > 0
    with torch.no_grad():
        parameter.fill_(math.log(1e-5))
    parameter.grad = None
    term = given.term()
    assert term.log["temperature"].item() == pytest.approx(0.01)
    term.value.backward()
    assert parameter.grad.abs() > 0  # not stuck at the border
    assert not batch("global_semantic", "paper").objective.log_temperature.requires_grad
    cold = batch("global_semantic", "paper", temperature=0.005).term()
    assert cold.log["temperature"].item() == pytest.approx(0.005)  # fixed: as it was asked for


def test_retrieval_top1_is_a_share_of_images(batch):
    strings = ["a red circle", "two boxes", "triangles", "two boxes"]
    given = batch("global_semantic", "corrected", strings)
    best = scores_of(given).argmax(1)
    expected = np.mean([strings[b] == own for b, own in zip(best, strings, strict=True)])
    assert given.term().log["retrieval_top1"].item() == pytest.approx(expected)


def test_pooled_reads_the_tokens(batch):
    given = batch("global_semantic", "corrected", source="pooled")
    mean = given.view.tokens.mean(1)
    expected = global_semantic_loss(
        given.objective.project(mean),
        given.caption.features.sentence,
        temperature=0.07,
        symmetric=True,
    )
    assert given.term().value.item() == pytest.approx(expected.item(), rel=1e-5)
    given.term().value.backward()
    assert given.view.cls.grad is None
    assert given.view.tokens.grad.abs().sum() > 0


def test_chance_and_perfect(batch):
    strings = ["a red circle", "two boxes"]
    given = batch("global_semantic", "paper", strings)
    same = given.but(cls=torch.zeros_like(given.view.cls))
    assert same.term().value.item() == pytest.approx(math.log(2), abs=0.2)


def test_the_queue_gives_the_last_pairs_as_negatives(batch):
    strings = ["a red circle", "two boxes"]
    given = batch("global_semantic", "corrected", strings, queue=3, temperature=0.5)
    given.objective.train()
    again = given.but(strings=["triangles", "two boxes"])
    alone = given.term().value.item()  # nothing is kept yet: the batch alone
    assert alone == pytest.approx(expected_with(given, [], []), rel=1e-5)
    assert again.term().value.item() == pytest.approx(
        expected_with(again, [given], [[0, 1]]), rel=1e-5
    )
    # The queue holds 3 of the 4 pairs now: the oldest, "a red circle", has gone.
    assert again.term().value.item() == pytest.approx(
        expected_with(again, [given, again], [[1], [0, 1]]), rel=1e-5
    )
    again.objective.eval()
    assert again.term().value.item() == pytest.approx(expected_with(again, [], []), rel=1e-5)


def expected_with(given, past, kept):
    """Both directions over the batch and the rows `kept` of each earlier batch, by loops."""

    def rows(each):
        layer = each.objective.project
        image = double(each.view.cls) @ double(layer.weight).T + double(layer.bias)
        text = double(each.caption.features.sentence)
        return normalized(image), normalized(text), each.caption.strings

    image, text, strings = rows(given)
    old = [
        (i[row], t[row], names[row])
        for (i, t, names), numbers in zip(map(rows, past), kept, strict=True)
        for row in numbers
    ]
    losses = []
    for mine, theirs, column in ((image, text, 1), (text, image, 0)):
        for i, name in enumerate(strings):
            far = [theirs[j] for j, other in enumerate(strings) if j == i or other != name]
            far += [pair[column] for pair in old if pair[2] != name]
            scores = np.array([mine[i] @ other for other in far]) / 0.5
            losses.append(np.log(np.exp(scores).sum()) - mine[i] @ theirs[i] / 0.5)
    return np.mean(losses)


def test_a_queue_is_in_the_state_dict_so_that_a_resumed_run_has_it(batch):
    given = batch("global_semantic", "corrected", queue=8)
    given.objective.train()
    given.term()
    other = batch("global_semantic", "corrected", queue=8)
    other.objective.train()
    other.objective.load_state_dict(given.objective.state_dict())
    assert other.term().value.item() == given.term().value.item()
    assert "queue.image" not in batch("global_semantic", "corrected").objective.state_dict()


def test_a_batch_larger_than_the_queue_leaves_its_last_pairs(batch):
    given = batch("global_semantic", "corrected", queue=2)
    given.objective.train()
    given.term()
    queue = given.objective.queue
    assert torch.equal(queue.token_ids, given.caption.features.token_ids[-2:])
    assert queue.is_filled.all()


def test_a_pair_that_is_not_finite_is_no_negative_later(batch):
    given = batch("global_semantic", "corrected", queue=8)
    given.objective.train()
    broken = given.view.cls.detach().clone()
    broken[1] = float("nan")
    given.but(cls=broken).term()
    assert given.objective.queue.is_filled.tolist()[:4] == [True, False, True, True]
    assert given.term().value.isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["image", "text"])
def test_the_queue_keeps_nothing_that_is_not_finite(side, value):
    queue = NegativeQueue(4, width=3, length=2)
    pairs = {"image": torch.ones(3, 3), "text": torch.ones(3, 3)}
    pairs[side][1, 2] = value
    queue.add(**pairs, token_ids=torch.arange(6).view(3, 2))
    assert queue.is_filled.tolist() == [True, False, True, False]
    assert queue.image.isfinite().all()
    assert queue.text.isfinite().all()


def test_a_queue_poisoned_by_an_earlier_version_is_cleaned_when_loaded():
    queue = NegativeQueue(2, width=3, length=2)
    queue.add(torch.ones(2, 3), torch.ones(2, 3), torch.arange(4).view(2, 2))
    state = queue.state_dict()
    state["text"] = torch.tensor([[float("nan")] * 3, [1.0] * 3])
    other = NegativeQueue(2, width=3, length=2)
    other.load_state_dict(state)
    assert other.is_filled.tolist() == [False, True]
    past = other.recall(torch.full((1, 2), 9))
    image = torch.ones(1, 3, requires_grad=True)
    global_semantic_loss(image, torch.ones(1, 3), symmetric=True, past=past).backward()
    assert image.grad.isfinite().all()


def test_words_are_a_second_term(batch):
    strings = ["a red circle", "two boxes", "a  red circle"]
    for span in (1, 2):
        with_words = batch(
            "global_semantic", "corrected", strings, words_weight=0.5, words_span=span
        )
        text = with_words.caption.features
        words, is_word = pool_words(text.tokens, text.word_ids)
        words, is_word = pool_phrases(words, is_word, span)
        same = torch.tensor([[a.split() == b.split() for b in strings] for a in strings])
        more = word_semantic_loss(
            with_words.view.tokens, words, is_word, temperature=0.07, symmetric=True, same=same
        )
        alone = batch("global_semantic", "corrected", strings).term().value
        expected = alone + 0.5 * more
        assert with_words.term().value.item() == pytest.approx(expected.item(), rel=1e-5)
