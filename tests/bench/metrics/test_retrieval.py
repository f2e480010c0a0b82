"""Recall at k: equals brute force over all orders of ties; several right items count once."""

import itertools

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.metrics.retrieval import retrieval_by_query, retrieval_recall


def brute_force(similarity: np.ndarray, relevant: np.ndarray, k: int) -> tuple[float, float]:
    """Mean over all orders that sort by similarity."""
    recalls, ranks = [], []
    for values, right in zip(similarity, relevant, strict=True):
        hits, firsts = [], []
        for order in itertools.permutations(range(len(values))):
            ranked = values[list(order)]
            if (np.diff(ranked) <= 0).all():
                found = right[list(order)]
                hits.append(found[:k].any())
                firsts.append(int(found.argmax()) + 1)
        recalls.append(np.mean(hits))
        ranks.append(np.mean(firsts))
    return float(np.mean(recalls)), float(np.mean(ranks))


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_equals_brute_force_with_ties_and_several_right_items(k):
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 3, (12, 6)).astype(float)
    relevant = rng.random((12, 6)) < 0.3
    relevant[np.arange(12), rng.integers(0, 6, 12)] = True
    got = retrieval_recall(torch.tensor(similarity), torch.tensor(relevant), ks=(k,))
    recall, rank = brute_force(similarity, relevant, k)
    assert got[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
    assert got["mean_rank"] == pytest.approx(rank, abs=1e-12)


def test_five_captions_an_image():
    similarity = torch.zeros(2, 10)
    similarity[0, 3] = 1  # the fourth caption of image 0
    similarity[1, 0] = 1  # a caption of the other image
    similarity[1, 9] = 0.5
    relevant = torch.eye(2).bool().repeat_interleave(5, dim=1)
    got = retrieval_recall(similarity, relevant, ks=(1, 2))
    assert got == {"recall@1": 0.5, "recall@2": 1.0, "mean_rank": 1.5}


def test_k_beyond_the_gallery_is_one():
    got = retrieval_recall(torch.zeros(3, 3), torch.eye(3).bool(), ks=(10,))
    assert got["recall@10"] == 1


@pytest.mark.parametrize(
    ("similarity", "relevant", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2).bool(), "one shape"),
        (torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), "no right item"),
        (torch.full((2, 2), torch.nan), torch.eye(2).bool(), "nan"),
    ],
)
def test_wrong_input_is_told(similarity, relevant, words):
    with pytest.raises(ValueError, match=words):
        retrieval_recall(similarity, relevant)


def test_each_query_has_the_rank_that_sorting_gives():
    generator = np.random.default_rng(4)
    similarity = generator.normal(size=(9, 7))
    right = generator.integers(7, size=9)
    order = (-similarity).argsort(axis=1)
    rank = (order == right[:, None]).argmax(axis=1) + 1
    relevant = torch.nn.functional.one_hot(torch.tensor(right), 7).bool()
    got = retrieval_by_query(torch.tensor(similarity), relevant, ks=(3,))
    np.testing.assert_allclose(got["mean_rank"], rank)
    np.testing.assert_allclose(got["recall@3"], rank <= 3, atol=1e-12)
