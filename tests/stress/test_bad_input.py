"""A short, repeatable part of `bad_input.py`: 200 cases and more, over all kinds of files."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="no hypothesis: pip install [test]")
sys.path.insert(0, str(Path(__file__).parent))

import bad_input

pytestmark = pytest.mark.slow
COUNTS = {  # by what a case costs
    "captions": 40,
    "ckpt": 50,
    "heads": 30,
    "results": 40,
    "shards": 15,
    "images": 10,
    "config": 10,
    "resume": 10,
    "retrofit": 6,
    "cache": 6,
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return bad_input.Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("kind", COUNTS)
def test_broken_input_ends_in_one_message(workshop, kind):
    with bad_input.narrowed():
        strategy = workshop.kinds()[kind]
        outcomes = bad_input.run_kind(strategy, workshop, COUNTS[kind], seconds=60)
    assert len(outcomes) >= 0.8 * COUNTS[kind]
    assert bad_input.defects_of(outcomes) == []
    # Not everything is refused, and not everything passes.
    assert {outcome.verdict for outcome in outcomes} >= {"refused"}


@pytest.mark.parametrize("kind", ["config", "images", "ckpt", "resume", "results"])
def test_sound_files_pass(workshop, kind):
    """Otherwise a refusal would mean nothing."""
    with bad_input.narrowed():
        case = workshop.sound()[kind]
        assert bad_input.attempt(case, workshop, 60).verdict == "success"
