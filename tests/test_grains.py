"""Words, phrases and captions as grains: equal to loops in float64, finite in every corner."""

import numpy as np
import pytest
import torch

from lgvq_plugin.functional import caption_relationship_loss, pool_phrases, word_semantic_loss


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def cosine(a, b):
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def softmax_loss(scores, allowed):
    return np.mean(
        [
            np.log(np.exp(row[free]).sum()) - row[i]
            for i, (row, free) in enumerate(zip(scores, allowed, strict=True))
        ]
    )


def test_words_are_compared_with_their_best_patches():
    tokens, words = draw(3, 4, 5), draw(3, 2, 5, seed=1)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    same = torch.eye(3, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    scores = np.zeros((3, 3))
    for image in range(3):
        for caption in range(3):
            own = [w for w, real in zip(words[caption], mask[caption], strict=True) if real]
            best = [max(cosine(word, patch) for patch in tokens[image]) for word in own]
            scores[image, caption] = np.mean(best) / 0.2
    allowed = ~same.numpy() | np.eye(3, dtype=bool)
    expected = (softmax_loss(scores, allowed) + softmax_loss(scores.T, allowed)) / 2
    value = word_semantic_loss(tokens, words, mask, temperature=0.2, symmetric=True, same=same)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    one_way = word_semantic_loss(tokens, words, mask, temperature=0.2, same=same)
    assert one_way.item() == pytest.approx(softmax_loss(scores, allowed), rel=1e-5)
    value.backward()
    assert tokens.grad.abs().sum() > 0
    assert words.grad is None  # a target


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_captions_without_words_leave_the_loss_finite(batch):
    tokens = draw(batch, 4, 5)
    value = word_semantic_loss(tokens, draw(batch, 2, 5), torch.zeros(batch, 2).bool())
    value.backward()
    assert value.item() == pytest.approx(np.log(max(batch, 1)))
    assert tokens.grad.isfinite().all()


def test_phrases_are_means_of_runs_and_a_short_caption_is_one():
    words = (
        torch.arange(1.0, 9).reshape(2, 4, 1)
        * torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])[..., None]
    )
    is_word = words[..., 0] > 0
    phrases, is_phrase = pool_phrases(words, is_word, 2)
    assert phrases[is_phrase].flatten().tolist() == [1.5, 2.5, 5.0]
    again, every = pool_phrases(words, is_word, 1)
    assert torch.equal(again, words)
    assert torch.equal(every, is_word)
    three, one = pool_phrases(words, is_word, 3)
    assert three[one].flatten().tolist() == [2.0, 5.0]
    assert not pool_phrases(words, torch.zeros(2, 4).bool(), 2)[1].any()


def test_captions_relate_as_their_images():
    sentences, codes = draw(4, 6), draw(4, 9, 3, seed=1)
    means = codes.mean(1)
    gaps = [
        (cosine(means[i], means[j]) - cosine(sentences[i], sentences[j])) ** 2
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    value = caption_relationship_loss(sentences, codes)
    assert value.item() == pytest.approx(np.mean(gaps), rel=1e-5)
    value.backward()
    assert codes.grad.abs().sum() > 0
    assert sentences.grad is None


@pytest.mark.parametrize("batch", [0, 1])
def test_fewer_than_two_images_have_no_relation(batch):
    codes = draw(batch, 9, 3)
    value = caption_relationship_loss(draw(batch, 6), codes)
    value.backward()
    assert value.item() == 0
    assert codes.grad is not None
