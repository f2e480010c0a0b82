"""Frozen codes equal the host's, however they are stored; their features equal NumPy's."""

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.probes.features import CodeCollector, FrozenCodes, collect_codes
from lgvq_plugin.types import Codes

K, C = 7, 3
BOOK = torch.randn(K, C, generator=torch.Generator().manual_seed(0))


def batches(kind):
    """Codes of two batches: from a book, projected from one, or without indices."""
    generator = torch.Generator().manual_seed(1)
    for count in (3, 4):
        indices = torch.randint(K, (count, 6), generator=generator)
        vectors = BOOK[indices]
        if kind == "book":
            yield Codes(vectors, indices, (2, 3), BOOK)
        elif kind == "projected":
            yield Codes(vectors * 2 + 1, indices, (2, 3), BOOK)
        elif kind == "no book":
            yield Codes(vectors, indices, (2, 3))
        elif kind == "varying":
            yield Codes(vectors + torch.randn(vectors.shape, generator=generator), indices, (2, 3))
        else:
            yield Codes(vectors, None, (2, 3))


@pytest.mark.parametrize("kind", ["book", "projected", "no book", "varying", "no indices"])
def test_codes_come_back_as_they_were(kind):
    collector = CodeCollector()
    for codes in batches(kind):
        collector.add(codes)
    frozen = collector.result()
    wanted = torch.cat([codes.codes for codes in batches(kind)])
    assert len(frozen) == 7
    assert frozen.width == C
    torch.testing.assert_close(frozen.codes(torch.arange(7)), wanted)
    is_small = frozen.vectors is None
    assert is_small == (kind in ("book", "projected", "no book"))
    assert (frozen.indices is None) == (kind == "no indices")


def test_shuffled_leaves_no_image_its_codes():
    indices = torch.arange(10)[:, None].expand(10, 4).contiguous()
    frozen = FrozenCodes((2, 2), indices, torch.randn(10, C))
    moved = frozen.shuffled(0)
    assert (moved.indices != indices).all()
    assert torch.equal(moved.indices.sort(dim=0).values, indices)
    assert frozen.fingerprint != moved.fingerprint
    assert moved.fingerprint == frozen.shuffled(0).fingerprint


def test_wrong_batches_are_told():
    with pytest.raises(ValueError, match="no batch"):
        CodeCollector().result()
    collector = CodeCollector()
    collector.add(Codes(torch.zeros(1, 6, C), None, (2, 3)))
    with pytest.raises(ValueError, match="grids"):
        collector.add(Codes(torch.zeros(1, 6, C), None, (3, 2)))


def host_encode(images: torch.Tensor) -> Codes:
    """The code of a pixel is its red value; images are channels first."""
    assert images.shape[1] == 3
    codebook = torch.arange(5.0 * C).view(5, C).sin()
    indices = images[:, 0].flatten(1).long()
    return Codes(codebook[indices], indices, tuple(images.shape[2:]), codebook)


@pytest.fixture
def pictures():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 5, (7, 4, 6, 3)))


def test_features_equal_numpy(pictures):
    got = collect_codes(host_encode, [{"image": pictures[:3]}, {"image": pictures[3:]}])
    codebook = np.sin(np.arange(5 * C, dtype=float)).reshape(5, C)
    red = pictures[..., 0].numpy()
    grid = codebook[red]
    parts = [
        grid[:, a, b].mean((1, 2)) for a in (slice(2), slice(2, 4)) for b in (slice(3), slice(3, 6))
    ]
    quadrants = np.stack(parts, axis=-1).reshape(7, -1)
    share = np.stack([np.bincount(r.ravel(), minlength=5) for r in red]) / 24
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


def test_without_the_codebook_size_there_is_no_histogram():
    codes = Codes(torch.zeros(1, 4, C), torch.zeros(1, 4, dtype=torch.long), (2, 2))
    assert collect_codes(lambda _: codes, [{"image": torch.zeros(1, 3, 8, 8)}]).histogram is None
