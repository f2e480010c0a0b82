"""One number of an evaluation, with all that it depends on."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import pool_words
from ..host import decode
from ..sockets import ConfigError, resolve
from .evaluate import EvaluationConfig
from .evaluation_context import Context, Encoded
from .metrics.answers import wordnet_similarity, wups
from .metrics.captions import (
    bleu_scores,
    caption_scores,
    caption_values,
    meteor_score,
    tokenize_ptb,
    tokenize_words,
)
from .metrics.clip_score import CLIPScorer
from .metrics.codebook import (
    STRONG,
    CodebookUsage,
    nearest_code_distances,
    similarity_gap,
    word_code_association,
)
from .metrics.frechet import LEAST_IMAGES, FrechetDistance
from .metrics.perceptual import PerceptualDistance
from .metrics.reconstruction import IMPLEMENTATION, psnr_and_ssim
from .probes.base import CodeFeatures, FrozenCodes

Rows = dict[str, "Row"]


@dataclass(frozen=True)
class Row:
    """A number.

    Args:
        value: of the metric.
        n: images, or questions, it was computed on.
        unit: such as dB; "" for a share or a pure number.
        higher_is_better: None where neither is better, as for a control.
        per_image: the value of each test image, in order, where there is one.
        settings: implementation, weights, resize filter and whatever else it depends on.
    """

    value: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = True
    per_image: Sequence[float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it for JSON; keys that say nothing are left out."""
        told: dict[str, Any] = {
            "value": self.value,
            "n": self.n,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }
        if self.settings:
            told["settings"] = dict(self.settings)
        if self.per_image is not None:
            told["per_image"] = [round(float(value), 6) for value in self.per_image]
        return told


