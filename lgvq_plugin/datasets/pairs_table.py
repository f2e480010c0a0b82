"""A table of pairs, as open_clip's CSV (tabs by default): columns filepath and title; or JSONL.

root: pairs.csv | pairs.tsv | pairs.jsonl      or a folder with train.csv, validation.csv ...
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import TABLE_SUFFIXES, Columns, is_table, read_table, split_name
from .listed import (
    SPLIT_ALIASES,
    SPLITS,
    ImageFinder,
    ListedImages,
    Reading,
    Record,
    declared_splits,
    of_split,
    records_of,
)

SUFFIXES = (".csv", ".tsv", ".jsonl")


class PairsTable(ListedImages):
    """Images and captions listed in a table; rows about one file are joined.

    Args:
        root: the table, or a folder that has one named after each split.
        split: which table of the folder; in one table, what its column `split` names. A table
            without that column is parted into train and validation by a hash of each file's name.
        holdout: share of the validation split in that last case, 0 < holdout < 1.
        images: the folder that the paths are relative to; null tries the table's own folder
            and its `images/`, then where you are.
        caption_key: the column with the captions, where it is not a usual one.
        file_key: the column with the images' paths, likewise.
        options: see `Reading`.

    Raises:
        ConfigError: if the table or an image is missing, or a line is broken.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        holdout: float = 0.1,
        file_key: str | None = None,
        caption_key: str | None = None,
        **options: Any,
    ):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        table = root if root.is_file() else _table(root, split_name(split))
        if table is None:
            raise ConfigError(f"{root}: no table of split {split!r} ({', '.join(SUFFIXES)}) there")
        columns = Columns(file_key=file_key, caption_key=caption_key, encoding=reading.encoding)
        records = _records(table, images, columns)
        if root.is_file():
            records = of_split(records, split, holdout=holdout, where=table)
        super().__init__(records, reading, where=table)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for tables named after splits, or take a table itself."""
        if root.is_file():
            is_read = root.suffix.lower() in TABLE_SUFFIXES and is_table(root)
            if not is_read and root.suffix.lower() not in SUFFIXES:
                return {}  # other tables are taken for one whose columns have unusual names
            splits = declared_splits(_records(root, None, Columns())) if is_read else []
            return {s: {"root": root, "split": s} for s in splits or ("all",)}
        tables = {split: _table(root, split) for split in SPLITS[:3]}
        return {s: {"root": root, "split": s} for s, t in tables.items() if t and is_table(t)}


def _records(table: Path, images: str | Path | None, columns: Columns) -> list[Record]:
    near = (table.parent, table.parent / "images", Path())
    homes = (Path(images).expanduser(),) if images else near
    listed = read_table(table, columns)
    return records_of(listed, ImageFinder(homes, below=homes[0]))


def _table(root: Path, split: str | None) -> Path | None:
    names = [split, *(alias for alias, name in SPLIT_ALIASES.items() if name == split)]
    places = (root / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((place for place in places if place.is_file()), None)
