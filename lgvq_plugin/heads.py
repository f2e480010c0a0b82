"""The trained modules of LG-VQ on top of the host's codes; inference does not need them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sockets import ConfigError

Rows = tuple[Tensor, Tensor]
"""States (R, D) of tokens, and their places in the flattened (B, T)."""


class CodeViT(nn.Module):
    """A small vision transformer over quantized codes (paper section 3.2, Eq. 4).

    Turns a grid of codes into one summary and N patch tokens in the text space.

    Args:
        code_dim: C, width of a code.
        width: width of the transformer; C if None (256 in the paper).
        depth: number of blocks (2 in the released code).
        heads: attention heads (1 in the released code); must divide the width.
        out_dim: D, width of the text features.
        grid: (h, w) of the position embeddings; other grids interpolate them.

    Raises:
        ConfigError: if the heads do not divide the width.

    Example:
        >>> CodeViT(8, out_dim=6, grid=(2, 2))(torch.zeros(3, 8, 2, 2)).shape
        torch.Size([3, 5, 6])
    """

    OLD_NAMES = {
        "enter.": "in_proj.",
        "enter_norm.": "in_norm.",
        "positions": "pos_embed",
        "norm.": "out_norm.",
    }

    def __init__(
        self,
        code_dim: int,
        width: int | None = None,
        depth: int = 2,
        heads: int = 1,
        out_dim: int = 512,
        grid: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        width = width or code_dim
        _require_divisor(width, heads, "code-ViT")
        self.code_dim, self.grid = code_dim, (int(grid[0]), int(grid[1]))
        self.in_proj = nn.Identity() if width == code_dim else nn.Linear(code_dim, width)
        self.cls = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.01))
        cells = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, cells, width).normal_(std=0.01))
        self.in_norm = nn.LayerNorm(width)  # codes may be tiny: 1/K at first
        self.blocks = nn.ModuleList(_encoder_block(width, heads, depth) for _ in range(depth))
        self.out_norm = nn.LayerNorm(width)
        self.project = nn.Parameter(torch.empty(width, out_dim).normal_(std=0.01))
        self.register_load_state_dict_pre_hook(accept_old_names)

    def forward(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return (B, 1 + N, D); row 0 is [CLS].

        Args:
            codes: (B, C, h, w), or (B, N, C) with `grid` (the trained grid if None).
            grid: (h, w) of the codes.

        Raises:
            ValueError: if the codes do not fit `code_dim` or the grid.
        """
        if codes.ndim == 4:
            grid = (codes.shape[2], codes.shape[3])
            codes = codes.flatten(2).mT
        grid = grid or self.grid
        if codes.shape[-1] != self.code_dim or codes.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"expected codes of {grid[0]}x{grid[1]} positions and width {self.code_dim}, "
                f"got (N, C) = {tuple(codes.shape[1:])}"
            )
        cells = torch.cat([self.cls.expand(len(codes), -1, -1), self.in_proj(codes)], dim=1)
        cells = self.in_norm(cells + self._pos_embed_on(grid))
        for block in self.blocks:
            cells = block(cells)
        return self.out_norm(cells) @ self.project

    def _pos_embed_on(self, grid: tuple[int, int]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.pos_embed
        cls, cells = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        plane = cells.mT.unflatten(-1, self.grid)
        plane = F.interpolate(plane, size=tuple(grid), mode="bilinear", align_corners=False)
        return torch.cat([cls, plane.flatten(2).mT], dim=1)


class TextDecoder(nn.Module):
    """Predicts the masked words of a caption from the image's codes (paper section 3.3).

    The output matrix is the guide's own token embedding, frozen.

    Args:
        width: Dt, width of the text features and the vocabulary.
        memory_dim: D, width of the code-ViT's tokens.
        vocabulary_size: V.
        max_length: T, longest caption in tokens.
        depth, heads, dropout: 2, 1 and 0.1 in the released code; the heads must divide the width.

    Raises:
        ConfigError: if they do not.

    Example:
        >>> decoder = TextDecoder(8, memory_dim=6, vocabulary_size=11, max_length=5)
        >>> text, memory = torch.zeros(2, 5, 8), torch.zeros(2, 4, 6)
        >>> mask = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
        >>> decoder(text, mask, memory, torch.zeros(11, 8)).shape
        torch.Size([3, 11])
    """

    OLD_NAMES = {"enter.": "in_proj."}

    def __init__(
        self,
        width: int,
        *,
        memory_dim: int,
        vocabulary_size: int,
        max_length: int = 30,
        depth: int = 2,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _require_divisor(width, heads, "text decoder")
        # One learned vector per position stands for a masked word; position-specific in the paper.
        self.mask_tokens = nn.Parameter(torch.empty(1, max_length, width).normal_(std=0.01))
        self.in_proj = nn.Identity() if memory_dim == width else nn.Linear(memory_dim, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.register_load_state_dict_pre_hook(accept_old_names)

    def forward(
        self,
        text: Tensor,
        mask: Tensor,
        memory: Tensor,
        vocabulary: Tensor,
        attention_mask: Tensor | None = None,
        choices: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the M masked positions only, (M, V), in row-major order.

        Args:
            text: token features, (B, T, Dt); those under the mask are never read.
            mask: True at masked tokens, (B, T) bool.
            memory: code-ViT tokens, (B, N, D).
            vocabulary: the guide's token embedding, (V, Dt); detached.
            attention_mask: True at real tokens, (B, T) bool; None attends to padding too, as the
                released code does. A row without a real token attends to all of it, since
                attention over nothing is NaN.
            choices: ids of the words to choose from, (V',) int64, as columns of the logits; None
                is the whole vocabulary.

        Raises:
            ValueError: for captions longer than `max_length`.
        """
        length, longest = text.shape[1], self.mask_tokens.shape[1]
        if length > longest:
            raise ValueError(f"captions of {length} tokens, but max_length is {longest}")
        real = torch.ones_like(mask) if attention_mask is None else attention_mask
        real = (real | ~real.any(dim=1, keepdim=True)).to(mask.device)
        # Indices are made where the masks are, so that no GPU is waited for if that is the CPU.
        tokens = (real | mask).flatten().nonzero()[:, 0]
        masked = mask.flatten()[tokens].nonzero()[:, 0]
        is_cuda = text.device.type == "cuda"  # elsewhere such a copy may be a race
        tokens, masked, mask, real = (
            each.to(text.device, non_blocking=is_cuda) for each in (tokens, masked, mask, real)
        )
        states = torch.where(mask[..., None], self.mask_tokens[:, :length].to(text.dtype), text)
        states = states.flatten(0, 1)[tokens]
        memory = self.in_proj(memory)
        for i, block in enumerate(self.blocks, start=1):
            wanted = masked if i == len(self.blocks) else None
            states = block(states, memory, real, tokens, wanted)
        states = self.head(states)
        rows = vocabulary.detach()
        if choices is None:
            return states @ rows.to(states.dtype).mT + self.bias
        return states @ rows[choices].to(states.dtype).mT + self.bias[choices]


class DecoderBlock(nn.TransformerDecoderLayer):
    """A decoder layer of torch (post-norm) that computes nothing at padding.

    Args:
        width: Dt.
        heads: attention heads.
        dropout: after each part, none in the attention.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(
            width, heads, width, dropout=dropout, layer_norm_eps=1e-12, batch_first=True
        )
        for attention in (self.self_attn, self.multihead_attn):
            attention.dropout = 0.0
            nn.init.normal_(attention.in_proj_weight, std=width**-0.5)
            nn.init.normal_(attention.out_proj.weight, std=width**-0.5)
        for linear in (self.linear1, self.linear2):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(  # type: ignore[override]
        self,
        states: Tensor,
        memory: Tensor,
        real: Tensor,
        tokens: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return new states of R tokens, without those of padding: (R, Dt), or the wanted rows.

        Args:
            states: (R, Dt).
            memory: of the image, (B, N, Dt).
            real: True at tokens that are attended to, (B, T) bool.
            tokens: places of the R tokens in the flattened (B, T).
            wanted: rows to compute; None is all.
        """
        keys, at = states, tokens
        if wanted is not None:
            states, at = states[wanted], tokens[wanted]
        own = _self_attention(self.self_attn, (states, at), (keys, tokens), real)
        states = self.norm1(states + self.dropout1(own))
        query = _spread(states, at, real.shape)
        seen = cross_attention(self.multihead_attn, query, memory).flatten(0, 1)[at]
        states = self.norm2(states + self.dropout2(seen))
        hidden = self.linear2(self.dropout(self.activation(self.linear1(states))))
        return self.norm3(states + self.dropout3(hidden))


def _spread(rows: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """Place rows (R, D) in zeros (B, T, D)."""
    spread = rows.new_zeros(shape.numel(), rows.shape[-1])
    return spread.index_copy(0, at, rows).unflatten(0, shape)


def _self_attention(
    attention: nn.MultiheadAttention, wanted: Rows, known: Rows, real: Tensor
) -> Tensor:
    """Return `attention` of the `wanted` rows over the `known` rows of the same caption."""
    (states, at), (keys, tokens) = wanted, known
    width = attention.embed_dim
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(states, weight[:width], bias[:width])
    both = F.linear(keys, weight[width:], bias[width:])
    parts = [(query, at), *((part, tokens) for part in both.chunk(2, dim=-1))]
    query, key, value = (
        _spread(rows, places, real.shape).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for rows, places in parts
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
    return attention.out_proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1)[at])


def cross_attention(attention: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Return `attention(query, memory, memory)` without projecting the memory.

    Scores are (q Wk) m instead of q (Wk m), and values are projected after they are averaged: the
    same up to rounding, at a cost that grows with the T words of a query instead of the N codes of
    an image, of which there are many more. The key's bias shifts all scores of a query alike, so it
    has no effect.

    Args:
        attention: with `batch_first`, a bias and one width for all.
        query: (B, T, D).
        memory: (B, N, D).

    Returns:
        (B, T, D).
    """
    heads, width = attention.num_heads, attention.head_dim
    weights = attention.in_proj_weight.unflatten(0, (3, heads, width))
    bias = attention.in_proj_bias.unflatten(0, (3, heads, width))
    queries = torch.einsum("btd,hed->bhte", query, weights[0]) + bias[0][:, None]
    queries = torch.einsum("bhte,hed->bhtd", queries, weights[1])
    keys = memory.to(queries.dtype)[:, None].expand(-1, heads, -1, -1)
    means = F.scaled_dot_product_attention(queries, keys, keys, scale=width**-0.5)
    values = torch.einsum("bhtd,hed->bthe", means, weights[2]) + bias[2]
    return attention.out_proj(values.flatten(2))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def _encoder_block(width: int, heads: int, depth: int) -> nn.TransformerEncoderLayer:
    block = nn.TransformerEncoderLayer(
        width,
        heads,
        4 * width,
        dropout=0.0,
        activation=quick_gelu,
        batch_first=True,
        norm_first=True,
    )
    residual_std = (2 * depth * width) ** -0.5  # the sum over all branches keeps its size
    nn.init.normal_(block.self_attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.self_attn.out_proj.weight, std=residual_std)
    nn.init.normal_(block.linear1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.linear2.weight, std=residual_std)
    return block


def _require_divisor(width: int, heads: int, owner: str) -> None:
    if heads < 1 or width % heads:
        divisors = ", ".join(str(n) for n in range(1, min(width, 16) + 1) if width % n == 0)
        raise ConfigError(
            f"heads of the {owner}: {heads} does not divide its width {width}; take one of "
            f"{divisors}"
        )


def accept_old_names(module: Any, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Rename the keys of version 0.1.0 (`module.OLD_NAMES`); a pre-hook of `load_state_dict`."""
    for old, new in module.OLD_NAMES.items():
        for key in [key for key in state if key.startswith(prefix + old)]:
            state[prefix + new + key[len(prefix + old) :]] = state.pop(key)
