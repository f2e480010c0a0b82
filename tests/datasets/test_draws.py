"""Choices that depend on a key alone are uniform, and independent of those of other keys."""

import numpy as np
from scipy import stats

from lgvq_plugin.datasets.images import HashedDraws


def test_hashed_draws_are_uniform_and_unlike_each_other():
    draws = np.array([[d.unit() for _ in range(4)]
                      for d in (HashedDraws(0, 0, index) for index in range(4000))])  # fmt: skip
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 0.001
    close = np.corrcoef(draws.T) - np.eye(4)
    assert abs(close).max() < 0.06  # four standard errors of independent columns
    follows = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    assert abs(follows) < 0.06
