"""MS-COCO's captions of 2014 and 2017, and the question sets on its images.

root/annotations/captions_{train,val}{2014,2017}.json     root/{train,val}{2014,2017}/*.jpg
COCO-QA: root/{train,test}/{questions,answers,types,img_ids}.txt, line by line, ids without zeros
VQA v2: root/v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json and
    root/v2_mscoco_{train,val}2014_annotations.json
images of the latter two: COCO's folders, in root, beside it, or at `images`
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import require, verify
from ..sockets import ConfigError
from .captions import clean, open_text, read_json, texts_of
from .images import is_missing
from .listed import ListedImages, Record
from .splits import choose_split, first_file, splits_at

SPLITS = {"train": "train", "validation": "val"}
KARPATHY_SPLITS = ("train", "restval", "validation", "test")
YEARS = (2017, 2014)
FOLDERS = tuple(f"{part}{year}" for year in (2014, 2017, 2015) for part in ("train", "val", "test"))
KINDS = {int: "a whole number", str: "a text", list: "a list"}
"""Of fields of published files."""
QA_TYPES = ("object", "number", "color", "location")
QA_COLUMNS = ("questions", "answers", "types", "img_ids")
QA_SPLITS = ("train", "test")
VQA_PARTS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
VQA_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
VQA_ANSWERS = "v2_mscoco_{}_annotations.json"
Questions = Mapping[int, list[dict[str, Any]]]


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
        if karpathy is None:
            self.where = path = _captions_file(root, SPLITS[choose_split(split, SPLITS)], year)
            records = _official_records(root, path)
            return self._with_objects(records, path) if instances else records
        listed = first_file([root / karpathy, Path(karpathy)])
        if listed is None:
            raise ConfigError(f"karpathy: {karpathy} is neither in {root} nor a path")
        if instances:
            raise ConfigError("instances: not with karpathy, whose file lists no objects")
        self.where = listed
        return _karpathy_records(root, listed, choose_split(split, KARPATHY_SPLITS), restval)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for captions_*.json; the splits have a year in their names if both are there."""
        found = {y: [s for s, part in SPLITS.items() if _of_years(root, part, y)] for y in YEARS}
        if not all(found.values()):
            return next((splits_at(root, s, year=year) for year, s in found.items() if s), {})
        return {
            f"{split}{year}": {"root": root, "split": split, "year": year}
            for year, splits in found.items()
            for split in splits
        }

    def _with_objects(self, records: list[Record], captions: Path) -> list[Record]:
        path = captions.with_name(captions.name.replace("captions_", "instances_"))
        content = read_json(path)
        kinds = entries(content, "categories", {"id": int, "name": str}, path)
        names = {int(entry["id"]): entry["name"] for entry in kinds}
        columns = tuple(names[key] for key in sorted(names))
        self.label_names = {"has_object": columns}
        objects = defaultdict(list)
        needed = {"image_id": int, "category_id": int, "bbox": list}
        for entry in entries(content, "annotations", needed, path):
            number, kind, box = (entry[key] for key in needed)
            where = f"{path}: an object of image {number}"
            require(int(kind) in names, f"{where}: category_id", "one of the categories", kind)
            verify(box, tuple[float, float, float, float], f"{where}: bbox")
            thing = {"name": names[int(kind)], "box": tuple(box)}
            thing["is_crowd"] = bool(entry.get("iscrowd"))
            objects[int(number)].append(thing)
        found = []
        for record in records:
            own = objects[record.extra["image_id"]]
            shown = {thing["name"] for thing in own}
            labels = np.array([name in shown for name in columns], np.int64)
            extra = {**record.extra, "objects": own, "attributes": {"has_object": labels}}
            found.append(replace(record, extra=extra))
        return found


