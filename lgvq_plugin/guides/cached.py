"""Text features from disk: `lgvq cache` encodes every caption once, training only looks them up.

captions --sha256--> shard, row --memory map--> TextFeatures, the bits that the guide gave
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sockets import ConfigError, suggest
from ..types import TextFeatures, TextTokens
from ._cache_file import CacheFacts, Shard, Shards, read_vocabulary
from ._cache_writer import write_cache
from .base import PLACES, AbstractGuide, UnknownWords, build_guide

log = logging.getLogger(__name__)

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
            log.warning(
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
            log.warning(
                "a caption has more than max_length = %d tokens and was cut, its end token kept; "
                "the guide's `truncated` goes on counting",
                self.max_length,
            )
        self.truncated += cut


def _cut(places: list[Place]) -> int:
    return sum(bool(shard["cut"][row]) for shard, row in places)
