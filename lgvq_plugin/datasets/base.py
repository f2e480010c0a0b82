"""The contract of a data set: captioned images in taming's batch convention."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from ..sockets import ConfigError, resolve
from . import MEMBERS

FILE_KEYS = (
    *("file_name", "filename", "file", "image", "filepath", "path", "image_name"),
    *("image_path", "image_file", "img", "img_path", "image_id"),
)
CAPTION_KEYS = (
    *("captions", "caption", "text", "title", "comment", "sentence", "sentences"),
    *("description", "prompt", "raw", "name"),
)
TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "captions.csv")
EXPECTED = (
    f"a table ({', '.join(TABLES)}, captions.txt or another .csv, .tsv, .jsonl or .json) with the "
    "images' paths (file_name, image, filepath, ...; `file_key` names another column) and captions "
    "(caption, text, title, ...; `caption_key`); lines x.jpg#0<TAB>caption, as "
    "Flickr8k.token.txt; x.txt beside each x.jpg; or tar shards of x.jpg with x.txt or x.json"
)


class CaptionedImages(Dataset):
    """Images with captions.

    A sample is `{"image": float32 array (H, W, C) in [-1, 1], "caption": str, "captions":
    list[str], "file": str, "index": int}`; `channel_first=True` gives (C, H, W), `channels` 1, 3
    (the default) or 4, and `image_key` a second key that holds the image. An image without a
    caption has `caption == ""` and takes no part in the text losses.

    The caption, crop and flip of a sample are drawn from (seed, epoch, index), so they are the
    same for any number of workers and after a resume; :meth:`set_epoch` moves the stream on.
    """

    seed: int = 0
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other captions, crops and flips from now on."""
        self.epoch = epoch

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a sample; members do so without opening the image."""
        return list(self[index]["captions"])

    def count_captioned(self) -> int | None:
        """Return how many images have a caption; None if that would mean opening them."""
        if type(self).captions_of is CaptionedImages.captions_of:
            return None
        return sum(bool(self.captions_of(index)) for index in range(len(self)))

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Return split -> keyword arguments if `root` is laid out as this data set, else {}."""
        return {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...


CONVERTED_FROM = "converted_from"
"""Key under which `lgvq data convert` keeps a file's old name: a hold-out parts the copy by it."""


@dataclass(frozen=True, slots=True)
class Health:
    """What a look at one image file found.

    Args:
        file: the name that samples show.
        problem: missing, empty, corrupt or bomb; "" for a good one.
        reason: what was wrong, in words.
        digest: sha256 of the file's bytes, "" if it could not be read.
        width, height: in pixels, upright; 0 if it could not be decoded.
    """

    file: str
    problem: str = ""
    reason: str = ""
    digest: str = ""
    width: int = 0
    height: int = 0


class CaptionedFiles(CaptionedImages):
    """Captioned images that are files, so that they can be checked and converted."""

    def broken_texts(self) -> list[tuple[str, str]]:
        """Return (file, caption) of captions with bytes of another encoding, now U+FFFD."""
        return []

    def unread_files(self) -> list[Path]:
        """Return files in the data set's folder that seem to hold captions and were not read."""
        return []

    @abstractmethod
    def file_of(self, index: int) -> str:
        """Return the name that a sample shows as `file`."""

    @abstractmethod
    def examine(self, index: int) -> Health:
        """Read and decode one file as training would."""

    @abstractmethod
    def shrunken(self, index: int, size: int, *, square: bool) -> tuple[bytes, str]:
        """Return the encoded image with its shorter side at most `size`, and its suffix.

        Args:
            index: of the sample.
            size: pixels of the shorter side; smaller images are not blown up.
            square: also cut the largest square from the middle.

        Raises:
            ConfigError: if the file cannot be read.
        """

    @abstractmethod
    def extra_of(self, index: int) -> dict[str, Any]:
        """Return the further keys of a sample, such as questions, labels and ids."""


@dataclass(frozen=True)
class Layout:
    """What a path was recognized as.

    Args:
        member: name of the data set in `MEMBERS`.
        splits: split -> keyword arguments of that data set.
    """

    member: str
    splits: Mapping[str, Mapping[str, Any]]

    def build(self, split: str, **options: Any) -> CaptionedFiles:
        """Return the data set of one split."""
        return resolve("datasets", self.member)(**self.splits[split], **options)


def recognize(root: str | Path, member: str | None = None) -> Layout:
    """Find out which data set lies at a path; the members are asked in their order.

    Args:
        root: a folder, or a table or list of paths.
        member: ask this one only.

    Raises:
        ConfigError: if nobody knows the layout.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise ConfigError(f"{root} does not exist; expected a folder of images or a table")
    for name in [member] if member else MEMBERS:
        splits = resolve("datasets", name).recognize(root)
        if splits:
            return Layout(name, splits)
    raise ConfigError(
        f"{root}: not laid out as {member or 'any data set known here'}; known: "
        f"{', '.join(MEMBERS)}. The smallest layout is x.jpg with x.txt beside it"
    )


def describe_captions(dataset: Any) -> str | None:
    """Return "n of m images have captions", found without opening an image.

    Args:
        dataset: any data set; a `torch.utils.data.Subset` is counted over its own indices.

    Returns:
        None for a data set that is not a :class:`CaptionedImages`, or would have to open images.

    Example:
        >>> from torch.utils.data import Subset
        >>> from .scenes import Scenes
        >>> describe_captions(Scenes(length=5)), describe_captions(Subset(Scenes(), [0, 1]))
        ('5 of 5 images have captions', '2 of 2 images have captions')
    """
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, CaptionedImages):
        whole = dataset.dataset
        if type(whole).captions_of is CaptionedImages.captions_of:
            return None
        count: int | None = sum(bool(whole.captions_of(index)) for index in dataset.indices)
    else:
        count = dataset.count_captioned() if isinstance(dataset, CaptionedImages) else None
    return None if count is None else f"{count:,} of {len(dataset):,} images have captions"


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images to a (B, ...) tensor and keep strings and lists of captions as lists.

    A key that some samples lack becomes a list, with None in their places.

    Example:
        >>> import numpy as np
        >>> image = np.zeros((2, 2, 3), np.float32)
        >>> batch = collate([{"image": image, "caption": "a dog", "captions": ["a dog"]}] * 2)
        >>> batch["image"].shape, batch["caption"]
        (torch.Size([2, 2, 2, 3]), ['a dog', 'a dog'])
    """
    import numpy as np
    import torch

    keys = dict.fromkeys(key for sample in samples for key in sample)
    batch: dict[str, Any] = {key: [sample.get(key) for sample in samples] for key in keys}
    for key, values in batch.items():
        if all(isinstance(value, np.ndarray | torch.Tensor) for value in values):
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
        elif all(isinstance(value, int | float) for value in values):
            batch[key] = torch.tensor(values)
    return batch
