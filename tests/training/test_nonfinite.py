"""NaN, infinity and 1e30 in terms, gradients, features, weights and images: see tests/stress."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "stress"))
from nonfinite import Case, not_finite, try_case

QUICK = [
    Case("term global_semantic", "nan", "raise"),
    Case("gradient encoder", "huge", "raise"),
    Case("text sentence", "inf", "skip"),
    Case("image", "nan", "raise"),
    Case("text tokens", "nan", "skip", True),
]
SLOW = [
    Case("term relationship", "inf", "skip"),
    Case("loss", "nan", "skip"),
    Case("gradient loss.lgvq", "inf", "skip"),
    Case("weight", "nan", "raise"),
    Case("buffer", "inf", "raise"),
    Case("image", "huge", "skip"),
    Case("gradient decoder", "nan", "skip", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    QUICK + [pytest.param(c, marks=(pytest.mark.slow, pytest.mark.extended)) for c in SLOW],
    ids=str,
)
def test_a_bad_number_is_named_and_reaches_no_checkpoint(case, tmp_path):
    ended, faults = try_case(case, tmp_path)
    assert ended in ("went on", "stopped")
    assert not faults


def test_the_search_finds_what_it_is_for():
    content = {"a": [torch.zeros(2), {"b": torch.tensor([1.0, torch.inf])}], "c": float("nan")}
    assert list(not_finite(content)) == [".a[1].b", ".c"]
