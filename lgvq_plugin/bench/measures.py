"""The metrics of an evaluation: functions from a context to rows, one number each."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import pool_words
from ..guides.base import AbstractGuide
from ..host import decode
from ..sockets import ConfigError
from .evaluation_context import Context, Encoded
from .metrics import captions as scores
from .metrics import codebook
from .metrics.answers import wordnet_similarity, wups
from .metrics.captions import tokenize_words, word_sets
from .metrics.codebook import STRONG
from .metrics.frechet import MIN_IMAGES, FrechetDistance
from .metrics.perceptual import CLIPScorer, PerceptualDistance
from .metrics.reconstruction import IMPLEMENTATION, psnr_and_ssim
from .probes.classifiers import ImageJudge
from .probes.features import FrozenCodes
from .probes.language import PROTOCOLS
from .probes.ridge import AttributesProbe, RetrievalProbe, stack_labels
from .probes.text_to_image import SynthesisProbe, label_vectors, map_vectors

logger = logging.getLogger(__name__)

MIN_COUNT, MAX_WORDS = 10, 1000
"""Words and codes of fewer images are left out; of the words only the most frequent are kept."""
JUDGED = 2048
"""Maximum number of training images of the judge."""
BATCH = 256
FUNCTION_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "he", "her", "his"),
    *("in", "into", "is", "it", "its", "near", "next", "no", "not", "of", "on", "one", "or"),
    *("other", "out", "over", "s", "she", "some", "that", "the", "their", "there", "these"),
    *("they", "this", "to", "up", "while", "with"),
}
"""Words of captions that say nothing about an image by themselves."""

LOWER = {"dead_codes", "mse", "mean_rank", "bits_per_code", "fd_judge"}
NEUTRAL = {"shuffled", "majority", "chance@1", "without_text", "reconstructed"}
"""Names of numbers for which lower is better, and parts of names for which neither direction is."""

Values = float | Tensor | Sequence[float]


@dataclass(frozen=True)
class Row:
    """A number."""

    value: float
    n: int  # number of images or questions
    unit: str = ""  # such as dB; "" for a share or a pure number
    higher_is_better: bool | None = True  # None if neither is, as for a control
    per_image: Sequence[float] | None = None  # in order; None if it is no mean over images
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that it depends on

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, without settings and per_image if there are none."""
        row = asdict(self)
        each, settings = row.pop("per_image"), row.pop("settings")
        if settings:
            row["settings"] = settings
        if each is not None:
            row["per_image"] = [round(float(value), 6) for value in each]
        return row


Rows = dict[str, Row]


def rows_of(
    prefix: str,
    numbers: Mapping[str, Values],
    n: int,
    *,
    unit: str = "",
    settings: Mapping[str, Any] | None = None,
    neutral: Iterable[str] = (),
) -> Rows:
    """Return `prefix/NAME` -> Row for each number on `n` images or questions.

    Args:
        prefix: of the names.
        numbers: by name; a tensor or list has the value of each image, of which the mean is taken.
        n: number of images or questions.
        unit, settings: of all numbers.
        neutral: further parts of names like :data:`NEUTRAL`.

    Example:
        >>> numbers = {"accuracy": [0.0, 1.0], "shuffled/accuracy": 0.1}
        >>> rows = rows_of("vqa", numbers, 2)
        >>> rows["vqa/accuracy"].value, rows["vqa/shuffled/accuracy"].higher_is_better is None
        (0.5, True)
    """
    rows: Rows = {}
    for name, value in numbers.items():
        *_, last = parts = name.split("/")
        better: bool | None = last not in LOWER and not last.startswith("lpips_")
        if not {*NEUTRAL, *neutral}.isdisjoint(parts) or last.startswith("nearest_"):
            better = None
        each: Any = value.tolist() if isinstance(value, Tensor) else value
        mean = sum(each) / max(len(each), 1) if isinstance(each, Sequence) else each
        each = each if isinstance(each, Sequence) else None
        rows[f"{prefix}/{name}"] = Row(float(mean), n, unit, better, each, settings or {})
    return rows


# Reconstruction: how close the reconstructions are, one by one and as a set.


def psnr(context: Context) -> Rows:
    """PSNR of each image, in dB."""
    return _pixel_rows(context, 0, "psnr", "dB")


