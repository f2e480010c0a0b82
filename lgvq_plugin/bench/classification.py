"""Metrics that classify images: zero-shot by the heads, linear probe and k nearest neighbors.

The class of an image is its folder (root/class_name/x.jpg). Without class folders, each label of
the data set with one value per image (main_color of the scenes) is a task of its own.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..datasets.folder import NO_CLASS
from ..encoder import encode_codes, encode_text
from ..sockets import ConfigError
from ..types import Codes
from .evaluation_context import Context, Encoded
from .measures import Rows, Values, rows_of
from .probes.classifiers import LinearProbe, NearestNeighbors, prompt_features, zero_shot_hits
from .probes.features import FrozenCodes

BATCH = 256
TOP = 5


def zeroshot(context: Context) -> Rows:
    """Accuracy of the class whose prompts are nearest to `encode_image`, without training.

    Each class has the mean feature of its prompts, as CLIP's ensembles; candidates are the classes
    of the test images, or those in `evaluation.zeroshot.names`.
    """
    heads, options = context.heads, context.config.zeroshot
    templates = [options.templates] if isinstance(options.templates, str) else options.templates
    seed, codes = context.config.seed, context.test.codes
    features = {"": _head_features(context, codes)}
    features["shuffled/"] = _head_features(context, codes.shuffled(seed))
    rows: Rows = {}
    for task, classes in _tasks(context, context.test).items():
        names = {name: options.names.get(name, readable(name)) for name in sorted({*classes})}
        names |= options.names if not task else {}
        unclear = [name for name, shown in names.items() if NO_CLASS.fullmatch(shown)]
        if unclear and task:  # such as a count
            continue
        if unclear:
            raise ConfigError(
                f"zeroshot: {unclear[0]!r} says nothing about its images; name the classes with "
                f"evaluation.zeroshot.names: {{{unclear[0]}: NAME, ...}}"
            )
        prompts = prompt_features(partial(encode_text, heads), [*names.values()], templates)
        target = _numbers(classes, [*names])
        numbers: dict[str, Values] = {"chance@1": 1 / len(names)}
        for prefix, seen in features.items():
            for top in (1, TOP) if len(names) > TOP else (1,):
                hits = zero_shot_hits(seen, prompts.cpu(), target, top=top)
                numbers[f"{prefix}accuracy{'' if top == 1 else f'@{top}'}"] = hits
        settings = {"templates": [*templates], "classes": names, "guide": dict(heads.guide.config)}
        rows |= rows_of(_joined("zeroshot", task), numbers, len(classes), settings=settings)
    if not rows:
        raise ConfigError("zeroshot: no label of this data set has names for prompts")
    return rows


def linear_probe(context: Context) -> Rows:
    """Accuracy of logistic regression on pooled codes and, with heads, on their image features."""
    probe = partial(LinearProbe, seed=context.config.seed)
    settings = {"probe": "logistic regression, features standardized"}
    return _probe_rows(context, "linear_probe", probe, settings)


def knn(context: Context) -> Rows:
    """Accuracy of the k nearest training images' weighted vote, on the same features."""
    k = context.config.knn.k
    settings = {"k": k, "vote": "exp(cosine / 0.07), as DINO's; features centered"}
    return _probe_rows(context, "knn", partial(NearestNeighbors, k=k), settings)


def _probe_rows(context: Context, name: str, probe: Any, settings: dict[str, Any]) -> Rows:
    tasks = _tasks(context, context.test)
    seen = _tasks(context, context.train)
    rows: Rows = {}
    for prefix, train, test, control in _features(context):
        for task, classes in tasks.items():
            if task not in seen:
                raise ConfigError(f"{name}: the training set has no {task or 'class folders'}")
            known = sorted({*seen[task]})
            target = _numbers(classes, known)
            fitted = probe().fit(train, _numbers(seen[task], known))
            numbers: dict[str, Values] = {
                f"{prefix}accuracy": (fitted.predict(test) == target).double(),
                f"{prefix}shuffled/accuracy": (fitted.predict(control) == target).double(),
                "chance@1": 1 / len(known),
            }
            about = {**settings, "classes": len(known), "train_images": len(train)}
            rows |= rows_of(_joined(name, task), numbers, len(test), settings=about)
    return rows


def _features(context: Context) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield prefix and features of training, test and shuffled test images: codes', then heads'."""
    test, shuffled = context.test.codes, context.test.codes.shuffled(context.config.seed)
    sets = (context.train.codes, test, shuffled)
    train, seen, control = (each.features().pooled for each in sets)
    yield "", train, seen, control
    if context.has_heads and "global_semantic" in context.heads.objectives:
        train, seen, control = (_head_features(context, each) for each in sets)
        yield "head/", train, seen, control


def _head_features(context: Context, codes: FrozenCodes) -> Tensor:
    """Return `encode_image` of images whose codes are known, (M, Ds) on the CPU."""
    parts = (codes.codes(rows) for rows in torch.arange(len(codes)).split(BATCH))
    encoded = [encode_codes(context.heads, Codes(part, None, codes.grid)) for part in parts]
    return torch.cat(encoded).cpu()


def _tasks(context: Context, data: Encoded) -> dict[str, list[str]]:
    """Return the class of each image by task, "" for class folders.

    Raises:
        ConfigError: if there are neither class folders nor labels.
    """
    folders = [PurePosixPath(file).parent.name for file in data.files]
    if all(folders) and len({*folders}) > 1:
        return {"": folders}
    names = context.attribute_names
    found: dict[str, list[str]] = {}
    for name, first in (data.attributes[0] if data.attributes else {}).items():
        if torch.as_tensor(first).ndim == 0:
            values = [int(each[name]) for each in data.attributes]
            known = names.get(name)
            found[name] = [str(known[value] if known else value) for value in values]
    if not found:
        raise ConfigError(
            "the data set has no classes: expected images in folders named after their class "
            "(root/class_name/x.jpg, at least two), or labels, as the scenes have"
        )
    return found


def _numbers(classes: Sequence[str], known: Sequence[str]) -> Tensor:
    """Return the place of each class among the known ones, -1 for another, (M,) int64."""
    places = {name: place for place, name in enumerate(known)}
    return torch.tensor([places.get(name, -1) for name in classes])


def readable(name: str) -> str:
    """Return the words in the name of a class folder.

    >>> readable("001.Black_footed_Albatross")
    'Black footed Albatross'
    """
    return re.sub(r"^\d+[._ -]+(?=\D)", "", name).replace("_", " ").strip()


def _joined(name: str, task: str) -> str:
    return f"{name}/{task}" if task else name
