"""Tar shards as a list of samples: one look at every header, then reads by offset.

A stream, as the `webdataset` package reads shards, could be neither shuffled by a seed nor
resumed exactly; local files can be, so we keep where each member lies and seek.
"""

import json
import logging
import re
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..sockets import ConfigError
from .base import CONVERTED_FROM
from .captions import CAPTION_KEYS, KEPT_KEYS, decode, split_name, texts_of
from .images import SUFFIXES
from .listed import (
    SPLIT_ALIASES,
    SPLITS,
    ListedImages,
    Reading,
    Record,
    choose_split,
    declared_splits,
    of_split,
    refuse_other_splits,
)

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


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

    def is_file(self) -> bool:
        """Return True: it was seen when the shard was listed."""
        return True

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass(slots=True)
class ShardSample:
    """The members that share a name up to its first dot."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """What follows that dot, in lower case -> member: jpg, txt, input.jpg."""

    def only(self, kinds: Collection[str], where: str, option: str) -> str | None:
        """Return the suffix of the one member of these kinds; x.jpg goes before x.mask.jpg.

        Args:
            kinds: last parts of suffixes.
            where: the shard, for an error.
            option: of the data set, which says which one is meant.

        Raises:
            ConfigError: if several could be meant.
        """
        found = [suffix for suffix in self.members if suffix.rpartition(".")[2] in kinds]
        found = [suffix for suffix in found if suffix in kinds] or found
        if len(found) > 1:
            raise ConfigError(
                f"{where}: sample {self.key!r} has several members that could be meant "
                f"({', '.join(found)}); name one: `{option}: {found[0]}`"
            )
        return found[0] if found else None


def expand(pattern: str) -> list[Path]:
    """Return the shards a pattern names: `{000..012}` counts, `::` joins.

    Example:
        >>> [str(path) for path in expand("a_{08..10}.tar::b.tar")]
        ['a_08.tar', 'a_09.tar', 'a_10.tar', 'b.tar']
    """
    names: list[str] = []
    for part in pattern.split("::"):
        found = BRACES.search(part)
        if found is None:
            names.append(part)
            continue
        low, high = found.groups()
        for number in range(int(low), int(high) + 1):
            text = f"{number:0{len(low)}d}"
            names += map(str, expand(part[: found.start()] + text + part[found.end() :]))
    return [Path(name).expanduser() for name in names]


def samples(shard: Path) -> list[ShardSample]:
    """Return the samples of a shard in the order of their first members.

    Members of a sample need not be adjacent.

    Raises:
        ConfigError: if the shard is missing, compressed or cut off, or holds a name twice.
    """
    found: dict[str, ShardSample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
                if not member.isreg() or name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")  # webdataset: up to the first dot
                key = (folder / stem).as_posix()
                own = found.setdefault(key, ShardSample(key)).members
                if suffix.lower() in own:
                    raise ConfigError(
                        f"shard {shard}: two members are called {member.name}; a name must be "
                        "unique in a shard: write the shard again"
                    )
                place = TarMember(shard, member.name, member.offset_data, member.size)
                own[suffix.lower()] = place
    except tarfile.TarError as error:
        raise ConfigError(
            f"shard {shard}: {error}; expected an uncompressed tar, whole; fetch or unpack it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"shard {shard} cannot be read: {error}") from error
    return list(found.values())


# -- WebDataset shards: tar files whose members share a stem, abc.jpg with abc.txt or abc.json ----


logger = logging.getLogger(__name__)

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
TEXTS = ("txt", "caption", "text")


class WebDataset(ListedImages):
    """Images and captions in tar shards, read by offset: shuffling and resuming are exact.

    Captions are the lines of `.txt`, or a field of `.json` (a text or a list of texts), which
    wins where it holds several. Shards must be uncompressed local files.

    Args:
        root: a folder with shards, or a pattern of them.
        split: train, validation or test: the folder of that name, or shards that have it in
            their name as a word, such as cc3m-train-0001.tar, or else the field `split` of
            `.json`; where there are none, train and validation are parted by a hash of each
            file's name, in shards of `lgvq data convert` of its old name. null or all: every
            shard.
        holdout: share of the validation split in that last case, 0 < holdout < 1.
        file_key: the suffix of the image, such as input.jpg, where several could be meant.
        caption_key: the field of `.json` with the captions, where it is not a usual one; or the
            suffix of the text, such as outputs.txt.
        options: see `Reading`.

    Raises:
        ConfigError: if there are no shards, or one is broken, or a caption is no text.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        holdout: float = 0.1,
        file_key: str | None = None,
        caption_key: str | None = None,
        **options: Any,
    ):
        reading, given = Reading.of(options, type(self)), split
        split = choose_split(split, SPLITS)
        self.shards, is_parted = _shards(root, split), split != "all"
        if not self.shards and split in ("train", "validation", "test"):
            self.shards, is_parted = _shards(root, "all"), False
            if any(_shards(root, other) for other in SPLITS[:3]):
                self.shards = []  # there are splits, but not this one
        if not self.shards:
            raise ConfigError(f"{root}: no shards (*.tar) of split {split!r}")
        missing = [shard for shard in self.shards if not shard.is_file()]
        if missing:
            raise ConfigError(f"{len(missing)} shards do not exist, first: {missing[0]}")
        found = [sample for shard in self.shards for sample in samples(shard)]
        read = _Members(file_key, caption_key, reading.encoding)
        records = [record for record in map(read, found) if record]
        _tell(root, found, records, list(read.fields))
        if split == "test" and not is_parted and not declared_splits(records):
            raise ConfigError(f"{root}: no shards (*.tar) of split 'test'")
        if is_parted:
            refuse_other_splits(records, split, root)
        else:
            records = of_split(records, given, holdout=holdout, where=root)
        super().__init__(records, reading, where=root)

    @classmethod
    def recognize(cls, root: Path) -> dict[str, dict[str, Any]]:
        """Look for *.tar, in folders or names of splits first."""
        found = {s: {"root": root, "split": s} for s in SPLITS[:3] if _shards(root, s)}
        return found or ({"all": {"root": root, "split": "all"}} if _shards(root, "all") else {})


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


