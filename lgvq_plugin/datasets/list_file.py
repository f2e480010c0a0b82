"""taming's list of paths: a text file with one image a line, a caption behind a tab or beside.

root: train.txt      /data/a.jpg            caption in /data/a.txt or a.caption, if any
                     /data/b.jpg<TAB>a dog
"""

from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._caption_files import clean, read_sidecar
from ._image import SUFFIXES
from ._listed import ListedImages, Reading, Record
from ._names import SPLIT_ALIASES, choose_split, read_text

SPLITS = ("train", "validation", "test", "all")


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
        reading, root = Reading.of(options), Path(root).expanduser()
        path = _list(root, choose_split(split, SPLITS))
        if path is None:
            raise ConfigError(f"{root}: no list of split {split!r} there; expected train.txt, ...")
        homes = [Path(images).expanduser()] if images else [path.parent, Path()]
        found: dict[str, list[str]] = {}
        for line in read_text(path).splitlines():
            name, _, caption = line.strip().partition("\t")
            if name:
                found.setdefault(name.strip(), []).extend(
                    [clean(caption)] if clean(caption) else []
                )
        records = []
        for name, captions in found.items():
            places = [home / name for home in homes]
            image = next((place for place in places if place.is_file()), places[0])
            texts = tuple(captions or read_sidecar(image) or ())
            records.append(Record(name, image, texts))
        super().__init__(records, reading, where=path)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Take a text file whose first line names an image, or a folder with such lists."""
        if root.is_file():
            return {"all": {"root": root}} if _lists_images(root) else {}
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
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    return first.strip().partition("\t")[0].lower().endswith(SUFFIXES)
