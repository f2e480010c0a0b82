"""retrieval, masked_words, attributes: what probes of frozen codes find, the same for any host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..probes.base import CodeFeatures
from ..sockets import ConfigError, resolve
from ._codebook import has_words, word_table
from ._config import EvaluationConfig
from ._context import Context, Encoded
from ._rows import Rows, means_of, rows_of

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
    probe = resolve("probes", "retrieval")(seed=context.config.seed)
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
    member, config = resolve("probes", "attributes"), context.config
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
