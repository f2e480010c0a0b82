"""What guides with a network of their own share: tokenize, truncate, mask and encode captions."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import require
from ..types import TextFeatures, TextTokens
from .base import AbstractGuide

MAX_KNOWN = 100_000  # captions whose tokens are kept
DTYPES = ("float32", "bfloat16")
CPU_ROWS = 8  # captions per forward pass on a CPU

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and word numbers of one caption, start and end included."""


class AbstractTokenGuide(AbstractGuide):
    """A frozen network over rows of tokens; masked words become one token id.

    A step asks for the tokens of its captions several times, and epochs do again: they are kept.
    """

    _network: nn.Module
    _embedding: nn.Embedding  # of tokens, a part of the network
    _source: Mapping[str, Any]  # constructor arguments, except max_length and device
    _words: int  # size of the vocabulary, without the row for masked words
    _mask_id: int

    @abstractmethod
    def _rows(self, captions: Sequence[str]) -> list[Row]:
        """Return token ids and word numbers of each caption, start and end included."""

    @abstractmethod
    def _forward(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, Dt) and sentence (B, Ds) of ids and mask (B, T) on the device."""

    @property
    def vocabulary(self) -> Tensor:
        """Token embedding, (V, Dt) float32, on :attr:`device`."""
        weight = self._embedding.weight[: self._words]
        if weight.dtype == torch.float32:
            return weight
        kept: Tensor | None = self.__dict__.get("_float_vocabulary")
        if kept is None or kept.device != weight.device:
            with torch.inference_mode(False):  # training may need it later
                kept = self.__dict__["_float_vocabulary"] = weight.float()
        return kept

    def _set_dtype(self, dtype: str) -> None:
        """Cast the network, whose weights are float32 so far; features stay float32."""
        require(dtype in DTYPES, "guide.dtype", "|".join(DTYPES), dtype)
        if dtype != DTYPES[0]:  # the configs of older caches do not have the key
            self._source = {**self._source, "dtype": dtype}
            self._network.to(getattr(torch, dtype))

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._embedding.weight.device

    def to(self, device: torch.device | str) -> "AbstractTokenGuide":
        """Move the network; returns self."""
        self._network.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {**self._source, "max_length": self.max_length, "device": str(self.device)}

    def weights(self) -> Mapping[str, Tensor]:
        """Return the network's tensors."""
        return self._network.state_dict()

    def tokenize(self, captions: Sequence[str]) -> TextTokens:
        """Split B captions into (B, max_length) tokens; long ones are cut, their end token kept."""
        known = self.__dict__.setdefault("_known", {})
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if len(known) + len(new) > MAX_KNOWN:
            known.clear()
            new = [*dict.fromkeys(captions)]
        if new:
            known |= zip(new, self._rows(new), strict=True)
        tokens = assemble([known[each] for each in captions], self.max_length, self.pad_id)
        if tokens.cut:
            self.count_truncated(each for each in captions if len(known[each][0]) > self.max_length)
        return tokens

    def encode(self, captions: Sequence[str], token_mask: Tensor | None = None) -> TextFeatures:
        """Encode B captions, trimmed to the longest; start, end and padding are never masked.

        Args:
            captions: B strings.
            token_mask: tokens to mask, (B, max_length) or (B, T) bool.
        """
        return self._encode(captions, token_mask, at_once=CPU_ROWS)

    def encode_apart(self, captions: Sequence[str]) -> TextFeatures:
        """Encode B captions; on a CPU the features of one do not depend on the others."""
        return self._encode(captions, None, at_once=1)

    @torch.no_grad()
    def _encode(
        self, captions: Sequence[str], token_mask: Tensor | None, *, at_once: int
    ) -> TextFeatures:
        """Encode; on a CPU, where padding costs, `at_once` captions of similar length together."""
        text = self.tokenize(captions)
        device = self._embedding.weight.device
        lengths = text.attention_mask.sum(dim=1)
        longest = int(lengths.max()) if len(lengths) else 0
        shape, seen = tuple(text.token_ids.shape), text.token_ids
        if token_mask is not None:
            if tuple(token_mask.shape) not in (shape, (len(captions), longest)):
                raise ValueError(f"token_mask: expected {shape}, got {tuple(token_mask.shape)}")
            masked = token_mask.cpu() & (text.word_ids[:, : token_mask.shape[1]] >= 0)
            seen = seen[:, :longest].masked_fill(masked[:, :longest], self._mask_id)
        tokens = torch.zeros(len(seen), longest, self.token_dim, device=device)
        sentence = torch.zeros(len(seen), self.sentence_dim, device=device)
        groups = lengths.argsort(stable=True).split(at_once)
        if device.type != "cpu":
            groups = (torch.arange(len(lengths)),)
        is_cuda = device.type == "cuda"  # elsewhere a copy that is not waited for may be a race
        with torch.autocast(device.type, enabled=False):
            for rows in groups if len(lengths) else ():
                length = int(lengths[rows].max())
                batch = seen[rows, :length], text.attention_mask[rows, :length], rows
                ids, mask, where = (each.to(device, non_blocking=is_cuda) for each in batch)
                of_tokens, of_sentence = self._forward(ids, mask)
                tokens[where, :length], sentence[where] = of_tokens.float(), of_sentence.float()
        return features_of(text, tokens, sentence, self.vocabulary)


