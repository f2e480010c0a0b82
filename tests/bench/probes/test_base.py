"""Code features: equal NumPy, in the loader's order, for any layout of images."""

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.probes.base import collect_codes
from lgvq_plugin.types import Codes

K, C = 5, 3


def host_encode(images: torch.Tensor) -> Codes:
    """Code of a pixel = its red value; channels first is what it is promised."""
    assert images.shape[1] == 3
    codebook = torch.arange(float(K * C)).view(K, C).sin()
    indices = images[:, 0].flatten(1).long()
    return Codes(codebook[indices], indices, tuple(images.shape[2:]), codebook)


@pytest.fixture
def pictures():
    return torch.from_numpy(np.random.default_rng(0).integers(0, K, (7, 4, 6, 3)))


def test_features_equal_numpy(pictures):
    got = collect_codes(host_encode, [{"image": pictures[:3]}, {"image": pictures[3:]}])
    codebook = np.sin(np.arange(K * C, dtype=float)).reshape(K, C)
    red = pictures[..., 0].numpy()
    grid = codebook[red]
    parts = [
        grid[:, a, b].mean((1, 2)) for a in (slice(2), slice(2, 4)) for b in (slice(3), slice(3, 6))
    ]
    quadrants = np.stack(parts, axis=-1).reshape(7, -1)
    share = np.stack([np.bincount(r.ravel(), minlength=K) for r in red]) / 24
    np.testing.assert_allclose(got.pooled, np.hstack([grid.mean((1, 2)), quadrants]), atol=1e-6)
    np.testing.assert_allclose(got.histogram, np.sqrt(share), atol=1e-6)


def test_channels_first_gives_the_same(pictures):
    first = collect_codes(
        host_encode, [{"picture": pictures.permute(0, 3, 1, 2)}], image_key="picture"
    )
    last = collect_codes(host_encode, [{"image": pictures}])
    assert torch.equal(first.pooled, last.pooled)


@pytest.mark.parametrize("grid", [(1, 24), (3, 8)])
def test_grids_that_do_not_halve(grid):
    codes = torch.ones(2, 24, C)
    got = collect_codes(lambda _: Codes(codes, None, grid), [{"image": torch.zeros(2, 3, 8, 8)}])
    assert torch.equal(got.pooled, torch.ones(2, 5 * C))
    assert got.histogram is None


def test_huge_codebooks_have_no_histogram():
    codes = Codes(torch.zeros(1, 4, C), torch.zeros(1, 4, dtype=torch.long), (2, 2))
    batch = [{"image": torch.zeros(1, 3, 8, 8)}]
    assert collect_codes(lambda _: codes, batch, codebook_size=4097).histogram is None
    assert collect_codes(lambda _: codes, batch, codebook_size=4096).histogram.shape == (1, 4096)


def test_an_empty_loader_is_told():
    with pytest.raises(ValueError, match="no batch"):
        collect_codes(host_encode, [])
