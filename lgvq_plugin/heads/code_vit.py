"""CodeViT: a small vision transformer over quantized codes (paper section 3.2, Eq. 4).

codes (B, N, C) -> [CLS] + codes + positions -> LayerNorm -> blocks -> LayerNorm -> (B, 1 + N, D)

Shape and first weights are those of the released code, which took CLIP's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._width import check_heads


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class CodeViT(nn.Module):
    """Turn a grid of codes into one summary and N patch tokens in the text space.

    Args:
        code_dim: C, width of a code.
        width: of the transformer; C if None (256 in the paper).
        depth: number of blocks (2 in the released code).
        heads: of the attention (1 in the released code); must divide the width.
        out_dim: D, width of the text features.
        grid: (h, w) that the positions are trained for; other grids interpolate them.

    Raises:
        ConfigError: if the heads do not divide the width.

    Example:
        >>> CodeViT(8, out_dim=6, grid=(2, 2))(torch.zeros(3, 8, 2, 2)).shape
        torch.Size([3, 5, 6])
    """

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
        check_heads(width, heads, of="code-ViT")
        self.code_dim, self.grid = code_dim, (int(grid[0]), int(grid[1]))
        self.enter = nn.Identity() if width == code_dim else nn.Linear(code_dim, width)
        self.cls = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.01))
        cells = 1 + self.grid[0] * self.grid[1]
        self.positions = nn.Parameter(torch.empty(1, cells, width).normal_(std=0.01))
        self.enter_norm = nn.LayerNorm(width)  # codes may be tiny: 1/K at first
        self.blocks = nn.ModuleList(_block(width, heads, depth=depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Parameter(torch.empty(width, out_dim).normal_(std=0.01))

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
        cells = torch.cat([self.cls.expand(len(codes), -1, -1), self.enter(codes)], dim=1)
        cells = self.enter_norm(cells + self._positions_on(grid))
        for block in self.blocks:
            cells = block(cells)
        return self.norm(cells) @ self.project

    def _positions_on(self, grid: tuple[int, int]) -> Tensor:
        if tuple(grid) == self.grid:
            return self.positions
        cls, cells = self.positions[:, :1], self.positions[:, 1:]
        plane = cells.mT.unflatten(-1, self.grid)
        plane = F.interpolate(plane, size=tuple(grid), mode="bilinear", align_corners=False)
        return torch.cat([cls, plane.flatten(2).mT], dim=1)


def _block(width: int, heads: int, *, depth: int) -> nn.TransformerEncoderLayer:
    block = nn.TransformerEncoderLayer(
        width,
        heads,
        4 * width,
        dropout=0.0,
        activation=quick_gelu,
        batch_first=True,
        norm_first=True,
    )
    leaving = (2 * depth * width) ** -0.5  # the sum over all branches keeps its size
    nn.init.normal_(block.self_attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.self_attn.out_proj.weight, std=leaving)
    nn.init.normal_(block.linear1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.linear2.weight, std=leaving)
    return block
