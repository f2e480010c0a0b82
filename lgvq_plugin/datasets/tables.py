"""Lists and tables of image paths with captions.

PairsTable: pairs.csv | pairs.tsv | pairs.jsonl    or a folder with train.csv, validation.csv, ...
    as open_clip's CSV (tabs by default): columns filepath and title
ListFile: train.txt, as taming's list of paths
    /data/a.jpg            caption in /data/a.txt or a.caption, if any
    /data/b.jpg<TAB>a dog  also b.jpg#0<TAB>a dog, b.jpg,a dog and b.jpg a dog
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import (
    TABLE_SUFFIXES,
    USUAL,
    Columns,
    caption_lines,
    find_table,
    is_table,
    read_lines,
    read_sidecar,
    read_table,
    split_line,
)
from .images import SUFFIXES
from .listed import ImageFinder, ListedImages, Record
from .splits import (
    SPLIT_LIST,
    SPLITS,
    choose_split,
    declared_splits,
    of_split,
    split_file,
    split_name,
    splits_at,
)

PAIRS = (".csv", ".tsv", ".jsonl")


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
        options: see :class:`.listed.ImageOptions`.
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
        table = root if root.is_file() else split_file(root, split_name(split), PAIRS)
        if table is None:
            raise ConfigError(f"{root}: no table of split {split!r} ({', '.join(PAIRS)})")
        self.where = table
        encoding = self.options.encoding
        columns = Columns(file_key=file_key, caption_key=caption_key, encoding=encoding)
        records = _pairs(table, images, columns)
        if root.is_file():
            return of_split(records, split, holdout=holdout, where=table)
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for tables named after splits, or take a table itself."""
        if root.is_file():
            is_read = root.suffix.lower() in TABLE_SUFFIXES and is_table(root)
            if not is_read and root.suffix.lower() not in PAIRS:
                return {}  # other tables are taken for one whose columns have unusual names
            splits = declared_splits(_pairs(root, None, USUAL)) if is_read else []
            return splits_at(root, splits or ["all"])
        tables = {split: split_file(root, split, PAIRS) for split in SPLITS[:3]}
        return splits_at(
            root, (split for split, table in tables.items() if table and is_table(table))
        )


def _pairs(table: Path, images: str | Path | None, columns: Columns) -> list[Record]:
    near = (table.parent, table.parent / "images", Path())
    homes = (Path(images).expanduser(),) if images else near
    return ImageFinder(homes, below=homes[0]).records(read_table(table, columns))


class ListFile(ListedImages):
    """Images from a list of paths; a path that occurs twice keeps all its captions.

    Args:
        root: the list, or a folder with `train.txt` and so on.
        split: which list of the folder; null or all if root is the list.
        images: the folder that the paths are relative to; null tries the list's own folder,
            then where you are (as taming).
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self, root: Path, split: str | None = None, *, images: str | Path | None = None
    ) -> list[Record]:
        path = _list(root, choose_split(split, SPLITS))
        if path is None:
            raise ConfigError(f"{root}: no list of split {split!r}; expected train.txt, ...")
        self.where = path
        found: dict[str, list[str]] = {}
        for _, name, caption in caption_lines(path, self.options.encoding):
            found.setdefault(name, []).extend([caption] if caption else [])
        homes = [Path(images).expanduser()] if images else [path.parent, Path()]
        records, finder = [], ImageFinder(homes)
        for name, captions in found.items():
            image = finder.find(name)
            texts = captions or read_sidecar(image, self.options.encoding) or ()
            records.append(Record(name, image, tuple(texts)))
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take a text file whose first line names an image, or a folder with such lists."""
        if root.is_dir():
            table = find_table(root, None)
            if table and not SPLIT_LIST.search(table.name):
                return {}  # it has the captions, the lists have the splits
        lists = {split: _list(root, split) for split in SPLITS}
        return splits_at(root, (s for s, path in lists.items() if path and _lists_images(path)))


def _list(root: Path, split: str) -> Path | None:
    if root.is_file():
        return root if split == "all" else None
    return split_file(root, split, (".txt",)) if split != "all" else None


def _lists_images(path: Path) -> bool:
    if path.suffix.lower() != ".txt":
        return False
    try:
        return split_line(next(iter(read_lines(path)), ""))[0].lower().endswith(SUFFIXES)
    except ConfigError:
        return False
