"""What COCO's own files and the question sets on top of it share: images by name and number."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._caption_files import texts_of

FOLDERS = tuple(f"{part}{year}" for year in (2014, 2017, 2015) for part in ("train", "val", "test"))
NUMBER = re.compile(r"(\d+)\.(?:jpe?g|png)$", re.IGNORECASE)


class CocoImages:
    """All image files of a COCO tree, by name and by number.

    The folders train2014 ... test2015 are sought in each root and in its `images/`; images may
    also lie loose there. The same photo is train2014/COCO_train2014_000000000009.jpg and
    train2017/000000000009.jpg, so a set of one year is served from the folders of the other.
    """

    def __init__(self, *roots: Path):
        self.roots = roots
        self._by_name: dict[str, Path] = {}
        self._by_number: dict[int, Path] = {}
        for root in roots:
            for base in (root, root / "images"):
                for folder in (*(base / name for name in FOLDERS), base):
                    self._list(folder)

    def __len__(self) -> int:
        """Return the number of image files."""
        return len(self._by_name)

    def find(self, *, number: int, name: str | None = None) -> Path:
        """Return where an image lies; if nowhere, where it was expected."""
        path = self._by_name.get(name or "") or self._by_number.get(number)
        return path or self.roots[0] / (name or f"{number:012d}.jpg")

    def _list(self, folder: Path) -> None:
        if not folder.is_dir():
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if number := NUMBER.search(entry.name):
                    path = Path(entry.path)
                    self._by_name.setdefault(entry.name, path)
                    self._by_number.setdefault(int(number[1]), path)


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; raises ConfigError naming file and place."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error


KINDS: dict[str, type] = {
    **dict.fromkeys(("file_name", "filename", "split", "question", "name"), str),
    **dict.fromkeys(("sentences", "answers", "bbox"), list),
}
"""What a field of a published file holds."""


def entries(
    content: Any,
    key: str,
    needed: tuple[str, ...],
    path: Path,
    *,
    numbers: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Return the list of objects under `key`, each of which has the keys `needed`.

    Their values are checked by `KINDS`; those of `numbers` are whole numbers or their digits.

    Raises:
        ConfigError: naming the file and the place where something is missing.
    """
    listed = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(listed, list):
        known = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ConfigError(f"{path}: expected an object with a list {key!r}, got {known}")
    for place, entry in enumerate(listed):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise ConfigError(f"{path}: {key}[{place}] has no {', '.join(missing)}")
        for name in needed:
            kind, value = KINDS.get(name), entry[name]
            if kind and not isinstance(value, kind):
                told = "a text" if kind is str else "a list"
                where = f"{path}: {key}[{place}].{name}"
                raise ConfigError(f"{where}: expected {told}, got {value!r:.60}")
        for name in numbers:
            if isinstance(entry[name], bool) or not str(entry[name]).isdecimal():
                where = f"{path}: {key}[{place}].{name}"
                raise ConfigError(f"{where}: expected a whole number, got {entry[name]!r:.60}")
    return listed


def annotation_file(root: Path, *names: str) -> Path | None:
    """Return the first of these files in root/annotations or in root, or None."""
    places = (root / "annotations" / name for name in names)
    return next(
        (path for path in (*places, *(root / name for name in names)) if path.is_file()), None
    )


def captions_by_image(content: Any, path: Path) -> dict[int, list[str]]:
    """Return image id -> captions, trimmed and on one line, empty ones left out."""
    found: dict[int, list[str]] = {}
    needed = ("image_id", "caption")
    for entry in entries(content, "annotations", needed, path, numbers=("image_id",)):
        texts = texts_of(entry["caption"], f"{path}: a caption of image {entry['image_id']}")
        found.setdefault(int(entry["image_id"]), []).extend(texts)
    return found


def all_captions(root: Path, images: Path) -> dict[int, list[str]]:
    """Return the captions of every COCO captions file beside the questions or the images."""
    found: dict[int, list[str]] = {}
    for base in dict.fromkeys((root, images)):
        for part in ("train", "val"):
            for year in (2014, 2017):
                path = annotation_file(base, f"captions_{part}{year}.json")
                if path is not None:
                    found = {**captions_by_image(read_json(path), path), **found}
    return found
