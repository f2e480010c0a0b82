"""The contract of a data set: captioned images in taming's batch convention.

A loader takes samples of a data set that is :class:`Watched`, so that :func:`naming_files` can
name the file that a process which loads them held when it died.
"""

import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from ..sockets import ConfigError, resolve, suggest
from . import MEMBERS

DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]+)")
"""What torch says of workers that died."""
_watched: "WeakSet[Watched]" = WeakSet()


class CaptionedImages(Dataset):
    """Images with captions.

    A sample is `{"image": float32 array (H, W, C) in [-1, 1], "caption": str, "captions":
    list[str], "file": str, "index": int}`; `channel_first=True` gives (C, H, W), `channels` 1, 3
    (the default) or 4, and `image_key` a second key that holds the image. An image without a
    caption has `caption == ""` and takes no part in the text losses.

    Caption, crop and flip are drawn from (seed, epoch, index), whatever the workers or a resume.
    """

    seed: int = 0
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other captions, crops and flips from now on."""
        self.epoch = epoch

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a sample; members do so without opening the image."""
        return list(self[index]["captions"])

    def origin(self, index: int) -> str:
        """Name a sample in messages; members whose samples are files give their paths."""
        return f"sample {index}"

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Return split -> keyword arguments if `root` has the layout of this data set, else {}."""
        return {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Layout:
    """The data set that a path was recognized as: its name, and split -> keyword arguments."""

    member: str
    splits: Mapping[str, Mapping[str, Any]]

    def build(self, split: str, **options: Any) -> Any:
        """Return the data set of one split."""
        return resolve("datasets", self.member)(**self.splits[split], **options)

    def chosen(self, split: str | None) -> list[str]:
        """Return the splits that `--split` chooses: the one it names, or all of them."""
        if split is not None and split not in self.splits:
            raise ConfigError(f"--split: {split!r}{suggest(split, list(self.splits))}")
        return [split] if split else list(self.splits)


def recognize(root: str | Path, member: str | None = None) -> Layout:
    """Find out which data set a folder, table or list of paths holds.

    The first member that recognizes it wins, or only `member` is tried; if none does, that is a
    ConfigError.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise ConfigError(f"{root} does not exist; expected a folder of images or a table")
    for name in [member] if member else MEMBERS:
        if splits := resolve("datasets", name).recognize(root):
            return Layout(name, splits)
    raise ConfigError(
        f"{root}: not laid out as {member or 'any data set known here'}; known: "
        f"{', '.join(MEMBERS)}. The smallest layout is x.jpg with x.txt beside it"
    )


@dataclass(frozen=True)
class ImageLayout:
    """Where things are in an image, for the probes of synthesis and grounding.

    A data set that knows has a method `layout_of(index)`, which returns it without reading the
    image.
    """

    semantic_map: np.ndarray
    """Class of each pixel, (H, W) unsigned integers; 0 is the background."""
    boxes: Mapping[str, list[tuple[float, float, float, float]]]
    """Boxes by word: left, top, right, bottom, as shares of width and height."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images to a (B, ...) tensor and keep strings and lists of captions as lists.

    A key that some samples lack becomes a list, with None for those samples.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((2, 2, 3), np.float32)
        >>> batch = collate([{"image": image, "caption": "a dog", "captions": ["a dog"]}] * 2)
        >>> batch["image"].shape, batch["caption"]
        (torch.Size([2, 2, 2, 3]), ['a dog', 'a dog'])
    """
    keys = dict.fromkeys(key for sample in samples for key in sample)
    batch: dict[str, Any] = {key: [sample.get(key) for sample in samples] for key in keys}
    for key, values in batch.items():
        if all(isinstance(value, np.ndarray | torch.Tensor) for value in values):
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
        elif all(isinstance(value, int | float) for value in values):
            batch[key] = torch.tensor(values)
    return batch


class Watched(Dataset):
    """A data set that notes, in shared memory, which sample each worker took last.

    An index may be a tuple that ends in the number of the sample, as of `training.data.AtEpoch`.
    """

    def __init__(self, dataset: Any, workers: int):
        self.dataset = dataset
        _watched.add(self)
        self.taken = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()  # process, sample

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return a sample."""
        if (worker := get_worker_info()) is not None:
            number = index[-1] if isinstance(index, tuple) else index
            self.taken[worker.id] = torch.tensor([os.getpid(), number])
        return self.dataset[index]


def _name(dataset: Any, index: int) -> str:
    """Return the file of a sample, or else its number."""
    while hasattr(dataset, "dataset"):  # a data set around another one
        order = getattr(dataset, "indices", None)  # torch's Subset
        dataset, index = dataset.dataset, index if order is None else order[index]
    return dataset.origin(index) if isinstance(dataset, CaptionedImages) else f"sample {index}"


@contextmanager
def naming_files() -> Iterator[None]:
    """Turn torch's error about a worker that died into a ConfigError with the file it held.

    torch raises it wherever the main process is at that moment, not only where it reads a batch.
    """
    try:
        yield
    except Exception as error:
        found = DEAD.search(str(error))
        if found is None:
            raise
        dead = [*map(int, found[1].split(","))]
        taken = [(one.dataset, *last) for one in [*_watched] for last in one.taken.tolist()]
        held = [_name(dataset, number) for dataset, process, number in taken if process in dead]
        files = ", ".join(held) or "not known"
        raise ConfigError(
            f"a worker of num_workers died: process {found[1]} {found[2].strip()}; the last that "
            f"it read: {files}. If the system ran out of memory, lower num_workers; if that file "
            "crashes its decoder, with num_workers: 0 too, remove it"
        ) from error
