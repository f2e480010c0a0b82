"""The paper's tasks without text in, each a small network on frozen codes.

Synthesis (unconditional, from labels, from a semantic map), completion, and visual grounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sockets import ConfigError
from .evaluation_context import Context, Encoded
from .measures import Rows, decode_indices, fit_probe, generated_rows, rows_of
from .metrics.captions import word_sets
from .probes.attributes import stack_labels
from .probes.synthesis import SynthesisProbe, label_vectors, map_vectors


def unconditional(context: Context) -> Rows:
    """Bits per code without any condition; Frechet distance of generated images."""
    probe, settings = _fitted(context, "unconditional", _nothing)
    test, given = context.test, _nothing(context.test)
    values = {"bits_per_code": probe.bits(test.codes, given)}
    rows = rows_of("unconditional", values, len(test.codes), unit="bits", settings=settings)
    return rows | _drawn(context, probe, test, given, "unconditional", settings, judged=())


def completion(context: Context) -> Rows:
    """The lower half of each image, given the codes of the upper half; no other condition."""
    probe, settings = _fitted(context, "unconditional", _nothing)
    test, given = context.test, _nothing(context.test)
    rows, columns = test.codes.grid
    half = rows // 2 * columns or columns // 2  # of tokens in one row: the first half
    settings = {**settings, "given": f"the first {half} codes"}
    values = {"bits_per_code": probe.bits(test.codes, given, start=half)}
    found = rows_of("completion", values, len(test.codes), unit="bits", settings=settings)
    return found | _drawn(context, probe, test, given, "completion", settings, first=half)


def class_to_image(context: Context) -> Rows:
    """Images from the labels of the data set: bits per code, what a judge sees in them."""
    train, test = context.train, context.test
    if not (train.attributes and test.attributes):
        raise ConfigError("class_to_image: the data set has no labels; folders of classes have")
    both = stack_labels([*train.attributes, *test.attributes])
    sizes = {k: int(v.max()) + 1 if v.ndim == 1 else v.shape[1] for k, v in both.items()}
    return _conditional(
        context,
        "class_to_image",
        lambda data: label_vectors(stack_labels(data.attributes), sizes),
    )


def semantic_to_image(context: Context) -> Rows:
    """Images from maps of what is where: bits per code, what a judge sees in them."""
    maps = {
        which: [torch.as_tensor(each.semantic_map) for each in context.layouts(which)]
        for which in ("train", "test")
    }
    classes = 1 + max(int(each.max()) for some in maps.values() for each in some)
    given = {
        which: map_vectors(some, classes, context.test.codes.grid) for which, some in maps.items()
    }
    return _conditional(
        context,
        "semantic_to_image",
        lambda data: given["train" if data is context.train else "test"],
    )


def grounding(context: Context) -> Rows:
    """Where the codes of a word are, against known boxes, learned from captions alone."""
    layouts = context.layouts("test")
    member, config = context.config.probe("grounding")
    train, test = context.train.captioned(), context.test
    used = set().union(*word_sets(train.captions))
    names = sorted({word for each in layouts for word in each.boxes} & used)
    probe = member(names, config, device=context.device)
    fit_probe(context, probe, train.codes, train.captions)
    boxes = [dict(each.boxes) for each in layouts]
    values: dict[str, Any] = {**probe.values(test.codes, boxes)}
    control = probe.values(test.codes.shuffled(context.config.seed), boxes)
    values |= {f"shuffled/{k}": v for k, v in control.items() if not k.startswith("chance")}
    settings = {"words": len(names), "train_images": len(train.codes), "probe": vars(config)}
    settings |= {"training": "words of captions, no boxes", "box": "half of the map's range"}
    count = len(values["iou"])
    return rows_of("grounding", values, count, settings=settings, neutral=["chance"])


def _conditional(context: Context, name: str, conditions: Callable[[Encoded], Tensor]) -> Rows:
    probe, settings = _fitted(context, name, conditions)
    given, codes = conditions(context.test), context.test.codes
    bits = probe.bits(codes, given)
    without = probe.bits(codes, given, given=False)
    shuffled = probe.bits(codes.shuffled(context.config.seed), given)
    values = {"bits_per_code": bits, "without_condition/bits_per_code": without}
    values |= {"shuffled/bits_per_code": shuffled, "gain": without - bits}
    neutral = ["without_condition"]
    rows = rows_of(name, values, len(codes), unit="bits", settings=settings, neutral=neutral)
    return rows | _drawn(context, probe, context.test, given, name, settings)


def _fitted(
    context: Context, name: str, conditions: Callable[[Encoded], Tensor]
) -> tuple[SynthesisProbe, dict[str, Any]]:
    _, config = context.config.probe(name)
    train = context.train
    given = conditions(train)
    probe = SynthesisProbe(given.shape[2], config, device=context.device, name=name)
    fit_probe(context, probe, train.codes, given)
    settings: dict[str, Any] = {"train": len(train.codes)}
    settings["probe"] = {**vars(config), "sampling": vars(config.sampling)}
    return probe, settings


def _nothing(data: Encoded) -> Tensor:
    return torch.zeros(len(data.codes), 1, 1)


def _drawn(
    context: Context,
    probe: SynthesisProbe,
    test: Encoded,
    given: Tensor,
    prefix: str,
    settings: dict[str, Any],
    *,
    first: int = 0,
    judged: tuple[str, ...] = ("judge/mean",),
) -> Rows:
    """Sample images and measure them: Frechet distance, and what the judge sees in them."""
    count = min(probe.config.images, len(given))
    options: dict[str, Any] = {"seed": context.config.seed, "progress": context.progress}
    if first:
        options["first"] = test.codes.indices[:count, :first]  # type: ignore[index]
    drawn = probe.draw(list(given[:count]), **options)
    images = decode_indices(context, test, drawn)
    rows = generated_rows(context, images, prefix, settings)
    return {k: row for k, row in rows.items() if "judge/" not in k or k.endswith(judged)}
