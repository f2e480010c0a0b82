"""CelebA-HQ with Multi-Modal-CelebA-HQ's ten captions an image, or as the LG-VQ code has them.

root/image/0.jpg .. 29999.jpg   (also images/, CelebA-HQ-img/)
root/text/0.txt ..              (also celeba-caption/, celeba_caption/)
root/{train,test}/filenames.pickle      root/CelebAMask-HQ-attribute-anno.txt (optional)
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..sockets import ConfigError
from .listed import (
    ListedImages,
    Reading,
    Record,
    choose_split,
    read_captions,
    read_lines,
    read_name_pickle,
)

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
        options: see `Reading`.

    Raises:
        ConfigError: if a folder, a split file or an image is missing.
    """

    def __init__(self, root: str | Path, split: str = "train", **options: Any):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        split = choose_split(split, SPLITS)
        images, texts = _folder(root, IMAGE_FOLDERS), _folder(root, TEXT_FOLDERS)
        if split == "all":
            names = sorted((path.stem for path in images.glob("*.jpg")), key=_number)
        else:
            names = read_name_pickle(root / split / "filenames.pickle")
        self.face_names, labels = _attributes(root)
        records = []
        for name in names:
            extra = {"attributes": {"face": labels[name]}} if name in labels else {}
            captions = read_captions(texts / f"{name}.txt", reading.encoding)
            records.append(Record(f"{name}.jpg", images / f"{name}.jpg", captions, extra))
        super().__init__(records, reading, where=root)

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the 40 columns; {} without the attribute file."""
        return {"face": self.face_names} if self.face_names else {}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for numbered images and texts and at least one split file."""
        folders = (IMAGE_FOLDERS, TEXT_FOLDERS)
        if not all(any((root / name).is_dir() for name in names) for names in folders):
            return {}
        splits = [s for s in SPLITS[:2] if (root / s / "filenames.pickle").is_file()]
        is_numbered = any(path.stem.isdigit() for path in _folder(root, TEXT_FOLDERS).glob("*.txt"))
        return {s: {"root": root, "split": s} for s in splits} if is_numbered else {}


def _folder(root: Path, names: tuple[str, ...]) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise ConfigError(f"{root}: none of the folders {', '.join(names)} is there")
    return found


def _number(stem: str) -> tuple[int, str]:
    return (int(stem) if stem.isdigit() else -1, stem)


def _attributes(root: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the attributes' names and image number -> (A,) int64 of 0 and 1."""
    path = next((p for p in (root / ATTRIBUTES, root.parent / ATTRIBUTES) if p.is_file()), None)
    if path is None:
        return (), {}
    told = read_lines(path)
    if len(told) < 2:
        raise ConfigError(f"{path}: expected a count, a line of names, then a line for each image")
    _, header, *lines = told
    names, labels = tuple(header.split()), {}
    for number, line in enumerate(lines, 3):
        file, *values = line.split()
        if len(values) != len(names):
            raise ConfigError(f"{path}:{number}: expected {len(names)} values, got {len(values)}")
        labels[file.partition(".")[0]] = np.array([value == "1" for value in values], np.int64)
    return names, labels
