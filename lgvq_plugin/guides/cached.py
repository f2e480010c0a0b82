"""Text features from disk: `lgvq cache` encodes every caption once, training looks them up.

cache.json                  the guide's fingerprint and config, precision, how words were masked
vocabulary.safetensors      the guide's token embedding
shard-000000.safetensors    features of captions, in the order in which they were encoded

Shards are memory-mapped and never change, so any number of processes can read while one adds more.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from ..config import differing
from ..files import remove_parts, write_bytes, write_json
from ..sockets import ConfigError, require_known
from ..types import TextFeatures, TextTokens
from .base import PLACES, AbstractGuide, UnknownWords, build_guide
from .shards import (
    FORMATS,
    INDEX,
    KEY_BYTES,
    VOCABULARY,
    CacheFacts,
    Place,
    Shards,
    encode_batch,
    read_vocabulary,
)
from .tokens import features_of

logger = logging.getLogger(__name__)

MISSING = ("error", "encode")
SHARD_BYTES = 32 * 2**20  # held in memory while it is encoded, lost if the run is killed
T = TypeVar("T")


class CachedGuide(AbstractGuide):
    """Another guide's features from disk, with no text tower in memory.

    At precision float32 they are bit-identical to those of the guide when the cache was written,
    otherwise rounded, and 0 at padding. The guide is built once, to compare its fingerprint with
    the cache's, and then released.

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
        require_known([missing], MISSING, "guide.missing: {!r}")
        if rest and guide is None:
            raise ConfigError(f"guide cached: no key {next(iter(rest))!r}; put it under `guide:`")
        self._folder = Path(folder).expanduser()
        self._given = {**rest, **guide} if guide is not None else None
        self._missing, self._verify = missing, verify
        self.depends_on_batch = missing == "encode"  # a batch with a new caption is encoded anew
        self.facts = CacheFacts.read(self._folder)
        self._source: AbstractGuide | None = None
        self._last: tuple[tuple[str, ...], list[Place]] | None = None
        self._require_same_guide()
        self._shards = Shards(self._folder, self.facts)
        self.max_length = self.facts.max_length
        self.token_dim, self.sentence_dim = self.facts.token_dim, self.facts.sentence_dim
        self._vocabulary = torch.from_numpy(read_vocabulary(self._folder, self.facts))
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
        ids, words, attention = (
            torch.from_numpy(_stack(places, name, (self.max_length,), kind))
            for name, kind in (("token_ids", np.int64), ("word_ids", np.int64), ("attention", bool))
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
        places = self._find(captions)
        if places is None:
            return self._ask_guide(lambda guide: guide.encode(captions, token_mask=token_mask))
        text, facts = self.tokenize(captions), self.facts
        attention = text.attention_mask.numpy()
        shape = (len(captions), int(attention.sum(axis=1).max(initial=0)))
        if token_mask is not None:
            expected = (len(captions), self.max_length)
            if tuple(token_mask.shape) not in (expected, shape):
                raise ValueError(f"token_mask: expected {expected}, got {tuple(token_mask.shape)}")
        numbers = self._mask_numbers(captions, places, text, token_mask)
        if numbers is None:
            return self._ask_guide(lambda guide: guide.encode(captions, token_mask=token_mask))
        rows, sentences = [facts.tokens.empty], [facts.sentences.empty]
        taken = attention.sum(axis=1) if not facts.padding else [self.max_length] * shape[0]
        for (shard, row), number, count in zip(places, numbers, taken, strict=True):
            prefix, at = ("", row) if number is None else ("masked_", (row, number))
            first = int(shard[f"{prefix}first"][at])
            rows.append(shard["rows"][first : first + count])
            sentences.append(shard[f"{prefix}sentence"][at][None])
        found = facts.tokens.unpack(np.concatenate(rows))
        if facts.padding:
            tokens = found.reshape(-1, self.max_length, facts.token_dim)[:, : shape[1]]
        else:
            tokens = np.zeros((*shape, facts.token_dim), np.float32)
            tokens[attention[:, : shape[1]]] = found
        sentence = facts.sentences.unpack(np.concatenate(sentences))
        of_tokens, of_sentence = (
            torch.from_numpy(each).to(self.device, non_blocking=self.device.type == "cuda")
            for each in (tokens, sentence)
        )
        return features_of(text, of_tokens, of_sentence, self._vocabulary)

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
        numbers = torch.randint(facts.maskings, (len(captions),), generator=generator).numpy()
        masks = _stack(places, "masks", (facts.maskings, self.max_length), bool)
        drawn = masks[np.arange(len(places)), numbers, : word_ids.shape[1]]
        return torch.from_numpy(drawn).to(word_ids.device)

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

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the guide that the features come from."""
        return self.facts.fingerprint

    def _require_same_guide(self) -> None:
        given = dict(self._given or self.facts.guide)
        if self._verify:
            fingerprint = build_guide(given).fingerprint
            is_same, wanted = fingerprint == self.fingerprint, f", fingerprint {fingerprint[:12]}"
        else:
            default = {"use": "open_clip", "dtype": "float32"}
            known, asked, wanted = {**default, **self.facts.guide}, default | given, ""
            is_same = all(known.get(key) == asked[key] for key in asked.keys() - {*PLACES})
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
            pairs = zip(captions, places, strict=True)
            self.count_truncated(text for text, (shard, row) in pairs if shard["cut"][row])
        return places

    def _mask_numbers(
        self, captions: Sequence[str], places: list[Place], text: TextTokens, mask: Tensor | None
    ) -> list[int | None] | None:
        """Return which stored mask each caption has, None for no masked word; None to encode."""
        numbers: list[int | None] = [None] * len(places)
        if mask is None:
            return numbers
        masked = mask.cpu() & (text.word_ids[:, : mask.shape[1]] >= 0)
        for at in masked.any(dim=-1).nonzero().flatten().tolist():
            shard, row = places[at]
            held = shard["masks"][row][:, : masked.shape[1]] if self.facts.maskings else ()
            number = next((i for i, m in enumerate(held) if (m == masked[at].numpy()).all()), None)
            if number is None and self._missing == "encode":
                return None
            if number is None:
                raise ConfigError(
                    f"this masking of caption {captions[at]!r} is not in the text cache; draw "
                    "masks with draw_mask(...), or set `guide.missing: encode`"
                )
            numbers[at] = number
        return numbers

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


def _stack(places: list[Place], name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Return an array of the captions, (B, *shape)."""
    rows = [shard[name][row] for shard, row in places]
    return np.array(rows, kind).reshape(len(rows), *shape)


# Writing


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
    precision: str | None = None,
    padding: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Plan, Iterator[int]]:
    """Encode captions into a cache; an interrupted one is continued.

    Captions of about the same length are encoded together.

    Args:
        folder: a new folder, or a cache with the same settings.
        guide: the guide whose features are stored.
        captions: captions to store; repeated ones are stored once.
        block: the `lgvq.guide` block that builds the guide.
        maskings: masks per caption.
        ratio: lowest and highest share of masked words.
        precision: int4, int8 or float32; None is that of the cache, int4 for a new one. Of int4
            and int8, sentences and vocabulary have int8.
        padding: keep features at padding, at precision float32; without them they read as 0.
        seed: seed of the masks.
        batch_size: captions per batch.

    Returns:
        What is left to do, and an iterator that does it and yields the size of each batch.

    Raises:
        ConfigError: if the folder holds something else, or another cache.
    """
    if precision is None:
        is_cache = (folder / INDEX).is_file()
        precision = CacheFacts.read(folder).precision if is_cache else "int4"
    facts = CacheFacts(
        fingerprint=guide.fingerprint,
        guide={key: value for key, value in block.items() if key not in PLACES},
        max_length=guide.max_length,
        token_dim=guide.token_dim,
        sentence_dim=guide.sentence_dim,
        maskings=maskings,
        ratio=(float(ratio[0]), float(ratio[1])),
        padding=padding and precision == "float32",
        seed=seed,
        precision=precision,
        format=FORMATS[precision != "float32"],
    )
    for name in (INDEX, VOCABULARY):  # of a run that was killed at its start
        remove_parts(folder / name)
    is_new = _require_same_cache(folder, facts)
    remove_parts(folder)
    unique = list(dict.fromkeys(["", *captions]))  # images without a caption ask for ""
    found = Shards(folder, facts).find(unique)
    todo = [text for text, place in zip(unique, found, strict=True) if place is None]
    each = (maskings + 1) * (facts.max_length * facts.tokens.bytes + facts.sentences.bytes)
    each += facts.max_length * (7 + maskings) + 8 * (maskings + 3) + KEY_BYTES
    needed = len(todo) * each + is_new * len(guide.vocabulary) * facts.vocabulary.bytes
    plan = Plan(todo, len(unique) - len(todo), needed, each)
    return plan, _fill(folder, facts, guide, plan, batch_size)