def means_of(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean over images of each (M,) tensor.

    Example:
        >>> means_of({"recall@1": Tensor([0.0, 1.0])})
        {'recall@1': 0.5}
    """
    return {name: float(value.double().mean()) for name, value in values.items()}


def rows_of(
    prefix: str,
    numbers: Mapping[str, float],
    n: int,
    *,
    lower: Sequence[str] = (),
    neutral: Sequence[str] = (),
    unit: str = "",
    settings: Mapping[str, Any] | None = None,
    per_image: Mapping[str, Iterable[float]] | None = None,
) -> Rows:
    """Return `prefix/NAME` -> Row of each number.

    Args:
        prefix: of the names.
        numbers: by name.
        n: of all.
        lower: parts of a name that say that lower is better.
        neutral: parts of a name that say that neither is, such as shuffled.
        unit: of all.
        settings: of all.
        per_image: values of each image, by name, of those numbers that are their mean.

    Example:
        >>> numbers = {"accuracy": 0.5, "shuffled/accuracy": 0.1}
        >>> rows = rows_of("vqa", numbers, 8, neutral=["shuffled"])
        >>> rows["vqa/shuffled/accuracy"].higher_is_better is None
        True
    """
    rows: Rows = {}
    for name, value in numbers.items():
        better: bool | None = not any(part in name for part in lower)
        if any(part in name for part in neutral):
            better = None
        each = (per_image or {}).get(name)
        values = None if each is None else [float(one) for one in each]
        rows[f"{prefix}/{name}"] = Row(float(value), n, unit, better, values, settings or {})
    return rows


# -- psnr, ssim, lpips, fid, fd: how near the reconstructions are, one by one and as a set -------


logger = logging.getLogger(__name__)
PIXELS = {
    "implementation": IMPLEMENTATION,
    "quantization": "uint8",
    "resize": "none",
    "mean": "over images",
}


def psnr(context: Context) -> Rows:
    """PSNR of each image, in dB."""
    return {"reconstruction/psnr": _pixel_row(context, 0, "dB")}


def ssim(context: Context) -> Rows:
    """SSIM of each image, Gaussian window of 11."""
    return {"reconstruction/ssim": _pixel_row(context, 1, "")}


def _pixel_row(context: Context, which: int, unit: str) -> Row:
    parts = [psnr_and_ssim(images, given)[which] for images, given in context.pairs()]
    values = torch.cat(parts).double()
    window = {"window": "Gaussian 11, sigma 1.5"} if which else {}
    settings = {**PIXELS, **window}
    return Row(float(values.mean()), len(values), unit, True, values.tolist(), settings)


def lpips(context: Context) -> Rows:
    """LPIPS of each image."""
    options = context.config.lpips
    metric = PerceptualDistance(options.net, options.backbone).to(context.device)
    parts = [
        metric.distances(images.to(context.device), given.to(context.device)).cpu()
        for images, given in context.pairs()
    ]
    values = torch.cat(parts).double()
    name = f"reconstruction/lpips_{options.net}"
    settings = metric.settings
    row = Row(float(values.mean()), len(values), "", False, values.tolist(), settings)
    return {name: row}


def fid(context: Context) -> Rows:
    """FID of the reconstructions against the test images."""
    return _frechet(context, FrechetDistance("inception", weights=context.config.fid.weights))


def fd(context: Context) -> Rows:
    """Frechet distance in another feature net."""
    options = context.config.fd
    return _frechet(context, FrechetDistance(options.net, weights=options.weights))


def _frechet(context: Context, distance: FrechetDistance) -> Rows:
    for images, given in context.pairs():
        distance.update(images, real=True)
        distance.update(given, real=False)
    value, (count, _) = distance.compute(), distance.counts
    warn_of_few(distance.name, count)
    settings = distance.settings | reference(context)
    return {f"reconstruction/{distance.name}": Row(value, count, "", False, settings=settings)}


def reference(context: Context) -> dict[str, Any]:
    """Tell the reference set of a Frechet distance."""
    return {"reference": {"set": context.test_section, "images": context.test_images}}


def warn_of_few(name: str, count: int) -> None:
    """Say that a Frechet distance of few images is biased."""
    if count < LEAST_IMAGES:
        logger.warning(
            "%s on %d images (< %d) is biased upwards: compare it with rows of the same n only",
            *(name, count, LEAST_IMAGES),
        )


# -- usage, words, relation: how the codebook is used, and which words its codes answer to -------


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


# -- retrieval, masked_words, attributes: what probes of frozen codes find, the same for any host --


FUNCTION_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "he", "her", "his"),
    *("in", "into", "is", "it", "its", "near", "next", "no", "not", "of", "on", "one", "or"),
    *("other", "out", "over", "s", "she", "some", "that", "the", "their", "there", "these"),
    *("they", "this", "to", "up", "while", "with"),
}
"""Words of captions that tell nothing of an image by themselves."""


def retrieval(context: Context) -> Rows:
    """Recall at 1, 5, 10 between test images and their first captions, by a ridge probe."""
    train, test = context.train.captioned(), context.test.captioned()
    probe = resolve("bench.probes", "retrieval")(seed=context.config.seed)
    probe.fit(train.codes.features(), _sentences(context, train.captions))
    captions = [texts[0] for texts in test.captions]
    target = _sentences(context, [[text] for text in captions])
    values = probe.values(test.codes.features(), target, captions)
    settings = {
        "probe": "ridge",
        "strength": probe.strength,
        "guide": context.guide_config,
        "train_images": len(train.codes),
    }
    return rows_of(
        "retrieval",
        means_of(values),
        len(captions),
        lower=["mean_rank"],
        neutral=["chance"],
        settings=settings,
        per_image={name: v for name, v in values.items() if name != "chance@1"},
    )


def _sentences(context: Context, captions: list[list[str]]) -> Tensor:
    """Return the guide's sentence features, (M, Ds): the mean of each image's unit features."""
    flat = [text for texts in captions for text in texts]
    parts = [
        F.normalize(context.guide.encode(flat[begin : begin + 256]).sentence, dim=-1).cpu()
        for begin in range(0, len(flat), 256)
    ]
    features, owners = torch.cat(parts), torch.tensor([len(texts) for texts in captions])
    means = torch.zeros(len(captions), features.shape[1])
    means.index_add_(0, torch.arange(len(captions)).repeat_interleave(owners), features)
    return means / owners[:, None]


def masked_words(context: Context) -> Rows:
    """Recall of hidden words by heads trained on frozen codes, leak-free and by the leaky protocol.

    Nothing of an LG-VQ model's own heads is used, so a baseline is asked in the same way.
    """
    member, config = context.config.probe("masked_words")
    train, test = context.train.captioned(), context.test.captioned()
    captions = [texts[0] for texts in test.captions]
    rows: Rows = {}
    told = {
        "leak_free": "words hidden before the text encoder",
        "leaky": "released code's protocol: words hidden after the text encoder, which leaks them",
    }
    if not config.leaky:
        del told["leaky"]
    for protocol, what in told.items():
        probe = member(context.guide, config, protocol=protocol, device=context.device)
        folder = context.folder
        probe.fit(train.codes, train.captions, folder=folder, progress=context.progress)
        settings = {
            "protocol": what,
            "heads": "trained on frozen codes",
            "guide": context.guide_config,
            "train_images": len(train.codes),
            "probe": vars(config),
        }
        for hidden in (1, 3):
            asked = {"hidden": hidden, "seed": context.config.seed}
            found = probe.values(test.codes, captions, **asked)
            blind = probe.values(test.codes.shuffled(context.config.seed), captions, **asked)
            each = {f"mask_{hidden}/{name}": values for name, values in found.items()}
            each |= {f"shuffled/mask_{hidden}/{name}": values for name, values in blind.items()}
            rows |= rows_of(
                f"masked_words/{protocol}",
                {name: sum(values) / max(len(values), 1) for name, values in each.items()},
                hidden * len(found["recall@1"]),
                neutral=["shuffled"],
                settings=settings,
                per_image=each,
            )
    return rows


def attributes(context: Context) -> Rows:
    """Accuracy of labels read off the codes by a linear map, on all and on few training images."""
    member, config = resolve("bench.probes", "attributes"), context.config
    train, test, wanted, target = _labelled(context)
    few, all_rows = min(config.few_shot, len(train.codes)), torch.arange(len(train.codes))
    draws = _few_shot_draws(len(all_rows), few, config)
    features, seen = train.codes.features(), test.codes.features()
    control = test.codes.shuffled(config.seed).features()
    rows: Rows = {}
    for name, sets in (("linear", [all_rows]), ("few_shot", draws)):
        numbers, values = [], []
        for drawn in sets:
            labels = {key: value[drawn] for key, value in wanted.items()}
            probe = member(seed=config.seed).fit(_rows_of(features, drawn), labels)
            found = probe.evaluate(seen, target)
            found["shuffled/mean_accuracy"] = probe.evaluate(control, target)["mean_accuracy"]
            numbers.append(found)
            values.append(probe.values(seen, target))
        rows |= rows_of(
            f"attributes/{name}",
            {key: sum(found[key] for found in numbers) / len(sets) for key in numbers[0]},
            len(test.codes),
            neutral=["majority", "shuffled"],
            settings={"probe": "ridge", "train_images": len(sets[0]), "draws": len(sets)},
            per_image={key: sum(v[key] for v in values) / len(sets) for key in values[0]},
        )
    return rows


def _few_shot_draws(count: int, few: int, config: EvaluationConfig) -> list[Tensor]:
    """Return the rows of each few-shot set: the first, then draws; one set where few is all."""
    generator = torch.Generator().manual_seed(config.seed)
    more = config.few_shot_draws - 1 if few < count else 0
    others = [torch.randperm(count, generator=generator)[:few] for _ in range(more)]
    return [torch.arange(few), *others]


def _labelled(context: Context) -> tuple[Encoded, Encoded, dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test images and their labels, or else their captions' usual words."""
    train, test = context.train, context.test
    if train.attributes and test.attributes:
        return train, test, _stack_labels(train.attributes), _stack_labels(test.attributes)
    if not context.config.attribute_words:
        raise ConfigError(
            "attributes: the data set has no labels (the scenes and CelebA have); set "
            "evaluation.attribute_words, such as 48, to take words of its captions for labels"
        )
    train, test = train.captioned(), test.captioned()
    known, has_word = word_table(train)
    shares = has_word.double().mean(dim=0).tolist()
    telling = [
        number
        for number, (word, share) in enumerate(zip(known, shares, strict=True))
        if share <= 0.5 and word not in FUNCTION_WORDS
    ][: context.config.attribute_words]
    wanted = {"words": has_word[:, telling].long()}
    target = {"words": has_words(test, [known[number] for number in telling]).long()}
    return train, test, wanted, target


def _rows_of(features: CodeFeatures, rows: Tensor) -> CodeFeatures:
    histogram = None if features.histogram is None else features.histogram[rows]
    return CodeFeatures(features.pooled[rows], histogram)


def _stack_labels(records: list) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.as_tensor(record[name]) for record in records])
        for name in records[0]
    }


