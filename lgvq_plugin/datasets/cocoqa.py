"""COCO-QA (Toronto): one-word answers to questions made from COCO captions.

root/{train,test}/{questions,answers,types,img_ids}.txt   line by line, ids without zeros
images: COCO's folders of 2014 or of 2017, in root, beside it, or at `images`
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import open_text
from .coco import question_records
from .listed import ListedImages, Record
from .splits import choose_split, splits_at

TYPES = ("object", "number", "color", "location")
COLUMNS = ("questions", "answers", "types", "img_ids")
SPLITS = ("train", "test")


class CocoQA(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "type"}`.

    One sample per image, in the order of the first question about it; the type is object,
    number, color or location. Captions come from COCO's captions files where these are beside
    the images, else `caption == ""`.

    Args:
        root: the folder with `train/` and `test/`, or one that holds it as `cocoqa/`.
        split: train or test.
        images: COCO's folder; null looks in root and in the folder above.
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self, root: Path, split: str = "train", *, images: str | Path | None = None
    ) -> list[Record]:
        home = _home(root)
        self.where = home / choose_split(split, SPLITS)
        places = [Path(images).expanduser()] if images else [root, home, home.parent]
        return question_records(_questions(self.where), places)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for img_ids.txt beside questions.txt."""
        files = [f"{name}.txt" for name in COLUMNS]
        is_there = (s for s in SPLITS if all((_home(root) / s / f).is_file() for f in files))
        return splits_at(root, is_there)


def _home(root: Path) -> Path:
    inner = root / "cocoqa"
    return inner if any((inner / split / "img_ids.txt").is_file() for split in SPLITS) else root


def _questions(folder: Path) -> dict[int, list[dict[str, Any]]]:
    columns = [_lines(folder / f"{name}.txt") for name in COLUMNS]
    if len({len(column) for column in columns}) > 1:
        counts = (f"{n}.txt {len(c)}" for n, c in zip(COLUMNS, columns, strict=True))
        raise ConfigError(
            f"{folder}: the files differ in their number of lines: {', '.join(counts)}"
        )
    found: dict[int, list[dict[str, Any]]] = {}
    for line, (question, answer, kind, number) in enumerate(zip(*columns, strict=True), 1):
        try:
            name, image = TYPES[int(kind)], int(number)
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{folder}: line {line}: expected a type 0-3 and an image id, "
                f"got {kind!r} and {number!r}"
            ) from error
        entry = {"question": question, "answer": answer, "type": name}
        found.setdefault(image, []).append(entry)
    return found


def _lines(path: Path) -> list[str]:
    # Empty lines inside count, as the files are aligned by line; those at the end do not.
    with open_text(path) as file:
        return [" ".join(line.split()) for line in file.read().rstrip().split("\n")]
