"""A cache of text features on disk: shards, each there whole or not at all, and what made them.

cache.json                  whose features: the guide's fingerprint, its config, the maskings
vocabulary.safetensors      the guide's token embedding
shard-000000.safetensors    captions in the order they were encoded; read through one memory map

A reader maps files and writes nothing, so that any number of processes may read at once.
"""

import hashlib
import json
import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from ..config import build, differing, require
from ..files import write_bytes, write_json
from ..functional import sample_word_mask
from ..sockets import ConfigError, suggest
from ..types import TextFeatures, TextTokens
from .base import PLACES, AbstractGuide, UnknownWords, build_guide

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


# -- Fill a text cache: captions are encoded in batches, shard by shard; what is there stays -----


SHARD_BYTES = 512 * 2**20  # a kill costs at most so much


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Args:
        todo: different captions that are not in the cache yet.
        done: how many are.
        bytes_needed: upper bound of what is left to write.
        bytes_each: upper bound of what a caption takes on disk.
    """

    todo: list[str]
    done: int
    bytes_needed: int
    bytes_each: int


def write_cache(
    folder: Path,
    guide: AbstractGuide,
    captions: Sequence[str],
    *,
    block: Mapping[str, Any],
    maskings: int = 4,
    ratio: tuple[float, float] = (0.15, 0.5),
    padding: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Plan, Iterator[int]]:
    """Encode captions to a cache; one that was begun is gone on with.

    Args:
        folder: new, or of a cache with the very same settings.
        guide: whose features are stored.
        captions: repeated ones are stored once.
        block: the `lgvq.guide` block that builds the guide.
        maskings: of each caption.
        ratio: lowest and highest share of words that they hide.
        padding: keep features at padding; without them they read as 0.
        seed: of the maskings.
        batch_size: captions that are encoded at a time.

    Returns:
        What is left to do, and an iterator that does it and yields the size of each batch.

    Raises:
        ConfigError: if the folder holds something else, or another cache.
    """
    facts = CacheFacts(
        fingerprint=guide.fingerprint,
        guide={key: value for key, value in block.items() if key not in PLACES},
        max_length=guide.max_length,
        token_dim=guide.token_dim,
        sentence_dim=guide.sentence_dim,
        maskings=maskings,
        ratio=(float(ratio[0]), float(ratio[1])),
        padding=padding,
        seed=seed,
    )
    plan = _prepare(folder, facts, guide, captions)
    return plan, _fill(folder, facts, guide, plan, batch_size)


def _is_begun(folder: Path) -> bool:
    """Whether nothing is there but what a killed run wrote first."""
    return folder.is_dir() and all(path.name.startswith(VOCABULARY) for path in folder.iterdir())


def _prepare(
    folder: Path, facts: CacheFacts, guide: AbstractGuide, captions: Sequence[str]
) -> Plan:
    """Begin a cache, or make sure that the one in `folder` is the same."""
    if (folder / INDEX).is_file():
        changed = differing(asdict(CacheFacts.read(folder)), asdict(facts))
        if changed:
            raise ConfigError(
                f"the text cache {folder} was made with {'; '.join(changed)}; choose another folder"
            )
    else:
        if folder.exists() and not _is_begun(folder):
            raise ConfigError(f"{folder} is not empty and holds no text cache; choose a new folder")
    for leftover in folder.glob("*.part"):  # of runs that were killed
        leftover.unlink(missing_ok=True)
    unique = list(dict.fromkeys(["", *captions]))  # images without a caption ask for ""
    found = Shards(folder, facts).find(unique)
    todo = [text for text, place in zip(unique, found, strict=True) if place is None]
    numbers = (facts.maskings + 1) * (facts.max_length * facts.token_dim + facts.sentence_dim)
    extra = facts.max_length * (7 + facts.maskings) + 8 * (facts.maskings + 3) + KEY_BYTES
    each, is_new = 4 * numbers + extra, not (folder / INDEX).is_file()
    needed = len(todo) * each + is_new * guide.vocabulary.numel() * 4
    return Plan(todo, len(unique) - len(todo), needed, each)


def _fill(
    folder: Path, facts: CacheFacts, guide: AbstractGuide, plan: Plan, batch_size: int
) -> Iterator[int]:
    """Encode what is left; yield the size of each batch done, before its shard is written."""
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_vocabulary(folder, guide.vocabulary.detach().float().cpu().numpy())
        facts.write(folder)
    size = max(batch_size, SHARD_BYTES // plan.bytes_each // batch_size * batch_size)
    for start in range(0, len(plan.todo), size):
        shard = _Builder(facts)
        chunk = plan.todo[start : start + size]
        for at in range(0, len(chunk), batch_size):
            batch = chunk[at : at + batch_size]
            shard.add(guide, batch)
            yield len(batch)
        write_shard(folder, shard.arrays())


class _Builder:
    """Collects the arrays of one shard."""

    def __init__(self, facts: CacheFacts):
        self.facts, self._count = facts, 0
        self._rows: list[np.ndarray] = []
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, guide: AbstractGuide, captions: list[str]) -> None:
        """Encode a batch, plain and under each masking."""
        cut = [guide.tokenize([caption]).cut > 0 for caption in captions]
        plain = guide.encode(captions)
        attention = plain.attention_mask.cpu().numpy()
        self._put("keys", [np.frombuffer(caption_key(text), np.uint8) for text in captions])
        self._put("cut", [np.array(cut)])
        self._put("attention", [attention])
        self._put("token_ids", [plain.token_ids.cpu().numpy().astype(np.int32)])
        self._put("word_ids", [plain.word_ids.cpu().numpy().astype(np.int16)])
        self._put("sentence", [plain.sentence.cpu().numpy()])
        first = self._put_rows(plain, attention, range(len(captions)))
        self._put("first", [first])
        if self.facts.maskings:
            self._add_masked(guide, captions, plain, first)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the shard."""
        stacked = {
            name: np.stack(parts) if name == "keys" else np.concatenate(parts)
            for name, parts in self._columns.items()
        }
        return {**stacked, "rows": np.concatenate(self._rows)}

    def _add_masked(
        self, guide: AbstractGuide, captions: list[str], plain: TextFeatures, first: np.ndarray
    ) -> None:
        masks = draw_maskings(captions, plain.word_ids.cpu(), self.facts)  # (B, M, T)
        attention = plain.attention_mask.cpu().numpy()
        starts = np.repeat(first[:, None], self.facts.maskings, axis=1)
        sentence = plain.sentence.cpu().numpy()[:, None].repeat(self.facts.maskings, axis=1)
        for number in range(self.facts.maskings):
            hidden = guide.encode(captions, token_mask=torch.from_numpy(masks[:, number]))
            new = []
            for row in range(len(captions)):
                # Short captions have few maskings: the same one is stored once.
                same = (masks[row, :number] == masks[row, number]).all(axis=1).nonzero()[0]
                if len(same):
                    starts[row, number] = starts[row, same[0]]
                    sentence[row, number] = sentence[row, same[0]]
                elif masks[row, number].any():
                    new.append(row)
            starts[new, number] = self._put_rows(hidden, attention, new)
            sentence[new, number] = hidden.sentence.cpu().numpy()[new]
        self._put("masks", [masks])
        self._put("masked_first", [starts])
        self._put("masked_sentence", [sentence])

    def _put(self, name: str, arrays: list[np.ndarray]) -> None:
        self._columns.setdefault(name, []).extend(arrays)

    def _put_rows(
        self, features: TextFeatures, attention: np.ndarray, captions: Sequence[int]
    ) -> np.ndarray:
        """Append the token features of some captions; return where each begins."""
        tokens, first = features.tokens.cpu().numpy(), []
        for row in captions:
            block = tokens[row] if self.facts.padding else tokens[row][attention[row]]
            first.append(self._count)
            self._count += len(block)
            self._rows.append(block)
        return np.array(first, np.int64)


