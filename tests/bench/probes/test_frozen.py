"""Frozen codes: the same as the host's, however they are kept."""

import pytest
import torch

from lgvq_plugin.bench.probes.base import CodeCollector, FrozenCodes, collect_codes, collect_frozen
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


def test_features_equal_those_of_the_loader():
    indices = [codes.indices for codes in batches("book")]

    def host_encode(images):
        rows = images[:, 0].flatten(1).long()
        return Codes(BOOK[rows], rows, (2, 3), BOOK)

    loader = [{"image": part.view(len(part), 1, 2, 3).expand(-1, 3, -1, -1)} for part in indices]
    wanted = collect_codes(host_encode, loader)
    got = collect_frozen(host_encode, loader).features()
    torch.testing.assert_close(got.pooled, wanted.pooled)
    torch.testing.assert_close(got.histogram, wanted.histogram)


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
