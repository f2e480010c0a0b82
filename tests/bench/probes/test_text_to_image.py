"""Text to image: bits per code reach the entropy, draws follow their distribution and the text."""

import math
from dataclasses import replace

import pytest
import torch

from lgvq_plugin.bench.probes.features import FrozenCodes
from lgvq_plugin.bench.probes.text_to_image import (
    Sampling,
    TextToImageConfig,
    TextToImageProbe,
    choose,
)
from lgvq_plugin.config import build
from lgvq_plugin.sockets import ConfigError

from .test_masked_words import CausalGuide

CONFIG = TextToImageConfig(
    steps=200, width=32, heads=2, depth=1, dropout=0.0, learning_rate=1e-2, images=64
)


@pytest.fixture
def captions(train, test):
    return [[t[0]] for t in train.captions], [t[0] for t in test.captions]


@pytest.mark.slow
def test_bits_reach_the_entropy_and_draws_follow_the_text(many, test, captions):
    probe = TextToImageProbe(CausalGuide(), CONFIG)
    probe.fit(many.codes, [t[:1] for t in many.captions], progress=False)
    got = probe.evaluate(test.codes, captions[1])
    # Color and shape: 2 bits each, known from the text; two places of noise: 3 bits each.
    assert got["bits_per_code"] == pytest.approx((0 + 0 + 3 + 3) / 4, abs=0.12)
    assert got["without_text/bits_per_code"] == pytest.approx((2 + 2 + 3 + 3) / 4, abs=0.12)
    assert got["shuffled/bits_per_code"] > got["without_text/bits_per_code"]
    drawn = probe.draw(captions[1], seed=4)
    assert torch.equal(drawn, probe.draw(captions[1], seed=4))
    right = (drawn[:, :2] == test.codes.indices[:, :2]).double().mean()
    assert right > 0.95
    assert len(drawn[:, 2].unique()) > 5  # noise is drawn, not one value


def test_draws_have_the_asked_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**keys):
        drawn = choose(logits, Sampling(**keys), generator)
        return torch.bincount(drawn[:, 0], minlength=4) / len(drawn)

    def close(got, wanted):
        return torch.allclose(got, torch.tensor(wanted), atol=0.015)

    assert close(shares(), [0.5, 0.3, 0.15, 0.05])
    assert close(shares(top_k=2), [0.625, 0.375, 0, 0])
    assert close(shares(top_p=0.6), [0.625, 0.375, 0, 0])
    assert close(shares(top_p=0.5), [1.0, 0, 0, 0])
    assert close(shares(temperature=0), [1.0, 0, 0, 0])
    hot = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert close(shares(temperature=2.0), (hot / hot.sum()).tolist())


@pytest.mark.slow
def test_guidance_sharpens_towards_the_text(train, captions):
    """With guidance g the logits are free + g (given - free): g = 1 is the plain network."""
    config = TextToImageConfig(
        steps=30, width=16, heads=1, depth=1, dropout=0.0, learning_rate=1e-2
    )
    probe = TextToImageProbe(CausalGuide(), config)
    probe.fit(train.codes, captions[0], progress=False)
    memory, mask = probe._read(["a red star"] * 2, torch.tensor([False, True]))
    codes = torch.zeros(2, 0, dtype=torch.long)
    from lgvq_plugin.bench.probes.transformer import Cache

    first = probe.network.step(codes, memory, mask, Cache())
    whole = probe.network(torch.zeros(2, 3, dtype=torch.long), memory, mask)[:, 0]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=1e-5)
    given, free = first
    wanted = (free + 4.0 * (given - free)).argmax()
    sampling = Sampling(guidance=4.0, temperature=0)
    probe.config = replace(config, sampling=sampling)
    drawn = probe.draw(["a red star"])
    assert drawn[0, 0] == wanted


def test_text_that_is_hidden_is_not_read(train, captions):
    config = TextToImageConfig(steps=2, width=16, heads=1, depth=1)
    probe = TextToImageProbe(CausalGuide(), config).fit(train.codes, captions[0], progress=False)
    one = probe.bits_per_code(train.codes, [t[0] for t in captions[0]], with_text=False)
    other = probe.bits_per_code(train.codes, ["zebra"] * 256, with_text=False)
    assert one == other
    assert one == pytest.approx(math.log2(8), abs=0.6)  # hardly trained: all codes alike


def test_hosts_without_indices_and_wrong_settings_are_told(train, captions):
    blind = FrozenCodes((2, 2), vectors=train.codes.codes(torch.arange(256)))
    with pytest.raises(ConfigError, match="no code indices"):
        TextToImageProbe(CausalGuide()).fit(blind, captions[0], progress=False)
    for keys, name in (
        ({"sampling": {"temperature": -1}}, "temperature"),
        ({"sampling": {"top_k": 0}}, "top_k"),
        ({"sampling": {"top_p": 0}}, "top_p"),
        ({"sampling": {"guidence": 1}}, "guidance"),
        ({"drop_text": 0}, "drop_text"),
        ({"images": 1}, "images"),
    ):
        with pytest.raises(ConfigError, match=name):
            build(TextToImageConfig, keys, "evaluation.text_to_image")