def features_of(
    text: TextTokens, tokens: Tensor, sentence: Tensor, vocabulary: Tensor
) -> TextFeatures:
    """Return features of captions with their tokens, trimmed as `tokens` are, on their device."""
    is_cuda = tokens.device.type == "cuda"  # elsewhere a copy that is not waited for may be a race
    parts = (text.token_ids, text.attention_mask, text.word_ids)
    cut = (each[:, : tokens.shape[1]] for each in parts)
    ids, mask, words = (each.to(tokens.device, non_blocking=is_cuda) for each in cut)
    return TextFeatures(ids, mask, words, tokens, sentence, vocabulary)


def assemble(rows: Sequence[Row], length: int, pad: int) -> TextTokens:
    """Cut rows to `length`, keeping their last token, and pad the shorter ones.

    Args:
        rows: B captions; the last token of each is its end token.
        length: T.
        pad: token id of the padding.

    Returns:
        (B, T) tokens, with the number of truncated rows.

    Example:
        >>> tokens = assemble([([7, 5, 6, 9], [-1, 0, 1, -1]), ([7, 9], [-1, -1])],
        ...                   length=3, pad=0)
        >>> tokens.token_ids.tolist(), tokens.word_ids.tolist(), tokens.cut
        ([[7, 5, 9], [7, 9, 0]], [[-1, 0, -1], [-1, -1, -1]], 1)
    """
    kept = [(_cut(ids, length), _cut(words, length)) for ids, words in rows]
    gaps = [length - len(ids) for ids, _ in kept]
    token_ids = [[*ids, *[pad] * gap] for (ids, _), gap in zip(kept, gaps, strict=True)]
    word_ids = [[*words, *[-1] * gap] for (_, words), gap in zip(kept, gaps, strict=True)]
    used = torch.tensor([[len(ids)] for ids, _ in kept], dtype=torch.int64).reshape(-1, 1)
    return TextTokens(
        torch.tensor(token_ids, dtype=torch.int64).reshape(-1, length),
        torch.arange(length) < used,
        torch.tensor(word_ids, dtype=torch.int64).reshape(-1, length),
        sum(len(ids) > length for ids, _ in rows),
    )


def _cut(numbers: Sequence[int], length: int) -> Sequence[int]:
    """Return at most `length` numbers, the last one among them."""
    return numbers if len(numbers) <= length else [*numbers[: length - 1], numbers[-1]]


def require_length(max_length: int, limit: int) -> int:
    """Return `max_length`; raise ConfigError unless it is an int from 3 to `limit`."""
    is_int = isinstance(max_length, int) and not isinstance(max_length, bool)
    require(is_int, "guide.max_length", "an int", max_length)
    expected = f"3 to {limit}, the model's context"
    require(3 <= max_length <= limit, "guide.max_length", expected, max_length)
    return max_length


def with_mean_row(embedding: nn.Embedding) -> nn.Embedding:
    """Return a frozen embedding with one more row, the mean of all: a token for masked words."""
    rows = torch.cat([embedding.weight, embedding.weight.mean(dim=0, keepdim=True)]).detach()
    return nn.Embedding.from_pretrained(rows, padding_idx=embedding.padding_idx, freeze=True)
