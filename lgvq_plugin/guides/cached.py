"""Text features from disk: `lgvq cache` encodes every caption once, training looks them up.

cache.json                  the guide's fingerprint and config, and how words were masked
vocabulary.safetensors      the guide's token embedding
shard-000000.safetensors    features of captions, in the order in which they were encoded

Shards are memory-mapped and never change, so any number of processes can read while one adds more.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from ..config import build, differing, require
from ..files import write_bytes, write_json
from ..functional import sample_word_mask
from ..sockets import ConfigError, suggest
from ..types import TextFeatures, TextTokens
from .base import PLACES, AbstractGuide, UnknownWords, build_guide

logger = logging.getLogger(__name__)

INDEX, VOCABULARY, FORMAT = "cache.json", "vocabulary.safetensors", 1
MISSING = ("error", "encode")
KEY_BYTES = 16
SHARD_BYTES = 512 * 2**20  # a killed run loses at most this much

Arrays = dict[str, np.ndarray]
Place = tuple[Arrays, int]
"""The shard and the row of a caption."""
T = TypeVar("T")


class CachedGuide(AbstractGuide):
    """Another guide's features from disk, with no text tower in memory.

    Features are bit-identical to those of the guide when the cache was written. The guide is built
    once, to compare its fingerprint with the cache's, and then released.

    Masked words change every feature, so masked captions are encoded in advance as well: a few
    masks per caption, of which :meth:`draw_mask` draws one. Other masks are not in the cache.

    Args:
        folder: folder of the cache.
        guide: the `lgvq.guide` block that the features must come from; null takes the one that
            the cache names.
        missing: what to do for a caption or a mask that is not in the cache: error, or encode,
            which then loads the guide and keeps it.
        verify: build the guide to compare fingerprints; false trusts the cache, for machines
            without the guide's weights.
        device: device of the features; the CPU by default.
        rest: further keys of `guide`, left by an overlay over another guide.

    Raises:
        ConfigError: if there is no cache, it is broken, or another guide made it.
    """

    keeps_features = True

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
        if rest and guide is None:
            raise ConfigError(f"guide cached: no key {next(iter(rest))!r}; put it under `guide:`")
        self._folder = Path(folder).expanduser()
        self._given = {**rest, **guide} if guide is not None else None
        self._missing, self._verify = missing, verify
        self.facts = CacheFacts.read(self._folder)
        self._source: AbstractGuide | None = None
        self._last: tuple[tuple[str, ...], list[Place]] | None = None
        self._require_same_guide()
        self._shards = Shards(self._folder, self.facts)
        self.max_length = self.facts.max_length
        self.token_dim, self.sentence_dim = self.facts.token_dim, self.facts.sentence_dim
        self._vocabulary = torch.from_numpy(read_vocabulary(self._folder, self.token_dim))
        self.to("cpu" if device is None else device)

    @staticmethod
    def write(*args: Any, **options: Any) -> "tuple[Plan, Iterator[int]]":
        """Fill a cache, see :func:`write_cache`."""
        return write_cache(*args, **options)

    def __len__(self) -> int:
        """Return the number of captions in the cache."""
        return len(self._shards)

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords | None:
        """Return the counts of the guide that made the cache, if it can be built offline."""
        block = self._given or self.facts.guide
        is_embedded = block.get("use") == "micro_clip"
        return build_guide(block).unknown_words(captions) if is_embedded else None

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Return the tokens of B captions, as the guide split them, on the CPU."""
        places = self._find(captions)
        if places is None:
            return self._ask_guide(lambda guide: guide.tokenize(captions))
        ids, attention, words = (
            self._stack([shard[name][row] for shard, row in places], kind, self.max_length)
            for name, kind in (("token_ids", np.int64), ("attention", bool), ("word_ids", np.int64))
        )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._vocabulary):
            raise ConfigError(
                f"the text cache {self._folder} is broken: a token of {list(captions)!r:.80} is "
                f"not among the {len(self._vocabulary)} of its vocabulary; create the cache again"
            )
        return TextTokens(ids, attention, words, _count_cut(places))

    @torch.no_grad()
    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Look B captions up; a `token_mask` must come from :meth:`draw_mask`, or mask nothing."""
        expected = (len(captions), self.max_length)
        if token_mask is not None and tuple(token_mask.shape) != expected:
            raise ValueError(f"token_mask: expected {expected}, got {tuple(token_mask.shape)}")
        places = self._find(captions)
        numbers = None if places is None else self._mask_numbers(captions, places, token_mask)
        if places is None or numbers is None:
            return self._ask_guide(lambda guide: guide.encode(captions, token_mask=token_mask))
        text = self.tokenize(captions)
        tokens, sentences = [], []
        for (shard, row), number in zip(places, numbers, strict=True):
            prefix, at = ("", row) if number is None else ("masked_", (row, number))
            first = int(shard[f"{prefix}first"][at])
            tokens.append(self._token_rows(shard, first, shard["attention"][row]))
            sentences.append(shard[f"{prefix}sentence"][at])
        return TextFeatures(
            token_ids=text.token_ids.to(self.device),
            attention_mask=text.attention_mask.to(self.device),
            word_ids=text.word_ids.to(self.device),
            tokens=self._stack(tokens, np.float32, self.max_length, self.token_dim).to(self.device),
            sentence=self._stack(sentences, np.float32, self.sentence_dim).to(self.device),
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
        """Draw one of the stored masks of each caption, (B, T) bool.

        Raises:
            ConfigError: if the cache has no masks, or masks of another ratio.
        """
        facts = self.facts
        fits = facts.maskings and tuple(ratio) == facts.ratio
        if not fits and self._missing == "error":
            held = f"{facts.maskings} maskings of ratio {facts.ratio}" if facts.maskings else "none"
            raise ConfigError(
                f"masked_text masks words with ratio {tuple(ratio)}, the text cache {self._folder} "
                f"holds {held}; run `lgvq cache` with this config and a new folder, or set "
                "`guide.missing: encode`"
            )
        places = self._find(captions) if fits else None
        if places is None:
            return super().draw_mask(captions, word_ids, ratio=ratio, generator=generator)
        numbers = torch.randint(facts.maskings, (len(captions),), generator=generator).tolist()
        masks = [s["masks"][row, number] for (s, row), number in zip(places, numbers, strict=True)]
        return self._stack(masks, bool, self.max_length).to(word_ids.device)

    @property
    def vocabulary(self) -> Tensor:
        """Token embedding, (V, Dt), on :attr:`device`."""
        return self._vocabulary

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self._vocabulary.device

    def to(self, device: torch.device | str) -> "CachedGuide":
        """Return features on `device` from now on; returns self."""
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
        """Fingerprint of the guide that the features come from."""
        return self.facts.fingerprint

    def _require_same_guide(self) -> None:
        given = dict(self._given or self.facts.guide)
        if self._verify:
            fingerprint = build_guide(given).fingerprint
            is_same, wanted = fingerprint == self.fingerprint, f", fingerprint {fingerprint[:12]}"
        else:
            known, wanted = {"use": "open_clip", **self.facts.guide}, ""
            is_same = all(known.get(key) == given[key] for key in given.keys() - {*PLACES})
        if not is_same:
            raise ConfigError(
                f"the text cache {self._folder} was made by another guide or other weights: "
                f"{dict(self.facts.guide)}, fingerprint {self.fingerprint[:12]}; the config has "
                f"{given}{wanted}; create a new cache in another folder: lgvq cache -b CONFIG "
                "-o FOLDER"
            )

    def _find(self, captions: Sequence[str]) -> list[Place] | None:
        """Return the captions' places, or None if the guide has to encode them."""
        key = tuple(captions)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        found = self._shards.find(captions)
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            if self._missing == "encode":
                return None
            raise ConfigError(
                f"caption {captions[found.index(None)]!r} is not among the {len(self):,} of the "
                f"text cache {self._folder}; run `lgvq cache` again with this config (captions "
                "that are there are kept), or set `guide.missing: encode`"
            )
        self._last = key, places  # a step asks several times
        if _count_cut(places):
            cut = (bool(shard["cut"][row]) for shard, row in places)
            self.count_truncated(text for text, is_cut in zip(captions, cut, strict=True) if is_cut)
        return places

    def _mask_numbers(
        self, captions: Sequence[str], places: list[Place], token_mask: Tensor | None
    ) -> list[int | None] | None:
        """Return which stored mask each caption has, None for no masked word; None to encode."""
        if token_mask is None:
            return [None] * len(places)
        numbers: list[int | None] = []
        masks = token_mask.cpu().numpy()
        for caption, (shard, row), mask in zip(captions, places, masks, strict=True):
            masked = mask & (shard["word_ids"][row] >= 0)
            equal = (shard["masks"][row] == masked).all(axis=1).nonzero()[0] if masked.any() else []
            if masked.any() and not len(equal):
                if self._missing == "encode":
                    return None
                raise ConfigError(
                    f"this masking of caption {caption!r} is not in the text cache; draw masks "
                    "with draw_mask(...), or set `guide.missing: encode`"
                )
            numbers.append(int(equal[0]) if len(equal) else None)
        return numbers

    def _token_rows(self, shard: Arrays, first: int, attention: np.ndarray) -> np.ndarray:
        if self.facts.padding:
            return shard["rows"][first : first + self.max_length]
        block = np.zeros((self.max_length, self.token_dim), np.float32)
        block[attention] = shard["rows"][first : first + int(attention.sum())]
        return block

    def _stack(self, arrays: list[np.ndarray], kind: Any, *shape: int) -> Tensor:
        stacked = np.stack(arrays) if arrays else np.zeros((0, *shape))
        return torch.from_numpy(stacked.astype(kind, copy=False))

    def _ask_guide(self, ask: Callable[[AbstractGuide], T]) -> T:
        if self._source is None:
            logger.warning(
                "a caption or mask is not in the text cache %s: the guide is loaded to encode it",
                self._folder,
            )
            self._source = build_guide(dict(self._given or self.facts.guide)).to(self.device)
        before = self._source.truncated
        answer = ask(self._source)
        self.truncated += self._source.truncated - before
        return answer


