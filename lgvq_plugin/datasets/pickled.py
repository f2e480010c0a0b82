"""Published sets whose splits are pickled lists of names: CelebA-HQ, CUB-200-2011, TextCaps.

CelebA-HQ, also as the LG-VQ code has it:
    root/image/0.jpg .. 29999.jpg   (also images/, CelebA-HQ-img/)
    root/text/0.txt ..              (also celeba-caption/, celeba_caption/)
    root/{train,test}/filenames.pickle      root/CelebAMask-HQ-attribute-anno.txt (optional)
CUB-200-2011 with Reed's captions:
    CUB_200_2011/{images.txt,train_test_split.txt,classes.txt,image_class_labels.txt}
    CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
    text:  birds/text/  text/  text_c10/  cvpr2016_cub/text_c10/   <class>/<stem>.txt, ten lines
    AttnGAN: birds/{train,test}/filenames.pickle
TextCaps, also as the LG-VQ code has it:
    root/TextCaps_0.1_{train,val,test}.json   root/train_images/*.jpg (train, val), test_images/
    root/{train,valid}_filenames.pickle       root/train_images/<id>.jpg   root/text/<id>.txt
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..config import require
from ..sockets import ConfigError
from .captions import read_captions, read_json, read_lines, texts_of
from .coco import entries
from .listed import ListedImages, Record, read_name_pickle
from .splits import choose_split, first_file, splits_at

logger = logging.getLogger(__name__)

SPLITS = ("train", "test", "all")
FACE_IMAGES = ("image", "images", "CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img")
FACE_TEXTS = ("text", "celeba-caption", "celeba_caption")
FACE_ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"
BIRD_TEXTS = ("birds/text", "text", "text_c10", "cvpr2016_cub/text_c10", "birds/text_c10")
TEXTCAPS_PARTS = {"train": "train", "validation": "val", "test": "test"}
TEXTCAPS_PICKLES = {"train": "train_filenames.pickle", "validation": "valid_filenames.pickle"}


class CelebAHQ(ListedImages):
    """Faces with ten captions each; with the attribute file also `attributes["face"]`, (40,).

    The captions are made from the attributes: many images have the very same one. The numbers
    are those of CelebAMask-HQ; taming's own imgHQ00000.npy files are numbered otherwise.

    Args:
        root: the folder with the images, the texts and the splits.
        split: train (24,000), test (6,000), or all, which needs no split files.
    """

    def _read(self, root: Path, split: str = "train") -> list[Record]:
        split = choose_split(split, SPLITS)
        images, texts = _folder(root, FACE_IMAGES), _folder(root, FACE_TEXTS)
        if split == "all":
            stems = (path.stem for path in images.glob("*.jpg"))
            names = sorted(stems, key=lambda s: (int(s) if s.isdigit() else -1, s))
        else:
            names = read_name_pickle(root / split / "filenames.pickle")
        columns, labels = _face_attributes(root)
        self.label_names = {"face": columns}
        encoding, records = self.options.encoding, []
        for name in names:
            extra = {"attributes": {"face": labels[name]}} if name in labels else {}
            captions = read_captions(texts / f"{name}.txt", encoding)
            records.append(Record(f"{name}.jpg", images / f"{name}.jpg", captions, extra))
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for numbered images and texts and at least one split file."""
        with suppress(ConfigError):
            _, texts = (_folder(root, names) for names in (FACE_IMAGES, FACE_TEXTS))
            if any(path.stem.isdigit() for path in texts.glob("*.txt")):
                listed = (s for s in SPLITS if (root / s / "filenames.pickle").is_file())
                return splits_at(root, listed)
        return {}


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
    """

    def _read(
        self, root: Path, split: str = "train", *, split_by: str = "official"
    ) -> list[Record]:
        self.where = home = _bird_home(root)
        split = choose_split(split, SPLITS)
        require(split_by in ("official", "class"), "split_by", "official or class", split_by)
        texts = _bird_texts(root, home)
        names, labels = _column(home / "images.txt"), _column(home / "image_class_labels.txt")
        wanted = _wanted_birds(root, home, names, split, split_by)
        self.label_names = {"species": tuple(_column(home / "classes.txt").values())}
        records = []
        for number, file in names.items():
            if number not in wanted:
                continue
            if not labels.get(number, "").isdigit():
                raise ConfigError(f"{home / 'image_class_labels.txt'}: no class of image {number}")
            extra = {"attributes": {"species": int(labels[number]) - 1}}
            path = texts.get(_bird_key(file))
            captions = read_captions(path, self.options.encoding) if path else ()
            records.append(Record(file, home / "images" / file, captions, extra))
        self.unmatched = [record.file for record in records if not record.captions]
        if self.unmatched:
            counts = (len(self.unmatched), len(records), self.unmatched[0])
            logger.info("%s: %d of %d images have no caption, first: %s", home, *counts)
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for CUB's lists."""
        needed = ("images.txt", "train_test_split.txt", "classes.txt")
        is_there = all((_bird_home(root) / name).is_file() for name in needed)
        return splits_at(root, SPLITS[:2] if is_there else ())


