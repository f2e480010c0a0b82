"""A table of pairs, as open_clip's CSV (tabs by default): columns filepath and title; or JSONL.

root: pairs.csv | pairs.tsv | pairs.jsonl      or a folder with train.csv, validation.csv ...
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._caption_files import FILE_KEYS, read_table
from ._listed import ListedImages, Reading, Record
from ._names import SPLIT_ALIASES, choose_split, read_text

SPLITS = ("train", "validation", "test", "all")
SUFFIXES = (".csv", ".tsv", ".jsonl")


class PairsTable(ListedImages):
    """Images and captions listed in a table; rows about one file are joined.

    Args:
        root: the table, or a folder that has one named after each split. To hold out a part of
            one table, use `folder` with `captions: TABLE`.
        split: which table of the folder; null or all if root is the table.
        images: the folder that the paths are relative to; null tries the table's own folder
            and its `images/`, then where you are.
        caption_key: the column with the captions, where it is not a usual one.
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
        caption_key: str | None = None,
        **options: Any,
    ):
        reading, root = Reading.of(options), Path(root).expanduser()
        table = _table(root, choose_split(split, SPLITS))
        if table is None:
            raise ConfigError(f"{root}: no table of split {split!r} ({', '.join(SUFFIXES)}) there")
        near = (table.parent, table.parent / "images", Path())
        homes = [Path(images).expanduser()] if images else near
        records = []
        for file, told in read_table(table, caption_key, "{}").items():
            places = [home / file for home in homes]
            path = next((place for place in places if place.is_file()), places[0])
            records.append(Record(file, path, tuple(told.captions), told.extra))
        super().__init__(records, reading, where=table)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for tables named after splits, or take a table itself."""
        if root.is_file():
            is_table = root.suffix.lower() in SUFFIXES and _tells_files(root)
            return {"all": {"root": root}} if is_table else {}
        tables = {split: _table(root, split) for split in SPLITS[:3]}
        return {s: {"root": root, "split": s} for s, t in tables.items() if t and _tells_files(t)}


def _table(root: Path, split: str) -> Path | None:
    if root.is_file():
        return root if split == "all" and root.suffix.lower() in SUFFIXES else None
    names = [split, *(alias for alias, name in SPLIT_ALIASES.items() if name == split)]
    places = (root / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def _tells_files(table: Path) -> bool:
    header = next(iter(read_text(table).splitlines()), "")
    return any(key in header for key in FILE_KEYS)
