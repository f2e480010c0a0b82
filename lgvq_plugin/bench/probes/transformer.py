"""The network of the probes: a transformer over tokens that attends to codes or to text.

tokens --embed--> [self-attention, cross-attention to a memory, MLP] x depth --> states
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import FrozenCodes
from .trainer import ProbeConfig

SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
PAD, START, END, UNKNOWN = range(4)
KeyValue = tuple[Tensor, Tensor]


@dataclass
class Cache:
    """Keys and values per block: of the tokens so far, and of the memory, which stays the same."""

    pairs: list[KeyValue] = field(default_factory=list)
    memory: list[KeyValue] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.pairs[0][0].shape[2] if self.pairs else 0


class ProbeTransformer(nn.Module):
    """Tokens and a memory to states.

    `vocabulary_size` is the number of tokens, `length` the maximum length of a sequence; if
    `causal`, a token sees only earlier ones.
    """

    def __init__(self, config: ProbeConfig, *, vocabulary_size: int, length: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, length, config.width).normal_(std=0.02))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Return states (B, L, D), or (B, R, D) with `read`.

        Args:
            inputs: tokens (B, L) int64, or their embeddings (B, L, D); with a cache only the new
                ones, one at a time.
            memory: (B, S, D).
            memory_mask, token_mask: True where they may be attended to, (B, S) and (B, L).
            cache: of the earlier tokens; the new ones are added to it.
            read: the positions whose states are needed, (B, R) int64, if not causal; the last
                block computes no others.
        """
        begin = 0 if cache is None else cache.length
        causal = self.causal and inputs.shape[1] > 1
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        x = x + self.pos_embed[:, begin : begin + x.shape[1]]
        pairs, contexts = [], []
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            normed = block.norms[0](x)
            pair = block.own.keys_and_values(normed)
            if begin and cache is not None:
                pair = tuple(torch.cat(both, 2) for both in zip(cache.pairs[i], pair, strict=True))
                context = cache.memory[i]
            else:
                context = block.cross.keys_and_values(memory)
            if read is not None and block is blocks[-1]:
                x, normed = (y.take_along_dim(read[..., None], dim=1) for y in (x, normed))
            x = block(x, normed, pair, context, memory_mask, token_mask, causal)
            pairs.append(pair)
            contexts.append(context)
        if cache is not None:
            cache.pairs, cache.memory = pairs, contexts
        return self.norm(x)


class _Block(nn.Module):
    """Self-attention, cross-attention and an MLP, pre-norm."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        width, dropout = config.width, Dropout(config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = _Attention(width, config.heads, dropout)
        self.cross = _Attention(width, config.heads, dropout)
        layers = (nn.Linear(width, 4 * width), nn.GELU(), dropout, nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(*layers)
        self.drop = dropout

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        pair: KeyValue,
        context: KeyValue,
        memory_mask: Tensor | None,
        token_mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        x = x + self.drop(self.own(normed, pair, mask=token_mask, causal=causal))
        x = x + self.drop(self.cross(self.norms[1](x), context, mask=memory_mask))
        return x + self.drop(self.mlp(self.norms[2](x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, drop: nn.Module):
        super().__init__()
        self.heads, self.drop = heads, drop
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_and_values(self, context: Tensor) -> KeyValue:
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self, x: Tensor, pair: KeyValue, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return (B, L, D); `mask` is True where keys may be attended to, (B, S)."""
        allowed = None if mask is None else mask[:, None, None, :]
        query, (key, value) = self._split(self.query(x)), pair
        if self.training and self.drop.rate:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if causal:
                allowed = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            seen = self.drop(scores.softmax(dim=-1)) @ value
        else:
            seen = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, is_causal=causal
            )
        return self.out(seen.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape (B, L, D) to (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Dropout(nn.Module):
    """Dropout from 16 random bits per value, in a tenth of the time of PyTorch's on a CPU.

    PyTorch's draws differ between makes of processor; these are the same on all.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = round(rate * 2**16) / 2**16

    def forward(self, x: Tensor) -> Tensor:
        """Return values of which a share of `rate` is zero, the others scaled up."""
        if not (self.training and self.rate):
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= self.rate * 2**16 - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.rate))


class StandardizedCodes(nn.Module):
    """A network whose inputs, codes, are standardized.

    The first 1,024 of the training images' `codes` give the shift and the scale.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, codes: FrozenCodes):
        super().__init__()
        sample = codes.codes(torch.arange(min(len(codes), 1024))).flatten(0, 1).double()
        self.register_buffer("mean", sample.mean(dim=0).float())
        deviation = (sample - sample.mean(dim=0)).square().mean().sqrt().clamp(min=1e-8)
        self.register_buffer("scale", deviation.float())

    def standardized(self, codes: Tensor) -> Tensor:
        """Shift and scale codes (B, N, C)."""
        return (codes - self.mean) / self.scale


class CodeMemory(StandardizedCodes):
    """Codes (B, N, C) to a memory (B, N, D): standardized, projected, plus positions.

    `codes` are those of the training images; `width` is D.
    """

    def __init__(self, codes: FrozenCodes, width: int):
        super().__init__(codes)
        self.in_proj = nn.Linear(codes.width, width)
        length = codes.grid[0] * codes.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, length, width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return self.norm(self.in_proj(self.standardized(codes)) + self.pos_embed)


class Words:
    """The words of at least `min_count` sentences, the most frequent first.

    Example:
        >>> words = Words(["a red star", "a ring"], min_count=1)
        >>> words.encode(["a blue star"], length=6).tolist()
        [[1, 4, 3, 7, 2, 0]]
        >>> words.decode([4, 6, 2, 4])
        'a ring'
    """

    def __init__(self, sentences: Iterable[str], *, min_count: int):
        counts = Counter(word for sentence in sentences for word in set(sentence.split()))
        kept = (word for word in counts if counts[word] >= min_count)
        self.known = (*SPECIAL, *sorted(kept, key=lambda word: (-counts[word], word)))
        self._number = {word: i for i, word in enumerate(self.known)}

    def __len__(self) -> int:
        """Return the size, special tokens included."""
        return len(self.known)

    def encode(self, sentences: Sequence[str], *, length: int) -> Tensor:
        """Return (B, length) int64: start, words (truncated), end, padding."""
        rows = torch.full((len(sentences), length), PAD)
        for row, sentence in zip(rows, sentences, strict=True):
            words = [self._number.get(word, UNKNOWN) for word in sentence.split()][: length - 2]
            row[: len(words) + 2] = torch.tensor([START, *words, END])
        return rows

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the words before the first end token, without special ones."""
        end = numbers.index(END) if END in numbers else len(numbers)
        return " ".join(self.known[number] for number in numbers[:end] if number > UNKNOWN)


def trim(tokens: Tensor) -> Tensor:
    """Remove trailing columns of padding only, (B, L) to (B, l)."""
    return tokens[:, : int((tokens != PAD).sum(dim=1).max())]


def used_length(mask: Tensor) -> int:
    """Return the number of leading columns of (B, L) bool after which all are False."""
    return int(((torch.arange(mask.shape[1], device=mask.device) + 1) * mask).max())
