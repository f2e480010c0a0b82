"""The paper's tasks without text in, each a small network on frozen codes.

Synthesis (unconditional, from labels, from a semantic map), completion, and visual grounding.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..sockets import ConfigError
from .evaluation_context import Context
from .measures import Rows, decode_indices, fit_probe, generated_rows, rows_of
from .metrics.captions import word_sets
from .probes.ridge import stack_labels
from .probes.text_to_image import SynthesisProbe, label_vectors, map_vectors


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
    settings = {"words": len(names), "train_images": len(train.codes)}
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
