"""Hugging Face data sets with an image column: imagefolder, save_to_disk, parquet, or the hub.

root/train/metadata.jsonl (imagefolder)   root/dataset_dict.json or state.json (save_to_disk)
root/data/train-00000-of-00001.parquet    root: "lmms-lab/TextCaps" (hub; downloads)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, suggest
from .captions import CAPTION_KEYS, texts_of
from .listed import ListedImages, Record
from .splits import choose_split, split_name, splits_at

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
CAPTION_COLUMNS = (*CAPTION_KEYS[:-1], "caption_str")


@dataclass(frozen=True, slots=True)
class Cell:
    """An image in a row of a `datasets.Dataset`."""

    table: Any
    row: int
    column: str

    def read_bytes(self) -> bytes:
        """Return the encoded image, from the table or from the file it names."""
        cell = self.table[self.row][self.column]
        if not isinstance(cell, dict):
            raise OSError(f"{self}: expected an encoded image, got {type(cell).__name__}")
        if not (cell.get("bytes") or cell.get("path")):
            raise OSError(f"{self} is empty")
        return cell.get("bytes") or Path(cell["path"]).read_bytes()

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column!r}"


class HuggingFaceImages(ListedImages):
    """Any data set that the `datasets` library reads and that has an image column.

    Args:
        root: a folder, or a name on the hub (which downloads).
        split: its name there; validation also finds val, valid and dev.
        image_column: null takes the first of image, img, jpg or png; also `file_key`.
        caption_column: null takes the first usual one; its cells are texts or lists of texts;
            also `caption_key`.
        name: of the configuration, for hub data sets with several.
    """

    def _read(
        self,
        root: Path,
        split: str = "train",
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        file_key: str | None = None,
        caption_key: str | None = None,
        name: str | None = None,
    ) -> list[Record]:
        table = _load(root, name)
        if isinstance(table, dict):
            known = {str(split_name(key)): key for key in table} | {key: key for key in table}
            table = table[known[choose_split(split, known)]]
        column = _column(table, image_column or file_key, IMAGE_COLUMNS, "image_column")
        words = _column(table, caption_column or caption_key, CAPTION_COLUMNS, "caption_column")
        from datasets import Image

        images = table.select_columns([column])
        if isinstance(table.features[column], Image):
            images = images.cast_column(column, Image(decode=False))
        records = []
        for row, texts in enumerate(table[words]):
            captions = tuple(texts_of(texts, f"{root}: row {row}, column {words!r}"))
            records.append(Record(f"{split}_{row:08d}", Cell(images, row, column), captions))
        return records

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for save_to_disk and parquet files; plain imagefolders are a `folder` too."""
        if not root.is_dir():
            return {}
        patterns = ("dataset_dict.json", "state.json", "*.parquet", "*/*.parquet")
        if not any(any(root.glob(pattern)) for pattern in patterns):
            return {}
        table = _load(root, None)
        return splits_at(root, table if isinstance(table, dict) else ["train"])


def _load(root: Path, name: str | None) -> Any:
    """Return a Dataset or a dict of them."""
    try:
        import datasets
    except ImportError as error:
        needed = "`pip install lgvq_plugin[data]`"
        raise ConfigError(f"{root}: reading Hugging Face data sets needs {needed}") from error
    try:
        if any((root / n).is_file() for n in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(root))
        if not root.is_dir():
            return datasets.load_dataset(str(root), name)
        if any(root.rglob("metadata.*")) or not any(root.rglob("*.parquet")):
            # load_dataset(root) overlooks metadata files that are in root itself.
            return datasets.load_dataset("imagefolder", data_dir=str(root))
        return datasets.load_dataset(str(root))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{root}: the datasets library cannot read it: {error}") from error


def _column(table: Any, given: str | None, usual: tuple[str, ...], option: str) -> str:
    names = list(table.column_names)
    if given is not None and given not in names:
        raise ConfigError(f"{option}: {given!r}{suggest(given, names)}")
    found = given or next((name for name in usual if name in names), None)
    if found is None:
        raise ConfigError(f"no usual column; name one with `{option}`; the columns are {names}")
    return found