# -- caption, vqa, t2i: the tasks of the paper, each a small net on frozen codes -----------------


JUDGED = 2048  # training pictures that the judge sees, at most


def caption(context: Context) -> Rows:
    """BLEU, ROUGE-L, CIDEr-D and METEOR of captions written from frozen codes."""
    member, config = context.config.probe("caption")
    train, test = context.train.captioned(), context.test.captioned()
    probe = member(config, device=context.device)
    probe.fit(train.codes, train.captions, folder=context.folder, progress=context.progress)
    references = _tokenized(context, test.captions)
    written = probe.write(test.codes)
    values = caption_values(written, references)
    numbers = bleu_scores(written, references)
    numbers |= {name: sum(each) / len(each) for name, each in values.items()}
    blind = caption_scores(probe.write(test.codes.shuffled(context.config.seed)), references)
    numbers |= {f"shuffled/{name}": value for name, value in blind.items()}
    settings = {
        "implementation": "pycocoevalcap",
        "tokenizer": context.config.tokenizer,
        "references": sum(map(len, references)),
        "train_images": len(train.codes),
        "probe": vars(config),
    }
    try:
        numbers["meteor"] = meteor_score(written, references)
    except ConfigError as error:
        settings["meteor"] = f"skipped: {error}"
    return rows_of(
        "caption",
        numbers,
        len(written),
        neutral=["shuffled"],
        settings=settings,
        per_image=values,
    )


