"""Write files completely or not at all, also when a run is killed."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .sockets import ConfigError, as_config_error

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers of an open file that cannot grow."""

PART = re.compile(
    r".+\.(ckpt|csv|html|jpg|jsonl?|md|npz|pn?g|pt|safetensors|tar|txt|ya?ml)\.(\d+)\.part"
)
"""Names of temporary files of this package: the file's own name and the writer's process id."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission for `path` into an error that names the file.

    Raises ConfigError if the block failed because `path`, or its folder, cannot be written.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch.save hides the system's error
        if cause is None or not (cause.errno in FULL or _is_within(cause.filename, path)):
            raise
        raise ConfigError(
            f"cannot write {str(path)!r}: {cause.strerror}; free space or check permissions there"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; it replaces `path` if the block succeeds.

    Missing folders are created. A block that raises leaves `path` as it was; one that is killed
    also leaves a `*.part` file, see :func:`remove_parts`. Raises ConfigError if the disk is full or
    the folder cannot be written to.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "a" / "b.txt"
    >>> with replacing(place) as part:
    ...     _ = part.write_text("whole")
    >>> place.read_text(), [file.name for file in place.parent.iterdir()]
    ('whole', ['b.txt'])
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def remove_parts(place: Path, *, inside: bool = True) -> list[Path]:
    """Remove the temporary files that killed processes left, and return them.

    Only files are removed whose name is one of :func:`replacing`, of a process that has ended.

    Args:
        place: a folder, or a file that was being written.
        inside: look into the folders in `place`, too; only where all of them are the package's.
    """
    if place.is_dir():
        pattern = "*.*.part"
        named = place.rglob(pattern) if inside else place.glob(pattern)
        parts = [part for part in named if PART.fullmatch(part.name)]
    else:
        own = re.compile(rf"{re.escape(place.name)}\.\d+\.part")
        parts = [part for part in place.parent.glob("*.part") if own.fullmatch(part.name)]
    found = [part for part in sorted(parts) if part.is_file() and not _is_in_use(part)]
    for part in found:
        part.unlink(missing_ok=True)
    return found


def require_writable(folder: Path) -> None:
    """Check that `folder` is one, or can be made, and takes files; nothing is made.

    Raises NotADirectoryError if a file is in its place or on the way; PermissionError if it, or the
    folder it would be made in, takes no files.
    """
    home = folder.absolute()
    while not os.path.lexists(home):
        home = home.parent
    if not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, where a folder is needed", str(home))
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write there", str(home))


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a .safetensors file; ConfigError if it cannot be read as one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kinds = (SafetensorError, OSError, ValueError, RuntimeError, KeyError)
    with as_config_error(f"{str(path)!r} is no valid safetensors file", *kinds):
        return load_file(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` and flush it to the disk."""
    with replacing(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON; values of other types are written as text."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def _is_within(name: Any, path: Path) -> bool:
    """Whether an OSError's filename is `path`, its `*.part` or a folder on the way to it."""
    if not isinstance(name, str | os.PathLike):
        return False
    place = Path(name)
    return place == path or place in path.parents or place.name.startswith(f"{path.name}.")


def _is_in_use(part: Path) -> bool:
    """Whether another live process is writing `part`, which has its id in the name."""
    number = part.name.split(".")[-2]
    if int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
