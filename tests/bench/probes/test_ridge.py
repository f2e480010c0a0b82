"""Ridge regression: equals NumPy's least squares with stacked penalty rows."""

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.probes.features import CodeFeatures
from lgvq_plugin.bench.probes.ridge import STRENGTHS, Scaling, fit_ridges, ridge_solver


@pytest.mark.parametrize(("count", "width"), [(40, 7), (12, 30)])
def test_both_forms_equal_least_squares(count, width):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(count, width)) + 3, rng.normal(size=(count, 2)) - 1
    got = ridge_solver(torch.tensor(x))(torch.tensor(y), 0.05)
    rows = np.vstack([x - x.mean(0), np.sqrt(0.05 * count) * np.eye(width)])
    targets = np.vstack([y - y.mean(0), np.zeros((width, 2))])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
    np.testing.assert_allclose(got.weight, weight, atol=1e-9)
    np.testing.assert_allclose(
        got(torch.tensor(x)), (x - x.mean(0)) @ weight + y.mean(0), atol=1e-9
    )


def test_noise_asks_for_the_strongest_penalty_and_signal_for_a_weak_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator, dtype=torch.float64) / 20**0.5
    targets = {"signal": x[:, :2], "noise": torch.randn(300, 2, generator=generator).double()}
    ridges = fit_ridges(x, targets)
    assert ridges["signal"].strength == min(STRENGTHS)
    assert ridges["noise"].strength >= 1


def test_the_scale_of_the_codes_does_not_matter():
    pooled, histogram = torch.randn(20, 4), torch.rand(20, 3)
    one = CodeFeatures(pooled, histogram)
    two = CodeFeatures(1000 * pooled + 7, histogram)
    torch.testing.assert_close(
        Scaling.from_features(one)(one), Scaling.from_features(two)(two), atol=1e-4, rtol=0
    )


def test_a_collapsed_codebook_gives_zeros():
    features = CodeFeatures(torch.ones(20, 4))
    assert torch.equal(Scaling.from_features(features)(features), torch.zeros(20, 4).double())


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match="at least 10"):
        fit_ridges(torch.zeros(3, 2).double(), {"a": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="20 images, but 19"):
        fit_ridges(torch.zeros(20, 2).double(), {"a": torch.zeros(19, 1)})
    with pytest.raises(ValueError, match="another host"):
        Scaling.from_features(CodeFeatures(torch.ones(20, 4)))(CodeFeatures(torch.ones(20, 5)))