def _tokenized(context: Context, captions: Sequence[Sequence[str]]) -> list[list[str]]:
    if context.config.tokenizer == "words":
        return [[tokenize_words(text) for text in texts] for texts in captions]
    flat = iter(tokenize_ptb([text for texts in captions for text in texts]))
    return [[next(flat) for _ in texts] for texts in captions]


def vqa(context: Context) -> Rows:
    """Accuracy of answers chosen from frozen codes; WUPS where WordNet is."""
    train, test = context.train, context.test
    if not train.questions or not test.questions:
        raise ConfigError("vqa: the data set has no questions; scenes, cocoqa and vqa2 have")
    member, config = context.config.probe("vqa")
    probe = member(config, device=context.device)
    probe.fit(train.codes, train.questions, folder=context.folder, progress=context.progress)
    numbers = probe.evaluate(test.codes, test.questions, seed=context.config.seed)
    settings: dict[str, Any] = {
        "train_questions": len(train.questions),
        "answers": len(probe.answers),
        "probe": vars(config),
    }
    try:
        similarity = wordnet_similarity(context.config.wordnet)
        given = probe.answer(test.codes, test.questions)
        wanted = [question.answer for question in test.questions]
        for threshold in (0.0, 0.9):
            name = f"wups@{threshold}"
            numbers[name] = wups(given, wanted, similarity, threshold=threshold)
    except ConfigError as error:
        settings["wups"] = f"skipped: {error}"
    neutral = ["shuffled", "majority"]
    return rows_of("vqa", numbers, len(test.questions), neutral=neutral, settings=settings)


def t2i(context: Context) -> Rows:
    """Bits per code with and without text; and of generated images, what a judge sees in them."""
    model = context.config.clip_score
    scorer = CLIPScorer(model) if model else None  # a wrong path is told before hours of training
    member, config = context.config.probe("t2i")
    train, test = context.train.captioned(), context.test.captioned()
    probe = member(context.guide, config, device=context.device)
    probe.fit(train.codes, train.captions, folder=context.folder, progress=context.progress)
    captions = [texts[0] for texts in test.captions]
    settings = {"probe": vars(config), "guide": context.guide_config, "train": len(train.codes)}
    settings["probe"] = {**vars(config), "sampling": vars(config.sampling)}
    if scorer is None:
        settings["clip_score"] = "skipped: evaluation.clip_score names no CLIP"
    values = probe.values(test.codes, captions, seed=context.config.seed)
    rows = rows_of(
        "t2i",
        means_of(values),
        len(captions),
        lower=["bits"],
        neutral=["shuffled", "without_text"],
        unit="bits",
        settings=settings,
        per_image=values,
    )
    count = min(config.images, len(captions))
    indices = probe.draw(captions[:count], seed=context.config.seed, progress=context.progress)
    images = images_of(context, test, indices)
    context.generated = (captions[:count], images)
    if scorer is not None:
        rows |= _clip_score(context, scorer, captions[:count], images, settings)
    return rows | _judged(context, images, settings)


