"""The network of the probes: causal or full self-attention, cross-attention to a memory, a cache.

tokens --embed + positions--> [self-attention, cross-attention to memory, MLP] x depth --> states
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._fit import ProbeConfig


@dataclass
class Cache:
    """Keys and values of the tokens seen so far, one pair a block."""

    pairs: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many tokens were seen."""
        return 0 if not self.pairs or self.pairs[0] is None else self.pairs[0][0].shape[2]


class Attention(nn.Module):
    """Multi-head attention from x to a context."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def pair(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a context (B, L, D)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.split(key), self.split(value)

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Return (B, L, D); `mask` is True where attention may go, (B, S)."""
        allowed = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(
            self.split(self.query(x)), *pair, attn_mask=allowed, dropout_p=dropout, is_causal=causal
        )
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP, norms first."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = Attention(width, config.heads, config.dropout)
        self.cross = Attention(width, config.heads, config.dropout)
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
        *,
        memory_mask: Tensor | None,
        token_mask: Tensor | None,
        causal: bool,
        cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the states and the keys and values of the tokens so far."""
        normed = self.norms[0](x)
        pair = self.own.pair(normed)
        if cached is not None:
            pair = (torch.cat([cached[0], pair[0]], 2), torch.cat([cached[1], pair[1]], 2))
        x = x + self.drop(self.own(normed, pair, mask=token_mask, causal=causal))
        context = self.cross.pair(memory)
        x = x + self.drop(self.cross(self.norms[1](x), context, mask=memory_mask))
        return x + self.drop(self.mlp(self.norms[2](x))), pair


class ProbeTransformer(nn.Module):
    """Tokens with a memory to states.

    Args:
        config: its size.
        vocabulary_size: of the tokens.
        length: most tokens there can be.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self, config: ProbeConfig, *, vocabulary_size: int, length: int, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary_size, config.width)
        self.positions = nn.Parameter(torch.empty(1, length, config.width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return states (B, L, D).

        Args:
            tokens: (B, L) int64; with a cache the new ones only, one at a time.
            memory: (B, S, D).
            memory_mask, token_mask: True at what may be attended to, (B, S) and (B, L).
            cache: of the tokens before; the new ones are added to it.
        """
        return self.states(
            self.embed(tokens), memory, memory_mask=memory_mask, token_mask=token_mask, cache=cache
        )

    def states(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the states of embedded tokens, (B, L, D); arguments as :meth:`forward`."""
        begin = 0 if cache is None else cache.length
        causal = self.causal and x.shape[1] > 1
        x = x + self.positions[:, begin : begin + x.shape[1]]
        for i, block in enumerate(self.blocks):
            cached = cache.pairs[i] if cache is not None and i < len(cache.pairs) else None
            x, pair = block(
                x,
                memory,
                memory_mask=memory_mask,
                token_mask=token_mask,
                causal=causal,
                cached=cached,
            )
            if cache is not None:
                if len(cache.pairs) <= i:
                    cache.pairs.append(None)
                cache.pairs[i] = pair
        return self.norm(x)


class CodeMemory(nn.Module):
    """Codes (B, N, C) to a memory (B, N, D): shifted and scaled as in training, plus positions.

    Args:
        codes: of training images, (M, N, C); they give the shift and the scale.
        width: D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, width: int):
        super().__init__()
        flat = codes.flatten(0, 1).double()
        self.register_buffer("mean", flat.mean(dim=0).float())
        deviation = (flat - flat.mean(dim=0)).square().mean().sqrt().clamp(min=1e-8)
        self.register_buffer("scale", deviation.float())
        self.enter = nn.Linear(codes.shape[-1], width)
        self.positions = nn.Parameter(torch.empty(1, codes.shape[1], width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return self.norm(self.enter((codes - self.mean) / self.scale) + self.positions)
