"""Loaders whose samples depend only on (seed, position), not on workers or a resume.

position in the stream -> (epoch, index) -> worker: set_epoch(epoch), dataset[index] -> batch
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..datasets.base import Watched, collate
from ..sockets import ConfigError
from . import rng

CAPTION_KEYS = ("captions", "caption", "text", "txt")
Draw = tuple[int, int]


@dataclass(eq=False, kw_only=True)
class Stream(Sampler[list[Draw]]):
    """Endless batches of (epoch, index), in the order given by (seed, epoch).

    A batch has `batch_size` samples of each of `world_size` processes, this one is `rank`; `start`
    is the number of samples that all processes together have taken already.

    >>> batches = iter(Stream(length=5, batch_size=2, seed=0))
    >>> [[epoch for epoch, _ in next(batches)] for _ in range(3)]
    [[0, 0], [0, 0], [1, 1]]
    """

    length: int
    batch_size: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.step = self.batch_size * self.world_size
        self.per_epoch = self.length // self.step * self.step  # of all; the rest is dropped
        if self.per_epoch == 0:
            raise ConfigError(
                f"the data set has {self.length} samples, fewer than a batch of {self.batch_size} "
                f"on {self.world_size} process(es); lower data.batch_size"
            )

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of this process, without end."""
        epoch, begin = divmod(self.start, self.per_epoch)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for at in range(begin, self.per_epoch - self.step + 1, self.step):
                mine = order[at : at + self.step][self.rank :: self.world_size]
                yield [(epoch, int(index)) for index in mine]
            epoch, begin = epoch + 1, 0


class AtEpoch(Dataset):
    """A data set indexed by (epoch, index).

    Its `set_epoch` is called, if it has one. Any other data set may draw from the global
    generators (as torchvision's transforms do): each sample is seeded by (seed, epoch, index).
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        self._set_epoch = getattr(dataset, "set_epoch", None)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Return the sample at (epoch, index)."""
        epoch, index = draw
        if self._set_epoch is not None:
            self._set_epoch(epoch)
            return self.dataset[index]
        with rng.preserved(cuda=False):
            words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]))
            return self.dataset[index]


class WrongCaptions(Dataset):
    """Images with the captions of other images, the same ones throughout: a control experiment.

    What such a training gains over the baseline is regularization, not language.

    Args:
        dataset: samples with `captions` or `caption`, two at least.
        seed: draws which image lends its captions.

    >>> samples = [{"caption": "a dog"}, {"caption": "a cat"}]
    >>> [sample["caption"] for sample in WrongCaptions(samples, seed=0)]
    ['a cat', 'a dog']
    """

    def __init__(self, dataset: Any, seed: int):
        if len(dataset) < 2:
            raise ConfigError(f"data.wrong_captions: expected 2 images or more, got {len(dataset)}")
        self.dataset, self.epoch = dataset, 0
        order = np.random.default_rng(seed).permutation(len(dataset))  # one cycle
        self.lender = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Draw other captions, crops and flips from now on."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample with another one's captions."""
        sample, lender = dict(self.dataset[index]), self.lender[index]
        if hasattr(self.dataset, "captions_of"):
            texts = list(self.dataset.captions_of(lender))
            own = {"captions": texts, "caption": texts[self.epoch % len(texts)] if texts else ""}
        else:
            other = self.dataset[lender]
            own = {key: other[key] for key in CAPTION_KEYS if key in other}
            if not own:
                keys = ", ".join(map(str, other))
                raise ConfigError(f"data.wrong_captions: no captions in a sample; it has {keys}")
        return {key: own.get(key, value) for key, value in sample.items()}


def train_loader(
    dataset: Any, stream: Stream, *, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return the endless loader of one training process; draws nothing from global generators."""
    return _loader(dataset, stream, stream.seed, num_workers, pin_memory=pin_memory)


def validation_loader(
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Return a loader of the first samples, in order, as they are in epoch 0.

    Every process has the same number of samples, so that none waits for another in a collective
    operation; at most world_size - 1 are left out.
    """
    each = len(dataset) // world_size
    if each == 0:
        raise ConfigError(f"{len(dataset)} validation samples for {world_size} processes")
    count = each if max_batches is None else min(each, max_batches * batch_size)
    draws = [(0, rank + i * world_size) for i in range(count)]
    batches = [draws[i : i + batch_size] for i in range(0, count, batch_size)]
    return _loader(dataset, batches, seed, num_workers)


def _loader(
    dataset: Any, batches: Iterable[list[Draw]], seed: int, num_workers: int, **options: Any
) -> DataLoader:
    return DataLoader(
        Watched(AtEpoch(dataset, seed), num_workers),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