def _clip_score(
    context: Context,
    scorer: CLIPScorer,
    captions: list[str],
    images: Tensor,
    settings: dict[str, Any],
) -> Rows:
    """Score generated images and, as a control, reconstructions of the real ones."""
    again = torch.cat([pair[1] for pair in context.pairs()])[: len(images)]
    rows = {}
    for name, shown, better in (("", images, True), ("reconstructed/", again, None)):
        values = scorer(shown, captions).double()
        told = {**settings, **scorer.settings}
        row = Row(float(values.mean()), len(values), "", better, values.tolist(), told)
        rows[f"t2i/{name}clip_score"] = row
    return rows


def images_of(context: Context, data: Encoded, indices: Tensor) -> Tensor:
    """Decode code indices (M, N) to images (M, 3, H, W) in [-1, 1] on the CPU."""
    _, table = indices_of(data.codes)
    height, width = data.codes.grid
    parts = []
    for part in indices.split(context.config.batch_size):
        grid = table[part].mT.unflatten(-1, (height, width)).to(context.device)
        parts.append(decode(context.host, grid).clamp(-1, 1).cpu())
    return torch.cat(parts)


def _judged(context: Context, images: Tensor, settings: dict[str, Any]) -> Rows:
    """Let a net that was trained on real pictures name the attributes of generated ones."""
    train, test = context.train, context.test
    if not train.attributes or not test.attributes or len(images) < 2:
        return _generated_distance(context, images, settings)
    target = {name: v[: len(images)] for name, v in _stack_labels(test.attributes).items()}
    labels = {name: v[:JUDGED] for name, v in _stack_labels(train.attributes).items()}
    judge = resolve("bench.probes", "image_judge").train_on(
        context.pictures("train", JUDGED),
        labels,
        folder=context.folder,
        progress=context.progress,
    )
    pairs = list(context.pairs())
    real = torch.cat([pair[0] for pair in pairs])[: len(images)]
    again = torch.cat([pair[1] for pair in pairs])[: len(images)]
    numbers: dict[str, float] = {}
    for prefix, shown in (("", images), ("reconstructed/", again), ("real/", real)):
        for name, value in judge.accuracy(shown, target).items():
            numbers[f"{prefix}judge/{name}"] = value
    order = torch.arange(len(images)).roll(1)
    shuffled = {name: value[order] for name, value in target.items()}
    for name, value in judge.accuracy(images, shuffled).items():
        numbers[f"shuffled/judge/{name}"] = value
    told = {**settings, "judge": "a small CNN trained on real training pictures"}
    neutral = ["real/", "reconstructed/", "shuffled/"]
    rows = rows_of("t2i", numbers, len(images), neutral=neutral, settings=told)
    for name, shown in (("fd_judge", images), ("reconstructed/fd_judge", again)):
        value = _distance(FrechetDistance(judge, name="judge"), real, shown)
        better = None if "/" in name else False
        rows[f"t2i/{name}"] = Row(value, len(images), "", better, settings=told)
    return rows


def _generated_distance(context: Context, images: Tensor, settings: dict[str, Any]) -> Rows:
    """Return the Frechet distance of generated images in the configured net, if it is there."""
    options = context.config.fd
    try:
        distance = FrechetDistance(options.net, weights=options.weights)
    except ConfigError as error:
        logger.warning("t2i: no Frechet distance of the generated images: %s", error)
        return {}
    real = torch.cat([pair[0] for pair in context.pairs()])[: len(images)]
    value = _distance(distance, real, images)
    warn_of_few(distance.name, len(images))
    told = {**settings, **distance.settings}
    return {f"t2i/{distance.name}": Row(value, len(images), "", False, settings=told)}


def _distance(distance: FrechetDistance, real: Tensor, shown: Tensor) -> float:
    for part in real.split(64):
        distance.update(part, real=True)
    for part in shown.split(64):
        distance.update(part, real=False)
    return distance.compute()
