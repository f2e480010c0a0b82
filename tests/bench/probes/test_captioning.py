"""Captioning: codes that tell all give perfect captions; codes of other images give chance."""

import pytest

from lgvq_plugin.bench.probes.language import CaptioningConfig, CaptioningProbe

CONFIG = CaptioningConfig(steps=150, width=32, heads=2, depth=1, dropout=0.0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def probe(train):
    return CaptioningProbe(CONFIG).fit(train.codes, train.captions, progress=False)


@pytest.mark.slow
def test_it_reads_the_codes(probe, test):
    written = probe.write(test.codes)
    colors = [texts[0].split()[1] for texts in test.captions]
    shapes = [texts[0].split()[2] for texts in test.captions]
    right = [c in w and s in w for w, c, s in zip(written, colors, shapes, strict=True)]
    assert sum(right) / len(right) > 0.95
    blind = probe.write(test.codes.shuffled(0))
    chance = [c in w and s in w for w, c, s in zip(blind, colors, shapes, strict=True)]
    assert sum(chance) / len(chance) < 0.25  # 1 in 16


@pytest.mark.slow
def test_scores_and_their_control(probe, test):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is in the extra [eval]")
    scores = probe.evaluate(test.codes, test.captions)
    assert scores["bleu_4"] > 0.8
    assert scores["cider_d"] > 3 * scores["shuffled/cider_d"]


def test_equal_seeds_write_equal_captions(train, test):
    short = CaptioningConfig(steps=5, width=16, heads=1, depth=1)
    written = [
        CaptioningProbe(short).fit(train.codes, train.captions, progress=False).write(test.codes)
        for _ in range(2)
    ]
    assert written[0] == written[1]


def test_images_without_captions_are_told(train):
    with pytest.raises(ValueError, match="at least one"):
        CaptioningProbe().fit(train.codes, [[]] * 256)
