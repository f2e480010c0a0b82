"""Questions: perfect with the right codes, chance with others, majority by counting."""

from dataclasses import replace

import pytest

from lgvq_plugin.bench.probes import language
from lgvq_plugin.bench.probes.language import VQAConfig, VQAProbe

CONFIG = VQAConfig(steps=150, width=32, heads=2, depth=1, dropout=0.0, learning_rate=1e-2)


@pytest.mark.slow
def test_it_reads_codes_and_questions(train, test):
    probe = VQAProbe(CONFIG).fit(train.codes, train.questions, progress=False)
    got = probe.evaluate(test.codes, test.questions)
    assert got["accuracy"] > 0.95
    assert got["accuracy/color"] > 0.9
    assert got["accuracy/shape"] > 0.9
    assert 0.1 < got["shuffled/accuracy"] < 0.45  # four answers a kind: 1/4
    usual = {}
    for kind in ("color", "shape"):
        answers = [q.answer for q in train.questions if q.kind == kind]
        usual[kind] = max(sorted(set(answers)), key=answers.count)
    right = [usual[q.kind] == q.answer for q in test.questions]
    assert got["majority/accuracy"] == pytest.approx(sum(right) / len(right))


def test_peoples_answers_give_the_vote(train, test):
    short = replace(CONFIG, steps=2)
    probe = VQAProbe(short).fit(train.codes, train.questions, progress=False)
    people = [replace(q, people=("zebra",) * 10) for q in test.questions]
    assert probe.evaluate(test.codes, people)["vote_accuracy"] == 0
    given = probe.answer(test.codes, test.questions)
    agree = [replace(q, people=(a,) * 10) for q, a in zip(test.questions, given, strict=True)]
    assert probe.evaluate(test.codes, agree)["vote_accuracy"] == 1


def test_only_the_usual_answers_are_classes(train):
    short = replace(CONFIG, steps=1, max_answers=3)
    probe = VQAProbe(short).fit(train.codes, train.questions, progress=False)
    assert len(probe.answers) == 3
    with pytest.raises(ValueError, match="no question"):
        VQAProbe(short).fit(train.codes, [])


def test_the_names_of_version_0_1_still_exist():
    assert (language.QuestionsProbe, language.QuestionsConfig) == (VQAProbe, VQAConfig)
