"""Finished metrics on disk, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._fields import verify
from .._files import write_json
from ..sockets import ConfigError
from ._rows import Row


@dataclass(frozen=True)
class _File:
    mark: str
    rows: dict[str, Row]


class Store:
    """One JSON file a metric, with a mark of all that it depends on.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def read(self, name: str, mark: str) -> dict[str, Any] | None:
        """Return a finished metric's rows if they were made under the same mark.

        Raises:
            ConfigError: if the file holds something else.
        """
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        again = "delete the file to measure again"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            verify(found, _File, "the file")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {again}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON: {error}; {again}") from error
        return found["rows"] if found["mark"] == mark else None

    def write(self, name: str, mark: str, rows: Mapping[str, Any]) -> None:
        """Keep a finished metric's rows."""
        path = self._path(name)
        if path is not None:
            write_json(path, {"mark": mark, "rows": rows})

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"


def mark_of(*parts: Any) -> str:
    """Return a hash of plain values.

    Example:
        >>> mark_of({"a": 1, "b": 2}) == mark_of({"b": 2, "a": 1})
        True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def host_hash(host: nn.Module) -> str:
    """Return a hash of a host's own weights: those of its loss do not count."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(host.state_dict().items()):
        if not name.startswith("loss."):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]
