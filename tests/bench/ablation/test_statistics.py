"""Against closed forms, scipy, and simulated data whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lgvq_plugin.bench.records import Cell, Difference, Results, Run
from lgvq_plugin.bench.statistics import (
    benjamini_hochberg,
    compare,
    correct,
    difference,
    estimate,
    mean_and_sd,
    p_values,
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
    for bad in (math.nan, math.inf):  # the report of the other metrics must not be lost
        mean, sd = mean_and_sd([1.0, bad])
        assert not math.isfinite(mean)
        assert math.isnan(sd)


def test_seeds_alone_are_scipys_paired_t_test():
    sample = np.random.default_rng(3).normal(1, 2, 12)
    for count in (2, 3, 12):
        expected = scipy_stats.ttest_1samp(sample[:count], 0)
        low, high, p = estimate(sample[:count, None])
        assert p == pytest.approx(expected.pvalue, rel=1e-5)
        assert (low, high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-5)


def test_images_of_one_seed_are_scipys_paired_t_test():
    sample = np.random.default_rng(4).normal(0.1, 1, 20)
    expected = scipy_stats.ttest_1samp(sample, 0)
    low, high, p = estimate(sample[None])
    assert p == pytest.approx(expected.pvalue)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval()))


def test_crossed_images_widen_the_interval():
    """An effect of the image is the same in every seed, so that more seeds do not average it."""
    effect = np.random.default_rng(6).normal(size=50)
    assert estimate(np.tile(effect, (4, 1))) == pytest.approx(estimate(effect[None]))


def test_an_effect_of_the_seed_is_in_the_interval():
    rows = np.array([[1.0], [2.0], [3.0]])
    assert estimate(np.repeat(rows, 30, axis=1)) == pytest.approx(estimate(rows))


def test_the_interval_ends_where_the_p_value_is_five_percent():
    table = np.random.default_rng(9).normal(0.2, 1, (5, 40)) + np.linspace(-1, 1, 40)
    low, high, p = estimate(table)
    assert p_values(np.stack([table, table - low, table - high])) == pytest.approx([p, 0.05, 0.05])
    narrow, wide = (estimate(table, confidence=level) for level in (0.8, 0.99))
    assert wide.low < low < narrow.low < narrow.high < high < wide.high


def test_a_single_difference_has_no_interval():
    with pytest.raises(ValueError, match="at least two differences"):
        estimate(np.ones((1, 1)))


REGIMES = {  # shares of seed, image and residual in the variance of the mean
    "seed": (1, 0, 0.02),
    "image": (0, 1, 0.05),
    "both": (1, 1, 0.1),
    "residual": (0, 0, 1),
}


def simulated(shares, seeds, images, count=2000):
    """Tables whose true mean is zero, (count, seeds, images), and the standard error of it."""
    generator = np.random.default_rng([seeds, images])
    of_seed, of_image, rest = np.sqrt(np.multiply(shares, (seeds, images, seeds * images)))
    tables = generator.standard_normal((count, seeds, images))
    tables *= rest
    tables += of_seed * generator.standard_normal((count, seeds, 1))
    tables += of_image * generator.standard_normal((count, 1, images))
    return tables, sum(shares) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("seeds", "images"), [(5, 512), (3, 64), (5, 64), (10, 64)])
def test_one_comparison_in_twenty_is_marked_where_nothing_differs(regime, seeds, images):
    """The rate of marks, and with it the coverage of the interval under any true difference.

    Rates over many more tables, in percent (seed, image, both, residual): 5.0, 4.6, 3.7, 4.8 for
    5 x 512; 5.2, 3.7, 2.5, 4.1 for 3 x 64; 4.9, 4.8, 3.7, 4.4 for 5 x 64; 4.9, 4.9, 4.2, 4.4 for
    10 x 64. Three seeds are conservative where both parts matter: the variance of seeds has two
    degrees of freedom, and no test is nominal for every ratio of the parts (with Satterthwaite's
    degrees of freedom it is 7.8 % at the worst ratio).
    """
    tables, error = simulated(REGIMES[regime], seeds, images)
    marked = p_values(tables) < 0.05
    least = 0.018 if (regime, seeds) == ("both", 3) else 0.035
    assert least <= marked.mean() <= 0.065
    # The interval of a table shifted by d covers d exactly where the table itself is not marked.
    shifted = tables[:20] + 3 * error
    covered = [low <= 3 * error <= high for low, high, _ in map(estimate, shifted)]
    assert covered == [*~marked[:20]]


def test_small_p_values_are_not_too_frequent():
    """What a correction for many comparisons relies on; Satterthwaite's are three times as many."""
    tables, _ = simulated((1, 0.2, 0.03), 3, 32, 4000)
    assert (p_values(tables) < 0.01).mean() < 0.013


