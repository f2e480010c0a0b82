"""Answers: the official VQA v2 evaluation's value on real questions, and Wu-Palmer by hand."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest

from lgvq_plugin.bench.metrics.answers import (
    exact_accuracy,
    majority,
    normalize_answer,
    vote_accuracy,
    wordnet_similarity,
    wups,
)
from lgvq_plugin.sockets import ConfigError


def test_a_second_writing_of_the_official_rules_on_real_questions(shared):
    """2,962 questions; each is answered as one person did, some retouched.

    The value was computed once by a second writing of the rules of GT-Vision-Lab/VQA, made
    apart from this package; the official file itself was not run.
    """
    with gzip.open(shared / "vqa_v2_60k" / "vqa_annotatons_test.gzip") as file:
        questions = json.load(file)["annotations"]
    total = 0.0
    for n, question in enumerate(questions):
        people = [answer["answer"] for answer in question["answers"]]
        given = people[n % 10]
        given = f"The {given.upper()}." if n % 3 == 0 else given
        total += vote_accuracy(given.replace(" ", " / ") if n % 5 == 0 else given, people)
    assert total / len(questions) == pytest.approx(0.8784942606347076, abs=1e-12)


@pytest.mark.parametrize("right", range(11))
def test_leaving_one_out_equals_counting(right):
    people = ["dog"] * right + [f"other{i}" for i in range(10 - right)]
    counts = [sum(a == "dog" for a in nine) for nine in itertools.combinations(people, 9)]
    expected = sum(min(count / 3, 1) for count in counts) / 10
    assert vote_accuracy("Dog", people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man", "man"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("don't", "don't"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("yes!", "yes"),
        ("$1,000", "$1000"),
        ("6.5 feet.", "6.5 feet"),
        ("wont", "won't"),
        ("shed", "shed"),
        ("well", "well"),
        ("couldnt've", "couldn't've"),
        ("THE\nend", "end"),
    ],
)
def test_normal_forms(text, expected):
    assert " ".join(normalize_answer(text).split()) == expected


def test_exact_accuracy_by_kind():
    got = exact_accuracy(["red", "one", "dog"], ["red", "two", "dog"], ["color", "count", "object"])
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert (got["accuracy/color"], got["accuracy/count"]) == (1, 0)
    assert majority(["b", "a", "b", "a"]) == "a"
    with pytest.raises(ValueError, match="questions"):
        exact_accuracy(["a"], [])
    with pytest.raises(ValueError, match="several people"):
        vote_accuracy("a", [])


def test_wups_by_hand():
    table = {("cat", "dog"): 0.86, ("cat", "car"): 0.3}

    def similarity(one, other):
        return table.get((one, other), 0.0)

    given, wanted = ["cat", "cat", "Cat", "zzz"], ["dog", "car", "cat ", "zzz"]
    assert wups(given, wanted, similarity, threshold=0.0) == pytest.approx((0.86 + 0.3 + 2) / 4)
    expected = (0.086 + 0.03 + 2) / 4
    assert wups(given, wanted, similarity, threshold=0.9) == pytest.approx(expected)


@pytest.mark.slow
def test_wordnet_gives_the_documented_similarity():
    """NLTK's own documentation: wup_similarity of dog.n.01 and cat.n.01 is 0.857142..."""
    pytest.importorskip("nltk", reason="nltk is in the extra [eval]")
    try:
        similarity = wordnet_similarity(os.environ.get("LGVQ_WORDNET"))
    except ConfigError as error:
        pytest.skip(str(error))
    assert similarity("dog", "cat") == pytest.approx(0.857142857, abs=1e-8)
    assert similarity("qqq", "cat") == 0


@pytest.mark.slow
def test_a_missing_wordnet_is_told(monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk", reason="nltk is in the extra [eval]")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    try:
        wordnet_similarity()
    except ConfigError as error:
        assert "evaluation.wordnet" in str(error)  # noqa: PT017
    else:
        assert Path(nltk.corpus.wordnet._root).is_dir()  # was loaded by a test before
