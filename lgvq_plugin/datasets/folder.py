"""Folders, tables and lists of images with captions.

CaptionedFolder: captions in a table, in text files beside the images, or none but names
    root/captions.jsonl | metadata.csv | captions.txt | ...         root/[images/]x.jpg
    root/Flickr8k.token.txt | results.csv (Flickr30k)               root/Images/x.jpg
    root/x.jpg + root/x.txt (one caption per line)                  root/class_name/x.jpg
    any of these in root/train, root/validation, root/test; or one table with a column `split`
PairsTable: pairs.csv | pairs.tsv | pairs.jsonl    or a folder with train.csv, validation.csv, ...
    as open_clip's CSV (tabs by default): columns filepath and title
ListFile: train.txt, as taming's list of paths
    /data/a.jpg            caption in /data/a.txt or a.caption, if any
    /data/b.jpg<TAB>a dog  also b.jpg#0<TAB>a dog, b.jpg,a dog and b.jpg a dog
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from . import captions as tables
from . import splits
from .captions import EXPECTED, USUAL, Columns, find_table, read_sidecar
from .images import SUFFIXES
from .listed import ImageFinder, ListedImages, Record, declared_splits, image_files
from .splits import split_name, splits_at

PAIRS = (".csv", ".tsv", ".jsonl")
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
        need_captions: refuse a folder without any; `lgvq train` sets it to false where no objective
            needs them.
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
        need_captions: bool = True,
    ) -> list[Record]:
        template, encoding = caption_template, self.options.encoding
        if not root.is_dir():
            raise ConfigError(f"root: {root} is no folder; expected one with images and {EXPECTED}")
        if template is not None and template.count("{}") != 1:
            usual = "must hold one {}, such as 'a photo of a {}'"
            raise ConfigError(f"caption_template {usual}; got {template!r}")
        self.template = template or ""
        inner = _split_folder(root, split_name(split)) if captions is None else None
        self.where = self._home = home = inner or root
        columns = Columns(file_key=file_key, caption_key=caption_key, encoding=encoding)
        if (table := find_table(home, captions, columns)) is None:
            records = _records_without_table(home, template, encoding, need_captions)
        else:
            self.where, records = table, _records_of_table(home, table, columns, template)
        self._listed = {record.path for record in records} if table else None
        if inner is not None:
            self._refuse_other_splits(records, split_name(split))
        try:
            unwanted = re.compile(exclude or r"(?!)")
        except re.error as error:
            raise ConfigError(f"exclude: {exclude!r} is no regular expression: {error}") from error
        kept = [record for record in records if not unwanted.search(record.file)]
        own = "all" if inner else split
        kept = self._of_split(kept, own, holdout)
        if not kept:
            left = f"no image is left by split {own!r}, exclude {exclude!r}"
            raise ConfigError(f"{self.where}: {left}")
        return kept

    def unlisted_images(self) -> list[Path]:
        """Return images in the data set's folder that its table does not list."""
        listed = self._listed
        return [] if listed is None else [p for p in image_files(self._home) if p not in listed]

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take any folder with images; splits are those that a table or folders name."""
        if not root.is_dir():
            return {}
        inner = {s: folder for s in splits.SPLITS[:3] if (folder := _split_folder(root, s))}
        if inner:
            return {s: {"root": root, "split": s, **_template(f)} for s, f in inner.items()}
        if table := find_table(root, None):
            named = declared_splits(_records_of_table(root, table, USUAL, None))
            return splits_at(root, named or ["all"])
        if not (images := image_files(root)):
            return {}
        named = declared_splits([_in_folder(root, path) for path in images])
        return splits_at(root, named or ["all"], **_template(root, images))


def _split_folder(root: Path, split: str | None) -> Path | None:
    """Return root/train and the like, if it has captions of its own or root has no table."""
    places = (root / name for name in splits.split_words(split))
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None or (find_table(root, None) and not find_table(folder, None)):
        return None
    return folder


def _template(root: Path, images: Sequence[Path] | None = None) -> dict[str, str]:
    """Return a template for the names of class folders, if `root` holds nothing but those."""
    images = image_files(root) if images is None else images
    classes = {path.parent.name for path in images}
    is_flat = any(path.parent in (root, root / "images") for path in images)
    has_classes = len(classes) > 1 and not is_flat and not any(map(NO_CLASS.fullmatch, classes))
    if not has_classes or find_table(root, None) or any(map(read_sidecar, images)):
        return {}
    return {"caption_template": "a photo of a {}"}


def _records_of_table(
    root: Path, table: Path, columns: Columns, template: str | None
) -> list[Record]:
    homes = (table.parent, root, root / "images", table.parent / "images")
    listed = tables.read_table(table, columns, template or "{}")
    records = ImageFinder(homes, below=root).records(listed)
    if not any(record.captions for record in records):
        raise ConfigError(f"{table}: all captions are empty; name their column with `caption_key`")
    lists = tables.read_split_lists(table)

    def split_of(record: Record) -> str | None:
        name = Path(record.file)
        listed = record.split or lists.get(name.name) or lists.get(name.stem)
        return listed or _in_folder(root, Path(str(record.path))).split

    return [replace(record, split=split_of(record)) for record in records]


def _in_folder(root: Path, path: Path) -> Record:
    """Return an image without captions, in the split that its folders name."""
    name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return Record(name.as_posix(), path, (), split=splits.split_of_folders(name.parts[:-1]))


def _records_without_table(
    root: Path, template: str | None, encoding: str, need_captions: bool
) -> list[Record]:
    records, has_captions = [], False
    for path in image_files(root):
        texts = read_sidecar(path, encoding)
        if texts is None and template and path.parent not in (root, root / "images"):
            texts = [template.replace("{}", tables.clean(path.parent.name.replace("_", " ")))]
        has_captions |= texts is not None
        records.append(replace(_in_folder(root, path), captions=tuple(texts or ())))
    if not records:
        raise ConfigError(f"{root} holds no images ({', '.join(SUFFIXES)}) and no table")
    if need_captions and not has_captions:
        unread = tables.unread_files(root, (record.file for record in records), read=())
        names = ", ".join(path.relative_to(root).as_posix() for path in unread)
        hint = f" ({names} could hold captions, but not in a layout that is read)" if names else ""
        if found := ", ".join(path.name for path in tables.tables_in([root])):
            hint = f" by this data set; `target: pairs_table` reads {found}, one table per split"
        raise ConfigError(
            f"{root}: no captions found{hint}; expected {EXPECTED}; or, for folders named after "
            "classes, caption_template: 'a photo of a {}'; need_captions: false reads the images "
            "alone"
        )
    return records


class PairsTable(ListedImages):
    """Images and captions listed in a table; rows about one file are joined.

    Args:
        root: the table, or a folder that has one named after each split.
        split: which table of the folder; in one table, what its column `split` names. A table
            without that column is divided into train and validation by a hash of each file's name.
        holdout: share of the validation split in that last case, 0 < holdout < 1.
        images: the folder that the paths are relative to; null tries the table's own folder
            and its `images/`, then where you are.
        caption_key: the column with the captions, where it is not a usual one.
        file_key: the column with the images' paths, likewise.
    """

    def _read(
        self,
        root: Path,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        holdout: float = 0.1,
        file_key: str | None = None,
        caption_key: str | None = None,
    ) -> list[Record]:
        table = root if root.is_file() else splits.split_file(root, split_name(split), PAIRS)
        if table is None:
            raise ConfigError(f"{root}: no table of split {split!r} ({', '.join(PAIRS)})")
        self.where, encoding = table, self.options.encoding
        columns = Columns(file_key=file_key, caption_key=caption_key, encoding=encoding)
        records = _pairs(table, images, columns)
        return self._of_split(records, split, holdout) if table == root else records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for tables named after splits, or take a table itself."""
        if not root.is_file():
            found = {split: splits.split_file(root, split, PAIRS) for split in splits.SPLITS[:3]}
            there = (split for split, path in found.items() if path and tables.is_table(path))
            return splits_at(root, there)
        is_read = tables.is_table(root)
        if not is_read and root.suffix.lower() not in PAIRS:
            return {}  # other tables are taken for one whose columns have unusual names
        named = declared_splits(_pairs(root, None, USUAL)) if is_read else []
        return splits_at(root, named or ["all"])