def test_a_difference_of_four_standard_errors_is_mostly_found():
    for shares in REGIMES.values():
        tables, error = simulated(shares, 5, 64, 1000)
        assert (p_values(tables + 4 * error) < 0.05).mean() > 0.75


def test_adjusted_p_values_are_scipys():
    values = np.random.default_rng(11).random(50) ** 3
    expected = scipy_stats.false_discovery_control(values, method="bh")
    assert benjamini_hochberg(values) == pytest.approx(expected)
    assert benjamini_hochberg([]).shape == (0,)


def test_at_most_one_mark_in_twenty_is_wrong():
    """30 of 40 metrics do not differ, and all share the effects of seeds and images."""
    generator = np.random.default_rng(12)
    wrong = []
    for _ in range(200):
        shared = 0.7 * generator.normal(size=(5, 1)) + generator.normal(size=(1, 24))
        tables = shared + generator.normal(size=(40, 5, 1)) + generator.normal(size=(40, 5, 24))
        tables[:10] += 4
        marked = benjamini_hochberg(p_values(tables)) <= 0.05
        wrong.append(marked[10:].sum() / max(marked.sum(), 1))
    assert np.mean(wrong) < 0.06


def cell(metric, p, *, higher=True, value=1.0, verdict=""):
    found = Difference(
        reference="baseline",
        value=value,
        low=value - 0.5,
        high=value + 0.5,
        paired_by="seeds",
        seeds=3,
        images=None,
        verdict=verdict,
        p=p,
    )
    return Cell(
        data="",
        variant="all",
        metric=metric,
        unit="",
        higher_is_better=higher,
        values={},
        mean=1.0,
        sd=None,
        images=None,
        differences=(found,),
    )


def test_the_verdicts_of_a_report_are_corrected_together():
    cells = [cell("a", 0.001), cell("b", 0.04, higher=False), cell("c", 0.5), cell("d", 1e-9)]
    control, old = cell("control", 1e-9, higher=None), cell("old", None, verdict="worse")
    found = [c.differences[0] for c in correct([*cells, control, old])]
    assert [d.verdict for d in found] == ["better", "", "", "better", "", "worse"]
    assert [d.p_adjusted for d in found[:4]] == pytest.approx([0.002, 0.16 / 3, 0.5, 4e-9])
    assert [d.p_adjusted for d in found[4:]] == [None, None]
    assert [d.p for d in found] == [0.001, 0.04, 0.5, 1e-9, 1e-9, None]
    alone = correct([cells[1]])
    assert alone[0].differences[0].verdict == "worse"
    assert correct(correct(cells)) == correct(cells)


def test_marks_tell_corrected_from_uncorrected():
    cells = [cell("a", 0.001), cell("b", 0.04, higher=False), cell("c", 0.4), cell("d", 0.9)]
    cells[2] = replace(cells[2], differences=(replace(cells[2].differences[0], low=-1.0),))
    marks = [one.mark("baseline") for one in correct(cells)]
    assert marks == [" ▲", " ▽", "", " △"]
    assert cells[0].mark("another") == ""


def test_pairing_sees_what_the_means_hide():
    """The gain is 0.1 on every image; the images differ by far more."""
    images = np.random.default_rng(7).normal(20, 5, 100)
    found = difference(
        {0: entry(images.mean() + 0.1, images=images + 0.1)},
        {0: entry(images.mean(), images=images)},
        reference="baseline",
    )
    assert (found.verdict, found.p) == ("better", pytest.approx(0, abs=1e-9))
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
    assert (found.p, found.p_adjusted) == (None, None)


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
