"""taming's list of paths: a text file with one image a line, a caption behind a tab or beside.

root: train.txt      /data/a.jpg            caption in /data/a.txt or a.caption, if any
                     /data/b.jpg<TAB>a dog  also b.jpg#0<TAB>a dog, b.jpg,a dog and b.jpg a dog
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from .captions import SPLIT_LIST, find_table, open_text, read_sidecar, split_line
from .images import SUFFIXES
from .listed import (
    SPLIT_ALIASES,
    SPLITS,
    ImageFinder,
    ListedImages,
    Reading,
    Record,
    choose_split,
    read_lines,
)


class ListFile(ListedImages):
    """Images from a list of paths; a path that stands twice keeps all its captions.

    Args:
        root: the list, or a folder with `train.txt` and so on.
        split: which list of the folder; null or all if root is the list.
        images: the folder that the paths are relative to; null tries the list's own folder,
            then where you are (as taming).
        options: see `Reading`.

    Raises:
        ConfigError: if the list or an image is missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        **options: Any,
    ):
        reading, root = Reading.of(options, type(self)), Path(root).expanduser()
        path = _list(root, choose_split(split, SPLITS))
        if path is None:
            raise ConfigError(f"{root}: no list of split {split!r} there; expected train.txt, ...")
        homes = [Path(images).expanduser()] if images else [path.parent, Path()]
        found: dict[str, list[str]] = {}
        with open_text(path, reading.encoding) as lines:
            for name, caption in map(split_line, lines):
                if name:
                    found.setdefault(name, []).extend([caption] if caption else [])
        records, finder = [], ImageFinder(homes)
        for name, captions in found.items():
            image = finder.find(name)
            texts = tuple(captions or read_sidecar(image, reading.encoding) or ())
            records.append(Record(name, image, texts))
        super().__init__(records, reading, where=path)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take a text file whose first line names an image, or a folder with such lists."""
        if root.is_file():
            return {"all": {"root": root}} if _lists_images(root) else {}
        table = find_table(root, None)
        if table and not SPLIT_LIST.search(table.name):  # it has the captions, the lists the splits
            return {}
        lists = {split: _list(root, split) for split in SPLITS[:3]}
        return {s: {"root": root, "split": s} for s, p in lists.items() if p and _lists_images(p)}


def _list(root: Path, split: str) -> Path | None:
    if root.is_file():
        return root if split == "all" else None
    names = [split, *(alias for alias, name in SPLIT_ALIASES.items() if name == split)]
    places = (root / f"{name}.txt" for name in names)
    return next((place for place in places if place.is_file()), None)


def _lists_images(path: Path) -> bool:
    if path.suffix.lower() != ".txt":
        return False
    first = next(iter(read_lines(path)), "")
    return split_line(first)[0].lower().endswith(SUFFIXES)
