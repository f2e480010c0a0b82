"""Splits: their names, how data name them, and how data that name none are divided."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, suggest

SPLITS = ("train", "validation", "test", "all")
SPLIT_WORDS = {
    **dict.fromkeys(("val", "valid", "dev", "eval", "validation"), "validation"),
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "fold")
"""All but the first only where they hold one of SPLIT_WORDS: `set` may be anything."""
FLAG_COLUMN = re.compile(rf"is_?({'|'.join(SPLIT_WORDS)})(?:_?(?:set|image))?", re.I)
"""is_test, is_training_image: yes or no."""
SPLIT_FOLDER = re.compile(r"(.+?)[._-]?(?:images?|imgs?|set|split|\d{4})?", re.I)
"""Of train, train2017, val_images."""
SPLIT_LIST = re.compile(
    r"(?:^|[._-])(train|val|valid|validation|dev|test)(?:[._-]?images)?\.\w+$", re.I
)
CONVERTED_FROM = "converted_from"
"""Key under which `lgvq data convert` keeps the original file name, by which it is held out."""


def split_name(value: Any) -> str | None:
    """Return the full name of a split as a table or list gives it; None if it gives none.

    Example:
        >>> split_name("Val"), split_name("restval"), split_name("")
        ('validation', 'train', None)
    """
    text = "" if value is None else str(value).strip()
    return SPLIT_WORDS.get(text.lower(), text) or None


def choose_split(split: str | None, known: Iterable[str]) -> str:
    """Return the split by its full name, which must be in `known`; None is "all"."""
    names = list(known)
    name = "all" if split is None else split
    full = name if name in names else split_name(name)
    if full is None or full not in names:
        raise ConfigError(f"split: {split!r}{suggest(str(split), names)}")
    return full


def split_words(split: str | None) -> list[str]:
    """Return the words that name a split: its full name, then the others, such as val."""
    if split is None:
        return []
    words = [word for word, full in SPLIT_WORDS.items() if full == split and word != "restval"]
    return list(dict.fromkeys([split, *words]))


def first_file(places: Iterable[Path]) -> Path | None:
    """Return the first of these paths at which there is a file."""
    return next((place for place in places if place.is_file()), None)


def split_file(folder: Path, split: str | None, suffixes: Sequence[str]) -> Path | None:
    """Return the file of a folder that is named after a split, such as val.csv."""
    return first_file(folder / f"{word}{end}" for word in split_words(split) for end in suffixes)


def split_of_row(row: Mapping[str, Any]) -> str | None:
    """Return the split that a table's row names, in a column `split` or the like.

    Example:
        >>> split_of_row({"Split": "val"}), split_of_row({"set": "A"}), split_of_row({"is_test": 0})
        ('validation', None, 'train')
    """
    columns = {str(key).strip().lower(): row[key] for key in reversed([*row])}
    if "split" in columns:
        return split_name(columns["split"])
    found = (split_name(columns[name]) for name in SPLIT_COLUMNS if name in columns)
    flags = {
        SPLIT_WORDS[name[1]]: str(value).strip().lower() in ("1", "1.0", "true", "yes", "y", "t")
        for column, value in columns.items()
        if (name := FLAG_COLUMN.fullmatch(column))
    }
    rest = "test" if "train" in flags else "train" if flags else None
    marked = next((split for split, is_set in flags.items() if is_set), rest)
    return next((name for name in found if name in SPLIT_WORDS), marked)


def split_of_folders(parts: Sequence[str]) -> str | None:
    """Return the split that the first folder which names one stands for.

    Example:
        >>> split_of_folders(["images", "val2017"]), split_of_folders(["dogs"])
        ('validation', None)
    """
    names = filter(None, map(SPLIT_FOLDER.fullmatch, parts))
    return next(filter(None, (SPLIT_WORDS.get(name[1].lower()) for name in names)), None)


def splits_at(root: Path, names: Iterable[str], **more: Any) -> dict[str, dict[str, Any]]:
    """Return split -> keyword arguments, what `recognize` of a member returns."""
    return {name: {"root": root, "split": name, **more} for name in names}


def held_out_share(file: str) -> float:
    """Return a number in [0, 1) that depends on the file's name alone; below holdout = held out.

    Example:
        >>> held_out_share("images/a.jpg") == held_out_share("a.jpg")
        True
    """
    digest = hashlib.sha256(file.removeprefix("images/").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
