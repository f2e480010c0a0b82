"""PSNR and SSIM: equal float64 NumPy, per image, on 8-bit values."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torchmetrics.functional.image import structural_similarity_index_measure

from lgvq_plugin.bench.metrics.reconstruction import ReconstructionMetrics, eight_bit, psnr_and_ssim
from lgvq_plugin.sockets import ConfigError


def to_bytes(images: torch.Tensor) -> np.ndarray:
    return np.clip(np.rint((images.double().numpy() + 1) * 127.5), 0, 255) / 255


def gaussian(channel: np.ndarray) -> np.ndarray:
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        channel = correlate1d(channel, window, axis=axis, mode="mirror")
    return channel


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, population covariances, mean over the whole map."""
    mean_a, mean_b = gaussian(a), gaussian(b)
    var_a, var_b = gaussian(a * a) - mean_a**2, gaussian(b * b) - mean_b**2
    cov = gaussian(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + first) * (2 * cov + second)
    values /= (mean_a**2 + mean_b**2 + first) * (var_a + var_b + second)
    return float(values.mean())


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 24, 32, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    strength = torch.tensor([0.01, 0.05, 0.2, 0.9]).view(4, 1, 1, 1)
    return images, images + noise * strength


def test_equals_numpy_per_image_however_split(pair):
    images, reconstructions = pair
    metric = ReconstructionMetrics()
    metric.update(images[:1], reconstructions[:1])
    metric.update(images[1:], reconstructions[1:])
    a, b = to_bytes(images), to_bytes(reconstructions)
    psnr = np.mean(-10 * np.log10(((a - b) ** 2).mean((1, 2, 3))))
    similar = np.mean(
        [[ssim(x, y) for x, y in zip(i, j, strict=True)] for i, j in zip(a, b, strict=True)]
    )
    got = metric.compute()
    assert float(got["psnr"]) == pytest.approx(psnr, abs=1e-3)
    assert float(got["ssim"]) == pytest.approx(similar, abs=1e-3)


def test_ssim_is_that_of_torchmetrics(pair):
    images, reconstructions = (eight_bit(one) for one in pair)
    theirs = structural_similarity_index_measure(
        reconstructions.double(), images.double(), data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(psnr_and_ssim(*pair)[1].double(), theirs, atol=1e-6, rtol=0)


def test_a_perfect_image_does_not_make_the_mean_infinite(pair):
    images, _ = pair
    metric = ReconstructionMetrics()
    metric.update(images, images)
    assert float(metric.compute()["psnr"]) == 100
    assert float(metric.compute()["ssim"]) == pytest.approx(1)


def test_small_images_are_told():
    with pytest.raises(ConfigError, match="11 x 11"):
        ReconstructionMetrics().update(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_unequal_shapes_are_told():
    with pytest.raises(ValueError, match="one shape"):
        ReconstructionMetrics().update(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 32))
