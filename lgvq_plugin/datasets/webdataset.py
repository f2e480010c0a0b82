"""WebDataset shards: tar files whose members share a stem, abc.jpg with abc.txt or abc.json.

root/000000.tar ...      root/train/0.tar ...      root/train-000000.tar ...
root: "shards/{000000..000099}.tar", several joined by "::"
"""

import logging
import re
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._caption_files import CAPTION_KEYS, KEPT_KEYS, clean
from ._listed import ListedImages, Reading, Record
from ._names import SPLIT_ALIASES, choose_split, held_out_share
from ._shards import ShardSample, expand, samples
from .base import CONVERTED_FROM

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "all")


class WebDataset(ListedImages):
    """Images and captions in tar shards, read by offset: shuffling and resuming are exact.

    Captions are the lines of `.txt`, or a field of `.json` (a text or a list of texts), which
    wins where it holds several. Shards must be uncompressed local files.

    Args:
        root: a folder with shards, or a pattern of them.
        split: train, validation or test: the folder of that name, or shards that have it in
            their name as a word, such as cc3m-train-0001.tar; where there are none, train and
            validation are parted by a hash of each file's name, in shards of `lgvq data
            convert` of its old name. null or all: every shard.
        holdout: share of the validation split in that last case, 0 < holdout < 1.
        caption_key: the field of `.json` with the captions, where it is not a usual one.
        options: see `Reading`.

    Raises:
        ConfigError: if there are no shards, or one is broken.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        holdout: float = 0.1,
        caption_key: str | None = None,
        **options: Any,
    ):
        reading, split = Reading.of(options), choose_split(split, SPLITS)
        if not 0 < holdout < 1:
            raise ConfigError(f"holdout must lie between 0 and 1, got {holdout!r}")
        self.shards, is_parted = _shards(root, split), True
        if not self.shards and split in ("train", "validation"):
            self.shards, is_parted = _shards(root, "all"), False
            if any(_shards(root, other) for other in SPLITS[:3]):
                self.shards = []  # there are splits, but not this one
        if not self.shards:
            raise ConfigError(f"{root}: no shards (*.tar) of split {split!r}")
        missing = [shard for shard in self.shards if not shard.is_file()]
        if missing:
            raise ConfigError(f"{len(missing)} shards do not exist, first: {missing[0]}")
        records, odd = [], 0
        for shard in self.shards:
            for sample in samples(shard):
                if sample.image is None:
                    odd += 1
                    continue
                source = str(sample.meta.get(CONVERTED_FROM, sample.image.name))
                if not is_parted and (held_out_share(source) < holdout) != (split == "validation"):
                    continue
                captions = _captions(sample, caption_key)
                extra = {key: sample.meta[key] for key in KEPT_KEYS if key in sample.meta}
                name = f"{shard.name}:{sample.image.name}"
                records.append(Record(name, sample.image, captions, extra))
        if odd:
            log.warning("%s: %d samples have no image and are left out", root, odd)
        super().__init__(records, reading, where=root)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for *.tar, in folders or names of splits first."""
        found = {s: {"root": root, "split": s} for s in SPLITS[:3] if _shards(root, s)}
        return found or ({"all": {"root": root}} if _shards(root, "all") else {})


def _shards(root: str | Path, split: str) -> list[Path]:
    folder = Path(root).expanduser()
    names = {split, *(alias for alias, name in SPLIT_ALIASES.items() if name == split)}
    if not folder.is_dir():
        listed = expand(str(root)) if str(root).endswith(".tar") else []
        is_own = [path.parent.name in names or _has_word(path, names) for path in listed]
        return [p for p, own in zip(listed, is_own, strict=True) if own or split == "all"]
    if split == "all":
        return sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")])
    inner = [path for name in names for path in (folder / name).glob("*.tar")]
    return sorted(inner or [path for path in folder.glob("*.tar") if _has_word(path, names)])


def _has_word(path: Path, names: set[str]) -> bool:
    return not names.isdisjoint(re.split(r"[-_.]", path.stem))


def _captions(sample: ShardSample, key: str | None) -> tuple[str, ...]:
    if key is not None and key not in sample.meta:
        raise ConfigError(f"{sample.image}: no caption_key {key!r} in its .json")
    usual = next((known for known in CAPTION_KEYS[:-1] if sample.meta.get(known)), None)
    told = sample.meta[key or usual] if key or usual else None
    if key is None and sample.text is not None and not isinstance(told, list):
        told = sample.text.splitlines()
    texts = [told] if isinstance(told, str) else told or []
    return tuple(text for text in (clean(str(text)) for text in texts) if text)