class CocoQA(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "type"}`.

    One sample per image, in the order of the first question about it; the type is object,
    number, color or location. Captions come from COCO's captions files where these are beside
    the images, else `caption == ""`.

    Args:
        root: the folder with `train/` and `test/`, or one that holds it as `cocoqa/`.
        split: train or test.
        images: COCO's folder; null looks in root and in the folder above.
    """

    def _read(
        self, root: Path, split: str = "train", *, images: str | Path | None = None
    ) -> list[Record]:
        home = self._home(root)
        self.where = home / choose_split(split, QA_SPLITS)
        places = [Path(images).expanduser()] if images else [root, home, home.parent]
        return _question_records(_qa_questions(self.where), places)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for img_ids.txt beside questions.txt."""
        home, files = cls._home(root), [f"{name}.txt" for name in QA_COLUMNS]
        is_there = (s for s in QA_SPLITS if all((home / s / file).is_file() for file in files))
        return splits_at(root, is_there)

    @staticmethod
    def _home(root: Path) -> Path:
        inner = root / "cocoqa"
        return inner if first_file(inner / split / "img_ids.txt" for split in QA_SPLITS) else root


class VQA2(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "answers", "type", ...}`.

    `answer` is the official most frequent one, `answers` all ten (the accuracy of VQA needs
    them), `type` yes/no, number or other, `question_id` the id in a result file. The test
    split has questions only. Captions come from COCO's captions files where these are beside
    the images, else `caption == ""`.

    Args:
        root: the folder with the question files.
        split: train, validation or test.
        images: COCO's folder; null looks in root and in the folder above.
        drop_missing: leave out questions about images that do not exist.
    """

    def _read(
        self,
        root: Path,
        split: str = "train",
        *,
        images: str | Path | None = None,
        drop_missing: bool = False,
    ) -> list[Record]:
        split = choose_split(split, VQA_PARTS)
        part = VQA_PARTS[split]
        needed = [VQA_QUESTIONS] if split == "test" else [VQA_QUESTIONS, VQA_ANSWERS]
        found = {name: _vqa_file(root, name, part) for name in needed}
        if missing := [name.format(part) for name, path in found.items() if path is None]:
            raise ConfigError(f"{root}: no {missing[0]}")
        self.where, *answers = (path for path in found.values() if path)
        places = [Path(images).expanduser()] if images else [root, root.parent]
        records = _question_records(_vqa_questions(self.where, *answers), places)
        return [r for r in records if not is_missing(r.path)] if drop_missing else records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for v2_OpenEnded_mscoco_*_questions.json."""
        is_there = (s for s, part in VQA_PARTS.items() if _vqa_file(root, VQA_QUESTIONS, part))
        return splits_at(root, is_there)


# Captions


def _annotation_file(root: Path, name: str) -> Path | None:
    return first_file([root / "annotations" / name, root / name])


def _of_years(root: Path, part: str, *years: int) -> list[Path]:
    found = (_annotation_file(root, f"captions_{part}{year}.json") for year in years)
    return [path for path in found if path]


def _captions_file(root: Path, part: str, year: int | None) -> Path:
    if year is not None and year not in YEARS:
        raise ConfigError(f"year must be one of {', '.join(map(str, YEARS))}, got {year!r}")
    years = [y for y in YEARS if year in (None, y)]
    found = _of_years(root, part, *years)
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
    listed = entries(content, "images", {"id": int, "file_name": str}, path)
    named = ((int(entry["id"]), entry["file_name"]) for entry in listed)
    return [images.record(number, captions.get(number, ()), name) for number, name in named]


def _captions_by_image(content: Any, path: Path) -> dict[int, tuple[str, ...]]:
    """Return image id -> captions, trimmed and on one line, empty ones left out."""
    found: dict[int, tuple[str, ...]] = defaultdict(tuple)
    for entry in entries(content, "annotations", {"image_id": int, "caption": object}, path):
        where = f"{path}: a caption of image {entry['image_id']}"
        found[int(entry["image_id"])] += tuple(texts_of(entry["caption"], where))
    return found


def _karpathy_records(root: Path, path: Path, split: str, restval: bool) -> list[Record]:
    wanted = {"val" if split == "validation" else split}
    wanted |= {"restval"} if restval and split == "train" else set()
    images, records = CocoImages(root), []
    needed = {"filename": str, "split": str, "sentences": list}
    for entry in entries(read_json(path), "images", needed, path):
        if entry["split"] not in wanted:
            continue
        name = entry["filename"]
        number = entry.get("cocoid", entry.get("imgid", -1))
        texts = [one.get("raw") if isinstance(one, dict) else one for one in entry["sentences"]]
        captions = tuple(texts_of(texts, f"{path}: sentences of {name}"))
        if type(number) is not int:
            raise ConfigError(f"{path}: cocoid of {name}: expected a number, got {number!r:.60}")
        records.append(images.record(number, captions, name))
    return records


# Questions


def _question_records(questions: Questions, homes: Sequence[Path]) -> list[Record]:
    """Return a record for each image number, with COCO's captions where `homes` have them."""
    images = CocoImages(*homes)
    captions: dict[int, tuple[str, ...]] = {}
    for home in dict.fromkeys(homes):
        for path in (p for part in SPLITS.values() for p in _of_years(home, part, *YEARS)):
            captions |= _captions_by_image(read_json(path), path)
    return [
        images.record(number, captions.get(number, ()), questions=asked)
        for number, asked in questions.items()
    ]


