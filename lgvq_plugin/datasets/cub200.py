"""CUB-200-2011 birds with Reed's ten captions an image, in the usual three arrangements.

CUB_200_2011/{images.txt,train_test_split.txt,classes.txt,image_class_labels.txt}
CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
text:  birds/text/  text/  text_c10/  cvpr2016_cub/text_c10/   <class>/<stem>.txt, ten lines
AttnGAN: birds/{train,test}/filenames.pickle
"""

import logging
import re
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .listed import (
    ListedImages,
    Reading,
    Record,
    choose_split,
    read_captions,
    read_lines,
    read_name_pickle,
)

log = logging.getLogger(__name__)

SPLITS = ("train", "test", "all")
SPLIT_BY = ("official", "class")
TEXTS = ("birds/text", "text", "text_c10", "cvpr2016_cub/text_c10", "birds/text_c10")
NUMBER = re.compile(r"^(\d+)")
TRAILING = re.compile(r"(\d+)$")


class CUB200(ListedImages):
    """Birds with ten captions each, and `attributes["species"]`, 0 to 199.

    Classes and files are not always called the same in images and captions (Brewers_Blackbird,
    Brewer_Blackbird), so captions are matched by the class's number and the number that ends
    the file's name; images that stay without a caption are in `unmatched`.

    Args:
        root: CUB_200_2011, or the folder that holds it.
        split: train, test or all.
        split_by: official (5,994 / 5,794 images, every class in both) or class (8,855 / 2,933,
            no class in both: AttnGAN's pickles, usual for text-to-image).
        options: see `Reading`.

    Raises:
        ConfigError: if a list or an image is missing, or no caption is found.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        split_by: str = "official",
        **options: Any,
    ):
        reading, given = Reading.of(options, type(self)), Path(root).expanduser()
        root, split = _home(given), choose_split(split, SPLITS)
        if split_by not in SPLIT_BY:
            raise ConfigError(f"split_by: expected {' or '.join(SPLIT_BY)}, got {split_by!r}")
        texts = _Texts(given, root, encoding=reading.encoding)
        names = _column(root / "images.txt")
        labels = _column(root / "image_class_labels.txt")
        wanted = _wanted(given, root, names, split, split_by)
        self.species_names = tuple(_column(root / "classes.txt").values())
        records = []
        for number, file in names.items():
            if number in wanted:
                if not labels.get(number, "").isdigit():
                    raise ConfigError(
                        f"{root / 'image_class_labels.txt'}: no class of image {number}"
                    )
                extra = {"attributes": {"species": int(labels[number]) - 1}}
                captions = texts.of(file)
                records.append(Record(file, root / "images" / file, captions, extra))
        self.unmatched = [record.file for record in records if not record.captions]
        if self.unmatched:
            log.info(
                "%s: %d of %d images have no caption, first: %s",
                *(root, len(self.unmatched), len(records), self.unmatched[0]),
            )
        super().__init__(records, reading, where=root)

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the species."""
        return {"species": self.species_names}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for CUB's lists."""
        home = _home(root)
        needed = ("images.txt", "train_test_split.txt", "classes.txt")
        if not all((home / name).is_file() for name in needed):
            return {}
        return {split: {"root": root, "split": split} for split in SPLITS[:2]}


class _Texts:
    """Caption files by (number of the class, number that ends the stem)."""

    def __init__(self, *roots: Path, encoding: str):
        self.encoding = encoding
        places = [base / name for root in roots for base in (root, root.parent) for name in TEXTS]
        self.folder = next((place for place in places if place.is_dir()), None)
        if self.folder is None:
            raise ConfigError(
                f"{roots[0]}: no captions; expected them in one of {', '.join(TEXTS)}"
            )
        self._known: dict[tuple[str, str], Path] = {}
        for path in sorted(self.folder.glob("*/*.txt")):
            self._known.setdefault(_key(path.parent.name, path.stem), path)

    def of(self, file: str) -> tuple[str, ...]:
        """Return the captions of images/<class>/<stem>.jpg; () if there are none."""
        image = Path(file)
        path = self._known.get(_key(image.parent.name, image.stem))
        return read_captions(path, self.encoding) if path else ()


def _key(class_name: str, stem: str) -> tuple[str, str]:
    number, trailing = NUMBER.search(class_name), TRAILING.search(stem)
    return (
        str(int(number[1])) if number else class_name,
        trailing[1] if trailing else stem,
    )


def _home(root: Path) -> Path:
    inner = root / "CUB_200_2011"
    return inner if (inner / "images.txt").is_file() else root


def _column(path: Path) -> dict[str, str]:
    """Return the first word of each line -> the rest of it."""
    pairs = [line.partition(" ") for line in read_lines(path)]
    broken = [key for key, _, value in pairs if not value]
    if broken:
        raise ConfigError(f"{path}: expected '<number> <value>' in each line, got {broken[0]!r}")
    return {key: value for key, _, value in pairs}


def _wanted(given: Path, root: Path, names: dict[str, str], split: str, split_by: str) -> set[str]:
    """Return the numbers of the images of a split."""
    if split == "all":
        return set(names)
    if split_by == "official":
        flag = "1" if split == "train" else "0"
        is_train = _column(root / "train_test_split.txt")
        return {number for number in names if is_train.get(number) == flag}
    name = f"{split}/filenames.pickle"
    places = [base / folder / name for base in (given, root) for folder in ("birds", ".")]
    path = next((place for place in places if place.is_file()), places[0])
    listed = {_key(*stem.split("/", 1)) for stem in read_name_pickle(path) if "/" in stem}
    return {
        n for n, file in names.items() if _key(Path(file).parent.name, Path(file).stem) in listed
    }
