"""Synthesis without text: bits reach the entropy, known codes stay, conditions are followed."""

import pytest
import torch

from lgvq_plugin.bench.probes.text_to_image import (
    SynthesisConfig,
    SynthesisProbe,
    label_vectors,
    map_vectors,
)

CONFIG = SynthesisConfig(
    steps=200, width=32, heads=2, depth=1, dropout=0.0, learning_rate=1e-2, images=64
)


def labels_of(world):
    """Color and shape, which the first two codes tell."""
    indices = world.codes.indices
    return label_vectors({"color": indices[:, 0], "shape": indices[:, 1] - 4}, CLASSES)


CLASSES = {"color": 4, "shape": 4}


@pytest.mark.slow
def test_bits_reach_the_entropy_and_draws_follow_the_labels(many, test):
    given = labels_of(many)
    probe = SynthesisProbe(given.shape[2], CONFIG).fit(many.codes, given, progress=False)
    seen = labels_of(test)
    # Color and shape: 2 bits each, known from the labels; two places of noise: 3 bits each.
    assert probe.bits(test.codes, seen).mean() == pytest.approx((0 + 0 + 3 + 3) / 4, abs=0.12)
    without = probe.bits(test.codes, seen, given=False)
    assert without.mean() == pytest.approx((2 + 2 + 3 + 3) / 4, abs=0.12)
    drawn = probe.draw(list(seen), seed=4)
    assert (drawn[:, :2] == test.codes.indices[:, :2]).double().mean() > 0.95
    assert len(drawn[:, 2].unique()) > 5  # noise is drawn, not one value
    labels = {"color": torch.zeros(8).long(), "shape": torch.ones(8).long()}
    drawn = probe.draw(list(label_vectors(labels, CLASSES)))
    assert drawn[:, :2].float().mean(dim=0).tolist() == pytest.approx([0, 5], abs=0.3)


@pytest.mark.slow
def test_completion_keeps_the_codes_that_are_known(many, test):
    nothing = torch.zeros(len(many.codes), 1, 1)
    probe = SynthesisProbe(1, CONFIG).fit(many.codes, nothing, progress=False)
    seen = torch.zeros(len(test.codes), 1, 1)
    whole = probe.bits(test.codes, seen)
    assert whole.mean() == pytest.approx((2 + 2 + 3 + 3) / 4, abs=0.12)
    assert probe.bits(test.codes, seen, start=2).mean() == pytest.approx(3, abs=0.15)
    # Bits per code of both parts, in shares, are those of the whole.
    parts = [probe.bits(test.codes, seen, start=k) * (4 - k) for k in (0, 1, 3)]
    assert torch.allclose(parts[0], whole * 4)
    assert ((parts[0] - parts[1]).mean()) == pytest.approx(2, abs=0.15)  # of the first code
    first = test.codes.indices[:, :2]
    drawn = probe.draw(list(seen), first=first, seed=1)
    assert torch.equal(drawn[:, :2], first)
    assert not torch.equal(drawn[:, 2:], test.codes.indices[:, 2:])


def test_maps_are_pooled_to_the_grid_of_the_codes():
    """Shares of each class per cell, by counting pixels."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(3, (8, 12), generator=generator) for _ in range(2)]
    vectors = map_vectors(maps, 3, (2, 3))
    assert vectors.shape == (2, 6, 3 + 6)
    for given, found in zip(maps, vectors, strict=True):
        for cell in range(6):
            row, column = divmod(cell, 3)
            part = given[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            counts = [int((part == k).sum()) / 16 for k in range(3)]
            assert found[cell, :3].tolist() == pytest.approx(counts)
            assert found[cell, 3:].tolist() == [float(k == cell) for k in range(6)]
