"""caption, vqa, t2i: the tasks of the paper, each a small net on frozen codes."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hosts.base import decode
from ..metrics.answers import wordnet_similarity, wups
from ..metrics.captions import (
    bleu_scores,
    caption_scores,
    caption_values,
    meteor_score,
    tokenize_ptb,
    tokenize_words,
)
from ..metrics.clip_score import CLIPScorer
from ..metrics.frechet import FrechetDistance
from ..sockets import ConfigError, resolve
from ._alignment import _stack_labels
from ._codebook import indices_of
from ._context import Context, Encoded
from ._reconstruction import warn_of_few
from ._rows import Row, Rows, means_of, rows_of

logger = logging.getLogger(__name__)
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
    judge = resolve("probes", "image_judge").train_on(
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
