"""TextCaps: photos with text in them; as published, or as the LG-VQ code lays them out.

root/TextCaps_0.1_{train,val,test}.json  train_images/<id>.jpg (train and val)  test_images/<id>.jpg
root/{train,valid}_filenames.pickle      train_images/<id>.jpg                  text/<id>.txt
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import read_captions, texts_of
from .coco import entries, read_json
from .listed import ListedImages, Record, read_name_pickle
from .splits import choose_split, splits_at

PARTS = {"train": "train", "validation": "val", "test": "test"}
PICKLES = {"train": "train_filenames.pickle", "validation": "valid_filenames.pickle"}


class TextCaps(ListedImages):
    """Photos with five captions each; the test split has none. Samples also have `image_id`.

    Args:
        root: the folder with the json files (or pickles) and the image folders.
        split: train, validation or test.
        options: see :class:`.listed.ImageOptions`.
    """

    def _read(self, root: Path, split: str = "train") -> list[Record]:
        split = choose_split(split, PARTS)
        listed = _listed(root, split)
        if listed is None:
            raise ConfigError(
                f"{root}: contains neither TextCaps_0.1_{PARTS[split]}.json nor "
                f"{PICKLES.get(split, 'a pickle of that split')}"
            )
        self.where = listed
        if listed.suffix == ".json":
            captions = _by_image(listed)
        else:
            captions = {
                name: read_captions(root / "text" / f"{name}.txt", self.options.encoding)
                for name in read_name_pickle(listed)
            }
        return [
            Record(f"{name}.jpg", _image(root, split, name), texts, {"image_id": name})
            for name, texts in captions.items()
        ]

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for TextCaps_*.json, else for the two pickles."""
        return splits_at(root, (split for split in PARTS if _listed(root, split)))


def _listed(root: Path, split: str) -> Path | None:
    found = [root / name for name in (PICKLES.get(split),) if name]
    found += sorted(root.glob(f"TextCaps_*_{PARTS[split]}.json")) if root.is_dir() else []
    return next((path for path in reversed(found) if path.is_file()), None)


def _image(root: Path, split: str, name: str) -> Path:
    # `image_path` in the json starts with train/ or val/, which are no folders on disk.
    usual = "test_images" if split == "test" else "train_images"
    folders = (usual, "train_images", "images", "train_val_images")
    places = [root / folder / f"{name}.jpg" for folder in folders]
    return next((path for path in places if path.is_file()), places[0])


def _by_image(path: Path) -> dict[str, tuple[str, ...]]:
    """Return image id -> captions; the file has one record per caption."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries(read_json(path), "data", ("image_id",), path):
        own = found.setdefault(str(entry["image_id"]), {})
        for key in ("reference_strs", "caption_str"):
            where = f"{path}: a caption of {entry['image_id']}"
            own.update(dict.fromkeys(texts_of(entry.get(key), where)))
    return {name: tuple(texts) for name, texts in found.items()}
