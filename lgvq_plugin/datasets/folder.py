"""A folder of images with captions in a table, in text files beside them, or none but names.

root/captions.jsonl | metadata.csv | captions.txt | ...         root/[images/]x.jpg
root/Flickr8k.token.txt | results.csv (Flickr30k)               root/Images/x.jpg
root/x.jpg + root/x.txt (one caption per line)                  root/class_name/x.jpg
any of these in root/train, root/validation, root/test; or one table with a column `split`
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import (
    EXPECTED,
    USUAL,
    Columns,
    clean,
    find_table,
    read_sidecar,
    read_split_lists,
    read_table,
    tables_in,
    unread_files,
)
from .images import SUFFIXES
from .listed import ImageFinder, ListedImages, Record, image_files
from .splits import (
    SPLITS,
    declared_splits,
    of_split,
    refuse_other_splits,
    split_name,
    split_of_folders,
    split_words,
    splits_at,
)

NO_CLASS = re.compile(
    r"(jpe?g|png|raw)?_?(images?|imgs?|pictures?|photos?|masks?|labels?|thumbnails?|data|dataset|"
    r"files|all|jpe?g|png|samples?|[a-z]?[\W\d_]*)",
    re.I,
)
"""Names of folders that do not describe the image: Images, 00000, n01440764."""


class CaptionedFolder(ListedImages):
    """Images of a folder with their captions; an image without one has `caption == ""`.

    Args:
        root: the folder; images are in it, in its `images/`, or below.
        captions: the table, relative to root or to where you are; None looks for one.
        split: train, validation or test, as the table's column `split`, a list such as
            `Flickr_8k.trainImages.txt` or a folder of that name says; where nothing does, train
            and validation are divided by a hash of each file's name. all: everything; None is the
            same where nothing names a split, and refused where something does.
        holdout: share of the validation split where nothing names one, 0 < holdout < 1.
        caption_key: the table's column with the captions, where its name is not a usual one.
        file_key: the table's column with the images' paths, likewise.
        caption_template: such as "a photo of a {}", for a `name` column and class folders.
        exclude: regular expression; files whose name it matches anywhere are left out.
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self,
        root: Path,
        captions: str | Path | None = None,
        split: str | None = None,
        *,
        holdout: float = 0.1,
        caption_key: str | None = None,
        file_key: str | None = None,
        caption_template: str | None = None,
        exclude: str | None = None,
    ) -> list[Record]:
        template, encoding = caption_template, self.options.encoding
        if not root.is_dir():
            raise ConfigError(f"root: {root} is no folder; expected one with images and {EXPECTED}")
        if template is not None and template.count("{}") != 1:
            raise ConfigError(
                "caption_template must hold one {}, such as 'a photo of a {}'; got "
                f"{template!r}"
            )
        inner = _split_folder(root, split_name(split)) if captions is None else None
        self._home = home = inner or root
        columns = Columns(file_key=file_key, caption_key=caption_key, encoding=encoding)
        table = find_table(home, captions, columns)
        if table is None:
            self.where, records = home, _records_without_table(home, template, encoding)
        else:
            self.where, records = table, _records_of_table(home, table, columns, template)
        self._listed = {record.path for record in records} if table else None
        if inner is not None:
            refuse_other_splits(records, split_name(split), self.where)
        try:
            unwanted = re.compile(exclude or r"(?!)")
        except re.error as error:
            raise ConfigError(f"exclude: {exclude!r} is no regular expression: {error}") from error
        kept = [record for record in records if not unwanted.search(record.file)]
        own = "all" if inner else split
        kept = of_split(kept, own, holdout=holdout, where=self.where)
        if not kept:
            raise ConfigError(
                f"{self.where}: no image is left by split {own!r}, exclude {exclude!r}"
            )
        return kept

    def unlisted_images(self) -> list[Path]:
        """Return images in the data set's folder that its table does not list."""
        if self._listed is None:
            return []
        return [path for path in image_files(self._home) if path not in self._listed]

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take any folder with images; splits are those that a table or folders name."""
        if not root.is_dir():
            return {}
        inner = {s: folder for s in SPLITS[:3] if (folder := _split_folder(root, s))}
        if inner:
            return {s: {"root": root, "split": s, **_template(f)} for s, f in inner.items()}
        if table := find_table(root, None):
            splits = declared_splits(_records_of_table(root, table, USUAL, None))
            return splits_at(root, splits or ["all"])
        if not (images := image_files(root)):
            return {}
        splits = declared_splits([_in_folder(root, path) for path in images])
        return splits_at(root, splits or ["all"], **_template(root, images))


def _split_folder(root: Path, split: str | None) -> Path | None:
    """Return root/train and the like, if it has captions of its own or root has no table."""
    folder = next((root / name for name in split_words(split) if (root / name).is_dir()), None)
    if folder is None or (find_table(root, None) and not find_table(folder, None)):
        return None
    return folder


def _template(root: Path, images: Sequence[Path] | None = None) -> dict[str, str]:
    """Return a template for the names of class folders, if `root` holds nothing but those."""
    images = image_files(root) if images is None else images
    classes = {path.parent.name for path in images}
    is_flat = any(path.parent in (root, root / "images") for path in images)
    if is_flat or len(classes) < 2 or any(NO_CLASS.fullmatch(name) for name in classes):
        return {}
    if find_table(root, None) or any(read_sidecar(path) for path in images):
        return {}
    return {"caption_template": "a photo of a {}"}


def _records_of_table(
    root: Path, table: Path, columns: Columns, template: str | None
) -> list[Record]:
    homes = (table.parent, root, root / "images", table.parent / "images")
    listed = read_table(table, columns, template or "{}")
    records = ImageFinder(homes, below=root).records(listed)
    if not any(record.captions for record in records):
        raise ConfigError(f"{table}: all captions are empty; name their column with `caption_key`")
    lists = read_split_lists(table)
    splits = (
        record.split
        or lists.get(Path(record.file).name)
        or lists.get(Path(record.file).stem)
        or _in_folder(root, Path(str(record.path))).split
        for record in records
    )
    return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]


def _in_folder(root: Path, path: Path) -> Record:
    """Return an image without captions, in the split that its folders name."""
    name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return Record(name.as_posix(), path, (), split=split_of_folders(name.parts[:-1]))


def _records_without_table(root: Path, template: str | None, encoding: str) -> list[Record]:
    records, has_captions = [], False
    for path in image_files(root):
        texts = read_sidecar(path, encoding)
        if texts is None and template and path.parent not in (root, root / "images"):
            texts = [template.replace("{}", clean(path.parent.name.replace("_", " ")))]
        has_captions |= texts is not None
        records.append(replace(_in_folder(root, path), captions=tuple(texts or ())))
    if not records:
        raise ConfigError(f"{root} holds no images ({', '.join(SUFFIXES)}) and no table")
    if not has_captions:
        tables = ", ".join(path.name for path in tables_in([root]))
        others = unread_files(root, (record.file for record in records), read=())
        names = ", ".join(path.relative_to(root).as_posix() for path in others)
        hint = f" ({names} could hold captions, but not in a layout that is read)" if names else ""
        if tables:
            hint = f" by this data set; `target: pairs_table` reads {tables}, one table per split"
        raise ConfigError(
            f"{root}: no captions found{hint}; expected {EXPECTED}; or, for folders named after "
            "classes, caption_template: 'a photo of a {}'"
        )
    return records
