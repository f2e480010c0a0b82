"""Tar shards as a list of samples: one look at every header, then reads by offset.

A stream, as the `webdataset` package reads shards, could be neither shuffled by a seed nor
resumed exactly; local files can be, so we keep where each member lies and seek.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..sockets import ConfigError
from ._image import SUFFIXES

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
    """The members that share a stem."""

    key: str
    image: TarMember | None = None
    text: str | None = None
    meta: dict = field(default_factory=dict)


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


def samples(shard: Path) -> Iterator[ShardSample]:
    """Yield the samples of a shard, in its order.

    Raises:
        ConfigError: if the shard is missing, compressed, cut off, or holds broken JSON.
    """
    current: ShardSample | None = None
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
                stem, _, suffix = name.partition(".")  # webdataset: up to the first dot
                key = (folder / stem).as_posix()
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = ShardSample(key)
                _put(current, suffix.lower(), member, tar, shard)
    except tarfile.TarError as error:
        raise ConfigError(
            f"shard {shard}: {error}; expected an uncompressed tar, whole; fetch or unpack it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"shard {shard} cannot be read: {error}") from error
    if current is not None:
        yield current


def _put(
    sample: ShardSample, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile, shard: Path
) -> None:
    if f".{suffix}" in SUFFIXES:
        sample.image = TarMember(shard, member.name, member.offset_data, member.size)
    elif suffix in ("txt", "caption"):
        sample.text = _content(tar, member).decode("utf-8-sig", errors="replace")
    elif suffix == "json":
        try:
            meta = json.loads(_content(tar, member).decode("utf-8-sig", errors="replace"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{shard}:{member.name}: not JSON ({error})") from error
        sample.meta = meta if isinstance(meta, dict) else {}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""
