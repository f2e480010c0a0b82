"""COCO-QA (Toronto): one-word answers to questions made from COCO captions.

root/{train,test}/{questions,answers,types,img_ids}.txt   line by line, ids without zeros
images: COCO's folders of 2014 or of 2017, in root, beside it, or at `images`
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .coco import CocoImages, all_captions
from .listed import ListedImages, Reading, Record, choose_split, read_text

TYPES = ("object", "number", "color", "location")
COLUMNS = ("questions", "answers", "types", "img_ids")
SPLITS = ("train", "test")


class CocoQA(ListedImages):
    """COCO images with `questions`: a list of `{"question", "answer", "type"}`.

    One sample an image, in the order of the first question about it; the type is object,
    number, color or location. Captions come from COCO's captions files where they lie beside
    the images, else `caption == ""`.

    Args:
        root: the folder with `train/` and `test/`, or one that holds it as `cocoqa/`.
        split: train or test.
        images: COCO's folder; null looks in root and in the folder above.
        options: see `Reading`.

    Raises:
        ConfigError: if a file or an image is missing, or the files differ in length.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        images: str | Path | None = None,
        **options: Any,
    ):
        reading, given = Reading.of(options, type(self)), Path(root).expanduser()
        root = _find(given)
        split = choose_split(split, SPLITS)
        homes = [Path(images).expanduser()] if images else [given, root, root.parent]
        files = CocoImages(*homes)
        told = [all_captions(home, home) for home in dict.fromkeys(homes)]
        captions = {number: texts for found in told for number, texts in found.items()}
        records = []
        for number, asked in _questions(root / split).items():
            path = files.find(number=number)
            extra = {"image_id": number, "questions": asked}
            records.append(Record(path.name, path, tuple(captions.get(number, ())), extra))
        super().__init__(records, reading, where=root / split)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for img_ids.txt beside questions.txt."""
        home = _find(root)
        there = [s for s in SPLITS if all((home / s / f"{c}.txt").is_file() for c in COLUMNS)]
        return {split: {"root": root, "split": split} for split in there}


def _find(root: Path) -> Path:
    inner = root / "cocoqa"
    return inner if any((inner / split / "img_ids.txt").is_file() for split in SPLITS) else root


def _questions(folder: Path) -> dict[int, list[dict[str, Any]]]:
    columns = [_lines(folder / f"{name}.txt") for name in COLUMNS]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        told = ", ".join(f"{n}.txt {k}" for n, k in zip(COLUMNS, lengths, strict=True))
        raise ConfigError(f"{folder}: the files differ in their number of lines: {told}")
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
    return [" ".join(line.split()) for line in read_text(path).rstrip().split("\n")]
