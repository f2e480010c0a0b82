"""Grounding: words are found where their codes are, from captions alone; scores by hand."""

import pytest
import torch

from lgvq_plugin.bench.probes.features import FrozenCodes
from lgvq_plugin.bench.probes.grounding import GroundingConfig, GroundingProbe, iou, score_map
from lgvq_plugin.sockets import ConfigError

WORDS = ("red", "blue", "green")
CONFIG = GroundingConfig(steps=150, width=16, dropout=0.0, batch_size=32, learning_rate=1e-2)


def world(count, seed):
    """One word per image; its code fills a block of 2 x 2 in a grid of 6 x 6."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((count, 6, 6), 3)
    captions, boxes = [], []
    for row in indices:
        word, top, left = (int(torch.randint(n, (), generator=generator)) for n in (3, 5, 5))
        row[top : top + 2, left : left + 2] = word
        captions.append([f"there is a {WORDS[word]} block"])
        boxes.append({WORDS[word]: [(left / 6, top / 6, (left + 2) / 6, (top + 2) / 6)]})
    table = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    return FrozenCodes((6, 6), indices.flatten(1), table), captions, boxes


@pytest.mark.slow
def test_words_are_found_where_their_codes_are():
    codes, captions, _ = world(200, 0)
    seen, _, boxes = world(60, 1)
    probe = GroundingProbe(WORDS, CONFIG).fit(codes, captions, progress=False)
    values = probe.values(seen, boxes)
    assert values["pointing"].mean() > 0.95
    assert values["chance/pointing"].tolist() == pytest.approx([4 / 36] * 60)
    # Each place sees its neighbors, so that 4 x 4 places may fire for a block of 2 x 2.
    assert values["iou"].mean() > 0.3
    control = probe.values(seen.shuffled(0), boxes)
    assert control["pointing"].mean() < 0.4
    again = GroundingProbe(WORDS, CONFIG).fit(codes, captions, progress=False)
    assert torch.equal(again.maps(seen), probe.maps(seen))


def test_scores_by_hand():
    scores = torch.zeros(2, 4)
    scores[1, 3] = 1.0
    right = (0.75, 0.5, 1.0, 1.0)
    assert score_map(scores, [right]) == (1.0, 1.0, 1.0, 0.125)
    left = (0.0, 0.0, 0.25, 0.5)
    assert score_map(scores, [left]) == (0.0, 0.0, 0.0, 0.125)
    assert score_map(scores, [left, right]) == (1.0, 1.0, 1.0, 0.25)
    wide = (0.5, 0.0, 1.0, 1.0)
    assert score_map(scores, [wide])[1:3] == (0.25, 0.0)


def test_overlap_equals_torchvision():
    from torchvision.ops import box_iou

    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator)
    boxes = torch.cat([corner, corner + torch.rand(50, 2, generator=generator)], dim=1).double()
    theirs = box_iou(boxes, boxes)
    for i, one in enumerate(boxes.tolist()):
        for j, other in enumerate(boxes.tolist()):
            assert iou(tuple(one), tuple(other)) == pytest.approx(float(theirs[i, j]), abs=1e-9)


@pytest.mark.slow
def test_words_that_cannot_be_learned_are_named():
    codes, captions, boxes = world(20, 0)
    with pytest.raises(ConfigError, match="no training caption has the word 'yellow'"):
        GroundingProbe(["red", "yellow"], CONFIG).fit(codes, captions, progress=False)
    probe = GroundingProbe(WORDS, CONFIG).fit(codes, captions, progress=False)
    with pytest.raises(ConfigError, match="no test image has a box"):
        probe.values(codes, [{"yellow": each["red"]} if "red" in each else {} for each in boxes])
