"""A cache of text features on disk: shards, each there whole or not at all, and what made them.

cache.json                  whose features: the guide's fingerprint, its config, the maskings
vocabulary.safetensors      the guide's token embedding
shard-000000.safetensors    captions in the order they were encoded; read through one memory map

A reader maps files and writes nothing, so that any number of processes may read at once.
"""

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from .._fields import build, require
from .._files import write_bytes, write_json
from ..sockets import ConfigError

INDEX, VOCABULARY, FORMAT = "cache.json", "vocabulary.safetensors", 1
KEY_BYTES = 16
TYPES = {"U8": np.uint8, "BOOL": np.bool_, "I16": np.int16, "I32": np.int32, "I64": np.int64,
         "F32": np.float32}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What a cache holds, and whose features they are."""

    fingerprint: str
    """Of the guide that encoded."""
    guide: Mapping[str, Any]
    """The `lgvq.guide` block that builds it."""
    max_length: int
    token_dim: int
    sentence_dim: int
    maskings: int
    """Maskings stored for each caption; 0 = none."""
    ratio: tuple[float, float]
    """Lowest and highest share of hidden words in them."""
    padding: bool
    """Whether features at padding are kept; else they read as 0."""
    seed: int = 0
    """Of the maskings."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that cannot be."""
        for name in ("max_length", "token_dim", "sentence_dim"):
            require(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))
        require(self.maskings >= 0, "maskings", "a whole number >= 0", self.maskings)

    @classmethod
    def read(cls, folder: Path) -> "CacheFacts":
        """Read them; raises ConfigError if there is no cache or it is of another format."""
        path = folder / INDEX
        try:
            given = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} holds no text cache; make one: lgvq cache -b CONFIG -o {folder}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; make the cache anew") from error
        names = {entry.name for entry in fields(cls)}
        is_ours = isinstance(given, Mapping) and given.get("format") == FORMAT
        if not is_ours or not names <= given.keys():
            raise ConfigError(f"{path}: not of format {FORMAT}; make the cache anew")
        try:
            return build(cls, {name: given[name] for name in names}, INDEX)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}; make the cache anew") from error

    def write(self, folder: Path) -> None:
        """Write them atomically."""
        write_json(folder / INDEX, asdict(self))


def caption_key(caption: str) -> bytes:
    """Return what a caption is found by, 16 bytes.

    Example:
        >>> caption_key("a dog").hex()[:8]
        '7dbdf68a'
    """
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def write_vocabulary(folder: Path, vocabulary: np.ndarray) -> None:
    """Store the guide's token embedding, (V, Dt) float32."""
    write_bytes(folder / VOCABULARY, save({"vocabulary": np.ascontiguousarray(vocabulary)}))


def read_vocabulary(folder: Path, token_dim: int) -> np.ndarray:
    """Return the token embedding, (V, token_dim) float32."""
    try:
        found = load_file(folder / VOCABULARY)["vocabulary"]
        if found.dtype != np.float32 or found.ndim != 2 or found.shape[1] != token_dim:
            raise ValueError(f"expected (V, {token_dim}) float32, got {found.shape} {found.dtype}")
        return found
    except Exception as error:  # safetensors has an exception of its own
        raise ConfigError(f"{folder / VOCABULARY}: {error}; make the cache anew") from error


