"""MS-COCO captions of 2014 and 2017, and what the question sets on top of COCO share."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..sockets import ConfigError
from .captions import texts_of
from .listed import ListedImages, Record
from .splits import choose_split, splits_at

SPLITS = {"train": "train", "validation": "val"}
KARPATHY_SPLITS = ("train", "restval", "validation", "test")
YEARS = (2017, 2014)
FOLDERS = tuple(f"{part}{year}" for year in (2014, 2017, 2015) for part in ("train", "val", "test"))
KINDS: dict[str, type] = {
    **dict.fromkeys(("file_name", "filename", "split", "question", "name"), str),
    **dict.fromkeys(("sentences", "answers", "bbox"), list),
}
"""The type of a field of a published file."""


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
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self,
        root: Path,
        split: str = "train",
        *,
        year: int | None = None,
        karpathy: str | Path | None = None,
        restval: bool = False,
        instances: bool = False,
    ) -> list[Record]:
        self.object_names: tuple[str, ...] = ()
        if karpathy is None:
            part = SPLITS[choose_split(split, SPLITS)]
            self.where = path = _captions_file(root, part, year)
            records = _official_records(root, path)
            return self._with_objects(records, path) if instances else records
        path = next((p for p in (root / karpathy, Path(karpathy)) if p.is_file()), root)
        if path is root:
            raise ConfigError(f"karpathy: {karpathy} is neither in {root} nor a path")
        if instances:
            raise ConfigError("instances: not with karpathy, whose file lists no objects")
        self.where = path
        return _karpathy_records(root, path, choose_split(split, KARPATHY_SPLITS), restval)

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the columns of `attributes`; {} without `instances`."""
        return {"has_object": self.object_names} if self.object_names else {}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for captions_*.json; the splits have a year in their names if both are there."""
        found = {
            year: [s for s, part in SPLITS.items() if _captions_files(root, part, year)]
            for year in YEARS
        }
        if all(found.values()):
            return {
                f"{split}{year}": {"root": root, "split": split, "year": year}
                for year, splits in found.items()
                for split in splits
            }
        return next((splits_at(root, s, year=year) for year, s in found.items() if s), {})

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
        found = {thing["name"] for thing in own}
        labels = np.array([name in found for name in self.object_names], np.int64)
        extra = {**record.extra, "objects": own, "attributes": {"has_object": labels}}
        return replace(record, extra=extra)


def _captions_files(root: Path, part: str, *years: int) -> list[Path]:
    found = (annotation_file(root, f"captions_{part}{year}.json") for year in years)
    return [path for path in found if path]


def _captions_file(root: Path, part: str, year: int | None) -> Path:
    if year is not None and year not in YEARS:
        raise ConfigError(f"year must be one of {', '.join(map(str, YEARS))}, got {year!r}")
    years = [y for y in YEARS if year in (None, y)]
    found = _captions_files(root, part, *years)
    if len(found) > 1:
        raise ConfigError(f"{root} holds {part} captions of both years; give `year: 2014` or 2017")
    if not found:
        names = " or ".join(f"captions_{part}{y}.json" for y in years)
        raise ConfigError(f"{root}: no {names}, neither in annotations/ nor in the folder itself")
    return found[0]


def _official_records(root: Path, path: Path) -> list[Record]:
    content = read_json(path)
    captions, images = _captions_by_image(content, path), CocoImages(root)
    # The names come from the file: made from ids they would lack zeros for short ids.
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
        texts = [one.get("raw") if isinstance(one, dict) else one for one in entry["sentences"]]
        captions = tuple(texts_of(texts, f"{path}: sentences of {name}"))
        if type(number) is not int:
            raise ConfigError(f"{path}: cocoid of {name}: expected a number, got {number!r:.60}")
        where = images.find(number=number, name=name)
        records.append(Record(name, where, captions, {"image_id": number}))
    return records


# Shared by COCO-QA, VQA v2 and TextCaps


def question_records(
    questions: Mapping[int, list[dict[str, Any]]], homes: Sequence[Path]
) -> list[Record]:
    """Return a record for each image number, with its questions and COCO's captions of it.

    Args:
        questions: image number -> its questions.
        homes: folders that may hold COCO's images and captions files.
    """
    images, records = CocoImages(*homes), []
    captions: dict[int, list[str]] = {}
    for home in dict.fromkeys(homes):
        for path in (p for part in SPLITS.values() for p in _captions_files(home, part, *YEARS)):
            captions = {**captions, **_captions_by_image(read_json(path), path)}
    for number, asked in questions.items():
        path = images.find(number=number)
        extra = {"image_id": number, "questions": asked}
        records.append(Record(path.name, path, tuple(captions.get(number, ())), extra))
    return records


class CocoImages:
    """All image files of a COCO tree, by name and by number.

    The folders train2014 ... test2015 are searched in each root and in its `images/`; images may
    also be directly in those. The same photo is train2014/COCO_train2014_000000000009.jpg and
    train2017/000000000009.jpg, so a set of one year is served from the folders of the other.
    """

    def __init__(self, *roots: Path):
        self.roots = roots
        self._by_name: dict[str, Path] = {}
        self._by_number: dict[int, Path] = {}
        for base in (base for root in roots for base in (root, root / "images")):
            for folder in (*(base / name for name in FOLDERS), base):
                for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                    if number := re.search(r"(\d+)\.(?:jpe?g|png)$", name, re.I):
                        self._by_name.setdefault(name, folder / name)
                        self._by_number.setdefault(int(number[1]), folder / name)

    def find(self, *, number: int, name: str | None = None) -> Path:
        """Return where an image is; if nowhere, where it was expected."""
        path = self._by_name.get(name or "") or self._by_number.get(number)
        return path or self.roots[0] / (name or f"{number:012d}.jpg")


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; raises ConfigError naming file and place."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error


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
            value, expected = entry[name], ""
            if not isinstance(value, KINDS.get(name, object)):
                expected = "a text" if KINDS[name] is str else "a list"
            elif name in numbers and (isinstance(value, bool) or not str(value).isdecimal()):
                expected = "a whole number"
            if expected:
                where = f"{path}: {key}[{place}].{name}"
                raise ConfigError(f"{where}: expected {expected}, got {value!r:.60}")
    return listed


def annotation_file(root: Path, name: str) -> Path | None:
    """Return this file in root/annotations or in root, or None."""
    places = (root / "annotations" / name, root / name)
    return next((path for path in places if path.is_file()), None)


def _captions_by_image(content: Any, path: Path) -> dict[int, list[str]]:
    """Return image id -> captions, trimmed and on one line, empty ones left out."""
    found: dict[int, list[str]] = {}
    needed = ("image_id", "caption")
    for entry in entries(content, "annotations", needed, path, numbers=("image_id",)):
        texts = texts_of(entry["caption"], f"{path}: a caption of image {entry['image_id']}")
        found.setdefault(int(entry["image_id"]), []).extend(texts)
    return found
