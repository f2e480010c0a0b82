"""WebDataset shards: tar files whose members share a stem, abc.jpg with abc.txt or abc.json.

The `webdataset` package reads shards as a stream, which can be neither shuffled by a seed nor
resumed exactly. Local files can: every header is read once, then members are read by offset.
"""

import logging
import math
import re
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from ..sockets import ConfigError
from . import splits
from .captions import CAPTION_KEYS, KEPT_KEYS, decode, parse_json, reading, texts_of
from .images import SUFFIXES
from .listed import ListedImages, Record, declared_splits
from .splits import SPLITS

logger = logging.getLogger(__name__)

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
TEXTS = ("txt", "caption", "text")
MAX_SHARDS = 100_000
RANGES = f"expected {{first..last}} with at most {MAX_SHARDS:,} shards, like {{000..012}}"


class WebDataset(ListedImages):
    """Images and captions in tar shards, read by offset: shuffling and resuming are exact.

    Captions are the lines of `.txt`, or a field of `.json` (a text or a list of texts), which
    wins where it holds several. Shards must be uncompressed local files.

    Args:
        root: a folder with shards, or a pattern of them.
        split: train, validation or test: the folder of that name, or shards that have it in
            their name as a word, such as cc3m-train-0001.tar, or else the field `split` of
            `.json`; where there are none, train and validation are divided by a hash of each
            file's name, in shards of `lgvq data convert` of its old name. null or all: every
            shard.
        holdout: share of the validation split in that last case, 0 < holdout < 1.
        file_key: the suffix of the image, such as input.jpg, where several could be meant.
        caption_key: the field of `.json` with the captions, where it is not a usual one; or the
            suffix of the text, such as outputs.txt.
    """

    def _read(
        self,
        root: Path,
        split: str | None = None,
        *,
        holdout: float = 0.1,
        file_key: str | None = None,
        caption_key: str | None = None,
    ) -> list[Record]:
        own = splits.choose_split(split, SPLITS)
        self.shards = _shards(root, own)
        has_shards = bool(self.shards) and own != "all"
        if not self.shards and not any(_shards(root, other) for other in SPLITS[:3]):
            self.shards = _shards(root, "all")
        if not self.shards:
            raise ConfigError(f"{root}: no shards (*.tar) of split {own!r}")
        missing = [shard for shard in self.shards if not shard.is_file()]
        if missing:
            raise ConfigError(f"{len(missing)} shards do not exist, first: {missing[0]}")
        found = [sample for shard in self.shards for sample in _samples(shard)]
        self._file_key = file_key and file_key.lower().lstrip(".")
        self._caption_key, self._fields = caption_key, dict[str, None]()
        records = [record for record in map(self._record, found) if record]
        self._report_missing(found, records)
        if has_shards:
            self._refuse_other_splits(records, own)
            return records
        if own == "test" and not declared_splits(records):
            raise ConfigError(f"{root}: no shards (*.tar) of split 'test'")
        return self._of_split(records, split, holdout)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for *.tar, in folders or names of splits first."""
        found = [split for split in SPLITS if _shards(root, split)]
        return splits.splits_at(root, [split for split in found if split != "all"] or found)

    def _record(self, sample: "_Sample") -> Record | None:
        """Return the record of a sample; None where there is no image."""
        image = sample.members.get(self._file_key or sample.only(IMAGES, "file_key") or "")
        if image is None:
            return None
        meta = self._meta(sample)
        row = meta if isinstance(meta, dict) else {}
        self._fields |= dict.fromkeys(map(str, row))
        captions = tuple(self._captions(sample, meta))
        extra = {key: row[key] for key in KEPT_KEYS if key in row}
        name = f"{image.tar.name}:{image.name}"
        return Record(name, image, captions, extra, splits.split_of_row(row))

    def _report_missing(self, found: "list[_Sample]", records: list[Record]) -> None:
        """Name the members that were found where images or captions are missing."""
        names = dict.fromkeys(f".{suffix}" for sample in found for suffix in sample.members)
        listed = ", ".join(list(names)[:12])
        suffixes = f"the members' suffixes are {listed or 'none'}"
        if not records:
            usual = f"{', '.join(SUFFIXES)}, or the one that `file_key` names"
            raise ConfigError(f"{self.where}: no images; {suffixes}; supported are {usual}")
        if lost := len(found) - len(records):
            logger.warning("%s: %d samples have no image; %s", self.where, lost, suffixes)
        if not any(record.captions for record in records):
            logger.warning(
                "%s: none of %d samples has a caption; %s; captions are read from .%s, and from "
                ".json, whose fields are %s (`caption_key` names one)",
                *(self.where, len(records), suffixes, ", .".join(TEXTS)),
                ", ".join(list(self._fields)[:20]) or "none",
            )

    def _meta(self, sample: "_Sample") -> Any:
        """Return the contents of the .json: fields, or the captions themselves."""
        found = [suffix for suffix in sample.members if suffix.rpartition(".")[2] == "json"]
        if "json" not in found and len(found) != 1:
            return {}
        suffix = "json" if "json" in found else found[0]
        return parse_json(self._text(sample, suffix), sample.members[suffix]) or {}

    def _captions(self, sample: "_Sample", meta: Any) -> list[str]:
        key, where = self._caption_key, f"of {sample.key!r}"
        if key is not None and key.lower().lstrip(".") in sample.members:
            return self._lines(sample, key.lower().lstrip("."))
        if not isinstance(meta, dict):  # the .json is the caption
            return texts_of(meta, f"{sample.shard}: the .json {where}")
        if key is not None and key not in meta:
            known = f"it has {', '.join([*map(str, meta), *sample.members])}"
            raise ConfigError(f"{sample.shard}: {sample.key!r} has no caption_key {key!r}; {known}")
        name = key or next((known for known in CAPTION_KEYS[:-1] if meta.get(known)), None)
        texts = texts_of(meta[name], f"{sample.shard}: {name} {where}") if name else []
        if key is None and (not name or not isinstance(meta[name], list)):
            suffix = sample.only(TEXTS, "caption_key")
            return self._lines(sample, suffix) if suffix else texts
        return texts

    def _lines(self, sample: "_Sample", suffix: str) -> list[str]:
        text = self._text(sample, suffix).replace("\r\n", "\n").replace("\r", "\n")
        return texts_of(text.split("\n"), sample.key)

    def _text(self, sample: "_Sample", suffix: str) -> str:
        member = sample.members[suffix]
        with reading(member):
            return decode(member.read_bytes(), self.options.encoding)


def expand(pattern: str) -> list[Path]:
    """Return the shards a pattern names: `{000..012}` counts, `::` joins.

    Raises:
        ConfigError: for a range that counts down, or more than 100,000 shards in a pattern.

    Example:
        >>> [str(path) for path in expand("a_{08..10}.tar::b.tar")]
        ['a_08.tar', 'a_09.tar', 'a_10.tar', 'b.tar']
    """
    found = []
    for part in pattern.split("::"):
        first, *rest = re.split(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}", part)
        lows, highs, texts = rest[::3], rest[1::3], rest[2::3]
        ranges = [range(int(low), int(high) + 1) for low, high in zip(lows, highs, strict=True)]
        if not 1 <= math.prod(map(len, ranges)) <= MAX_SHARDS:
            raise ConfigError(f"root: {part:.200}: counts down, or to too many; {RANGES}")
        for numbers in product(*ranges):
            name = first
            for number, low, text in zip(numbers, lows, texts, strict=True):
                name += f"{number:0{len(low)}d}{text}"
            found.append(Path(name).expanduser())
    return found


def _shards(root: Path, split: str) -> list[Path]:
    words = {*splits.split_words(split)}
    if not root.is_dir():
        listed = expand(str(root)) if root.suffix == ".tar" else []
        return [p for p in listed if split == "all" or p.parent.name in words or _has(p, words)]
    if split == "all":
        return sorted([*root.glob("*.tar"), *root.glob("*/*.tar")])
    inner = [path for word in words for path in (root / word).glob("*.tar")]
    return sorted(inner or [path for path in root.glob("*.tar") if _has(path, words)])


def _has(path: Path, words: set[str]) -> bool:
    return not words.isdisjoint(re.split(r"[-_.]", path.stem))


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a tar file, as an image source."""

    tar: Path
    name: str
    offset: int
    length: int

    def read_bytes(self) -> bytes:
        """Return its contents."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) < self.length:
            raise OSError(f"{self.tar} ends inside {self.name}: it was cut off")
        return content

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass(slots=True)
class _Sample:
    """The members that share a name up to its first dot."""

    shard: Path
    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """What follows that dot, in lower case -> member: jpg, txt, input.jpg."""

    def only(self, kinds: Collection[str], option: str) -> str | None:
        """Return the suffix of the one member of these kinds; x.jpg goes before x.mask.jpg.

        Where several could be meant, `option` of the data set must choose one.
        """
        found = [suffix for suffix in self.members if suffix.rpartition(".")[2] in kinds]
        found = [suffix for suffix in found if suffix in kinds] or found
        if len(found) > 1:
            several = f"has several members that could be meant ({', '.join(found)})"
            hint = f"name one: `{option}: {found[0]}`"
            raise ConfigError(f"{self.shard}: sample {self.key!r} {several}; {hint}")
        return found[0] if found else None


def _samples(shard: Path) -> list[_Sample]:
    """Return the samples of a shard in the order of their first members.

    Members of a sample need not be adjacent. Missing, compressed and cut off shards are errors.
    """
    found: dict[str, _Sample] = {}
    try:
        with reading(f"shard {shard}"), tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.name.startswith("."):
                    continue
                stem, _, suffix = path.name.partition(".")  # webdataset: up to the first dot
                key = (path.parent / stem).as_posix()
                own = found.setdefault(key, _Sample(shard, key)).members
                if suffix.lower() in own:
                    hint = "a name must be unique in a shard: write the shard again"
                    twice = f"two members are called {member.name}"
                    raise ConfigError(f"shard {shard}: {twice}; {hint}")
                own[suffix.lower()] = TarMember(shard, member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        expected = "expected an uncompressed tar, whole; fetch or unpack it again"
        raise ConfigError(f"shard {shard}: {error}; {expected}") from error
    return list(found.values())
