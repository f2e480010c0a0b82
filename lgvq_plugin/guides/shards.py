"""The files of a text cache: facts, vocabulary and memory-mapped shards of packed features."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor

from ..config import build, require
from ..functional import sample_word_mask
from ..sockets import ConfigError, as_config_error
from .base import AbstractGuide

INDEX, VOCABULARY = "cache.json", "vocabulary.safetensors"
FORMATS = (1, 2)  # without and with packed features
BITS = {"int4": 4, "int8": 8, "float32": 32}  # of a number of a token's features, by precision
GROUP = 32  # numbers that share a scale
KEY_BYTES = 16
AGAIN = "; create the cache again"

Arrays = dict[str, np.ndarray]
Place = tuple[Arrays, int]
"""The shard and the row of a caption."""


@dataclass(frozen=True)
class Packing:
    """How vectors lie on disk: float32, or a few bits per number.

    Each group of 32 numbers has a float16 scale; the number farthest from 0 becomes -2^(bits - 1)
    times the scale, and the others the nearest multiple.

    Args:
        width: D, numbers of a vector.
        bits: of a number: 4, 8 or 32.

    Example:
        >>> packing = Packing(width=64, bits=4)
        >>> row = np.linspace(-1, 1, 64, dtype=np.float32)[None]
        >>> packed = packing.pack(row)
        >>> packed.shape, bool(abs(packing.unpack(packed) - row).max() < 0.13)
        ((1, 36), True)
    """

    width: int
    bits: int

    @property
    def groups(self) -> int:
        """Number of groups of a vector; the last one may be filled up."""
        return -(-self.width // GROUP)

    @property
    def empty(self) -> np.ndarray:
        """No packed vector, of the right type and width."""
        if self.bits == 32:
            return np.zeros((0, self.width), np.float32)
        return np.zeros((0, self.groups * (GROUP * self.bits // 8 + 2)), np.uint8)

    @property
    def bytes(self) -> int:
        """Bytes of a packed vector."""
        return self.empty.shape[1] * self.empty.itemsize

    def pack(self, vectors: np.ndarray) -> np.ndarray:
        """Pack (R, D) float32 vectors; raises ConfigError if a scale is beyond float16."""
        if self.bits == 32:
            return np.ascontiguousarray(vectors, np.float32)
        filled = np.zeros((len(vectors), self.groups * GROUP), np.float32)
        filled[:, : self.width] = vectors
        scaled = filled.reshape(-1, self.groups, GROUP)
        high, low = scaled.max(axis=2, keepdims=True), scaled.min(axis=2, keepdims=True)
        half = 2 ** (self.bits - 1)
        with np.errstate(over="ignore"):
            scales = (np.where(high > -low, high, low) / -half).astype(np.float16)
        if not np.isfinite(scales).all():
            raise ConfigError("features are not finite or beyond float16; use precision float32")
        scaled /= np.where(scales == 0, 1, scales).astype(np.float32)
        numbers = (np.rint(scaled).clip(-half, half - 1) + half).astype(np.uint8)
        if self.bits == 4:
            numbers = numbers[..., : GROUP // 2] | numbers[..., GROUP // 2 :] << 4
        packed = np.concatenate([numbers, scales.view(np.uint8)], axis=2)
        return packed.reshape(len(vectors), self.empty.shape[1])

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Return the (R, D) float32 vectors."""
        if self.bits == 32:
            return packed
        numbers = packed.reshape(len(packed), self.groups, GROUP * self.bits // 8 + 2)
        numbers, scales = numbers[..., :-2], np.ascontiguousarray(numbers[..., -2:])
        if self.bits == 4:
            numbers = np.concatenate([numbers & 15, numbers >> 4], axis=2)
        vectors = numbers.astype(np.float32)
        vectors -= 2 ** (self.bits - 1)
        vectors *= scales.view(np.float16)
        return vectors.reshape(len(packed), self.groups * GROUP)[:, : self.width]


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What a cache holds, and whose features they are."""

    fingerprint: str
    """Fingerprint of the guide."""
    guide: Mapping[str, Any]
    """The `lgvq.guide` block that builds it."""
    max_length: int
    token_dim: int
    sentence_dim: int
    maskings: int
    """Masks stored per caption; 0 = none."""
    ratio: tuple[float, float]
    """Lowest and highest share of masked words."""
    padding: bool
    """Whether features at padding are kept; otherwise they read as 0."""
    seed: int = 0
    """Seed of the masks."""
    precision: str = "float32"
    """int4, int8 or float32."""
    format: int = FORMATS[0]

    def __post_init__(self) -> None:
        """Raise ConfigError for impossible sizes."""
        for name in ("max_length", "token_dim", "sentence_dim"):
            require(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))
        require(self.maskings >= 0, "maskings", "a whole number >= 0", self.maskings)
        require(self.precision in BITS, "precision", f"one of {[*BITS]}", self.precision)

    @property
    def tokens(self) -> Packing:
        """How tokens' features lie on disk."""
        return Packing(self.token_dim, BITS[self.precision])

    @property
    def sentences(self) -> Packing:
        """How sentences' features lie on disk."""
        return Packing(self.sentence_dim, max(8, BITS[self.precision]))

    @property
    def vocabulary(self) -> Packing:
        """How the token embedding lies on disk."""
        return Packing(self.token_dim, max(8, BITS[self.precision]))

    @classmethod
    def read(cls, folder: Path) -> "CacheFacts":
        """Read them; raises ConfigError if there is no cache or it is of another format."""
        path = folder / INDEX
        try:
            given = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} holds no text cache; create one: lgvq cache -b CONFIG -o {folder}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; create the cache again") from error
        if isinstance(given, Mapping):
            given = {"precision": "float32", **given}  # earlier versions knew no other
        names = {entry.name for entry in fields(cls)}
        is_ours = isinstance(given, Mapping) and given.get("format") in FORMATS
        if not is_ours or not names <= given.keys():
            raise ConfigError(f"{path}: not of format {FORMATS[-1]}; create the cache again")
        with as_config_error(str(folder), ConfigError, hint=AGAIN):
            return build(cls, {name: given[name] for name in names}, INDEX)