def _count_cut(places: list[Place]) -> int:
    return sum(bool(shard["cut"][row]) for shard, row in places)


@dataclass(frozen=True)
class Plan:
    """What is left to encode.

    Args:
        todo: distinct captions that are not in the cache yet.
        done: number of captions that are.
        bytes_needed: upper bound of what is left to write.
        bytes_each: upper bound of the size of one caption on disk.
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
    """Encode captions into a cache; an interrupted one is continued.

    Args:
        folder: a new folder, or a cache with the same settings.
        guide: the guide whose features are stored.
        captions: captions to store; repeated ones are stored once.
        block: the `lgvq.guide` block that builds the guide.
        maskings: masks per caption.
        ratio: lowest and highest share of masked words.
        padding: keep features at padding; without them they read as 0.
        seed: seed of the masks.
        batch_size: captions per batch.

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
    is_new = _require_same_cache(folder, facts)
    for leftover in folder.glob("*.part"):  # of killed runs
        leftover.unlink(missing_ok=True)
    unique = list(dict.fromkeys(["", *captions]))  # images without a caption ask for ""
    found = Shards(folder, facts).find(unique)
    todo = [text for text, place in zip(unique, found, strict=True) if place is None]
    numbers = (maskings + 1) * (facts.max_length * facts.token_dim + facts.sentence_dim)
    extra = facts.max_length * (7 + maskings) + 8 * (maskings + 3) + KEY_BYTES
    each = 4 * numbers + extra
    needed = len(todo) * each + is_new * guide.vocabulary.numel() * 4
    plan = Plan(todo, len(unique) - len(todo), needed, each)
    return plan, _fill(folder, facts, guide, plan, batch_size)