def ssim(context: Context) -> Rows:
    """SSIM of each image."""
    return _pixel_rows(context, 1, "ssim", "", window="Gaussian 11, sigma 1.5")


def _pixel_rows(context: Context, which: int, name: str, unit: str, **settings: str) -> Rows:
    values = torch.cat([psnr_and_ssim(*pair)[which] for pair in context.pairs()])
    fixed = {"implementation": IMPLEMENTATION, "quantization": "uint8", "resize": "none"}
    settings = {**fixed, "mean": "over images", **settings}
    return rows_of("reconstruction", {name: values}, len(values), unit=unit, settings=settings)


def lpips(context: Context) -> Rows:
    """LPIPS of each image."""
    options = context.config.lpips
    metric = PerceptualDistance(options.net, options.backbone).to(context.device)
    pairs = ([images.to(context.device) for images in pair] for pair in context.pairs())
    values = torch.cat([metric.distances(*pair).cpu() for pair in pairs])
    numbers = {f"lpips_{options.net}": values}
    return rows_of("reconstruction", numbers, len(values), settings=metric.settings)


def fid(context: Context) -> Rows:
    """FID of the reconstructions against the test images."""
    return _distance_to_test(context, FrechetDistance(weights=context.config.fid.weights))


def fd(context: Context) -> Rows:
    """Frechet distance in another feature net."""
    options = context.config.fd
    return _distance_to_test(context, FrechetDistance(options.net, weights=options.weights))


def _distance_to_test(context: Context, distance: FrechetDistance) -> Rows:
    reference = {"set": context.test_section, "images": context.test_images}
    return _distance("reconstruction", distance, context.pairs(), {"reference": reference})


def _distance(
    prefix: str,
    distance: FrechetDistance,
    pairs: Iterable[Sequence[Tensor]],
    settings: Mapping[str, Any],
) -> Rows:
    """Return the distance of pairs of real and other images."""
    for real, other in pairs:
        distance.update(real, real=True)
        distance.update(other, real=False)
    value, (count, _) = distance.compute(), distance.counts
    if count < MIN_IMAGES:
        logger.warning(
            "%s on %d images (< %d) is biased upwards: compare it with rows of the same n only",
            *(distance.name, count, MIN_IMAGES),
        )
    settings = {**settings, **distance.settings}
    return {f"{prefix}/{distance.name}": Row(value, count, "", False, settings=settings)}


# Codebook: how it is used, and which words its codes go with.


def usage(context: Context) -> Rows:
    """Usage, perplexity, dead codes, entropy over the test set; nearest-code distances."""
    codes = context.test.codes
    indices, table = _indices(codes)
    metric = codebook.CodebookUsage(len(table))
    metric.update(indices)
    numbers = {name: float(value) for name, value in metric.compute().items()}
    entropy = {"entropy": numbers.pop("entropy")}
    settings: dict[str, Any] = {"window": f"{len(codes)} test images", "codes": len(table)}
    rows = rows_of("codebook", numbers, len(codes), settings=settings)
    rows |= rows_of("codebook", entropy, len(codes), unit="bits", settings=settings)
    if len(table) > 1:
        distances = codebook.nearest_code_distances(table)
        length = distances.pop("rms_length")
        numbers = {f"nearest_{name}": value for name, value in distances.items()}
        settings = {"unit": "root-mean-square length of a code", "length": length}
        rows |= rows_of("codebook", numbers, len(table), settings=settings)
    return rows


def words(context: Context) -> Rows:
    """How many codes go with a word and words with a code, compared with shuffled images."""
    data = context.train.captioned()
    found = _WordsAndCodes(data, data.codes)
    chance = _WordsAndCodes(data, data.codes.shuffled(context.config.seed))
    is_frequent = found.has_code.sum(0) >= MIN_COUNT
    numbers: dict[str, Values] = {}
    for prefix, strength in (("", found.strength), ("shuffled/", chance.strength)):
        is_strong = strength > STRONG
        numbers[f"{prefix}codes_with_a_word"] = _share(is_strong.any(0)[is_frequent])
        numbers[f"{prefix}words_with_a_code"] = _share(is_strong.any(1))
        numbers[f"{prefix}strength"] = float(strength.amax(1).mean())
    settings = {"words": len(found.words), "least_images": MIN_COUNT, "threshold": STRONG}
    return rows_of("words", numbers, len(data.codes), settings=settings)