def _pairs(table: Path, images: str | Path | None, columns: Columns) -> list[Record]:
    near = [table.parent, table.parent / "images", Path()]
    homes = [Path(images).expanduser()] if images else near
    return ImageFinder(homes, below=homes[0]).records(tables.read_table(table, columns))


class ListFile(ListedImages):
    """Images from a list of paths; a path that occurs twice keeps all its captions.

    Args:
        root: the list, or a folder with `train.txt` and so on.
        split: which list of the folder; null or all if root is the list.
        images: the folder that the paths are relative to; null tries the list's own folder,
            then where you are (as taming).
    """

    def _read(
        self, root: Path, split: str | None = None, *, images: str | Path | None = None
    ) -> list[Record]:
        path = _list(root, splits.choose_split(split, splits.SPLITS))
        if path is None:
            raise ConfigError(f"{root}: no list of split {split!r}; expected train.txt, ...")
        self.where, encoding = path, self.options.encoding
        found: dict[str, list[str]] = defaultdict(list)
        for _, name, caption in tables.caption_lines(path, encoding):
            found[name] += [caption] if caption else []
        finder = ImageFinder([Path(images).expanduser()] if images else [path.parent, Path()])
        records = []
        for name, captions in found.items():
            image = finder.find(name)
            texts = captions or read_sidecar(image, encoding) or ()
            records.append(Record(name, image, tuple(texts)))
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take a text file whose first line names an image, or a folder with such lists."""
        if root.is_dir():
            table = find_table(root, None)
            if table and not splits.SPLIT_LIST.search(table.name):
                return {}  # it has the captions, the lists have the splits
        lists = {split: _list(root, split) for split in splits.SPLITS}
        return splits_at(root, (s for s, path in lists.items() if path and _lists_images(path)))


def _list(root: Path, split: str) -> Path | None:
    if root.is_file():
        return root if split == "all" else None
    return splits.split_file(root, split, (".txt",)) if split != "all" else None


def _lists_images(path: Path) -> bool:
    with suppress(ConfigError):
        first = next(iter(tables.read_lines(path)), "") if path.suffix.lower() == ".txt" else ""
        return tables.split_line(first)[0].lower().endswith(SUFFIXES)
    return False
