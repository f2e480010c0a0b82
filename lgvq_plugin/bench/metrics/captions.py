"""Caption scores by the scorers that papers use (pycocoevalcap): BLEU, ROUGE-L, CIDEr-D, METEOR.

Sentences must be tokenized: by `tokenize_words` (ours), or by `tokenize_ptb` (papers; needs Java).
"""

import importlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from ...sockets import ConfigError

References = Sequence[Sequence[str]]


def caption_scores(hypotheses: Sequence[str], references: References) -> dict[str, float]:
    """Return `bleu_1` to `bleu_4` of the whole set, and the means of `rouge_l` and `cider_d`.

    Each image has one tokenized hypothesis and at least one tokenized reference. CIDEr-D weighs
    words by their rarity in these references, so it is not comparable between sets. It is at most
    about 10, the others at most 1.

    Raises:
        ConfigError: if pycocoevalcap is not installed.
        ValueError: on unequal lengths or an image without a reference.
    """
    means = {name: sum(v) / len(v) for name, v in caption_values(hypotheses, references).items()}
    return bleu_scores(hypotheses, references) | means


def bleu_scores(hypotheses: Sequence[str], references: References) -> dict[str, float]:
    """Return `bleu_1` to `bleu_4` of the whole set; arguments as :func:`caption_scores`."""
    given, wanted = _tables(hypotheses, references)
    bleu = _scorer("bleu.bleu", "Bleu")(4).compute_score(wanted, given, verbose=0)[0]
    return {f"bleu_{n + 1}": float(bleu[n]) for n in range(4)}


def caption_values(hypotheses: Sequence[str], references: References) -> dict[str, list[float]]:
    """Return `rouge_l` and `cider_d` of each image; arguments as :func:`caption_scores`."""
    given, wanted = _tables(hypotheses, references)
    scorers = {"rouge_l": ("rouge.rouge", "Rouge"), "cider_d": ("cider.cider", "Cider")}
    return {
        name: [float(value) for value in _scorer(*path)().compute_score(wanted, given)[1]]
        for name, path in scorers.items()
    }


def meteor_score(hypotheses: Sequence[str], references: References) -> float:
    """Return METEOR 1.5 (English) of tokenized sentences.

    Raises:
        ConfigError: without Java or pycocoevalcap.
    """
    _require_java("METEOR needs Java: no `java` on the PATH")
    given, wanted = _tables(hypotheses, references)
    scorer = _scorer("meteor.meteor", "Meteor")()
    with scorer.meteor_p as process:
        try:
            return float(scorer.compute_score(wanted, given)[0])
        finally:
            process.kill()


def tokenize_words(sentence: str) -> str:
    """Return the lower-case words and numbers of a sentence, separated by blanks.

    Example:
        >>> tokenize_words("A man's twin-hulled boat, 2 dogs.")
        "a man's twin-hulled boat 2 dogs"
    """
    return " ".join(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", sentence.lower()))


def word_sets(captions: Sequence[Sequence[str]]) -> list[set[str]]:
    """Return the words of each image's captions.

    Example:
        >>> [sorted(words) for words in word_sets([["A dog.", "a hound"], []])]
        [['a', 'dog', 'hound'], []]
    """
    return [{w for text in texts for w in tokenize_words(text).split()} for texts in captions]


def tokenize_ptb(sentences: Sequence[str]) -> list[str]:
    """Tokenize as papers do, with the Penn Treebank tokenizer and without punctuation.

    Raises:
        ConfigError: without Java or pycocoevalcap.
    """
    _require_java("tokenizer ptb needs Java: no `java` on the PATH; `tokenizer: words` needs none")
    tokenizer = _scorer("tokenizer.ptbtokenizer", "PTBTokenizer")()
    table = {i: [{"caption": sentence}] for i, sentence in enumerate(sentences)}
    return [tokens[0] for tokens in tokenizer.tokenize(table).values()]


def _require_java(message: str) -> None:
    if shutil.which("java") is None:
        raise ConfigError(message)


def _tables(
    hypotheses: Sequence[str], references: References
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return what pycocoevalcap takes; an empty sentence becomes "_", which METEOR can read."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} sentences for {len(references)} lists of references")
    if not all(len(sentences) for sentences in references):
        raise ValueError("some image has no reference; leave it out")
    given = {i: [" ".join(text.split()) or "_"] for i, text in enumerate(hypotheses)}
    return given, {i: list(texts) for i, texts in enumerate(references)}


def _scorer(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise ConfigError(
            "caption scores need pycocoevalcap: pip install 'lgvq_plugin[eval]'"
        ) from error
