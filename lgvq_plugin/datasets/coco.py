"""What COCO's own files and the question sets on top of it share: images by name and number."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..sockets import ConfigError
from .captions import texts_of
from .listed import ListedImages, Reading, Record, choose_split

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


# -- MS-COCO captions of 2014 and 2017, by the official splits or Karpathy's; objects on request ---


SPLITS = {"train": "train", "validation": "val"}
KARPATHY_SPLITS = ("train", "restval", "validation", "test")
YEARS = (2017, 2014)


class Coco(ListedImages):
    """COCO images with their five or more captions; samples also have `image_id`.

    Args:
        root: the folder that holds `annotations/` and the image folders.
        split: train or validation; with `karpathy` train, restval, validation or test.
        year: 2014 or 2017; null takes the one that is there.
        karpathy: path of `dataset_coco.json`, from root or from where you are, to split by it.
        restval: add Karpathy's 30,504 `restval` images to his train split, as is usual; the
            other splits stay as they are.
        instances: also read the object annotations: `objects`, a list of `{"name", "box"
            (x, y, width, height in pixels of the file), "is_crowd"}`, and `attributes`, whose
            `has_object` says which of the 80 classes are there.
        options: see `Reading`.

    Raises:
        ConfigError: if a file or an image is missing, or a file is not as COCO's.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        year: int | None = None,
        karpathy: str | Path | None = None,
        restval: bool = False,
        instances: bool = False,
        **options: Any,
    ):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        self.object_names: tuple[str, ...] = ()
        if karpathy is not None:
            path = next((p for p in (root / karpathy, Path(karpathy)) if p.is_file()), None)
            if path is None:
                raise ConfigError(f"karpathy: {karpathy} is neither in {root} nor a path")
            if instances:
                raise ConfigError("instances: not with karpathy, whose file lists no objects")
            records = _karpathy_records(root, path, choose_split(split, KARPATHY_SPLITS), restval)
        else:
            part = SPLITS[choose_split(split, list(SPLITS))]
            path = _captions_file(root, part, year)
            records = _official_records(root, path)
            if instances:
                records = self._with_objects(records, path)
        super().__init__(records, reading, where=path)

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the columns of `attributes`; {} without `instances`."""
        return {"has_object": self.object_names} if self.object_names else {}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for captions_*.json; the splits have a year in their names if both are there."""
        years = [y for y in YEARS if any(_is_there(root, part, y) for part in SPLITS.values())]
        return {
            f"{split}{year}" if years[1:] else split: {"root": root, "split": split, "year": year}
            for year in years
            for split, part in SPLITS.items()
            if _is_there(root, part, year)
        }

    def _with_objects(self, records: list[Record], captions: Path) -> list[Record]:
        path = captions.with_name(captions.name.replace("captions_", "instances_"))
        content = read_json(path)
        names = {e["id"]: e["name"] for e in entries(content, "categories", ("id", "name"), path)}
        self.object_names = tuple(names[key] for key in sorted(names))
        objects: dict[int, list[dict[str, Any]]] = {}
        needed = ("image_id", "category_id", "bbox")
        for entry in entries(content, "annotations", needed, path):
            thing = {
                "name": names[entry["category_id"]],
                "box": tuple(entry["bbox"]),
                "is_crowd": bool(entry.get("iscrowd")),
            }
            objects.setdefault(entry["image_id"], []).append(thing)
        return [self._with_own(record, objects) for record in records]

    def _with_own(self, record: Record, objects: dict[int, list[dict[str, Any]]]) -> Record:
        own = objects.get(record.extra["image_id"], [])
        there = {thing["name"] for thing in own}
        labels = np.array([name in there for name in self.object_names], np.int64)
        extra = {**record.extra, "objects": own, "attributes": {"has_object": labels}}
        return Record(record.file, record.path, record.captions, extra)


def _is_there(root: Path, part: str, year: int) -> bool:
    return annotation_file(root, f"captions_{part}{year}.json") is not None


def _captions_file(root: Path, part: str, year: int | None) -> Path:
    if year is not None and year not in YEARS:
        raise ConfigError(f"year must be one of {', '.join(map(str, YEARS))}, got {year!r}")
    names = [f"captions_{part}{y}.json" for y in YEARS if year in (None, y)]
    found = [path for path in (annotation_file(root, name) for name in names) if path]
    if len(found) > 1:
        raise ConfigError(f"{root} holds {part} captions of both years; give `year: 2014` or 2017")
    if not found:
        raise ConfigError(f"{root}: neither annotations/{names[0]} nor {' or '.join(names)} there")
    return found[0]


def _official_records(root: Path, path: Path) -> list[Record]:
    content = read_json(path)
    captions, images = captions_by_image(content, path), CocoImages(root)
    # The names stand in the file: made from ids they would lack zeros for short ids.
    return [
        Record(
            entry["file_name"],
            images.find(number=int(entry["id"]), name=entry["file_name"]),
            tuple(captions.get(int(entry["id"]), ())),
            {"image_id": int(entry["id"])},
        )
        for entry in entries(content, "images", ("id", "file_name"), path, numbers=("id",))
    ]


def _karpathy_records(root: Path, path: Path, split: str, restval: bool) -> list[Record]:
    wanted = {"val" if split == "validation" else split}
    if restval and split == "train":
        wanted.add("restval")
    images, records = CocoImages(root), []
    needed = ("filename", "split", "sentences")
    for entry in entries(read_json(path), "images", needed, path):
        if entry["split"] not in wanted:
            continue
        name = entry["filename"]
        number = entry.get("cocoid", entry.get("imgid", -1))
        told = [one.get("raw") if isinstance(one, dict) else one for one in entry["sentences"]]
        captions = tuple(texts_of(told, f"{path}: sentences of {name}"))
        if type(number) is not int:
            raise ConfigError(f"{path}: cocoid of {name}: expected a number, got {number!r:.60}")
        where = images.find(number=number, name=name)
        records.append(Record(name, where, captions, {"image_id": number}))
    return records
