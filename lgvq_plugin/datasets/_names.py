"""Names of splits, lists of file names in pickles, and lines of caption files, read with care."""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, suggest
from ._caption_files import clean, open_text

SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


def choose_split(split: str | None, known: Sequence[str]) -> str:
    """Return the split by its full name; None is all of them, where a set has "all".

    Raises:
        ConfigError: if the data set has no such split.

    Example:
        >>> choose_split("val", ["train", "validation"])
        'validation'
    """
    name = "all" if split is None else SPLIT_ALIASES.get(split, split)
    if name not in known:
        raise ConfigError(f"split: {split!r}{suggest(str(split), list(known))}")
    return name


def held_out_share(file: str) -> float:
    """Return a number in [0, 1) that depends on the file's name alone; below holdout = held out.

    Example:
        >>> held_out_share("images/a.jpg") == held_out_share("a.jpg")
        True
    """
    digest = hashlib.sha256(file.removeprefix("images/").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a text file without surplus blanks, empty ones left out.

    Bytes that are not of the encoding become U+FFFD; any line end will do.

    Raises:
        ConfigError: if there is no such file.
    """
    return [line for line in map(clean, read_text(path, encoding).split("\n")) if line]


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file, a byte order mark dropped, broken bytes as U+FFFD."""
    with open_text(path, encoding) as file:
        return file.read()


def read_captions(path: Path, encoding: str = "utf-8") -> tuple[str, ...]:
    """Return the captions in a text file, one a line; () if there is no such file."""
    return tuple(read_lines(path, encoding)) if path.is_file() else ()


class _NamesOnly(pickle.Unpickler):
    """Unpickle lists and strings; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run code")


def read_name_pickle(path: Path) -> list[str]:
    """Return the file names in a pickled list, as CelebA-HQ, CUB and TextCaps splits come.

    Raises:
        ConfigError: if the file is missing or holds anything but a list of names.
    """
    try:
        with path.open("rb") as file:
            names = _NamesOnly(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; it lists the images of a split") from error
    except (OSError, MemoryError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected a pickled list of file names and nothing else ({error}); "
            "refused, as a pickle can run code"
        ) from error
    if not isinstance(names, list) or not all(isinstance(n, str | int) for n in names):
        raise ConfigError(f"{path}: expected a pickled list of names, got {names!r:.80}")
    return [str(name) for name in names]