class TextCaps(ListedImages):
    """Photos with five captions each; the test split has none. Samples also have `image_id`.

    Args:
        root: the folder with the json files (or pickles) and the image folders.
        split: train, validation or test.
    """

    def _read(self, root: Path, split: str = "train") -> list[Record]:
        split = choose_split(split, TEXTCAPS_PARTS)
        listed = _textcaps_list(root, split)
        if listed is None:
            pickled = TEXTCAPS_PICKLES.get(split, "a pickle of that split")
            usual = f"TextCaps_0.1_{TEXTCAPS_PARTS[split]}.json"
            raise ConfigError(f"{root}: contains neither {usual} nor {pickled}")
        self.where, encoding = listed, self.options.encoding
        if listed.suffix == ".json":
            captions = _textcaps_captions(listed)
        else:
            names = read_name_pickle(listed)
            captions = {n: read_captions(root / "text" / f"{n}.txt", encoding) for n in names}
        # `image_path` in the json starts with train/ or val/, which are no folders on disk.
        usual = "test_images" if split == "test" else "train_images"
        folders = [root / name for name in (usual, "train_images", "images", "train_val_images")]
        records = []
        for name, texts in captions.items():
            places = [folder / f"{name}.jpg" for folder in folders]
            path = first_file(places) or places[0]
            records.append(Record(path.name, path, texts, {"image_id": name}))
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for TextCaps_*.json, else for the two pickles."""
        return splits_at(root, (split for split in TEXTCAPS_PARTS if _textcaps_list(root, split)))


def _folder(root: Path, names: tuple[str, ...]) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise ConfigError(f"{root}: contains none of the folders {', '.join(names)}")
    return found


def _face_attributes(root: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return the attributes' names and image number -> (A,) int64 of 0 and 1."""
    path = first_file([root / FACE_ATTRIBUTES, root.parent / FACE_ATTRIBUTES])
    if path is None:
        return (), {}
    rows = read_lines(path)
    if len(rows) < 2:
        raise ConfigError(f"{path}: expected a count, a line of names, then a line for each image")
    names, labels = tuple(rows[1].split()), {}
    for number, row in enumerate(rows[2:], 3):
        file, *values = row.split()
        if len(values) != len(names):
            raise ConfigError(f"{path}:{number}: expected {len(names)} values, got {len(values)}")
        labels[file.partition(".")[0]] = np.array([value == "1" for value in values], np.int64)
    return names, labels


def _bird_home(root: Path) -> Path:
    inner = root / "CUB_200_2011"
    return inner if (inner / "images.txt").is_file() else root


def _bird_key(file: str) -> tuple[str, str]:
    """Return (number of the class, number that ends the stem) of <class>/<stem>.jpg."""
    kind, stem = Path(file).parent.name, Path(file).stem
    number, trailing = re.match(r"\d+", kind), re.search(r"\d+$", stem)
    return str(int(number[0])) if number else kind, trailing[0] if trailing else stem


def _bird_texts(*roots: Path) -> dict[tuple[str, str], Path]:
    places = [base / name for r in roots for base in (r, r.parent) for name in BIRD_TEXTS]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        expected = ", ".join(BIRD_TEXTS)
        raise ConfigError(f"{roots[0]}: no captions; expected them in one of {expected}")
    # Reversed, so that the first of two files with one key wins.
    return {_bird_key(str(path)): path for path in sorted(folder.glob("*/*.txt"), reverse=True)}


def _wanted_birds(
    root: Path, home: Path, names: dict[str, str], split: str, split_by: str
) -> set[str]:
    """Return the numbers of the images of a split."""
    if split == "all":
        return set(names)
    if split_by == "official":
        flag = "1" if split == "train" else "0"
        is_train = _column(home / "train_test_split.txt")
        return {number for number in names if is_train.get(number) == flag}
    name = f"{split}/filenames.pickle"
    places = [base / folder / name for base in (root, home) for folder in ("birds", ".")]
    stems = read_name_pickle(first_file(places) or places[0])
    listed = {_bird_key(f"{stem}.jpg") for stem in stems if "/" in stem}
    return {number for number, file in names.items() if _bird_key(file) in listed}


def _column(path: Path) -> dict[str, str]:
    """Return the first word of each line -> the rest of it."""
    pairs = [line.partition(" ") for line in read_lines(path)]
    broken = [key for key, _, value in pairs if not value]
    if broken:
        raise ConfigError(f"{path}: expected '<number> <value>' in each line, got {broken[0]!r}")
    return {key: value for key, _, value in pairs}


def _textcaps_list(root: Path, split: str) -> Path | None:
    found = sorted(root.glob(f"TextCaps_*_{TEXTCAPS_PARTS[split]}.json")) if root.is_dir() else []
    pickled = [root / TEXTCAPS_PICKLES[split]] if split in TEXTCAPS_PICKLES else []
    return first_file([*reversed(found), *pickled])


def _textcaps_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Return image id -> captions; the file has one record per caption."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries(read_json(path), "data", {"image_id": object}, path):
        own = found.setdefault(str(entry["image_id"]), {})
        where = f"{path}: a caption of {entry['image_id']}"
        for key in ("reference_strs", "caption_str"):
            own.update(dict.fromkeys(texts_of(entry.get(key), where)))
    return {name: tuple(texts) for name, texts in found.items()}