def words_of_codes(context: Context, *, count: int = 5) -> dict[int, list[tuple[str, float]]]:
    """Return the words that each code goes with, the strongest first; codes without are left out.

    Raises:
        ConfigError: if the host has no indices or the images have no captions.
    """
    data = context.train.captioned()
    found = _WordsAndCodes(data, data.codes)
    best = found.strength.topk(min(count, len(found.words)), dim=0)
    table = {}
    columns = zip(best.values.mT.tolist(), best.indices.mT.tolist(), strict=True)
    for code, (values, numbers) in enumerate(columns):
        pairs = zip(numbers, values, strict=True)
        if kept := [(found.words[w], round(v, 2)) for w, v in pairs if v > STRONG]:
            table[code] = kept
    return table


def relation(context: Context) -> Rows:
    """MSE and correlation of word-word with code-code cosines (paper, table 4).

    The paper matches words to codes by its heads, which a baseline does not have. Here a word's
    code is the one with the strongest association on training images, for any host.
    """
    data = context.train.captioned()
    found = _WordsAndCodes(data, data.codes)
    is_matched = found.strength.amax(1) > 0
    if int(is_matched.sum()) < 3:
        raise ConfigError("relation: fewer than three words go together with a code")
    texts = [found.words[i] for i in is_matched.nonzero()[:, 0].tolist()]
    seen = [context.guide.encode(part) for part in _batches(texts)]
    features = torch.cat([pool_words(x.tokens, x.word_ids)[0][:, 0].cpu() for x in seen])
    codes = _indices(data.codes)[1][found.strength[is_matched].argmax(1)]
    numbers = codebook.similarity_gap(features, codes)
    pairs = int(numbers.pop("pairs"))
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(context.config.seed))
    control = codebook.similarity_gap(features, codes[order])
    numbers |= {f"shuffled/{name}": control[name] for name in ("mse", "pearson", "spearman")}
    settings = {"words": len(texts), "match": "likelihood ratio", "guide": context.guide_config}
    return rows_of("relation", numbers, pairs, settings=settings)


class _WordsAndCodes:
    """The frequent words of captions and their association with each code, (W, K)."""

    def __init__(self, data: Encoded, codes: FrozenCodes):
        indices, table = _indices(codes)
        self.words, self.has_word = _word_table(data)
        empty = torch.zeros(len(indices), len(table), dtype=torch.bool)
        self.has_code = empty.scatter_(1, indices, True)
        self.strength = codebook.word_code_association(
            self.has_word, self.has_code, min_count=MIN_COUNT
        )


def _word_table(data: Encoded) -> tuple[list[str], Tensor]:
    """Return the words of enough images, and which image has which, (M, W) bool."""
    sets = word_sets(data.captions)
    counts = Counter(word for found in sets for word in found)
    kept = [word for word, n in counts.items() if MIN_COUNT <= n <= len(sets) - MIN_COUNT]
    known = sorted(kept, key=lambda word: (-counts[word], word))[:MAX_WORDS]
    if not known:
        raise ConfigError(f"no word of the captions is at {MIN_COUNT} images; use more images")
    return known, _has_words(sets, known)


def _has_words(sets: Sequence[set[str]], known: Sequence[str]) -> Tensor:
    return torch.tensor([[word in found for word in known] for found in sets])


def _batches(texts: list[str]) -> list[list[str]]:
    return [texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)]


def _indices(codes: FrozenCodes) -> tuple[Tensor, Tensor]:
    """Return indices and table of codes; ConfigError for a host without indices."""
    if codes.indices is None or codes.table is None:
        raise ConfigError("this host's quantizer has no code indices")
    return codes.indices, codes.table


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0


# Probes of frozen codes, the same for any host.


