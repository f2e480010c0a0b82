"""What the metrics of one host share: its data, its codes, its reconstructions, the guide."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..datasets.base import collate
from ..guides.base import AbstractGuide, build_guide
from ..host import encode, reconstruct
from ..sockets import ConfigError
from ..training.build import build_dataset
from .evaluate import EvaluationConfig
from .probes.base import CodeCollector, FrozenCodes, Question

CACHE_LIMIT = 2**30  # bytes of pictures that are kept in memory


@dataclass(frozen=True)
class Encoded:
    """A set of images as the tasks see it.

    Args:
        codes: of the M images.
        captions: of each image, [] where there is none.
        attributes: labels of each image, or [].
        questions: about the images, or [].
    """

    codes: FrozenCodes
    captions: list[list[str]]
    attributes: list[Mapping[str, Any]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def captioned(self) -> "Encoded":
        """Return the images that have a caption.

        Raises:
            ConfigError: if too few have.
        """
        rows = [i for i, texts in enumerate(self.captions) if texts]
        if len(rows) < 2:
            raise ConfigError("the data set has no captions, and this metric needs them")
        if len(rows) == len(self.captions):
            return self
        return Encoded(self.codes.take(torch.tensor(rows)), [self.captions[i] for i in rows])


class Context:
    """Everything is computed when it is first asked for, and kept.

    Args:
        host: in evaluation mode.
        data: the config's `data:` section, plain.
        lgvq: the config's `lgvq:` block, {} for a baseline.
        config: the `evaluation:` block.
        folder: where probes keep their checkpoints, or None.
        progress: whether to show bars.
    """

    def __init__(
        self,
        host: nn.Module,
        data: Mapping[str, Any],
        lgvq: Mapping[str, Any],
        config: EvaluationConfig,
        *,
        folder: Path | None = None,
        progress: bool = True,
    ):
        self.host, self.config, self.folder, self.progress = host, config, folder, progress
        self._data, self._lgvq = {**(data.get("params") or {}), **data}, lgvq
        self.generated: tuple[list[str], Tensor] | None = None  # captions, images: of t2i
        self._pictures: list[tuple[Tensor, Tensor]] | None = None
        first = next(iter(host.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device

    @cached_property
    def test_section(self) -> dict[str, Any]:
        """The `{target, params}` of the test set: `data.test`, else `data.validation`."""
        section = self._data.get("test") or self._data.get("validation")
        if not section:
            raise ConfigError("data: evaluation needs a `test:` or a `validation:` data set")
        return dict(section)

    @cached_property
    def train_section(self) -> dict[str, Any]:
        """The `{target, params}` of the set that probes train on."""
        section = self._data.get("train")
        if not section:
            raise ConfigError("data: the probes need a `train:` data set")
        return dict(section)

    @cached_property
    def test_images(self) -> int:
        """How many test images are looked at."""
        return len(self._set("test"))

    @cached_property
    def guide_config(self) -> dict[str, Any]:
        """The guide of the tasks with text."""
        return dict(self.config.guide or self._lgvq.get("guide") or {"use": "micro_clip"})

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

    def batches(self, which: str, what: str) -> Iterator[dict[str, Any]]:
        """Yield the batches of a set in order, with a progress bar that says what for."""
        dataset = self._set(which)
        loader = DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        yield from tqdm(loader, desc=what, disable=not self.progress, leave=False)

    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the images of a batch, (B, 3, H, W) float32 on the host's device."""
        images = batch["image"]
        if images.shape[-1] < images.shape[1]:  # channels last: 1, 3 or 4 of them
            images = images.movedim(-1, 1)
        return images.to(self.device).float().contiguous()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images and their reconstructions, (B, 3, H, W) on the 8-bit grid of [-1, 1].

        They are kept as bytes where they fit into memory.
        """
        if self._pictures is not None:
            yield from ((_floats(a), _floats(b)) for a, b in self._pictures)
            return
        kept: list[tuple[Tensor, Tensor]] = []
        size = 0
        for batch in self.batches("test", "reconstructing"):
            images = self.images(batch)
            pair = _bytes(images), _bytes(reconstruct(self.host, images))
            size += 2 * pair[0].numel()
            if size <= CACHE_LIMIT:
                kept.append(pair)
            yield _floats(pair[0]), _floats(pair[1])
        if size <= CACHE_LIMIT:
            self._pictures = kept

    def pictures(self, which: str, count: int) -> Tensor:
        """Return the first pictures of a set as bytes, (count or fewer, 3, H, W) uint8."""
        found: list[Tensor] = []
        for batch in self.batches(which, "reading pictures"):
            found.append(_bytes(self.images(batch)))
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def _set(self, which: str) -> Any:
        section = self.test_section if which == "test" else self.train_section
        dataset = build_dataset(section)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)
        limit = self.config.limit
        if which == "train":
            limit = self.config.train_limit or (None if limit is None else 4 * limit)
        return dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))

    def _encode(self, which: str) -> Encoded:
        collector = CodeCollector()
        captions: list[list[str]] = []
        attributes: list[Mapping[str, Any]] = []
        questions: list[Question] = []
        for batch in self.batches(which, f"encoding ({which})"):
            collector.add(encode(self.host, self.images(batch)))
            given = batch.get("captions") or [[text] for text in batch.get("caption", [])]
            begin = len(captions)
            captions += [[text for text in texts if text.strip()] for texts in given]
            attributes += batch.get("attributes", [])
            for i, asked in enumerate(batch.get("questions", [])):
                questions += [_question(begin + i, item) for item in asked if item.get("answer")]
        codes = collector.result()
        return Encoded(codes, captions or [[] for _ in range(len(codes))], attributes, questions)


def _question(row: int, item: Mapping[str, Any]) -> Question:
    return Question(
        row,
        str(item["question"]),
        str(item["answer"]),
        str(item.get("type") or ""),
        tuple(item.get("answers") or ()),
    )


def _bytes(images: Tensor) -> Tensor:
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def as_array(pixels: Tensor) -> np.ndarray:
    """Return bytes (B, 3, H, W) as (B, H, W, 3) for image files."""
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
