"""A folder of images with captions in a table, in text files beside them, or none but names.

root/captions.jsonl | metadata.jsonl | metadata.csv | *.csv     root/[images/]x.jpg
root/x.jpg + root/x.txt (one caption a line)                    root/class_name/x.jpg
any of these in root/train, root/validation, root/test
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._caption_files import (
    EXPECTED,
    TABLES,
    clean,
    find_table,
    read_sidecar,
    read_table,
)
from ._image import SUFFIXES
from ._listed import ListedImages, Reading, Record
from ._names import SPLIT_ALIASES, choose_split, held_out_share
from .base import CONVERTED_FROM

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "all")


class CaptionedFolder(ListedImages):
    """Images of a folder with their captions; an image without one has `caption == ""`.

    Args:
        root: the folder; images lie in it, in its `images/`, or below.
        captions: the table, relative to root or to where you are; None looks for one.
        split: train, validation or test: the folder of that name, if root has one and no table
            itself; else train or validation, parted by a hash of each file's name. None or
            all: everything.
        holdout: share of the validation split, 0 < holdout < 1.
        size: height and width in pixels.
        crop: center, random (largest square), or none (whole image, padded with white).
        flip: mirror every other image; captions that say left and right become wrong.
        captions_per_image: keep at most so many, the first ones.
        caption_key: the table's column with the captions, where its name is not a usual one.
        caption_template: such as "a photo of a {}", for a `name` column and class folders.
        exclude: regular expression; files whose name it finds are left out.
        seed: of the draws of caption, crop and flip.
        channel_first: (3, H, W) images instead of (H, W, 3).
        skip_corrupt: put the next good image in the place of one that cannot be read.

    Raises:
        ConfigError: if there is nothing to read, or a line or an image is broken; it is named.
    """

    def __init__(
        self,
        root: str | Path,
        captions: str | Path | None = None,
        split: str | None = None,
        *,
        holdout: float = 0.1,
        size: int = 64,
        crop: str = "center",
        flip: bool = False,
        captions_per_image: int | None = None,
        caption_key: str | None = None,
        caption_template: str | None = None,
        exclude: str | None = None,
        seed: int = 0,
        channel_first: bool = False,
        skip_corrupt: bool = False,
    ):
        root = Path(root).expanduser()
        reading = Reading(
            size=size,
            crop=crop,
            flip=flip,
            captions_per_image=captions_per_image,
            seed=seed,
            channel_first=channel_first,
            skip_corrupt=skip_corrupt,
        )
        split = None if split is None else choose_split(split, SPLITS)
        _check(root, holdout, caption_template)
        inner = _split_folder(root, split) if captions is None else None
        root, split = (root, split) if inner is None else (inner, None)
        records = _records(root, captions, caption_key, caption_template)
        records = _kept(records, exclude, split, holdout, root)
        super().__init__(records, reading, where=root)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take any folder with images; folders named after splits are those."""
        if not root.is_dir():
            return {}
        found = {s: {"root": root, "split": s} for s in SPLITS[:3] if _split_folder(root, s)}
        if found:
            return found
        images = _image_files(root)
        is_told = find_table(root, None) or any(read_sidecar(path) for path in images)
        if not is_told and all(path.parent not in (root, root / "images") for path in images):
            is_classes = {"root": root, "caption_template": "a photo of a {}"}
            return {"all": is_classes} if images else {}
        return {"all": {"root": root}} if images else {}


def _split_folder(root: Path, split: str | None) -> Path | None:
    """Return root/train and the like, if root has no table of its own."""
    if split in (None, "all") or any((root / name).is_file() for name in TABLES):
        return None
    names = [split, *(alias for alias, name in SPLIT_ALIASES.items() if name == split)]
    folders = (root / str(name) for name in names)
    return next((folder for folder in folders if folder.is_dir()), None)


def _check(root: Path, holdout: float, template: str | None) -> None:
    if not root.is_dir():
        raise ConfigError(f"root: {root} is no folder; expected one with images and {EXPECTED}")
    if not 0 < holdout < 1:
        raise ConfigError(f"holdout must lie between 0 and 1, got {holdout!r}")
    if template is not None and template.count("{}") != 1:
        raise ConfigError(
            f"caption_template must hold one {{}}, such as 'a photo of a {{}}'; got {template!r}"
        )


def _records(
    root: Path, captions: str | Path | None, caption_key: str | None, template: str | None
) -> list[Record]:
    table = find_table(root, captions)
    if table is None:
        return _records_without_table(root, template)
    listed = read_table(table, caption_key, template or "{}")
    places = (table.parent, root, root / "images", table.parent / "images")
    records = []
    for file, told in listed.items():
        paths = [place / file for place in places]  # an absolute `file` stays as it is
        path = next((path for path in paths if path.is_file()), paths[0])
        records.append(Record(file, path, tuple(told.captions), told.extra))
    if not any(record.captions for record in records):
        raise ConfigError(f"{table}: all captions are empty; name their column with `caption_key`")
    return records


def _records_without_table(root: Path, template: str | None) -> list[Record]:
    records, captioned = [], 0
    for path in _image_files(root):
        texts = read_sidecar(path)
        captioned += texts is not None
        is_in_class = path.parent not in (root, root / "images")
        if texts is None and template and is_in_class:
            texts = [template.replace("{}", clean(path.parent.name.replace("_", " ")))]
            captioned += 1
        records.append(Record(path.relative_to(root).as_posix(), path, tuple(texts or ())))
    if not records:
        raise ConfigError(f"{root} holds no images ({', '.join(SUFFIXES)}) and no table")
    if not captioned:
        raise ConfigError(
            f"{root}: no captions found; expected {EXPECTED}; or, for folders named after "
            "classes, caption_template: 'a photo of a {}'"
        )
    if captioned < len(records):
        log.info(
            "%s: %d of %d images have no caption", root, len(records) - captioned, len(records)
        )
    return records


def _image_files(root: Path) -> list[Path]:
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def _kept(
    records: list[Record], exclude: str | None, split: str | None, holdout: float, root: Path
) -> list[Record]:
    try:
        unwanted = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ConfigError(f"exclude: {exclude!r} is no regular expression: {error}") from error
    if unwanted:
        records = [record for record in records if not unwanted.search(record.file)]
    if split == "test":
        raise ConfigError(f"{root}: split 'test' needs a folder {root / 'test'}")
    if split in ("train", "validation"):
        wanted = split == "validation"
        records = [r for r in records if (held_out_share(_first_name(r)) < holdout) == wanted]
    if not records:
        raise ConfigError(f"{root}: no image is left by split {split!r} and exclude {exclude!r}")
    return records


def _first_name(record: Record) -> str:
    """The file's name before `lgvq data convert` gave it another, if it did."""
    return str(record.extra.get(CONVERTED_FROM, record.file))
