"""Accuracy of answers: exact match (COCO-QA), VQA v2's vote among ten people, and WUPS."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from ...sockets import ConfigError

COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(COUNTED.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def exact_accuracy(
    given: Sequence[str], wanted: Sequence[str], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the share of equal answers as `accuracy`, and `accuracy/KIND` of each kind.

    Example:
        >>> exact_accuracy(["red", "two"], ["Red ", "one"], ["color", "count"])
        {'accuracy': 0.5, 'accuracy/color': 1.0, 'accuracy/count': 0.0}
    """
    if not given or len(given) != len(wanted):
        raise ValueError(f"{len(given)} answers for {len(wanted)} questions")
    right = [_plain(g) == _plain(w) for g, w in zip(given, wanted, strict=True)]
    results = {"accuracy": sum(right) / len(right)}
    for kind in sorted(set(kinds or ())):
        mine = [r for r, k in zip(right, kinds or (), strict=True) if k == kind]
        results[f"accuracy/{kind}"] = sum(mine) / len(mine)
    return results


def vote_accuracy(given: str, people: Sequence[str]) -> float:
    """Return VQA v2's accuracy of one answer: min(matches / 3, 1), each person left out in turn.

    Example:
        >>> round(vote_accuracy("yes", ["yes"] * 3 + ["no"] * 7), 4)  # (3 * 2/3 + 7 * 1) / 10
        0.9
    """
    if not people:
        raise ValueError("expected the answers of several people, got none")
    answer = normalize_answer(given)
    # Official code: the people's answers are cleaned of punctuation only, and only if they differ.
    are_alike = len(set(people)) == 1
    matches = [(p if are_alike else _clean(_flat(p))) == answer for p in people]
    total = sum(matches)
    votes = [min(1.0, (total - match) / 3) for match in matches]
    return sum(votes) / len(votes)


def normalize_answer(text: str) -> str:
    """Return an answer as VQA v2's evaluation sees it.

    Lower case; no articles; numbers up to ten as digits; apostrophes put back into contractions;
    punctuation removed, but for periods and apostrophes within, by the official rules.

    Example:
        >>> [normalize_answer(text) for text in ("The  two dogs, dont!", "1,000", "3.5")]
        ["2 dogs don't", '1000', '3.5']
    """
    words = [NUMBERS.get(word, word) for word in _clean(_flat(text)).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _clean(text: str) -> str:
    """Drop a mark that stands beside a blank, or any in a number such as 1,000; else a blank."""
    out = text
    is_grouped = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text or is_grouped
        out = out.replace(mark, "" if is_loose else " ")
    return re.sub(r"\.(?!\d)", "", out)


def _contractions() -> dict[str, str]:
    """Return the forms without an apostrophe that are no other word: "dont" -> "don't"."""
    endings = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was "
        "were wo would",
        "'ve": "could i might must not should they we what where who would you",
        "'d": "he how it somebody someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "n't've": "could had might should would",
        "'d've": "he i it she somebody someone something there they we who you",
    }
    whole = [s + end for end, stems in endings.items() for s in stems.split()]
    whole += ["i'm", "ma'am", "o'clock", "'twas", "y'all", "let's"]
    table: dict[str, str] = {}
    for form in whole:
        places = [i for i, letter in enumerate(form) if letter == "'"]
        for kept in range(1 << len(places)):
            gone = {p for bit, p in enumerate(places) if not kept >> bit & 1}
            table[("".join(c for i, c in enumerate(form) if i not in gone))] = form
    return table


CONTRACTIONS = {short: form for short, form in _contractions().items() if short not in ("lets",)}


Similarity = Callable[[str, str], float]


def wups(
    given: Sequence[str], wanted: Sequence[str], similarity: Similarity, *, threshold: float
) -> float:
    """Return the mean Wu-Palmer similarity of one-word answers (Malinowski and Fritz 2014).

    Args:
        given, wanted: the answers.
        similarity: of two words, in [0, 1]; :func:`wordnet_similarity` makes one.
        threshold: a similarity below it counts a tenth; papers use 0.9 and 0.0.
    """
    if not given or len(given) != len(wanted):
        raise ValueError(f"{len(given)} answers for {len(wanted)} questions")
    known: dict[tuple[str, str], float] = {}
    total = 0.0
    for pair in zip(map(_plain, given), map(_plain, wanted), strict=True):
        if pair not in known:
            value = 1.0 if pair[0] == pair[1] else similarity(*pair)
            known[pair] = value if value >= threshold else 0.1 * value
        total += known[pair]
    return total / len(given)


def wordnet_similarity(folder: str | None = None) -> Similarity:
    """Return the best Wu-Palmer similarity over the noun senses of two words, by NLTK's WordNet.

    A word that WordNet does not know is similar to itself only.

    Args:
        folder: a folder that holds NLTK's `corpora/wordnet`; None looks where NLTK does.

    Raises:
        ConfigError: without NLTK or without its WordNet.
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
            "WUPS needs WordNet: python -m nltk.downloader wordnet, or name the folder that holds "
            "corpora/wordnet: evaluation.vqa.wordnet=PATH"
        ) from error

    def similarity(one: str, other: str) -> float:
        if one == other:
            return 1.0
        pairs = [
            first.wup_similarity(second) or 0.0
            for first in wordnet.synsets(one.replace(" ", "_"), pos="n")
            for second in wordnet.synsets(other.replace(" ", "_"), pos="n")
        ]
        return float(max(pairs, default=0.0))

    return similarity


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the first in the alphabet among equals."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