def _require_same_cache(folder: Path, facts: "CacheFacts") -> bool:
    """Return whether `folder` is new; refuse another cache and other files."""
    if (folder / INDEX).is_file():
        changed = differing(asdict(CacheFacts.read(folder)), asdict(facts))
        if changed:
            raise ConfigError(
                f"the text cache {folder} was made with {'; '.join(changed)}; choose another folder"
            )
        return False
    # A run that was killed at its start leaves the vocabulary only.
    is_begun = folder.is_dir() and all(p.name.startswith(VOCABULARY) for p in folder.iterdir())
    if folder.exists() and not is_begun:
        raise ConfigError(f"{folder} is not empty and holds no text cache; choose a new folder")
    return True


def _fill(
    folder: Path, facts: "CacheFacts", guide: AbstractGuide, plan: Plan, batch_size: int
) -> Iterator[int]:
    """Encode what is left; yield the size of each batch before its shard is written."""
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = guide.vocabulary.detach().float().cpu().contiguous().numpy()
        write_bytes(folder / VOCABULARY, save({"vocabulary": vocabulary}))
        write_json(folder / INDEX, asdict(facts))
    size = max(batch_size, SHARD_BYTES // plan.bytes_each // batch_size * batch_size)
    taken = [int(path.name[6:12]) for path in folder.glob("shard-*.safetensors")]
    starts = range(0, len(plan.todo), size)
    for number, start in enumerate(starts, start=max(taken, default=-1) + 1):
        chunk, parts, count = plan.todo[start : start + size], [], 0
        for at in range(0, len(chunk), batch_size):
            batch = chunk[at : at + batch_size]
            parts.append(_encode_batch(guide, batch, facts, first_row=count))
            count += len(parts[-1]["rows"])
            yield len(batch)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_bytes(folder / f"shard-{number:06d}.safetensors", save(arrays))


def _encode_batch(
    guide: AbstractGuide, captions: list[str], facts: "CacheFacts", *, first_row: int
) -> Arrays:
    """Return the arrays of :func:`open_shard` for a batch, encoded whole and under each mask."""
    cut = [guide.tokenize([caption]).cut > 0 for caption in captions]
    plain = guide.encode(captions).padded(guide.max_length, guide.pad_id)
    attention, sentence = plain.attention_mask.cpu().numpy(), plain.sentence.cpu().numpy()
    blocks: list[np.ndarray] = []
    ends = [first_row]

    def append(tokens: np.ndarray, row: int) -> int:
        """Store the token features of a caption; return the number of their first row."""
        blocks.append(tokens[row] if facts.padding else tokens[row][attention[row]])
        ends.append(ends[-1] + len(blocks[-1]))
        return ends[-2]

    tokens = plain.tokens.cpu().numpy()
    first = np.array([append(tokens, row) for row in range(len(captions))], np.int64)
    arrays = {
        "keys": np.stack([np.frombuffer(caption_key(text), np.uint8) for text in captions]),
        "cut": np.array(cut),
        "attention": attention,
        "token_ids": plain.token_ids.cpu().numpy().astype(np.int32),
        "word_ids": plain.word_ids.cpu().numpy().astype(np.int16),
        "sentence": sentence,
        "first": first,
    }
    if facts.maskings:
        masks = draw_maskings(captions, plain.word_ids.cpu(), facts)  # (B, M, T)
        masked_first = np.repeat(first[:, None], facts.maskings, axis=1)
        masked_sentence = np.repeat(sentence[:, None], facts.maskings, axis=1)
        for m in range(facts.maskings):
            masked = guide.encode(captions, token_mask=torch.from_numpy(masks[:, m]))
            masked = masked.padded(guide.max_length, guide.pad_id)
            tokens, sentence = masked.tokens.cpu().numpy(), masked.sentence.cpu().numpy()
            for row in range(len(captions)):
                # Short captions have few distinct masks: equal ones are stored once.
                equal = (masks[row, :m] == masks[row, m]).all(axis=1).nonzero()[0]
                if len(equal):
                    masked_first[row, m] = masked_first[row, equal[0]]
                    masked_sentence[row, m] = masked_sentence[row, equal[0]]
                elif masks[row, m].any():
                    masked_first[row, m] = append(tokens, row)
                    masked_sentence[row, m] = sentence[row]
        arrays |= {"masks": masks, "masked_first": masked_first, "masked_sentence": masked_sentence}
    return {**arrays, "rows": np.concatenate(blocks)}


def draw_maskings(captions: Sequence[str], word_ids: Tensor, facts: "CacheFacts") -> np.ndarray:
    """Draw the masks of each caption, (B, M, T) bool, from the seed and the caption alone."""
    drawn = []
    for caption, words in zip(captions, word_ids, strict=True):
        digest = hashlib.sha256(f"{facts.seed} {caption}".encode("utf-8", "surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        many = words.expand(facts.maskings, -1)
        drawn.append(sample_word_mask(many, ratio=facts.ratio, generator=generator).numpy())
    return np.stack(drawn)


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
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raise ConfigError for impossible sizes."""
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
                f"{folder} holds no text cache; create one: lgvq cache -b CONFIG -o {folder}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; create the cache again") from error
        names = {entry.name for entry in fields(cls)}
        is_ours = isinstance(given, Mapping) and given.get("format") == FORMAT
        if not is_ours or not names <= given.keys():
            raise ConfigError(f"{path}: not of format {FORMAT}; create the cache again")
        try:
            return build(cls, {name: given[name] for name in names}, INDEX)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}; create the cache again") from error


def read_vocabulary(folder: Path, token_dim: int) -> np.ndarray:
    """Return the token embedding, (V, token_dim) float32."""
    try:
        found = load_file(folder / VOCABULARY)["vocabulary"]
        if found.dtype != np.float32 or found.ndim != 2 or found.shape[1] != token_dim:
            raise ValueError(f"expected (V, {token_dim}) float32, got {found.shape} {found.dtype}")
        return found
    except Exception as error:  # safetensors has an exception of its own
        raise ConfigError(f"{folder / VOCABULARY}: {error}; create the cache again") from error


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
        sentence: (n, Ds) float32.
        first: number of a caption's first row in `rows`, (n,) int64.
        rows: token features, (R, Dt) float32.
        masks: (n, M, T) bool;  masked_first: (n, M);  masked_sentence: (n, M, Ds).

    Raises:
        ConfigError: if the file is broken, or its shapes do not fit `facts`.
    """
    try:
        with safe_open(path, framework="pt") as file:  # its tensors are views of the memory map
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        _check_arrays(arrays, facts)
        return arrays
    except Exception as error:  # of safetensors, torch or the system
        raise ConfigError(
            f"{path} is broken ({error}); delete it and run `lgvq cache` again"
        ) from error


def _check_arrays(arrays: Arrays, facts: CacheFacts) -> None:
    """Raise unless all arrays are there with their shapes, and all rows are within `rows`."""
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
        ends = arrays[name] + taken.reshape(-1, *[1] * (arrays[name].ndim - 1))
        if n and (arrays[name].min() < 0 or ends.max() > len(arrays["rows"])):
            raise ValueError(f"{name}: rows beyond the {len(arrays['rows'])} that exist")