def retrieval(context: Context) -> Rows:
    """Recall at 1, 5, 10 between test images and their first captions, by a ridge probe."""
    train, test = context.train.captioned(), context.test.captioned()
    probe = RetrievalProbe(seed=context.config.seed)
    probe.fit(train.codes.features(), _sentences(context.guide, train.captions))
    captions = test.first_captions
    target = _sentences(context.guide, [[text] for text in captions])
    values: dict[str, Values] = {**probe.values(test.codes.features(), target, captions)}
    values["chance@1"] = float(torch.as_tensor(values["chance@1"]).mean())
    settings: dict[str, Any] = {"probe": "ridge", "strength": probe.strength}
    settings |= {"guide": context.guide_config, "train_images": len(train.codes)}
    return rows_of("retrieval", values, len(captions), settings=settings)


def _sentences(guide: AbstractGuide, captions: list[list[str]]) -> Tensor:
    """Return the mean of each image's normalized sentence features, (M, Ds)."""
    parts = [
        F.normalize(guide.encode(texts).sentence, dim=-1).cpu()
        for texts in _batches([text for texts in captions for text in texts])
    ]
    of_images = torch.cat(parts).split([len(texts) for texts in captions])
    return torch.stack([features.mean(dim=0) for features in of_images])


def masked_words(context: Context) -> Rows:
    """Recall of masked words by a probe trained on frozen codes, leak-free and leaky."""
    _, config = context.config.probe("masked_words")
    train, test = context.train.captioned(), context.test.captioned()
    several = {"": test.codes, "shuffled/": test.codes.shuffled(context.config.seed)}
    rows: Rows = {}
    for protocol in PROTOCOLS if config.leaky else ("leak_free",):
        given = (train.codes, train.captions, context.guide)
        probe = fit_probe(context, "masked_words", *given, protocol=protocol)
        settings: dict[str, Any] = {"protocol": PROTOCOLS[protocol]}
        settings |= {"heads": "trained on frozen codes", "guide": context.guide_config}
        settings |= {"train_images": len(train.codes), "probe": asdict(config)}
        for number in (1, 3):
            seed = context.config.seed
            numbers = probe.named_values(several, test.first_captions, number, seed)
            n = number * len(numbers[f"mask_{number}/recall@1"])
            rows |= rows_of(f"masked_words/{protocol}", numbers, n, settings=settings)
    return rows


def fit_probe(
    context: Context, name: str, codes: FrozenCodes, target: Any, /, *args: Any, **options: Any
) -> Any:
    """Return the neural probe of a metric, trained in the context's folder.

    `args` and `options` are its constructor's, besides its config and its device.
    """
    member, config = context.config.probe(name)
    probe = member(*args, config=config, device=context.device, **options)
    return probe.fit(codes, target, folder=context.folder, progress=context.progress)


def attributes(context: Context) -> Rows:
    """Accuracy of attributes read from the codes by a linear map, fitted on all and few images."""
    config = context.config
    train, test, labels, target = _labeled(context)
    count = len(train.codes)
    few = min(config.few_shot, count)
    generator = torch.Generator().manual_seed(config.seed)
    more = config.few_shot_draws - 1 if few < count else 0
    draws = [torch.randperm(count, generator=generator)[:few] for _ in range(more)]
    features, seen = train.codes.features(), test.codes.features()
    control = test.codes.shuffled(config.seed).features()
    rows: Rows = {}
    sets = {"linear": [torch.arange(count)], "few_shot": [torch.arange(few), *draws]}
    for name, parts in sets.items():
        sums: dict[str, Any] = {}  # floats, or tensors with the value of each image
        for drawn in parts:
            probe = AttributesProbe(seed=config.seed)
            probe.fit(features.take(drawn), {key: value[drawn] for key, value in labels.items()})
            found = probe.evaluate(seen, target)
            found["shuffled/mean_accuracy"] = probe.evaluate(control, target)["mean_accuracy"]
            for key, value in (found | probe.values(seen, target)).items():
                sums[key] = sums.get(key, 0) + value
        means = {key: value / len(parts) for key, value in sums.items()}
        settings = {"probe": "ridge", "train_images": len(parts[0]), "draws": len(parts)}
        rows |= rows_of(f"attributes/{name}", means, len(test.codes), settings=settings)
    return rows


