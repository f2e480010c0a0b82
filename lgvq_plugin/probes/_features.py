"""Features of frozen codes that the linear probes read; pure functions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Codes

HISTOGRAM_LIMIT = 4096  # codebooks larger than this have no histogram block


@dataclass(frozen=True)
class CodeFeatures:
    """Features of M images, made of their frozen codes only.

    Args:
        pooled: mean code vector, then the mean of each quadrant, (M, 5 * C) float32.
        histogram: square roots of the shares of the codes, (M, K) float32; None without
            indices, or if K is unknown or above 4096.
    """

    pooled: Tensor
    histogram: Tensor | None = None

    def __len__(self) -> int:
        """Return M."""
        return len(self.pooled)

    @property
    def blocks(self) -> list[Tensor]:
        """The blocks there are, each (M, width)."""
        return [self.pooled] if self.histogram is None else [self.pooled, self.histogram]


def pool_codes(codes: Codes) -> Tensor:
    """Return the mean code and the means of 2 x 2 parts of the grid, (B, 5 * C) float32."""
    batch, _, width = codes.codes.shape
    grid = codes.codes.detach().float().mT.reshape(batch, width, *codes.grid)
    parts = F.adaptive_avg_pool2d(grid, 2)
    return torch.cat([grid.mean(dim=(2, 3)), parts.flatten(1)], dim=1)


def code_histogram(indices: Tensor, size: int) -> Tensor:
    """Return square roots of the shares of `size` codes: (B, N) int to (B, size), of length 1.

    Example:
        >>> code_histogram(torch.tensor([[0, 0, 0, 2]]), 3)
        tensor([[0.8660, 0.0000, 0.5000]])
    """
    counts = torch.zeros(len(indices), size, device=indices.device)
    counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=counts.dtype))
    return (counts / indices.shape[1]).sqrt()
