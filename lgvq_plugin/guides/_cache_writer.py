"""Fill a text cache: captions are encoded in batches, shard by shard; what is there stays.

captions --guide--> features --+
        --masks, guide--> features of each masking --+--> one shard, written in one go
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._fields import differing
from ..functional import sample_word_mask
from ..sockets import ConfigError
from ..types import TextFeatures
from ._cache_file import (
    INDEX,
    KEY_BYTES,
    VOCABULARY,
    CacheFacts,
    Shards,
    caption_key,
    write_shard,
    write_vocabulary,
)
from .base import PLACES, AbstractGuide

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