def _labeled(context: Context) -> tuple[Encoded, Encoded, dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test images with their labels, or with frequent words of captions."""
    train, test = context.train, context.test
    if train.attributes and test.attributes:
        return train, test, stack_labels(train.attributes), stack_labels(test.attributes)
    if not context.config.attribute_words:
        raise ConfigError(
            "attributes: the data set has no labels (the scenes and CelebA have); set "
            "evaluation.attribute_words, such as 48, to take words of its captions for labels"
        )
    train, test = train.captioned(), test.captioned()
    known, has_word = _word_table(train)
    shares = has_word.double().mean(dim=0).tolist()
    shown = zip(known, shares, strict=True)
    is_kept = [share <= 0.5 and word not in FUNCTION_WORDS for word, share in shown]
    kept = [i for i, keep in enumerate(is_kept) if keep][: context.config.attribute_words]
    target = _has_words(word_sets(test.captions), [known[i] for i in kept])
    return train, test, {"words": has_word[:, kept].long()}, {"words": target.long()}


# The paper's tasks, each a small network on frozen codes.


def captioning(context: Context) -> Rows:
    """BLEU, ROUGE-L, CIDEr-D and METEOR of captions written from frozen codes."""
    train, test = context.train.captioned(), context.test.captioned()
    probe = fit_probe(context, "captioning", train.codes, train.captions)
    references = _tokenized(context, test.captions)
    written = probe.write(test.codes)
    numbers: dict[str, Values] = {**scores.bleu_scores(written, references)}
    numbers |= scores.caption_values(written, references)
    control = probe.write(test.codes.shuffled(context.config.seed))
    blind = scores.caption_scores(control, references)
    numbers |= {f"shuffled/{name}": value for name, value in blind.items()}
    settings: dict[str, Any] = {"implementation": "pycocoevalcap"}
    settings |= {"tokenizer": context.config.tokenizer, "references": sum(map(len, references))}
    settings |= {"train_images": len(train.codes), "probe": asdict(probe.config)}
    try:
        numbers["meteor"] = scores.meteor_score(written, references)
    except ConfigError as error:
        settings["meteor"] = f"skipped: {error}"
    return rows_of("caption", numbers, len(written), settings=settings)


def _tokenized(context: Context, captions: Sequence[Sequence[str]]) -> list[list[str]]:
    if context.config.tokenizer == "words":
        return [[tokenize_words(text) for text in texts] for texts in captions]
    flat = iter(scores.tokenize_ptb([text for texts in captions for text in texts]))
    return [[next(flat) for _ in texts] for texts in captions]


def vqa(context: Context) -> Rows:
    """Accuracy of answers chosen from frozen codes; WUPS if WordNet is installed."""
    train, test = context.train, context.test
    if not train.questions or not test.questions:
        raise ConfigError("vqa: the data set has no questions; scenes, cocoqa and vqa2 have")
    probe = fit_probe(context, "vqa", train.codes, train.questions)
    given = probe.answer(test.codes, test.questions)
    numbers = probe.evaluate(test.codes, test.questions, seed=context.config.seed, given=given)
    settings: dict[str, Any] = {"train_questions": len(train.questions)}
    settings |= {"answers": len(probe.answers), "probe": asdict(probe.config)}
    try:
        similarity = wordnet_similarity(context.config.wordnet)
        wanted = [question.answer for question in test.questions]
        for threshold in (0.0, 0.9):
            numbers[f"wups@{threshold}"] = wups(given, wanted, similarity, threshold=threshold)
    except ConfigError as error:
        settings["wups"] = f"skipped: {error}"
    return rows_of("vqa", numbers, len(test.questions), settings=settings)


def text_to_image(context: Context) -> Rows:
    """Bits per code with and without text; quality of generated images."""
    model, seed = context.config.clip_score, context.config.seed
    scorer = CLIPScorer(model) if model else None  # a wrong path fails before hours of training
    train, test = context.train.captioned(), context.test.captioned()
    probe = fit_probe(context, "text_to_image", train.codes, train.captions, context.guide)
    settings = {"guide": context.guide_config, "train": len(train.codes)}
    settings["probe"] = asdict(probe.config)
    if scorer is None:
        settings["clip_score"] = "skipped: evaluation.clip_score names no CLIP"
    values = probe.values(test.codes, test.first_captions, seed=seed)
    rows = rows_of("t2i", values, len(test.codes), unit="bits", settings=settings)
    captions = test.first_captions[: probe.config.images]
    drawn = probe.draw(captions, seed=seed, progress=context.progress)
    images = decode_indices(context, drawn)
    context.generated = (captions, images)
    if scorer is not None:
        again = torch.cat([given for _, given in context.pairs()])[: len(images)]
        found = {"clip_score": scorer(images, captions)}
        found["reconstructed/clip_score"] = scorer(again, captions)  # a control
        rows |= rows_of("t2i", found, len(images), settings={**settings, **scorer.settings})
    return rows | generated_rows(context, images, "t2i", settings)


def generated_rows(context: Context, images: Tensor, prefix: str, settings: dict[str, Any]) -> Rows:
    """Return what can be measured of generated images (M, 3, H, W), of the first test images.

    A judge's accuracy and distance if the data set has labels, else a Frechet distance.
    """
    real, again = (torch.cat(part)[: len(images)] for part in zip(*context.pairs(), strict=True))
    if context.train.attributes and context.test.attributes and len(images) > 1:
        shown = {"": images, "reconstructed/": again, "real/": real}
        return _judge_rows(context, shown, prefix, settings)
    options = context.config.fd
    try:
        distance = FrechetDistance(options.net, weights=options.weights)
    except ConfigError as error:
        logger.warning("%s: no Frechet distance of the generated images: %s", prefix, error)
        return {}
    pairs = zip(real.split(64), images.split(64), strict=True)
    return _distance(prefix, distance, pairs, settings)


def decode_indices(context: Context, indices: Tensor) -> Tensor:
    """Decode code indices (M, N) to images (M, 3, H, W) in [-1, 1] on the CPU."""
    codes = context.test.codes
    table = _indices(codes)[1]
    parts = []
    for part in indices.split(context.config.batch_size):
        grid = table[part].mT.unflatten(-1, codes.grid).to(context.device)
        parts.append(decode(context.host, grid).clamp(-1, 1).cpu())
    return torch.cat(parts)


def _judge_rows(
    context: Context, shown: Mapping[str, Tensor], prefix: str, settings: dict[str, Any]
) -> Rows:
    """Let a network trained on real images classify attributes of generated ones."""
    images = shown[""]
    train = stack_labels(context.train.attributes[:JUDGED])
    target = stack_labels(context.test.attributes[: len(images)])
    pictures = context.train_pictures(JUDGED)
    judge = ImageJudge.train_on(pictures, train, folder=context.folder, progress=context.progress)
    numbers = {
        f"{kind}judge/{name}": value
        for kind, some in shown.items()
        for name, value in judge.accuracy(some, target).items()
    }
    shuffled = {name: labels.roll(1, 0) for name, labels in target.items()}
    for name, value in judge.accuracy(images, shuffled).items():
        numbers[f"shuffled/judge/{name}"] = value
    for kind in ("", "reconstructed/"):
        distance = FrechetDistance(judge, name="judge")
        for real, other in zip(shown["real/"].split(64), shown[kind].split(64), strict=True):
            distance.update(real, real=True)
            distance.update(other, real=False)
        numbers[f"{kind}fd_judge"] = distance.compute()
    settings = {**settings, "judge": "a small CNN trained on real training pictures"}
    return rows_of(prefix, numbers, len(images), settings=settings, neutral=["real"])


# The paper's tasks without text in, each a small network on frozen codes.


def unconditional(context: Context) -> Rows:
    """Bits per code without any condition; Frechet distance of generated images."""
    return _without_condition(context, "unconditional")


def completion(context: Context) -> Rows:
    """The lower half of each image, given the codes of the upper half; no other condition."""
    rows, columns = context.test.codes.grid
    half = rows // 2 * columns or columns // 2  # of tokens in one row: the first half
    return _without_condition(context, "completion", half)


def class_to_image(context: Context) -> Rows:
    """Images from the labels of the data set: bits per code, what a judge sees in them."""
    train, test = context.train.attributes, context.test.attributes
    if not (train and test):
        raise ConfigError("class_to_image: the data set has no labels; folders of classes have")
    both = stack_labels([*train, *test])
    sizes = {k: int(v.max()) + 1 if v.ndim == 1 else v.shape[1] for k, v in both.items()}
    vectors = [label_vectors(stack_labels(labels), sizes) for labels in (train, test)]
    return _conditional(context, "class_to_image", *vectors)


def semantic_to_image(context: Context) -> Rows:
    """Images from maps of what is where: bits per code, what a judge sees in them."""
    maps = [
        [torch.as_tensor(each.semantic_map) for each in context.layouts(which)]
        for which in ("train", "test")
    ]
    classes = 1 + max(int(each.max()) for some in maps for each in some)
    vectors = [map_vectors(some, classes, context.test.codes.grid) for some in maps]
    return _conditional(context, "semantic_to_image", *vectors)


def grounding(context: Context) -> Rows:
    """Where the codes of a word are, against known boxes, learned from captions alone."""
    layouts = context.layouts("test")
    train, test = context.train.captioned(), context.test
    used = set().union(*word_sets(train.captions))
    names = sorted({word for each in layouts for word in each.boxes} & used)
    probe = fit_probe(context, "grounding", train.codes, train.captions, names)
    boxes = [dict(each.boxes) for each in layouts]
    values: dict[str, Any] = {**probe.values(test.codes, boxes)}
    control = probe.values(test.codes.shuffled(context.config.seed), boxes)
    values |= {f"shuffled/{k}": v for k, v in control.items() if not k.startswith("chance")}
    settings: dict[str, Any] = {"words": len(names), "train_images": len(train.codes)}
    settings |= {"probe": asdict(probe.config)}
    settings |= {"training": "words of captions, no boxes", "box": "half of the map's range"}
    count = len(values["iou"])
    return rows_of("grounding", values, count, settings=settings, neutral=["chance"])


def _without_condition(context: Context, name: str, first: int = 0) -> Rows:
    """Synthesis of each image's codes from number `first` on, given those before."""
    nothing = [torch.zeros(len(data.codes), 1, 1) for data in (context.train, context.test)]
    probe, settings = _fitted(context, "unconditional", nothing[0])
    codes = context.test.codes
    if first:
        settings["given"] = f"the first {first} codes"
    values = {"bits_per_code": probe.bits(codes, nothing[1], start=first)}
    rows = rows_of(name, values, len(codes), unit="bits", settings=settings)
    drawn = _drawn(context, probe, nothing[1], name, settings, first=first)
    return rows | {key: row for key, row in drawn.items() if first or "judge/" not in key}


def _conditional(context: Context, name: str, train: Tensor, test: Tensor) -> Rows:
    """Synthesis given vectors of each training and test image."""
    probe, settings = _fitted(context, name, train)
    codes = context.test.codes
    bits = probe.bits(codes, test)
    without = probe.bits(codes, test, given=False)
    shuffled = probe.bits(codes.shuffled(context.config.seed), test)
    values = {"bits_per_code": bits, "without_condition/bits_per_code": without}
    values |= {"shuffled/bits_per_code": shuffled, "gain": without - bits}
    neutral = ["without_condition"]
    rows = rows_of(name, values, len(codes), unit="bits", settings=settings, neutral=neutral)
    return rows | _drawn(context, probe, test, name, settings)


def _fitted(context: Context, name: str, given: Tensor) -> tuple[SynthesisProbe, dict[str, Any]]:
    codes = context.train.codes
    probe = fit_probe(context, name, codes, given, given.shape[2], name=name)
    return probe, {"train": len(codes), "probe": asdict(probe.config)}


def _drawn(
    context: Context,
    probe: SynthesisProbe,
    given: Tensor,
    prefix: str,
    settings: dict[str, Any],
    *,
    first: int = 0,
) -> Rows:
    """Sample images and measure them: Frechet distance, and what the judge sees in them."""
    count = min(probe.config.images, len(given))
    options: dict[str, Any] = {"seed": context.config.seed, "progress": context.progress}
    if first:
        options["first"] = context.test.codes.indices[:count, :first]  # type: ignore[index]
    images = decode_indices(context, probe.draw(list(given[:count]), **options))
    rows = generated_rows(context, images, prefix, settings)
    return {k: row for k, row in rows.items() if "judge/" not in k or k.endswith("judge/mean")}