def draw_maskings(captions: Sequence[str], word_ids: torch.Tensor, facts: CacheFacts) -> np.ndarray:
    """Draw the maskings of each caption, (B, M, T) bool, from the seed and the caption alone."""
    drawn = []
    for caption, words in zip(captions, word_ids, strict=True):
        digest = hashlib.sha256(f"{facts.seed} {caption}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        many = words.expand(facts.maskings, -1)
        drawn.append(sample_word_mask(many, ratio=facts.ratio, generator=generator).numpy())
    return np.stack(drawn)


# -- Text features from disk: `lgvq cache` encodes every caption once, training only looks them up -


logger = logging.getLogger(__name__)

MISSING = ("error", "encode")
Place = tuple[Shard, int]


class CachedGuide(AbstractGuide):
    """Another guide's features from disk, with no text tower in memory.

    Features are bit for bit what the guide gave when the cache was written. The guide is built
    once to compare its fingerprint with the cache's, then let go.

    Hidden words change every feature, so masked captions are encoded beforehand too: a few
    maskings a caption, of which :meth:`draw_mask` draws one. Other masks are not in the cache.

    Args:
        folder: of the cache.
        guide: the `lgvq.guide` block that the features must come from; null takes the one
            that the cache names.
        missing: what a caption or a mask that is not in the cache does: error, or encode,
            which loads the guide then and keeps it.
        verify: build the guide to compare fingerprints; false trusts the cache, for machines
            that do not have the guide's weights.
        device: where features go; the CPU if not given.
        rest: further keys of `guide`, which an overlay over another guide leaves there.

    Raises:
        ConfigError: if there is no cache, it is broken, or it was made by another guide.
    """

    write = staticmethod(write_cache)

    def __init__(
        self,
        folder: str,
        guide: Mapping[str, Any] | None = None,
        missing: str = "error",
        verify: bool = True,
        device: torch.device | str | None = None,
        **rest: Any,
    ) -> None:
        if missing not in MISSING:
            raise ConfigError(f"guide.missing: {missing!r}{suggest(str(missing), list(MISSING))}")
        self._folder = Path(folder).expanduser()
        self._given = {**rest, **guide} if guide is not None else None
        self._missing, self._verify = missing, verify
        self.facts = CacheFacts.read(self._folder)
        self._source: AbstractGuide | None = None
        self._found: tuple[tuple[str, ...], list[Place]] | None = None
        if rest and guide is None:
            raise ConfigError(f"guide cached: no key {next(iter(rest))!r}; put it under `guide:`")
        if verify or guide is not None:
            self._refuse_foreign(build=verify)
        self._shards = Shards(self._folder, self.facts)
        self.max_length = self.facts.max_length
        self.token_dim, self.sentence_dim = self.facts.token_dim, self.facts.sentence_dim
        self._vocabulary = torch.from_numpy(read_vocabulary(self._folder, self.token_dim))
        self.to("cpu" if device is None else device)

    def __len__(self) -> int:
        """Return the number of captions in the cache."""
        return len(self._shards)

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords | None:
        """Return what the guide that made the cache says, if it takes no download to ask it."""
        block = self._given or self.facts.guide
        is_embedded = block.get("use") == "micro_clip"
        return build_guide(block).unknown_words(captions) if is_embedded else None

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Return the tokens of B captions, as the guide split them, on the CPU."""
        places = self._find(captions)
        if places is None:
            return self._tokenize_by_source(captions)
        ids, attention, words = (
            self._stack([shard[name][row] for shard, row in places], kind, self.max_length)
            for name, kind in (("token_ids", np.int64), ("attention", bool), ("word_ids", np.int64))
        )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._vocabulary):
            raise ConfigError(
                f"the text cache {self._folder} is broken: a token of {list(captions)!r:.80} is "
                f"not among the {len(self._vocabulary)} of its vocabulary; make the cache anew"
            )
        return TextTokens(ids, attention, words, _cut(places))

    @torch.no_grad()
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Look B captions up; a `token_mask` must come from :meth:`draw_mask`, or hide nothing."""
        if token_mask is not None and tuple(token_mask.shape) != (len(captions), self.max_length):
            expected = (len(captions), self.max_length)
            raise ValueError(f"token_mask: expected {expected}, got {tuple(token_mask.shape)}")
        places = self._find(captions)
        masks = None if token_mask is None else token_mask.cpu().numpy()
        chosen = None if places is None else self._maskings(captions, places, masks)
        if places is None or chosen is None:
            return self._encode_by_source(captions, token_mask)
        text = self.tokenize(captions)
        tokens, sentence = [], []
        for (shard, row), masking in zip(places, chosen, strict=True):
            if masking is None:
                first, whole = shard["first"][row], shard["sentence"][row]
            else:
                first, whole = (
                    shard["masked_first"][row, masking],
                    shard["masked_sentence"][row, masking],
                )
            tokens.append(self._rows(shard, int(first), shard["attention"][row]))
            sentence.append(whole)
        return TextFeatures(
            token_ids=text.token_ids.to(self.device),
            attention_mask=text.attention_mask.to(self.device),
            word_ids=text.word_ids.to(self.device),
            tokens=self._stack(tokens, np.float32, self.max_length, self.token_dim).to(self.device),
            sentence=self._stack(sentence, np.float32, self.sentence_dim).to(self.device),
            vocabulary=self._vocabulary,
        )

    def draw_mask(
        self,
        captions: Sequence[str],
        word_ids: Tensor,
        *,
        ratio: tuple[float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw one of the stored maskings of each caption, (B, T) bool.

        Raises:
            ConfigError: if the cache has no maskings, or those of another ratio.
        """
        facts = self.facts
        if not facts.maskings or tuple(ratio) != facts.ratio:
            if self._missing == "encode":
                return super().draw_mask(captions, word_ids, ratio=ratio, generator=generator)
            held = f"{facts.maskings} maskings of ratio {facts.ratio}" if facts.maskings else "none"
            raise ConfigError(
                f"masked_text hides words with ratio {tuple(ratio)}, the text cache {self._folder} "
                f"holds {held}; run `lgvq cache` with this config and a new folder, or set "
                "`guide.missing: encode`"
            )
        places = self._find(captions)
        if places is None:
            return super().draw_mask(captions, word_ids, ratio=ratio, generator=generator)
        chosen = torch.randint(facts.maskings, (len(captions),), generator=generator).tolist()
        masks = [s["masks"][row, k] for (s, row), k in zip(places, chosen, strict=True)]
        return self._stack(masks, bool, self.max_length).to(word_ids.device)

    @property
    def vocabulary(self) -> Tensor:
        """The token embedding, (V, Dt), on :attr:`device`."""
        return self._vocabulary

    @property
    def device(self) -> torch.device:
        """Where features go."""
        return self._vocabulary.device

    def to(self, device: torch.device | str) -> "CachedGuide":
        """Send features there from now on; returns self."""
        self._vocabulary = self._vocabulary.to(device)
        if self._source is not None:
            self._source.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {
            "folder": str(self._folder),
            "guide": self._given,
            "missing": self._missing,
            "verify": self._verify,
            "device": str(self.device),
        }

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the guide that the features come from."""
        return self.facts.fingerprint

    def _refuse_foreign(self, *, build: bool) -> None:
        given = dict(self._given or self.facts.guide)
        if not build:
            known = {"use": "open_clip", **self.facts.guide}
            if any(known.get(key) != given[key] for key in given.keys() - {*PLACES}):
                self._raise_foreign(f"{given}")
            return
        guide = build_guide(given)
        if guide.fingerprint != self.facts.fingerprint:
            self._raise_foreign(f"{given}, fingerprint {guide.fingerprint[:12]}")

    def _raise_foreign(self, wanted: str) -> None:
        raise ConfigError(
            f"the text cache {self._folder} was made by another guide or other weights: "
            f"{dict(self.facts.guide)}, fingerprint {self.facts.fingerprint[:12]}; the config has "
            f"{wanted}; make a new cache in another folder: lgvq cache -b CONFIG -o FOLDER"
        )

    def _find(self, captions: Sequence[str]) -> list[Place] | None:
        """Return where the captions lie, or None if the guide has to encode them."""
        key = tuple(captions)
        if self._found is not None and self._found[0] == key:
            return self._found[1]
        places = self._shards.find(captions)
        lost = [text for text, place in zip(captions, places, strict=True) if place is None]
        if lost and self._missing == "error":
            raise ConfigError(
                f"caption {lost[0]!r} is not among the {len(self):,} of the text cache "
                f"{self._folder}; run `lgvq cache` again with this config (what is there is "
                "kept), or set `guide.missing: encode`"
            )
        if lost:
            return None
        found = [place for place in places if place is not None]
        self._found = key, found  # a step asks several times, and a cut caption shall count once
        self._count_cut(_cut(found))
        return found

    def _maskings(
        self, captions: Sequence[str], places: list[Place], masks: np.ndarray | None
    ) -> list[int | None] | None:
        """Return the number of each caption's masking, None for no hidden word; or None."""
        chosen: list[int | None] = []
        for number, (shard, row) in enumerate(places):
            hidden = None if masks is None else masks[number] & (shard["word_ids"][row] >= 0)
            if hidden is None or not hidden.any():
                chosen.append(None)
                continue
            equal = (shard["masks"][row] == hidden).all(axis=1).nonzero()[0]
            if not len(equal):
                if self._missing == "encode":
                    return None
                raise ConfigError(
                    f"this masking of caption {captions[number]!r} is not in the text cache; "
                    "draw masks with draw_mask(...), or set `guide.missing: encode`"
                )
            chosen.append(int(equal[0]))
        return chosen

    def _rows(self, shard: Shard, first: int, attention: np.ndarray) -> np.ndarray:
        if self.facts.padding:
            return shard["rows"][first : first + self.max_length]
        block = np.zeros((self.max_length, self.token_dim), np.float32)
        block[attention] = shard["rows"][first : first + int(attention.sum())]
        return block

    def _stack(self, arrays: list[np.ndarray], kind: Any, *shape: int) -> Tensor:
        stacked = np.stack(arrays) if arrays else np.zeros((0, *shape))
        return torch.from_numpy(stacked.astype(kind, copy=False))

    def _loaded(self) -> AbstractGuide:
        if self._source is None:
            logger.warning(
                "a caption or mask is not in the text cache %s: the guide is loaded to encode it",
                self._folder,
            )
            self._source = build_guide(dict(self._given or self.facts.guide)).to(self.device)
        return self._source

    def _tokenize_by_source(self, captions: Sequence[str]) -> TextTokens:
        guide = self._loaded()
        before = guide.truncated
        text = guide.tokenize(captions)
        self.truncated += guide.truncated - before
        return text

    def _encode_by_source(self, captions: Sequence[str], mask: Tensor | None) -> TextFeatures:
        guide = self._loaded()
        before = guide.truncated
        features = guide.encode(captions, token_mask=mask)
        self.truncated += guide.truncated - before
        return features

    def _count_cut(self, cut: int) -> None:
        if cut and not self.truncated:
            logger.warning(
                "a caption has more than max_length = %d tokens and was cut, its end token kept; "
                "the guide's `truncated` goes on counting",
                self.max_length,
            )
        self.truncated += cut


def _cut(places: list[Place]) -> int:
    return sum(bool(shard["cut"][row]) for shard, row in places)