class _Members:
    """Turns the members of a sample into a record; None where there is no image."""

    def __init__(self, file_key: str | None, caption_key: str | None, encoding: str):
        self.file_key = None if file_key is None else file_key.lower().lstrip(".")
        self.caption_key, self.encoding = caption_key, encoding
        self.fields: dict[str, None] = {}
        """All fields of .json files, to be named where no captions are found."""

    def __call__(self, sample: ShardSample) -> Record | None:
        where = str(next(iter(sample.members.values())).tar)
        suffix = self.file_key or sample.only(IMAGES, where, "file_key")
        image = sample.members.get(suffix or "")
        if image is None:
            return None
        meta = self._meta(sample, where)
        told = meta if isinstance(meta, dict) else {}
        self.fields |= dict.fromkeys(map(str, told))
        captions = tuple(self._captions(sample, meta, where))
        extra = {key: told[key] for key in (*KEPT_KEYS, CONVERTED_FROM) if key in told}
        name = f"{image.tar.name}:{image.name}"
        return Record(name, image, captions, extra, split_name(told.get("split")))

    def _meta(self, sample: ShardSample, where: str) -> Any:
        """Return what the .json says: fields, or the captions themselves."""
        found = [suffix for suffix in sample.members if suffix.rpartition(".")[2] == "json"]
        suffix = "json" if "json" in found else found[0] if len(found) == 1 else None
        if suffix is None:
            return {}
        member = sample.members[suffix]
        try:
            return json.loads(self._text(sample, suffix)) or {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{member}: not JSON ({error})") from error

    def _captions(self, sample: ShardSample, meta: Any, where: str) -> list[str]:
        key = self.caption_key
        if key is not None and key.lower().lstrip(".") in sample.members:
            return self._lines(sample, key.lower().lstrip("."))
        if not isinstance(meta, dict):  # the .json is the caption
            return texts_of(meta, f"{where}: the .json of {sample.key!r}")
        if key is not None and key not in meta:
            known = ", ".join([*map(str, meta), *sample.members])
            raise ConfigError(f"{where}: {sample.key!r} has no caption_key {key!r}; it has {known}")
        usual = next((known for known in CAPTION_KEYS[:-1] if meta.get(known)), None)
        field = key or usual
        told = texts_of(meta[field], f"{where}: {field} of {sample.key!r}") if field else []
        if key is None and (not field or not isinstance(meta[field], list)):
            suffix = sample.only(TEXTS, where, "caption_key")
            return self._lines(sample, suffix) if suffix else told
        return told

    def _lines(self, sample: ShardSample, suffix: str) -> list[str]:
        text = self._text(sample, suffix).replace("\r\n", "\n").replace("\r", "\n")
        return texts_of(text.split("\n"), sample.key)

    def _text(self, sample: ShardSample, suffix: str) -> str:
        member = sample.members[suffix]
        try:
            return decode(member.read_bytes(), self.encoding)
        except OSError as error:
            raise ConfigError(f"{member}: {error}") from error


def _tell(
    root: str | Path,
    found: Sequence[ShardSample],
    records: Sequence[Record],
    fields: Sequence[str],
) -> None:
    """Say which members were found where images or captions are missing."""
    names = dict.fromkeys(f".{suffix}" for sample in found for suffix in sample.members)
    listed = ", ".join(list(names)[:12])
    if not records:
        raise ConfigError(
            f"{root}: no images; the members' suffixes are {listed or 'none'}; read are "
            f"{', '.join(SUFFIXES)}, or the one that `file_key` names"
        )
    if lost := len(found) - len(records):
        logger.warning(
            "%s: %d samples have no image; the members' suffixes: %s", root, lost, listed
        )
    if not any(record.captions for record in records):
        logger.warning(
            "%s: none of %d samples has a caption; the members' suffixes are %s; captions are read "
            "from .%s, and from .json, whose fields are %s (`caption_key` names one)",
            *(root, len(records), listed, ", .".join(TEXTS), ", ".join(fields[:20]) or "none"),
        )