def read_vocabulary(folder: Path, facts: CacheFacts) -> np.ndarray:
    """Return the token embedding, (V, token_dim) float32."""
    empty = facts.vocabulary.empty
    with as_config_error(str(folder / VOCABULARY), hint=AGAIN):
        found = load_file(folder / VOCABULARY)["vocabulary"]
        if found.dtype != empty.dtype or found.shape[1:] != empty.shape[1:]:
            expected = f"(V, {empty.shape[1]}) {empty.dtype}"
            raise ValueError(f"expected {expected}, got {found.shape} {found.dtype}")
        return facts.vocabulary.unpack(found)


def caption_key(caption: str) -> bytes:
    """Return the key of a caption, 16 bytes.

    Example:
        >>> caption_key("a dog").hex()[:8]
        '7dbdf68a'
    """
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


class Shards:
    """All captions of a cache: from strings to places."""

    def __init__(self, folder: Path, facts: CacheFacts):
        paths = sorted(folder.glob("shard-*.safetensors"))
        self.shards = [open_shard(path, facts) for path in paths]
        empty = np.zeros((0, KEY_BYTES), np.uint8)
        keys = np.concatenate([empty, *(shard["keys"] for shard in self.shards)])
        keys = keys.view(f"S{KEY_BYTES}").ravel()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._starts = np.cumsum([0, *(len(shard["keys"]) for shard in self.shards)])

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._keys)

    def find(self, captions: Sequence[str]) -> list[Place | None]:
        """Return the place of each caption, None if it is not in the cache."""
        wanted = np.array([caption_key(caption) for caption in captions], f"S{KEY_BYTES}")
        found: list[Place | None] = []
        for key, at in zip(wanted, np.searchsorted(self._keys, wanted), strict=True):
            if at == len(self._keys) or self._keys[at] != key:
                found.append(None)
                continue
            row = self._order[at]
            number = np.searchsorted(self._starts, row, side="right") - 1
            found.append((self.shards[number], int(row - self._starts[number])))
        return found


def open_shard(path: Path, facts: CacheFacts) -> Arrays:
    """Map the arrays of a shard of n captions; nothing is read until it is used.

    Returns:
        keys: (n, 16) uint8.
        token_ids, word_ids: (n, T).
        attention: (n, T) bool.
        cut: whether the caption was too long, (n,) bool.
        sentence: packed sentence features, (n, ...).
        first: number of a caption's first row in `rows`, (n,) int64.
        rows: packed token features, (R, ...).
        masks: (n, M, T) bool;  masked_first: (n, M);  masked_sentence: (n, M, ...).

    Raises:
        ConfigError: if the file is broken, or its shapes do not fit `facts`.
    """
    with as_config_error(f"{path} is broken", hint="; delete it and run `lgvq cache` again"):
        with safe_open(path, framework="pt") as file:  # its tensors are views of the memory map
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        _check_arrays(arrays, facts)
        return arrays


