"""What a probe is, and the features of frozen codes that the linear probes read.

loader --host_encode--> Codes --collect_codes--> CodeFeatures --probe.fit / .evaluate--> numbers
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Codes

HISTOGRAM_LIMIT = 4096  # codebooks larger than this have no histogram block

Target = TypeVar("Target")
Self = TypeVar("Self", bound="AbstractProbe")


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


class AbstractProbe(ABC, Generic[Target]):
    """A small model from frozen codes to a task; it is trained on one split, tested on another."""

    @abstractmethod
    def fit(self: Self, features: CodeFeatures, target: Target) -> Self:
        """Train on M images, in the order of `features`; returns self."""

    @abstractmethod
    def evaluate(self, features: CodeFeatures, target: Target) -> dict[str, float]:
        """Return the numbers of the task on images that were not in :meth:`fit`."""


@torch.no_grad()
def collect_codes(
    host_encode: Callable[[Tensor], Codes],
    loader: Iterable[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    *,
    image_key: str = "image",
    codebook_size: int | None = None,
) -> CodeFeatures:
    """Encode every image of a loader that does not shuffle.

    Args:
        host_encode: (B, 3, H, W) float32 on `device` to the host's codes; the host is in
            evaluation mode.
        loader: batches with images (B, H, W, 3) or (B, 3, H, W) at `image_key`.
        device: where the host lies; the features come back on the CPU.
        codebook_size: K, for hosts whose codes do not carry the codebook.

    Raises:
        ValueError: if the loader is empty.
    """
    pooled: list[Tensor] = []
    histograms: list[Tensor] = []
    for batch in loader:
        images = batch[image_key]
        if images.shape[1] != 3:
            images = images.movedim(-1, 1)
        codes = host_encode(images.to(device).float().contiguous())
        pooled.append(pool_codes(codes).cpu())
        size = codebook_size if codes.codebook is None else len(codes.codebook)
        if codes.indices is not None and size is not None and size <= HISTOGRAM_LIMIT:
            histograms.append(code_histogram(codes.indices, size).cpu())
    if not pooled:
        raise ValueError("the loader gave no batch, so there are no codes to probe")
    return CodeFeatures(torch.cat(pooled), torch.cat(histograms) if histograms else None)


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
