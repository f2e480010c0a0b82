"""CUB-200-2011 birds with Reed's ten captions per image, in the usual three arrangements.

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
from .captions import read_captions, read_lines
from .listed import ListedImages, Record, read_name_pickle
from .splits import choose_split, splits_at

logger = logging.getLogger(__name__)

SPLITS = ("train", "test", "all")
SPLIT_BY = ("official", "class")
TEXTS = ("birds/text", "text", "text_c10", "cvpr2016_cub/text_c10", "birds/text_c10")


class CUB200(ListedImages):
    """Birds with ten captions each, and `attributes["species"]`, 0 to 199.

    Classes and files do not always have the same name in images and captions (Brewers_Blackbird,
    Brewer_Blackbird), so captions are matched by the class's number and the number that ends
    the file's name; images without a caption are in `unmatched`.

    Args:
        root: CUB_200_2011, or the folder that holds it.
        split: train, test or all.
        split_by: official (5,994 / 5,794 images, every class in both) or class (8,855 / 2,933,
            no class in both: AttnGAN's pickles, usual for text-to-image).
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(
        self, root: Path, split: str = "train", *, split_by: str = "official"
    ) -> list[Record]:
        home, split = _home(root), choose_split(split, SPLITS)
        self.where = home
        if split_by not in SPLIT_BY:
            raise ConfigError(f"split_by: expected {' or '.join(SPLIT_BY)}, got {split_by!r}")
        texts = _texts(root, home)
        names, labels = _column(home / "images.txt"), _column(home / "image_class_labels.txt")
        wanted = _wanted(root, home, names, split, split_by)
        self.species_names = tuple(_column(home / "classes.txt").values())
        records = []
        for number, file in names.items():
            if number not in wanted:
                continue
            if not labels.get(number, "").isdigit():
                raise ConfigError(f"{home / 'image_class_labels.txt'}: no class of image {number}")
            extra = {"attributes": {"species": int(labels[number]) - 1}}
            path = texts.get(_key(file))
            captions = read_captions(path, self.options.encoding) if path else ()
            records.append(Record(file, home / "images" / file, captions, extra))
        self.unmatched = [record.file for record in records if not record.captions]
        if self.unmatched:
            logger.info(
                "%s: %d of %d images have no caption, first: %s",
                *(home, len(self.unmatched), len(records), self.unmatched[0]),
            )
        return records

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the species."""
        return {"species": self.species_names}

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for CUB's lists."""
        needed = ("images.txt", "train_test_split.txt", "classes.txt")
        is_there = all((_home(root) / name).is_file() for name in needed)
        return splits_at(root, SPLITS[:2] if is_there else ())


def _home(root: Path) -> Path:
    inner = root / "CUB_200_2011"
    return inner if (inner / "images.txt").is_file() else root


def _key(file: str) -> tuple[str, str]:
    """Return (number of the class, number that ends the stem) of <class>/<stem>.jpg."""
    path = Path(file)
    number, trailing = re.match(r"\d+", path.parent.name), re.search(r"\d+$", path.stem)
    return (
        str(int(number[0])) if number else path.parent.name,
        trailing[0] if trailing else path.stem,
    )


def _texts(*roots: Path) -> dict[tuple[str, str], Path]:
    places = [base / name for root in roots for base in (root, root.parent) for name in TEXTS]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise ConfigError(f"{roots[0]}: no captions; expected them in one of {', '.join(TEXTS)}")
    # Reversed, so that the first of two files with one key wins.
    return {_key(str(path)): path for path in sorted(folder.glob("*/*.txt"), reverse=True)}


def _column(path: Path) -> dict[str, str]:
    """Return the first word of each line -> the rest of it."""
    pairs = [line.partition(" ") for line in read_lines(path)]
    broken = [key for key, _, value in pairs if not value]
    if broken:
        raise ConfigError(f"{path}: expected '<number> <value>' in each line, got {broken[0]!r}")
    return {key: value for key, _, value in pairs}


def _wanted(root: Path, home: Path, names: dict[str, str], split: str, split_by: str) -> set[str]:
    """Return the numbers of the images of a split."""
    if split == "all":
        return set(names)
    if split_by == "official":
        flag = "1" if split == "train" else "0"
        is_train = _column(home / "train_test_split.txt")
        return {number for number in names if is_train.get(number) == flag}
    name = f"{split}/filenames.pickle"
    places = [base / folder / name for base in (root, home) for folder in ("birds", ".")]
    path = next((place for place in places if place.is_file()), places[0])
    listed = {_key(f"{stem}.jpg") for stem in read_name_pickle(path) if "/" in stem}
    return {number for number, file in names.items() if _key(file) in listed}
