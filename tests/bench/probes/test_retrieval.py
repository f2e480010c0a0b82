"""The retrieval probe: perfect where the codes hold the text, chance where they say nothing."""

import pytest
import torch
from scipy.stats import binom

from lgvq_plugin import sockets
from lgvq_plugin.bench.probes import MEMBERS, AbstractProbe
from lgvq_plugin.bench.probes.features import CodeFeatures
from lgvq_plugin.bench.probes.ridge import RetrievalProbe


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_that_hold_the_text_find_it():
    train, test = draw(300, 16, seed=1), draw(100, 16, seed=2)
    mixing = draw(16, 40, seed=3)
    unit = torch.nn.functional.normalize
    probe = RetrievalProbe().fit(CodeFeatures(unit(train) @ mixing), train)
    got = probe.evaluate(CodeFeatures(unit(test) @ mixing), test)
    for direction in ("image_to_text", "text_to_image"):
        assert got[f"{direction}/recall@1"] == 1
        assert got[f"{direction}/mean_rank"] == 1


@pytest.mark.parametrize("k", [1, 10])
def test_random_codes_are_at_chance(k):
    hits, total = 0.0, 0
    for seed in range(5):
        probe = RetrievalProbe(ks=(k,)).fit(
            CodeFeatures(draw(200, 30, seed=10 + seed)), draw(200, 16, seed=20 + seed)
        )
        got = probe.evaluate(
            CodeFeatures(draw(200, 30, seed=30 + seed)), draw(200, 16, seed=40 + seed)
        )
        hits += 200 * got[f"image_to_text/recall@{k}"]
        total += 200
    low, high = binom.interval(0.999, total, k / 200)
    assert low <= hits <= high


def test_a_collapsed_codebook_is_exactly_at_chance():
    features, text = CodeFeatures(torch.ones(50, 4)), draw(50, 8, seed=0)
    got = RetrievalProbe().fit(features, text).evaluate(features, text)
    assert got["image_to_text/recall@1"] == pytest.approx(1 / 50)
    assert got["text_to_image/recall@10"] == pytest.approx(10 / 50)
    assert got["text_to_image/mean_rank"] == pytest.approx(25.5)
    assert got["chance@1"] == pytest.approx(1 / 50)


def test_equal_captions_all_count_as_right():
    text = draw(40, 8, seed=0)
    text[20:] = text[:20]
    codes = CodeFeatures(torch.nn.functional.normalize(text))
    probe = RetrievalProbe().fit(codes, text)
    names = [f"caption {i % 20}" for i in range(40)]
    told, found = probe.evaluate(codes, text, names), probe.evaluate(codes, text)
    assert told == found
    assert told["image_to_text/recall@1"] == told["text_to_image/recall@1"] == 1
    strict = probe.evaluate(codes, text, [str(i) for i in range(40)])
    assert strict["image_to_text/recall@1"] < 1


def test_several_captions_an_image_are_averaged():
    codes, text = CodeFeatures(draw(30, 6, seed=0)), draw(30, 8, seed=1)
    one = RetrievalProbe().fit(codes, text).evaluate(codes, text)
    many = RetrievalProbe().fit(codes, text[:, None].repeat(1, 5, 1)).evaluate(codes, text)
    assert one == pytest.approx(many)


def test_wrong_use_is_told():
    codes, text = CodeFeatures(draw(20, 4, seed=0)), draw(20, 8, seed=1)
    with pytest.raises(RuntimeError, match="fit"):
        RetrievalProbe().evaluate(codes, text)
    probe = RetrievalProbe().fit(codes, text)
    with pytest.raises(ValueError, match="20 images"):
        probe.evaluate(codes, text[:10])
    with pytest.raises(ValueError, match="2 captions"):
        probe.evaluate(codes, text, ["a", "b"])


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "image_judge"])
def test_members_are_probes(name):
    assert issubclass(sockets.resolve("bench.probes", name), AbstractProbe)
