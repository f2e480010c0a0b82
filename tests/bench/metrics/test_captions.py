"""Caption scores: the published values of coco-caption on its own 1,000 captions."""

import json
import shutil

import pytest

from lgvq_plugin.bench.metrics.captions import (
    caption_scores,
    caption_values,
    meteor_score,
    tokenize_ptb,
    tokenize_words,
)
from lgvq_plugin.sockets import ConfigError

needs_scorers = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("pycocoevalcap"),
    reason="pycocoevalcap is not installed: pip install 'lgvq_plugin[eval]'",
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")


@pytest.fixture
def oracle(shared):
    folder = shared / "caption_metric_oracle"
    records = json.loads((folder / "fakecap1000.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    return records, expected


def published(expected):
    return next(value for key, value in expected.items() if key.startswith("published"))


@needs_scorers
@pytest.mark.slow
def test_the_published_values_to_three_decimals(oracle):
    records, expected = oracle
    got = caption_scores([r["hyp_tok"] for r in records], [r["refs_tok"] for r in records])
    names = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
    names |= {"rouge_l": "ROUGE_L", "cider_d": "CIDEr"}
    full = next(value for key, value in expected.items() if key.startswith("full"))
    for ours, theirs in names.items():
        assert round(got[ours], 3) == published(expected)[theirs], ours
        assert got[ours] == pytest.approx(full[theirs], abs=1e-9), ours


@needs_scorers
@needs_java
@pytest.mark.slow
@pytest.mark.extended
def test_meteor_as_published(oracle):
    records, expected = oracle
    got = meteor_score([r["hyp_tok"] for r in records], [r["refs_tok"] for r in records])
    assert round(got, 3) == published(expected)["METEOR"]


@needs_scorers
@needs_java
@pytest.mark.slow
def test_ptb_tokens_equal_the_stored_ones(oracle):
    records, _ = oracle
    got = tokenize_ptb([r["hyp_raw"] for r in records[:200]])
    assert got == [r["hyp_tok"] for r in records[:200]]


def test_our_words_differ_from_ptb_in_few_sentences(oracle):
    records, _ = oracle
    pairs = [(raw, r["refs_tok"]) for r in records for raw in r["refs_raw"]]
    share = sum(tokenize_words(raw) in tokens for raw, tokens in pairs) / len(pairs)
    assert share > 0.95


@needs_scorers
def test_perfect_empty_and_shuffled_captions():
    sentences = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("star", "ring")]
    wanted = [[sentence, sentence] for sentence in sentences]
    perfect = caption_scores(sentences, wanted)
    assert perfect["bleu_1"] == pytest.approx(1, abs=1e-6)
    assert perfect["rouge_l"] == 1
    shuffled = caption_scores(sentences[::-1], wanted)  # both words are wrong, "a" is right
    assert shuffled["bleu_1"] == pytest.approx(1 / 3, abs=1e-6)
    assert shuffled["cider_d"] < 0.05 * perfect["cider_d"]
    empty = caption_scores([""] * 4, wanted)
    assert empty["bleu_1"] < 1e-6
    assert empty["cider_d"] == 0


@needs_scorers
def test_rouge_of_each_image_is_that_of_the_image_alone():
    given, wanted = ["a red star", "two rings", "a box"], [["a red ring"], ["two rings"], ["rain"]]
    alone = [caption_scores([g], [w])["rouge_l"] for g, w in zip(given, wanted, strict=True)]
    assert caption_values(given, wanted)["rouge_l"] == pytest.approx(alone)
    assert alone[1:] == pytest.approx([1, 0])


def test_wrong_input_is_told(monkeypatch):
    with pytest.raises(ValueError, match="lists of references"):
        caption_scores(["a"], [])
    with pytest.raises(ValueError, match="no reference"):
        caption_scores(["a"], [[]])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="Java"):
        meteor_score(["a"], [["a"]])


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ConfigError, match=r"lgvq_plugin\[eval\]"):
        caption_scores(["a"], [["a"]])
