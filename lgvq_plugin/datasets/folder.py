"""A folder of images with captions in a table, in text files beside them, or none but names.

root/captions.jsonl | metadata.jsonl | metadata.csv | *.csv     root/[images/]x.jpg
root/x.jpg + root/x.txt (one caption a line)                    root/class_name/x.jpg
"""

import hashlib
import logging
import os
import re
from pathlib import Path

from ..sockets import ConfigError, suggest
from ._caption_files import EXPECTED, clean, find_table, read_sidecar, read_table
from ._image import SUFFIXES, Pipeline
from ._listed import ListedImages, Record

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "all")


class CaptionedFolder(ListedImages):
    """Images of a folder with their captions; an image without one has `caption == ""`.

    Args:
        root: the folder; images lie in it, in its `images/`, or below.
        captions: the table, relative to root or to where you are; None looks for one.
        split: train or validation, parted by a hash of each file's name; None or all: both.
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
        _check(root, split, holdout, captions_per_image, caption_template)
        pipeline = Pipeline(size=size, crop=crop, flip=flip, channel_first=channel_first)
        records = _records(root, captions, caption_key, caption_template)
        records = _kept(records, exclude, split, holdout, root)
        lost = [record for record in records if not record.path.is_file()]
        if lost and not skip_corrupt:
            raise ConfigError(
                f"{root}: {len(lost)} of {len(records)} images do not exist, first: "
                f"{lost[0].file}, sought in {root}, {root / 'images'} and beside the table; "
                "mend the table, or set `skip_corrupt: true` to skip them"
            )
        if captions_per_image:
            records = [Record(r.file, r.path, r.captions[:captions_per_image]) for r in records]
        super().__init__(records, pipeline, seed=seed, skip_corrupt=skip_corrupt)


def _check(
    root: Path, split: str | None, holdout: float, per_image: int | None, template: str | None
) -> None:
    if not root.is_dir():
        raise ConfigError(f"root: {root} is no folder; expected one with images and {EXPECTED}")
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split: {split!r}{suggest(str(split), list(SPLITS))}")
    if not 0 < holdout < 1:
        raise ConfigError(f"holdout must lie between 0 and 1, got {holdout!r}")
    if per_image is not None and per_image < 1:
        raise ConfigError(f"captions_per_image must be >= 1 or null, got {per_image!r}")
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
    for file, texts in listed.items():
        paths = [place / file for place in places]  # an absolute `file` stays as it is
        path = next((path for path in paths if path.is_file()), paths[0])
        records.append(Record(file, path, tuple(texts)))
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
    if split in ("train", "validation"):
        wanted = split == "validation"
        records = [r for r in records if (_share(r.file) < holdout) == wanted]
    if not records:
        raise ConfigError(f"{root}: no image is left by split {split!r} and exclude {exclude!r}")
    return records


def _share(file: str) -> float:
    """Return a number in [0, 1) that depends on the file's name alone."""
    digest = hashlib.sha256(file.removeprefix("images/").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
