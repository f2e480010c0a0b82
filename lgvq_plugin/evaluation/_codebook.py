"""usage, words, relation: how the codebook is used, and which words its codes answer to."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import pool_words
from ..metrics.captions import tokenize_words
from ..metrics.code_geometry import (
    STRONG,
    nearest_code_distances,
    similarity_gap,
    word_code_association,
)
from ..metrics.codebook import CodebookUsage
from ..probes.base import FrozenCodes
from ..sockets import ConfigError
from ._context import Context, Encoded
from ._rows import Row, Rows, rows_of

LEAST_COUNT = 10
"""Images that a word must stand at, and a code be used in, to be looked at."""
MOST_WORDS = 1000


def usage(context: Context) -> Rows:
    """Usage, perplexity, dead codes and entropy over the whole test set; nearest-code distances."""
    codes = context.test.codes
    indices, table = indices_of(codes)
    metric = CodebookUsage(len(table))
    metric.update(indices)
    numbers = {name: float(value) for name, value in metric.compute().items()}
    settings: dict[str, Any] = {"window": f"{len(codes)} test images", "codes": len(table)}
    rows = rows_of("codebook", numbers, len(codes), lower=["dead"], settings=settings)
    rows["codebook/entropy"] = Row(numbers["entropy"], len(codes), "bits", True, settings=settings)
    if len(table) > 1:
        distances = nearest_code_distances(table)
        told = {f"nearest_{k}": v for k, v in distances.items() if k != "rms_length"}
        settings = {"unit": "root-mean-square length of a code", "length": distances["rms_length"]}
        rows |= rows_of("codebook", told, len(table), neutral=["nearest"], settings=settings)
    return rows


def words(context: Context) -> Rows:
    """How many codes answer to a word, and how many words to a code, beside shuffled images."""
    data = context.train.captioned()
    known, has_word = word_table(data)
    indices, table = indices_of(data.codes)
    found = word_code_association(has_word, used(indices, len(table)), least=LEAST_COUNT)
    control = indices_of(data.codes.shuffled(context.config.seed))[0]
    chance = word_code_association(has_word, used(control, len(table)), least=LEAST_COUNT)
    numbers = {}
    for prefix, strength in (("", found), ("shuffled/", chance)):
        strong = strength > STRONG
        is_used = used(indices, len(table)).sum(0) >= LEAST_COUNT
        numbers[f"{prefix}codes_with_a_word"] = _share(strong.any(0)[is_used])
        numbers[f"{prefix}words_with_a_code"] = _share(strong.any(1))
        numbers[f"{prefix}strength"] = float(strength.amax(1).mean())
    settings = {"words": len(known), "least_images": LEAST_COUNT, "threshold": STRONG}
    return rows_of("words", numbers, len(data.codes), neutral=["shuffled"], settings=settings)


def answering_words(context: Context, *, most: int = 5) -> dict[int, list[tuple[str, float]]]:
    """Return the words that each code answers to, the strongest first; codes without are left out.

    Raises:
        ConfigError: if the host tells no indices or the images have no captions.
    """
    data = context.train.captioned()
    known, has_word = word_table(data)
    indices, table = indices_of(data.codes)
    strength = word_code_association(has_word, used(indices, len(table)), least=LEAST_COUNT)
    best = strength.topk(min(most, len(known)), dim=0)
    told = {}
    for code in range(len(table)):
        pairs = zip(best.values[:, code].tolist(), best.indices[:, code].tolist(), strict=True)
        if kept := [(known[w], round(value, 2)) for value, w in pairs if value > STRONG]:
            told[code] = kept
    return told


def relation(context: Context) -> Rows:
    """MSE and correlation of word-word with code-code cosines (paper, table 4).

    The paper matches words to codes by its heads, which a baseline has not. Here a word's code is
    the one that it most goes together with on training images: the same for every host.
    """
    data = context.train.captioned()
    known, has_word = word_table(data)
    indices, table = indices_of(data.codes)
    strength = word_code_association(has_word, used(indices, len(table)), least=LEAST_COUNT)
    matched = strength.amax(1) > 0
    if int(matched.sum()) < 3:
        raise ConfigError("relation: fewer than three words go together with a code")
    texts = [word for word, is_matched in zip(known, matched.tolist(), strict=True) if is_matched]
    features = word_features(context, texts)
    codes = table[strength[matched].argmax(1)]
    numbers = similarity_gap(features, codes)
    pairs = int(numbers.pop("pairs"))
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(context.config.seed))
    control = similarity_gap(features, codes[order])
    numbers |= {f"shuffled/{name}": control[name] for name in ("mse", "pearson", "spearman")}
    settings = {"words": len(texts), "match": "likelihood ratio", "guide": context.guide_config}
    return rows_of(
        "relation", numbers, pairs, lower=["mse"], neutral=["shuffled"], settings=settings
    )


def word_features(context: Context, texts: list[str]) -> Tensor:
    """Return the guide's feature of each word said alone, (W, Dt)."""
    parts = []
    for begin in range(0, len(texts), 256):
        seen = context.guide.encode(texts[begin : begin + 256])
        parts.append(pool_words(seen.tokens, seen.word_ids)[0][:, 0].cpu())
    return torch.cat(parts)


def word_table(data: Encoded) -> tuple[list[str], Tensor]:
    """Return the words that stand at enough images, and which image has which, (M, W) bool."""
    sets = _word_sets(data)
    counts = Counter(word for found in sets for word in found)
    most = [word for word, n in counts.items() if LEAST_COUNT <= n <= len(sets) - LEAST_COUNT]
    known = sorted(most, key=lambda word: (-counts[word], word))[:MOST_WORDS]
    if not known:
        raise ConfigError(f"no word of the captions stands at {LEAST_COUNT} images; use more")
    return known, _table(sets, known)


def has_words(data: Encoded, known: Sequence[str]) -> Tensor:
    """Return which image has which of the words in a caption, (M, W) bool."""
    return _table(_word_sets(data), known)


def _word_sets(data: Encoded) -> list[set[str]]:
    return [{w for text in texts for w in tokenize_words(text).split()} for texts in data.captions]


def _table(sets: Sequence[set[str]], known: Sequence[str]) -> Tensor:
    number = {word: i for i, word in enumerate(known)}
    table = torch.zeros(len(sets), len(known), dtype=torch.bool)
    for i, found in enumerate(sets):
        table[i, [number[word] for word in found if word in number]] = True
    return table


def indices_of(codes: FrozenCodes) -> tuple[Tensor, Tensor]:
    """Return indices and table of codes; raises ConfigError for a host without indices."""
    if codes.indices is None or codes.table is None:
        raise ConfigError("this host's quantizer tells no code indices")
    return codes.indices, codes.table


def used(indices: Tensor, size: int) -> Tensor:
    """Return which image uses which code, (M, K) bool."""
    return torch.zeros(len(indices), size, dtype=torch.bool).scatter_(1, indices, True)


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0
