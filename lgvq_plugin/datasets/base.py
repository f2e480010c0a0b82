"""The contract of a data set: captioned images in taming's batch convention."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..sockets import ConfigError, resolve, suggest
from . import MEMBERS


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