def _qa_questions(folder: Path) -> Questions:
    columns = [_aligned_lines(folder / f"{name}.txt") for name in QA_COLUMNS]
    if len({*map(len, columns)}) > 1:
        counts = ", ".join(f"{n}.txt {len(c)}" for n, c in zip(QA_COLUMNS, columns, strict=True))
        raise ConfigError(f"{folder}: the files differ in their number of lines: {counts}")
    found = defaultdict(list)
    for line, (question, answer, kind, number) in enumerate(zip(*columns, strict=True), 1):
        try:
            name, image = QA_TYPES[int(kind)], int(number)
        except (ValueError, IndexError) as error:
            got = f"expected a type 0-3 and an image id, got {kind!r} and {number!r}"
            raise ConfigError(f"{folder}: line {line}: {got}") from error
        found[image].append({"question": question, "answer": answer, "type": name})
    return found


def _aligned_lines(path: Path) -> list[str]:
    # Empty lines inside count, as the files are aligned by line; those at the end do not.
    with open_text(path) as file:
        return [clean(line) for line in file.read().rstrip().split("\n")]


def _vqa_file(root: Path, name: str, part: str) -> Path | None:
    folders = (".", "questions", "annotations", "vqa", "VQAv2")
    found = (_annotation_file(root / folder, name.format(part)) for folder in folders)
    return next((path for path in found if path), None)


def _vqa_questions(path: Path, annotations: Path | None = None) -> Questions:
    answers = _vqa_answers(annotations) if annotations else None
    found, needed = defaultdict(list), {"image_id": int, "question": str, "question_id": int}
    for entry in entries(read_json(path), "questions", needed, path):
        number = entry["question_id"]
        if answers is not None and number not in answers:
            raise ConfigError(f"{path}: question {number} has no answers in the annotations")
        asked = {"question": clean(entry["question"]), "question_id": number}
        found[int(entry["image_id"])].append(asked | (answers or {}).get(number, {}))
    return found


def _vqa_answers(path: Path) -> dict[int, dict[str, Any]]:
    found, needed = {}, {"question_id": int, "multiple_choice_answer": str, "answers": list}
    for entry in entries(read_json(path), "annotations", needed, path):
        answers = [given["answer"] for given in entries(entry, "answers", {"answer": str}, path)]
        answer, kind = entry["multiple_choice_answer"], str(entry.get("answer_type", ""))
        found[entry["question_id"]] = {"answer": answer, "answers": answers, "type": kind}
    return found


# Files


class CocoImages:
    """All image files of a COCO tree, by name and by number.

    The folders train2014 ... test2015 are searched in each root and in its `images/`; images may
    also be directly in those. The same photo is train2014/COCO_train2014_000000000009.jpg and
    train2017/000000000009.jpg, so a set of one year is served from the folders of the other.
    """

    def __init__(self, *roots: Path):
        self.roots = roots
        self._found: dict[str | int, Path] = {}
        bases = (base for root in roots for base in (root, root / "images"))
        for folder in (base / name for base in bases for name in (*FOLDERS, ".")):
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if number := re.search(r"(\d+)\.(?:jpe?g|png)$", name, re.I):
                    self._found.setdefault(name, folder / name)
                    self._found.setdefault(int(number[1]), folder / name)

    def record(
        self, number: int, captions: tuple[str, ...], name: str = "", **extra: Any
    ) -> Record:
        """Return an image where it is; if nowhere, where it was expected."""
        path = self._found.get(name) or self._found.get(number)
        path = path or self.roots[0] / (name or f"{number:012d}.jpg")
        return Record(name or path.name, path, captions, {"image_id": number, **extra})


def entries(content: Any, key: str, needed: Mapping[str, type], path: Path) -> list[dict[str, Any]]:
    """Return the list of objects under `key`, each of which has the keys `needed`.

    Their values are of the given types; of int also digits. What is missing or wrong is a
    ConfigError with file and place.
    """
    listed = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(listed, list):
        known = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ConfigError(f"{path}: expected an object with a list {key!r}, got {known}")
    for place, entry in enumerate(listed):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise ConfigError(f"{path}: {key}[{place}] has no {', '.join(missing)}")
        for name, kind in needed.items():
            value = entry[name]
            is_number = not isinstance(value, bool) and str(value).isdecimal()
            if not (is_number if kind is int else isinstance(value, kind)):
                where = f"{path}: {key}[{place}].{name}"
                raise ConfigError(f"{where}: expected {KINDS[kind]}, got {value!r:.60}")
    return listed
