"""Against closed forms, scipy, and simulated data whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lgvq_plugin.bench.records import Results, Run
from lgvq_plugin.bench.statistics import (
    bootstrap_interval,
    compare,
    difference,
    mean_and_sd,
    seed_stretch,
)


def entry(value, *, higher=True, images=None):
    metric = {"value": value, "n": 4, "unit": "dB", "higher_is_better": higher}
    return metric if images is None else {**metric, "per_image": list(images)}


def test_mean_and_sd_are_numpys():
    values = np.random.default_rng(0).normal(1e6, 1, 7)
    mean, sd = mean_and_sd(list(values))
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert sd == pytest.approx(values.std(ddof=1), rel=1e-9)
    assert mean_and_sd([2.0]) == (2.0, None)


def test_plain_percentiles_are_scipys():
    sample = np.random.default_rng(1).normal(0.3, 1.0, 40)
    low, high = bootstrap_interval(sample, resamples=20000, stretch=False)
    expected = scipy_stats.bootstrap(
        (sample,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


def test_stretched_interval_is_nearly_the_t_interval():
    """Closed form: mean +- t(n - 1) s / sqrt(n), where the sample is large enough to be smooth."""
    sample = np.random.default_rng(3).normal(0, 2, 12)
    low, high = bootstrap_interval(sample, resamples=40000)
    half = scipy_stats.t.ppf(0.975, 11) * sample.std(ddof=1) / math.sqrt(12)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(sample.mean(), abs=0.1)


def test_images_of_one_seed_are_scipys():
    sample = np.random.default_rng(4).normal(0.1, 1, (1, 200))
    low, high = bootstrap_interval(sample, resamples=20000)
    half = 1.96 * sample.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.01)


@pytest.mark.parametrize("seeds", [3, 5])
def test_three_seeds_are_not_enough_to_find_what_is_not_there(seeds):
    """Where nothing differs, about one interval in twenty excludes zero; plainly one in four."""
    generator = np.random.default_rng(5)
    found = plain = 0
    for _ in range(400):
        sample = generator.normal(size=seeds)
        low, high = bootstrap_interval(sample, resamples=500)
        found += low > 0 or high < 0
        low, high = bootstrap_interval(sample, resamples=500, stretch=False)
        plain += low > 0 or high < 0
    assert found / 400 < 0.09
    assert plain / 400 > 0.1


def test_seeds_and_images_together_err_once_in_twenty():
    """Effects of seed, image and both, of a size that none can be left out; the truth is 0."""
    generator = np.random.default_rng(8)
    found = 0
    for _ in range(400):
        seeds, images = generator.normal(size=(3, 1)), generator.normal(size=(1, 12))
        table = 0.5 * seeds + images + generator.normal(size=(3, 12))
        low, high = bootstrap_interval(table, resamples=1000)
        found += low > 0 or high < 0
    assert found / 400 < 0.08


def test_crossed_images_widen_the_interval():
    """An effect of the image is the same in every seed, so that more seeds do not average it."""
    effect = np.random.default_rng(6).normal(size=50)
    table = np.tile(effect, (4, 1))
    low, high = bootstrap_interval(table, resamples=20000)
    half = 1.96 * effect.std() / math.sqrt(50)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_an_effect_of_the_seed_is_in_the_interval():
    rows = np.array([[1.0], [2.0], [3.0]])
    table = np.repeat(rows, 30, axis=1)
    assert bootstrap_interval(table) == pytest.approx(bootstrap_interval(rows[:, 0]))


def test_the_stretch_vanishes_with_many_seeds():
    assert seed_stretch(2) > seed_stretch(3) > seed_stretch(10) > 1
    assert seed_stretch(10_000) == pytest.approx(1, abs=1e-3)


def test_pairing_sees_what_the_means_hide():
    """The gain is 0.1 on every image; the images differ by far more."""
    images = np.random.default_rng(7).normal(20, 5, 100)
    found = difference(
        {0: entry(images.mean() + 0.1, images=images + 0.1)},
        {0: entry(images.mean(), images=images)},
        reference="baseline",
    )
    assert found.verdict == "better"
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert (found.paired_by, found.seeds, found.images) == ("images", 1, 100)


def test_lower_is_better_turns_the_verdict():
    own = {s: entry(1.0 + 0.01 * s, higher=False) for s in range(3)}
    other = {s: entry(2.0, higher=False) for s in range(3)}
    assert difference(own, other, reference="b").verdict == "better"
    assert difference(other, own, reference="b").verdict == "worse"


def test_no_direction_no_verdict():
    own = {s: entry(1.0, higher=None) for s in range(3)}
    other = {s: entry(2.0, higher=None) for s in range(3)}
    assert difference(own, other, reference="b").verdict == ""


def test_one_seed_without_images_has_no_interval():
    found = difference({0: entry(9.0)}, {0: entry(1.0)}, reference="b")
    assert (found.value, found.low, found.high, found.verdict) == (8.0, None, None, "")


def test_seeds_that_all_differ_by_the_same_are_not_judged():
    """One dead code less in each of two seeds has no spread, and is no evidence."""
    own, other = ({s: entry(v + s, higher=False) for s in range(2)} for v in (22.0, 23.0))
    found = difference(own, other, reference="b")
    assert (found.value, found.low, found.verdict) == (-1.0, None, "")
    same = difference(own, own, reference="b")
    assert (same.low, same.high, same.verdict) == (0.0, 0.0, "")


def test_only_common_seeds_are_paired():
    found = difference(
        {0: entry(1.0), 1: entry(1.0), 7: entry(100.0)},
        {0: entry(0.0), 1: entry(0.0), 2: entry(-50.0)},
        reference="b",
    )
    assert (found.value, found.seeds) == (1.0, 2)
    assert difference({0: entry(1.0)}, {1: entry(1.0)}, reference="b") is None


def test_lists_that_are_not_the_metric_are_not_paired():
    """A Fréchet distance with per-image values is not their mean."""
    own = {s: entry(5.0, images=[1.0, 2.0]) for s in range(2)}
    found = difference(own, own, reference="b")
    assert (found.paired_by, found.images) == ("seeds", None)


def test_a_value_that_is_not_finite_is_not_judged():
    own = {0: entry(math.nan), 1: entry(1.0)}
    found = difference(own, {0: entry(0.0), 1: entry(0.0)}, reference="b")
    assert math.isnan(found.value)
    assert (found.low, found.verdict) == (None, "")


def test_compare_keeps_a_variant_whose_runs_failed():
    def run(variant, seed, value):
        metrics = {"reconstruction/psnr": entry(value)}
        return Run(data="", variant=variant, seed=seed, evaluation={"metrics": metrics})

    results = Results(
        title="t",
        references=("baseline",),
        variants={"baseline": {}, "all": {}, "broken": {}},
        runs=(
            *(run("baseline", s, 20.0 + s) for s in range(3)),
            *(run("all", s, 21.0 + 1.1 * s) for s in range(3)),
            Run(data="", variant="broken", seed=0, status="failed", reason="out of memory"),
        ),
    )
    baseline, everything, broken = compare(results)
    assert (baseline.mean, baseline.sd, baseline.differences) == (21.0, 1.0, ())
    assert everything.to("baseline").value == pytest.approx(1.1)
    assert everything.to("baseline").verdict == "better"
    assert (broken.mean, broken.values, broken.differences) == (None, {}, ())
