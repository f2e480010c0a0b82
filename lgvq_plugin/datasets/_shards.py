"""Tar shards as a list of samples: one look at every header, then reads by offset.

A stream, as the `webdataset` package reads shards, could be neither shuffled by a seed nor
resumed exactly; local files can be, so we keep where each member lies and seek.
"""

import re
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..sockets import ConfigError

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
