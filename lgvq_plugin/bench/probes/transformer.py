"""The network of the probes: a transformer over tokens that attends to codes or to text.

tokens --embed--> [self-attention, cross-attention to a memory, MLP] x depth --> states
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    """Keys and values of the tokens so far, one pair per block."""

    pairs: list[KeyValue] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.pairs[0][0].shape[2] if self.pairs else 0


class ProbeTransformer(nn.Module):
    """Tokens and a memory to states.

    Args:
        config: of the probe.
        vocabulary_size: number of tokens.
        length: maximum sequence length.
        causal: whether a token sees only earlier ones.
    """

    def __init__(
        self, config: ProbeConfig, *, vocabulary_size: int, length: int, causal: bool
    ) -> None:
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
    ) -> Tensor:
        """Return states (B, L, D).

        Args:
            inputs: tokens (B, L) int64, or their embeddings (B, L, D); with a cache only the new
                ones, one at a time.
            memory: (B, S, D).
            memory_mask: True where the memory may be attended to, (B, S).
            token_mask: True where tokens may be attended to, (B, L).
            cache: of the earlier tokens; the new ones are added to it.
        """
        begin = 0 if cache is None else cache.length
        causal = self.causal and inputs.shape[1] > 1
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        x = x + self.pos_embed[:, begin : begin + x.shape[1]]
        pairs = []
        for i, block in enumerate(self.blocks):
            cached = cache.pairs[i] if cache is not None and cache.pairs else None
            x, pair = block(x, memory, memory_mask, token_mask, causal, cached)
            pairs.append(pair)
        if cache is not None:
            cache.pairs = pairs
        return self.norm(x)


class _Block(nn.Module):
    """Self-attention, cross-attention and an MLP, pre-norm."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = _Attention(width, config.heads, config.dropout)
        self.cross = _Attention(width, config.heads, config.dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        token_mask: Tensor | None,
        causal: bool,
        cached: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the states, and the keys and values of all tokens so far."""
        normed = self.norms[0](x)
        pair = self.own.keys_and_values(normed)
        if cached is not None:
            pair = (torch.cat([cached[0], pair[0]], 2), torch.cat([cached[1], pair[1]], 2))
        x = x + self.drop(self.own(normed, pair, mask=token_mask, causal=causal))
        context = self.cross.keys_and_values(memory)
        x = x + self.drop(self.cross(self.norms[1](x), context, mask=memory_mask))
        return x + self.drop(self.mlp(self.norms[2](x))), pair


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
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
        dropout = self.dropout if self.training else 0.0
        query = self._split(self.query(x))
        seen = F.scaled_dot_product_attention(
            query, *pair, attn_mask=allowed, dropout_p=dropout, is_causal=causal
        )
        return self.out(seen.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape (B, L, D) to (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CodeMemory(nn.Module):
    """Codes (B, N, C) to a memory (B, N, D): standardized, projected, plus positions.

    Args:
        codes: of training images, whose first 1,024 give the shift and the scale.
        width: D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, codes: FrozenCodes, width: int):
        super().__init__()
        sample = codes.codes(torch.arange(min(len(codes), 1024)))
        flat = sample.flatten(0, 1).double()
        self.register_buffer("mean", flat.mean(dim=0).float())
        deviation = (flat - flat.mean(dim=0)).square().mean().sqrt().clamp(min=1e-8)
        self.register_buffer("scale", deviation.float())
        self.in_proj = nn.Linear(sample.shape[-1], width)
        self.pos_embed = nn.Parameter(torch.empty(1, sample.shape[1], width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return self.norm(self.in_proj((codes - self.mean) / self.scale) + self.pos_embed)


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
