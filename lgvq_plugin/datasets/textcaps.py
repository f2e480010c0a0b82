"""TextCaps: photos with text in them; as published, or as the LG-VQ code lays them out.

root/TextCaps_0.1_{train,val,test}.json  train_images/<id>.jpg (train and val)  test_images/<id>.jpg
root/{train,valid}_filenames.pickle      train_images/<id>.jpg                  text/<id>.txt
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import texts_of
from .coco import entries, read_json
from .listed import ListedImages, Reading, Record, choose_split, read_captions, read_name_pickle

PARTS = {"train": "train", "validation": "val", "test": "test"}
PICKLES = {"train": "train_filenames.pickle", "validation": "valid_filenames.pickle"}
FOLDERS = {"train": "train_images", "validation": "train_images", "test": "test_images"}


class TextCaps(ListedImages):
    """Photos with five captions each; the test split has none. Samples also have `image_id`.

    Args:
        root: the folder with the json files (or pickles) and the image folders.
        split: train, validation or test.
        options: see `Reading`.

    Raises:
        ConfigError: if a file or an image is missing, or a file is not as TextCaps'.
    """

    def __init__(self, root: str | Path, split: str = "train", **options: Any):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        split = choose_split(split, list(PARTS))
        table, pickled = _table(root, split), root / PICKLES.get(split, "")
        if table is not None:
            captions = _by_image(table)
        elif pickled.is_file():
            names = read_name_pickle(pickled)
            folder = root / "text"
            captions = {
                name: read_captions(folder / f"{name}.txt", reading.encoding) for name in names
            }
        else:
            raise ConfigError(
                f"{root}: neither TextCaps_0.1_{PARTS[split]}.json nor "
                f"{PICKLES.get(split, 'a pickle of that split')} there"
            )
        records = [
            Record(f"{name}.jpg", _image(root, split, name), texts, {"image_id": name})
            for name, texts in captions.items()
        ]
        super().__init__(records, reading, where=table or pickled)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for TextCaps_*.json, else for the two pickles."""
        return {
            split: {"root": root, "split": split}
            for split in PARTS
            if _table(root, split) or (split in PICKLES and (root / PICKLES[split]).is_file())
        }


def _table(root: Path, split: str) -> Path | None:
    if not root.is_dir():
        return None
    found = sorted(root.glob(f"TextCaps_*_{PARTS[split]}.json"))
    return found[-1] if found else None


def _image(root: Path, split: str, name: str) -> Path:
    # `image_path` in the json starts with train/ or val/, which are no folders on disk.
    folders = dict.fromkeys((FOLDERS[split], "train_images", "images", "train_val_images"))
    places = [root / folder / f"{name}.jpg" for folder in folders]
    return next((path for path in places if path.is_file()), places[0])


def _by_image(path: Path) -> dict[str, tuple[str, ...]]:
    """Return image id -> captions; the file has one record a caption."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries(read_json(path), "data", ("image_id",), path):
        own = found.setdefault(str(entry["image_id"]), {})
        where = f"{path}: a caption of {entry['image_id']}"
        texts = texts_of(entry.get("reference_strs"), where)
        own.update(dict.fromkeys([*texts, *texts_of(entry.get("caption_str"), where)]))
    return {name: tuple(texts) for name, texts in found.items()}