def _check_arrays(arrays: Arrays, facts: CacheFacts) -> None:
    """Raise unless all arrays are there with their shapes, and all rows are within `rows`."""
    n, length, many = len(arrays["keys"]), facts.max_length, facts.maskings
    tokens, sentences = facts.tokens.empty, facts.sentences.empty
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "keys": (np.uint8, (n, KEY_BYTES)),
        "token_ids": (np.int32, (n, length)),
        "word_ids": (np.int16, (n, length)),
        "attention": (np.bool_, (n, length)),
        "cut": (np.bool_, (n,)),
        "sentence": (sentences.dtype, (n, sentences.shape[1])),
        "first": (np.int64, (n,)),
        "rows": (tokens.dtype, (len(arrays["rows"]), tokens.shape[1])),
    }
    if many:
        shapes["masks"] = (np.bool_, (n, many, length))
        shapes["masked_first"] = (np.int64, (n, many))
        shapes["masked_sentence"] = (sentences.dtype, (n, many, sentences.shape[1]))
    for name, (kind, shape) in shapes.items():
        if arrays[name].dtype != kind or arrays[name].shape != shape:
            found = f"{arrays[name].shape} {arrays[name].dtype}"
            raise ValueError(f"{name}: expected {shape} {np.dtype(kind)}, got {found}")
    taken = np.full(n, length) if facts.padding else arrays["attention"].sum(axis=1)
    for name in ("first", "masked_first")[: 1 + bool(many)]:
        ends = arrays[name] + taken.reshape(-1, *[1] * (arrays[name].ndim - 1))
        if n and (arrays[name].min() < 0 or ends.max() > len(arrays["rows"])):
            raise ValueError(f"{name}: rows beyond the {len(arrays['rows'])} that exist")


# Writing


def encode_batch(
    guide: AbstractGuide, captions: list[str], facts: CacheFacts, *, pad: int, first_row: int
) -> Arrays:
    """Return the arrays of :func:`open_shard` but `cut`, encoded whole and under each mask."""
    features = guide.encode(captions)
    length = features.token_ids.shape[1]

    def widen(tensor: Tensor, value: float) -> np.ndarray:
        """Fill up to max_length tokens."""
        width = [(0, 0), (0, facts.max_length - length), (0, 0)][: tensor.ndim]
        return np.pad(tensor.cpu().numpy(), width, constant_values=value)

    words = widen(features.word_ids, -1)
    attention = widen(features.attention_mask, False)
    kept = attention | facts.padding
    whole = np.zeros((len(captions), 1, facts.max_length), bool)
    masks = np.concatenate([whole, draw_maskings(captions, torch.from_numpy(words), facts)], axis=1)
    # Short captions have few distinct masks: equal ones, and no masked word, are stored once.
    source = (masks[:, :, None] == masks[:, None]).all(axis=3).argmax(axis=2)
    rows, sentences = [], []
    first = np.zeros(source.shape, np.int64)
    for m in range(facts.maskings + 1):
        if m:
            mask = torch.from_numpy(masks[:, m, :length])
            features = guide.encode(captions, token_mask=mask)
        stored = kept & (source[:, m : m + 1] == m)
        counts = stored.sum(axis=1)
        first[:, m] = first_row + counts.cumsum() - counts
        rows.append(facts.tokens.pack(widen(features.tokens, 0.0)[stored]))
        sentences.append(facts.sentences.pack(features.sentence.cpu().numpy()))
        first_row += len(rows[-1])
    first = np.take_along_axis(first, source, axis=1)
    sentence = np.take_along_axis(np.stack(sentences, axis=1), source[..., None], axis=1)
    arrays = {
        "keys": np.stack([np.frombuffer(caption_key(text), np.uint8) for text in captions]),
        "attention": attention,
        "token_ids": widen(features.token_ids, pad).astype(np.int32),
        "word_ids": words.astype(np.int16),
        "sentence": sentence[:, 0],
        "first": first[:, 0],
        "rows": np.concatenate(rows),
    }
    if facts.maskings:
        masked = {"masked_first": first[:, 1:], "masked_sentence": sentence[:, 1:]}
        arrays |= {"masks": masks[:, 1:], **masked}
    return arrays


def draw_maskings(captions: Sequence[str], word_ids: Tensor, facts: CacheFacts) -> np.ndarray:
    """Draw the masks of each caption, (B, M, T) bool, from the seed and the caption alone."""
    drawn = []
    if not facts.maskings:
        return np.zeros((len(captions), 0, facts.max_length), bool)
    for caption, words in zip(captions, word_ids, strict=True):
        digest = hashlib.sha256(f"{facts.seed} {caption}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        many = words.expand(facts.maskings, -1)
        drawn.append(sample_word_mask(many, ratio=facts.ratio, generator=generator).numpy())
    return np.stack(drawn)
