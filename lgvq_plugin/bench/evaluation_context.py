"""What the metrics of one host share: its data, its codes, its reconstructions, the guide."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..alignment import Alignment
from ..datasets.base import ImageLayout, Watched, collate
from ..encoder import SavedHeads
from ..guides.base import AbstractGuide, build_guide
from ..host import attach_saved, encode, reconstruct
from ..sockets import ConfigError
from ..training.build import build_dataset
from .evaluate import EvaluationConfig
from .metrics.perceptual import state_hash
from .metrics.reconstruction import to_uint8
from .probes.features import CodeCollector, FrozenCodes, channels_first
from .probes.language import Question

CACHE_LIMIT = 2**30  # bytes of images that are kept in memory


@dataclass(frozen=True)
class Encoded:
    """A set of M images as the metrics see it."""

    codes: FrozenCodes
    captions: list[list[str]]  # of each image, [] for an image without any
    attributes: list[Mapping[str, Any]] = field(default_factory=list)  # of each image, or []
    questions: list[Question] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # of each image, or []

    @property
    def first_captions(self) -> list[str]:
        """One caption of each image, for sets whose images all have one."""
        return [texts[0] for texts in self.captions]

    def captioned(self) -> "Encoded":
        """Return the images that have a caption.

        Raises:
            ConfigError: if there are fewer than two.
        """
        rows = [i for i, texts in enumerate(self.captions) if texts]
        if len(rows) < 2:
            raise ConfigError("the data set has no captions, and this metric needs them")
        if len(rows) == len(self.captions):
            return self
        return Encoded(self.codes.take(torch.tensor(rows)), [self.captions[i] for i in rows])


@dataclass(eq=False)
class Context:
    """Data, codes and guide, each computed on first use and kept.

    `data` and `lgvq` ({} for a baseline) are those sections of the config, plain, and `config` is
    its `evaluation:` block; `folder` is for the probes' checkpoints; `given_heads` were trained on
    the host, whose own loss may have them, too.
    """

    host: nn.Module
    data: Mapping[str, Any]
    lgvq: Mapping[str, Any]
    config: EvaluationConfig
    folder: Path | None = None
    progress: bool = True
    given_heads: Alignment | SavedHeads | None = None
    generated: tuple[list[str], Tensor] | None = None
    """Captions and images of text_to_image."""
    _pictures: list[tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        self.data = {**(self.data.get("params") or {}), **self.data}
        chosen = self.config.guide or self.lgvq.get("guide") or {"use": "micro_clip"}
        self.guide_config = dict(chosen)
        self.device = next((p.device for p in self.host.parameters()), torch.device("cpu"))
        if self.given_heads is None:
            self.given_heads = getattr(getattr(self.host, "loss", None), "alignment", None)

    @property
    def has_heads(self) -> bool:
        """Whether heads of LG-VQ were trained on the host."""
        return self.given_heads is not None

    @cached_property
    def heads(self) -> Alignment:
        """The heads that were trained on the host; ConfigError for a host without."""
        given = self.given_heads
        if given is None:
            raise ConfigError("the tokenizer has no heads of LG-VQ: it is a baseline, or exported")
        if not isinstance(given, SavedHeads):
            return given
        guide = (given.block or {}).get("guide") or {}
        # Prompts are not among the captions of a text cache.
        is_cached = guide.get("use") == "cached"
        more: Any = {"guide": {**guide, "missing": "encode"}} if is_cached else {}
        handle = attach_saved(self.host, given, **more)
        handle.detach()
        return handle.heads.eval()

    @property
    def heads_mark(self) -> list[Any]:
        """What tells heads apart: a hash of their tensors, and their config; [] without heads."""
        given = self.given_heads
        if given is None:
            return []
        saved = given if isinstance(given, SavedHeads) else SavedHeads.of(given)
        return [state_hash(saved.tensors), saved.block]

    @property
    def attribute_names(self) -> Mapping[str, Sequence[str]]:
        """The data set's names of the values of each label; {} if it has none."""
        _, whole = self._dataset("test")
        return getattr(whole, "attribute_names", dict)()

    @property
    def test_section(self) -> dict[str, Any]:
        """The `{target, params}` of the test set: `data.test`, else `data.validation`."""
        section = self.data.get("test") or self.data.get("validation")
        if not section:
            raise ConfigError("data: evaluation needs a `test:` or a `validation:` data set")
        return dict(section)

    @cached_property
    def test_images(self) -> int:
        """Number of test images."""
        return len(self._dataset("test")[0])

    @cached_property
    def guide(self) -> AbstractGuide:
        """The frozen text model."""
        return build_guide(self.guide_config).to(self.device)

    @cached_property
    def train(self) -> Encoded:
        """The training set, encoded."""
        return self._encode("train")

    @cached_property
    def test(self) -> Encoded:
        """The test set, encoded."""
        return self._encode("test")

    def layouts(self, which: str) -> list[ImageLayout]:
        """Return where things are in each image of a set, `train` or `test`.

        Raises:
            ConfigError: if the data set does not know.
        """
        dataset, whole = self._dataset(which)
        layout_of = getattr(whole, "layout_of", None)
        if layout_of is None:
            raise ConfigError(
                "the data set does not say where things are (the scenes do); give it a method "
                "layout_of(index) that returns a lgvq_plugin.datasets.base.ImageLayout"
            )
        return [layout_of(index) for index in range(len(dataset))]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images and their reconstructions, (B, 3, H, W) in [-1, 1], rounded to 8 bits.

        They are kept as bytes if they fit into memory.
        """
        if self._pictures is not None:
            yield from ((_to_float(a), _to_float(b)) for a, b in self._pictures)
            return
        kept: list[tuple[Tensor, Tensor]] = []
        size = 0
        for images, _ in self._batches("test", "reconstructing"):
            pair = to_uint8(images).cpu(), to_uint8(reconstruct(self.host, images)).cpu()
            size += 2 * pair[0].numel()
            if size <= CACHE_LIMIT:
                kept.append(pair)
            yield _to_float(pair[0]), _to_float(pair[1])
        if size <= CACHE_LIMIT:
            self._pictures = kept

    def train_pictures(self, count: int) -> Tensor:
        """Return the first training images, (count or fewer, 3, H, W) uint8."""
        found: list[Tensor] = []
        for images, _ in self._batches("train", "reading images"):
            found.append(to_uint8(images).cpu())
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def _batches(self, which: str, what: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the batches of a set in order, with their images on the host's device."""
        loader = DataLoader(
            Watched(self._dataset(which)[0], self.config.num_workers),
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        for batch in tqdm(loader, desc=what, disable=not self.progress, leave=False):
            yield channels_first(batch["image"].to(self.device)), batch

    def _dataset(self, which: str) -> tuple[Any, Any]:
        """Return the samples of a set that are used, and the whole data set that has them."""
        section, limit = self.test_section, self.config.limit
        if which == "train":
            section = self.data.get("train") or {}
            if not section:
                raise ConfigError("data: the probes need a `train:` data set")
            limit = self.config.train_limit or (None if limit is None else 4 * limit)
        dataset = build_dataset(section)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)
        if limit is None:
            return dataset, dataset
        return Subset(dataset, range(min(limit, len(dataset)))), dataset

    def _encode(self, which: str) -> Encoded:
        collector = CodeCollector()
        captions: list[list[str]] = []
        attributes: list[Mapping[str, Any]] = []
        questions: list[Question] = []
        files: list[str] = []
        for images, batch in self._batches(which, f"encoding ({which})"):
            collector.add(encode(self.host, images))
            given = batch.get("captions") or [[text] for text in batch.get("caption", [])]
            for row, items in enumerate(batch.get("questions", []), len(captions)):
                for item in items:
                    if item.get("answer"):
                        text, answer = str(item["question"]), str(item["answer"])
                        kind, people = str(item.get("type") or ""), item.get("answers") or ()
                        questions.append(Question(row, text, answer, kind, tuple(people)))
            captions += [[text for text in texts if text.strip()] for texts in given]
            attributes += batch.get("attributes", [])
            files += [str(file) for file in batch.get("file", [])]
        codes = collector.result()
        captions = captions or [[] for _ in range(len(codes))]
        return Encoded(codes, captions, attributes, questions, files)


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