def write_shard(folder: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Store one shard under the next free number."""
    taken = [int(path.name[6:12]) for path in folder.glob("shard-*.safetensors")]
    path = folder / f"shard-{max(taken, default=-1) + 1:06d}.safetensors"
    write_bytes(path, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    return path


class Shard:
    """One file, mapped; arrays are views into it and token features are read when they are used.

    Args:
        path: of the file.
        facts: of the cache, which say the shapes.

    Raises:
        ConfigError: if the file is broken, or not of these shapes.

    Its arrays are
        keys: (n, 16) uint8.
        token_ids, word_ids: (n, T).
        attention: (n, T) bool.
        cut: whether the caption was too long, (n,) bool.
        sentence: (n, Ds) float32.
        first: where a caption's rows begin in `rows`, (n,) int64.
        rows: token features, (R, Dt) float32.
        masks: (n, M, T) bool;  masked_first: (n, M);  masked_sentence: (n, M, Ds).
    """

    def __init__(self, path: Path, facts: CacheFacts):
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8:start])
            header.pop("__metadata__", None)
            arrays = {name: self._view(start, entry) for name, entry in header.items()}
            _check_arrays(arrays, facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is broken ({error}); delete it and run `lgvq cache` again"
            ) from error
        self.path, self._arrays = path, arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array by its name."""
        return self._arrays[name]

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._arrays["keys"])

    def _view(self, start: int, entry: Mapping[str, Any]) -> np.ndarray:
        begin, end = entry["data_offsets"]
        kind = np.dtype(TYPES[entry["dtype"]])
        if not 0 <= begin <= end or start + end > len(self._map):
            raise ValueError("it is cut off")
        flat = np.frombuffer(self._map, kind, (end - begin) // kind.itemsize, start + begin)
        return flat.reshape(entry["shape"])


def _check_arrays(arrays: Mapping[str, np.ndarray], facts: CacheFacts) -> None:
    """Raise ValueError unless all arrays are there, in shape, and rows lie within `rows`."""
    n, length, many = len(arrays["keys"]), facts.max_length, facts.maskings
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "keys": (np.uint8, (n, KEY_BYTES)),
        "token_ids": (np.int32, (n, length)),
        "word_ids": (np.int16, (n, length)),
        "attention": (np.bool_, (n, length)),
        "cut": (np.bool_, (n,)),
        "sentence": (np.float32, (n, facts.sentence_dim)),
        "first": (np.int64, (n,)),
        "rows": (np.float32, (len(arrays["rows"]), facts.token_dim)),
    }
    if many:
        shapes["masks"] = (np.bool_, (n, many, length))
        shapes["masked_first"] = (np.int64, (n, many))
        shapes["masked_sentence"] = (np.float32, (n, many, facts.sentence_dim))
    for name, (kind, shape) in shapes.items():
        if arrays[name].dtype != kind or arrays[name].shape != shape:
            found = f"{arrays[name].shape} {arrays[name].dtype}"
            raise ValueError(f"{name}: expected {shape} {np.dtype(kind)}, got {found}")
    taken = np.full(n, length) if facts.padding else arrays["attention"].sum(axis=1)
    for name in ("first", "masked_first")[: 1 + bool(many)]:
        ends = arrays[name] + (taken if arrays[name].ndim == 1 else taken[:, None])
        if n and (arrays[name].min() < 0 or ends.max() > len(arrays["rows"])):
            raise ValueError(f"{name}: rows beyond the {len(arrays['rows'])} there are")


class Shards:
    """All captions of a cache: from strings to (shard, row)."""

    def __init__(self, folder: Path, facts: CacheFacts):
        self.shards = [Shard(path, facts) for path in sorted(folder.glob("shard-*.safetensors"))]
        keys = [shard["keys"] for shard in self.shards]
        flat = np.concatenate(keys) if keys else np.zeros((0, KEY_BYTES), np.uint8)
        named = np.ascontiguousarray(flat).view(f"S{KEY_BYTES}").ravel()
        order = np.argsort(named, kind="stable")
        self._keys, self._order = named[order], order
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._keys)

    def find(self, captions: Sequence[str]) -> list[tuple[Shard, int] | None]:
        """Return where each caption lies, None where it does not."""
        if not len(self._keys):
            return [None] * len(captions)
        wanted = np.array([caption_key(caption) for caption in captions], f"S{KEY_BYTES}")
        places = np.searchsorted(self._keys, wanted)
        hits = self._keys[np.minimum(places, len(self._keys) - 1)] == wanted
        found: list[tuple[Shard, int] | None] = []
        for place, is_hit in zip(places.tolist(), hits.tolist(), strict=True):
            if not is_hit:
                found.append(None)
                continue
            row = int(self._order[place])
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            found.append((self.shards[number], row - int(self._starts[number])))
        return found