def _require_same_cache(folder: Path, facts: CacheFacts) -> bool:
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
    folder: Path, facts: CacheFacts, guide: AbstractGuide, plan: Plan, batch_size: int
) -> Iterator[int]:
    """Encode what is left; yield the size of each batch before its shard is written."""
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = guide.vocabulary.detach().float().cpu().numpy()
        write_bytes(folder / VOCABULARY, save({"vocabulary": facts.vocabulary.pack(vocabulary)}))
        write_json(folder / INDEX, asdict(facts))
    size = max(batch_size, SHARD_BYTES // plan.bytes_each // batch_size * batch_size)
    taken = [int(path.name[6:12]) for path in folder.glob("shard-*.safetensors")]
    pad = int(guide.tokenize(["", "a"]).token_ids[0, -1])
    starts = range(0, len(plan.todo), size)
    for number, start in enumerate(starts, start=max(taken, default=-1) + 1):
        texts = plan.todo[start : start + size]
        tokens = {text: guide.tokenize([text]) for text in texts}
        texts.sort(key=lambda text: int(tokens[text].attention_mask.sum()))
        parts, count = [], 0
        for at in range(0, len(texts), batch_size):
            batch = texts[at : at + batch_size]
            parts.append(encode_batch(guide, batch, facts, pad=pad, first_row=count))
            parts[-1]["cut"] = np.array([tokens[text].cut > 0 for text in batch])
            count += len(parts[-1]["rows"])
            yield len(batch)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_bytes(folder / f"shard-{number:06d}.safetensors", save(arrays))
