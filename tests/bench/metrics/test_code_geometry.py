"""Code geometry: SciPy's distances, correlations and chi-square statistics."""

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from lgvq_plugin.bench.metrics.codebook import (
    nearest_code_distances,
    similarity_gap,
    word_code_association,
)


def test_nearest_distances_equal_scipy():
    codes = np.random.default_rng(0).normal(size=(1500, 6))  # more than one block
    distances = scipy.spatial.distance.cdist(codes, codes)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(1) / np.sqrt((codes**2).sum(1).mean())
    got = nearest_code_distances(torch.tensor(codes))
    assert got["min"] == pytest.approx(nearest.min(), rel=1e-9)
    assert got["mean"] == pytest.approx(nearest.mean(), rel=1e-9)
    assert got["max"] == pytest.approx(nearest.max(), rel=1e-9)
    assert got["median"] == pytest.approx(np.sort(nearest)[749], rel=1e-9)


def test_twins_are_at_distance_zero():
    assert nearest_code_distances(torch.ones(3, 2))["max"] == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="two codes"):
        nearest_code_distances(torch.ones(1, 2))


def test_similarity_gap_equals_scipy():
    rng = np.random.default_rng(0)
    words, codes = rng.normal(size=(9, 5)), rng.normal(size=(9, 3))
    wanted = 1 - scipy.spatial.distance.pdist(words, "cosine")
    got = 1 - scipy.spatial.distance.pdist(codes, "cosine")
    gap = similarity_gap(torch.tensor(words), torch.tensor(codes))
    assert gap["pairs"] == 36
    assert gap["mse"] == pytest.approx(((wanted - got) ** 2).mean(), rel=1e-9)
    assert gap["pearson"] == pytest.approx(scipy.stats.pearsonr(wanted, got)[0], rel=1e-9)
    assert gap["spearman"] == pytest.approx(scipy.stats.spearmanr(wanted, got)[0], rel=1e-9)


def test_spearman_with_ties_equals_scipy():
    words = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 1]])
    codes = torch.tensor([[1.0, 2], [3, 4], [1, 2], [0, 1], [2, 0]])
    wanted, got = (
        np.round(1 - scipy.spatial.distance.pdist(x.numpy(), "cosine"), 12) for x in (words, codes)
    )
    value = similarity_gap(words, codes)["spearman"]
    # Cosines that are equal on paper may differ in the last bit; both sides see rounded ones.
    assert value == pytest.approx(scipy.stats.spearmanr(wanted, got)[0], abs=0.1)


def test_pairs_stay_within_a_caption_and_padding_counts_nothing():
    words = torch.randn(2, 4, 5)
    codes = torch.randn(2, 4, 3)
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    got = similarity_gap(words, codes, valid)
    parts = [similarity_gap(words[0, :3], codes[0, :3]), similarity_gap(words[1, :2], codes[1, :2])]
    assert got["pairs"] == 4
    assert got["mse"] == pytest.approx((3 * parts[0]["mse"] + parts[1]["mse"]) / 4, rel=1e-9)


def test_equal_geometry_is_perfect_and_scale_does_not_matter():
    words = torch.randn(12, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    got = similarity_gap(words, 3 * words @ rotation)
    assert got["mse"] == pytest.approx(0, abs=1e-10)
    assert got["pearson"] == pytest.approx(1, abs=1e-6)


def test_association_equals_scipys_g_statistic():
    rng = np.random.default_rng(0)
    has_word, has_code = rng.random((200, 4)) < 0.3, rng.random((200, 5)) < 0.4
    has_code[:, 0] |= has_word[:, 0]
    has_code[:, 1] &= ~has_word[:, 1]
    got = word_code_association(torch.tensor(has_word), torch.tensor(has_code)).numpy()
    for w in range(4):
        for k in range(5):
            table = np.histogram2d(has_word[:, w], has_code[:, k], bins=[2, 2])[0]
            g = scipy.stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")[0]
            assert got[w, k] ** 2 == pytest.approx(g, rel=1e-4, abs=1e-5)
    assert got[0, 0] > 5
    assert got[1, 1] < -3


def test_rare_words_and_codes_speak_for_nothing():
    seen = torch.zeros(50, 1, dtype=torch.bool)
    seen[:4] = True
    assert float(word_code_association(seen, seen)) == 0
    assert float(word_code_association(seen, seen, min_count=4)) > 0
