"""Files that are there whole or not at all, whenever a run is killed; and the like of folders."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes `path`'s place when the block ends well.

    Folders on the way are made. A block that raises leaves `path` as it was; one that is killed
    leaves a `*.part` file besides.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "a" / "b.txt"
        >>> with replacing(place) as part:
        ...     _ = part.write_text("whole")
        >>> place.read_text(), [file.name for file in place.parent.iterdir()]
        ('whole', ['b.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Check that `folder` is one, or can be made, and takes files; nothing is made.

    Raises:
        NotADirectoryError: if a file is in its place or on the way.
        PermissionError: if it, or the folder it would be made in, takes no files.
    """
    home = folder.absolute()
    while not os.path.lexists(home):
        home = home.parent
    if not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, where a folder is needed", str(home))
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write there", str(home))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, down to the disk: files that a later run relies on."""
    with replacing(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON; what it does not know is written as text."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")
