"""CelebA-HQ with Multi-Modal-CelebA-HQ's ten captions per image, or as the LG-VQ code has them.

root/image/0.jpg .. 29999.jpg   (also images/, CelebA-HQ-img/)
root/text/0.txt ..              (also celeba-caption/, celeba_caption/)
root/{train,test}/filenames.pickle      root/CelebAMask-HQ-attribute-anno.txt (optional)
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..sockets import ConfigError
from .captions import read_captions, read_lines
from .listed import ListedImages, Record, read_name_pickle
from .splits import choose_split, splits_at

SPLITS = ("train", "test", "all")
IMAGE_FOLDERS = ("image", "images", "CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img")
TEXT_FOLDERS = ("text", "celeba-caption", "celeba_caption")
ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"


class CelebAHQ(ListedImages):
    """Faces with ten captions each; with the attribute file also `attributes["face"]`, (40,).

    The captions are made from the attributes: many images have the very same one. The numbers
    are those of CelebAMask-HQ; taming's own imgHQ00000.npy files are numbered otherwise.

    Args:
        root: the folder with the images, the texts and the splits.
        split: train (24,000), test (6,000), or all, which needs no split files.
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(self, root: Path, split: str = "train") -> list[Record]:
        split = choose_split(split, SPLITS)
        images, texts = _folder(root, IMAGE_FOLDERS), _folder(root, TEXT_FOLDERS)
        if split == "all":
            stems = (path.stem for path in images.glob("*.jpg"))
            names = sorted(stems, key=lambda s: (int(s) if s.isdigit() else -1, s))
        else:
            names = read_name_pickle(root / split / "filenames.pickle")
        self.face_names, labels = _attributes(root)
        records = []
        for name in names:
            extra = {"attributes": {"face": labels[name]}} if name in labels else {}
            captions = read_captions(texts / f"{name}.txt", self.options.encoding)
            records.append(Record(f"{name}.jpg", images / f"{name}.jpg", captions, extra))
        return records

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the 40 columns; {} without the attribute file."""
        return {"face": self.face_names} if self.face_names else {}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for numbered images and texts and at least one split file."""
        try:
            texts = [_folder(root, names) for names in (IMAGE_FOLDERS, TEXT_FOLDERS)][1]
        except ConfigError:
            return {}
        if not any(path.stem.isdigit() for path in texts.glob("*.txt")):
            return {}
        return splits_at(root, (s for s in SPLITS if (root / s / "filenames.pickle").is_file()))


def _folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"{root}: contains none of the folders {', '.join(names)}")


def _attributes(root: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the attributes' names and image number -> (A,) int64 of 0 and 1."""
    path = next((p for p in (root / ATTRIBUTES, root.parent / ATTRIBUTES) if p.is_file()), None)
    if path is None:
        return (), {}
    rows = read_lines(path)
    if len(rows) < 2:
        raise ConfigError(f"{path}: expected a count, a line of names, then a line for each image")
    names, labels = tuple(rows[1].split()), {}
    for number, row in enumerate(rows[2:], 3):
        file, *values = row.split()
        if len(values) != len(names):
            raise ConfigError(f"{path}:{number}: expected {len(names)} values, got {len(values)}")
        labels[file.partition(".")[0]] = np.array([value == "1" for value in values], np.int64)
    return names, labels
