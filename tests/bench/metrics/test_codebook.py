"""Codebook usage: equals NumPy, however the indices are split."""

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.metrics.codebook import CodebookUsage


@pytest.mark.parametrize("batches", [1, 4])
def test_equals_numpy_however_split(batches):
    rng = np.random.default_rng(0)
    indices = np.minimum(rng.geometric(0.2, (8, 4, 4)), 31)
    metric = CodebookUsage(40)
    for part in np.split(indices, batches):
        metric.update(torch.tensor(part))
    values, counts = np.unique(indices, return_counts=True)
    share = counts / counts.sum()
    bits = -(share * np.log2(share)).sum()
    got = {name: float(value) for name, value in metric.compute().items()}
    wanted = {
        "usage": len(values) / 40,
        "perplexity": 2**bits,
        "dead_codes": 40 - len(values),
        "entropy": bits,
    }
    assert got == pytest.approx(wanted, rel=1e-9)


def test_histograms_of_ranks_are_summed_before_the_logarithm():
    merged = CodebookUsage(2)
    merged.update(torch.tensor([0, 0]))
    other = CodebookUsage(2)
    other.update(torch.tensor([1, 1]))
    # What torchmetrics does at sync: each state of the ranks is stacked and reduced.
    stacked = torch.stack([merged.counts, other.counts])
    merged.counts = merged._reductions["counts"](stacked)
    assert float(merged.compute()["perplexity"]) == pytest.approx(2)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_codebook_is_told(index):
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        CodebookUsage(4).update(torch.tensor([0, index]))
