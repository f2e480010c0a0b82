"""Accuracy of answers: exact match (COCO-QA), VQA v2's vote among ten people, and WUPS."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from ...sockets import ConfigError

Similarity = Callable[[str, str], float]


def exact_accuracy(
    given: Sequence[str], wanted: Sequence[str], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the share of equal answers as `accuracy`, and `accuracy/KIND` for each kind.

    Example:
        >>> exact_accuracy(["red", "two"], ["Red ", "one"], ["color", "count"])
        {'accuracy': 0.5, 'accuracy/color': 1.0, 'accuracy/count': 0.0}
    """
    _require_pairs(given, wanted)
    right = [_plain(g) == _plain(w) for g, w in zip(given, wanted, strict=True)]
    results = {"accuracy": sum(right) / len(right)}
    for kind in sorted(set(kinds or ())):
        of_kind = [r for r, k in zip(right, kinds or (), strict=True) if k == kind]
        results[f"accuracy/{kind}"] = sum(of_kind) / len(of_kind)
    return results


def vote_accuracy(given: str, people: Sequence[str]) -> float:
    """Return VQA v2's accuracy of one answer: min(matches / 3, 1), leaving each person out in turn.

    Example:
        >>> round(vote_accuracy("yes", ["yes"] * 3 + ["no"] * 7), 4)  # (3 * 2/3 + 7 * 1) / 10
        0.9
    """
    if not people:
        raise ValueError("expected the answers of several people, got none")
    answer = normalize_answer(given)
    # The official code cleans people's answers of punctuation only, and only if they differ.
    are_alike = len(set(people)) == 1
    matches = [(p if are_alike else _clean(_one_line(p))) == answer for p in people]
    votes = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(votes) / len(votes)


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer; the alphabetically first one of equally frequent ones."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def wups(
    given: Sequence[str], wanted: Sequence[str], similarity: Similarity, *, threshold: float
) -> float:
    """Return the mean Wu-Palmer similarity of one-word answers (Malinowski and Fritz 2014).

    `similarity` maps two words to [0, 1], see :func:`wordnet_similarity`; values below `threshold`
    are multiplied by 0.1. Papers use 0.9 and 0.0.
    """
    _require_pairs(given, wanted)
    total = 0.0
    for pair, count in Counter(zip(map(_plain, given), map(_plain, wanted), strict=True)).items():
        value = 1.0 if pair[0] == pair[1] else similarity(*pair)
        total += count * (value if value >= threshold else 0.1 * value)
    return total / len(given)


def wordnet_similarity(folder: str | None = None) -> Similarity:
    """Return the highest Wu-Palmer similarity of two words' noun senses, from NLTK's WordNet.

    A word that is not in WordNet is similar only to itself. `folder` contains NLTK's
    `corpora/wordnet`; None: NLTK's default search path.

    Raises:
        ConfigError: without NLTK or its WordNet.
    """
    try:
        import nltk
        from nltk.corpus import wordnet
    except ImportError as error:
        raise ConfigError("WUPS needs NLTK: pip install 'lgvq_plugin[eval]'") from error
    if folder is not None and folder not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise ConfigError(
            "WUPS needs WordNet: python -m nltk.downloader wordnet, or set the folder that "
            "contains corpora/wordnet: evaluation.wordnet=PATH"
        ) from error

    def similarity(one: str, other: str) -> float:
        if one == other:
            return 1.0
        senses = [wordnet.synsets(word.replace(" ", "_"), pos="n") for word in (one, other)]
        pairs = [a.wup_similarity(b) or 0.0 for a in senses[0] for b in senses[1]]
        return float(max(pairs, default=0.0))

    return similarity


def normalize_answer(text: str) -> str:
    """Normalize an answer as VQA v2's official evaluation does.

    Lower case, no articles, digits for numbers up to ten, contractions with their apostrophes, and
    no punctuation except periods and apostrophes within words.

    Example:
        >>> [normalize_answer(text) for text in ("The  two dogs, dont!", "1,000", "3.5")]
        ["2 dogs don't", '1000', '3.5']
    """
    words = [NUMBERS.get(word, word) for word in _clean(_one_line(text)).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _clean(text: str) -> str:
    """Delete punctuation next to a blank or in a number like 1,000; turn the rest into blanks."""
    cleaned = text
    is_grouped = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text or is_grouped
        cleaned = cleaned.replace(mark, "" if is_loose else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _require_pairs(given: Sequence[str], wanted: Sequence[str]) -> None:
    if not given or len(given) != len(wanted):
        raise ValueError(f"{len(given)} answers for {len(wanted)} questions")


def _contractions() -> dict[str, str]:
    """Map forms that lack an apostrophe to the right ones: "dont" -> "don't"."""
    endings = {
        "n't": "ai are ca could did does do did had has have is might must need ought sha should "
        "was were wo would",
        "'ve": "could i might must not should they we what where who would you",
        "'d": "he how it somebody someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "n't've": "could had might should would",
        "'d've": "he i it she somebody someone something there they we who you",
    }
    whole = [stem + end for end, stems in endings.items() for stem in stems.split()]
    whole += ["i'm", "ma'am", "o'clock", "'twas", "y'all", "let's"]
    table: dict[str, str] = {}
    for form in whole:
        parts = form.split("'")
        for marks in itertools.product(["", "'"], repeat=len(parts) - 1):
            table["".join(map("".join, zip(["", *marks], parts, strict=True)))] = form
    del table["lets"]  # a word of its own
    return table


COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(COUNTED.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = _contractions()
