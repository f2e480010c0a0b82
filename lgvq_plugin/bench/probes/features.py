"""Frozen codes of a set of images, and the features of them that the linear probes read.

loader --host_encode--> Codes --CodeCollector--> FrozenCodes --features()--> CodeFeatures
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...types import Codes

HISTOGRAM_LIMIT = 4096
"""Larger codebooks have no histogram."""
TOLERANCE = 1e-4
"""Relative to the codes' scale: how far `table[indices]` may be from the vectors."""
BATCH = 256


@dataclass(frozen=True)
class CodeFeatures:
    """Features of M images, made only of their frozen codes.

    `pooled` is the mean code vector and the means of the four quadrants, (M, 5 * C) float32;
    `histogram` the square roots of the shares of codes, (M, K) float32, None without indices, or
    if K is unknown or above 4096.
    """

    pooled: Tensor
    histogram: Tensor | None = None

    def __len__(self) -> int:
        """Return M."""
        return len(self.pooled)

    @property
    def blocks(self) -> list[Tensor]:
        """The features that exist, each (M, width)."""
        return [self.pooled] if self.histogram is None else [self.pooled, self.histogram]

    def take(self, rows: Tensor) -> "CodeFeatures":
        """Return the features of some images, in this order."""
        return CodeFeatures(*(block[rows] for block in self.blocks))


@dataclass(frozen=True)
class FrozenCodes:
    """Codes of M images, on the CPU."""

    grid: tuple[int, int]  # (h, w), h * w == N
    indices: Tensor | None = None  # (M, N) int64; None if the host has no indices
    table: Tensor | None = None  # the vector of each index, (K, C)
    vectors: Tensor | None = None  # (M, N, C) float32, where they differ from `table[indices]`

    def __len__(self) -> int:
        """Return M."""
        return len(self.indices if self.vectors is None else self.vectors)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Return C."""
        return (self.table if self.vectors is None else self.vectors).shape[-1]  # type: ignore[union-attr]

    @property
    def fingerprint(self) -> str:
        """A hash, equal for equal codes."""
        digest = hashlib.sha256(str(self.grid).encode())
        for part in (self.indices, self.table, self.vectors):
            if part is not None:
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def codes(self, rows: Tensor) -> Tensor:
        """Return the vectors of some images, (B, N, C) float32."""
        if self.vectors is not None:
            return self.vectors[rows]
        return self.table[self.indices[rows]]  # type: ignore[index]

    def features(self) -> CodeFeatures:
        """Return what the linear probes read."""
        batches = torch.arange(len(self)).split(BATCH)
        pooled = torch.cat([pool_codes(self.codes(rows), self.grid) for rows in batches])
        size = 0 if self.indices is None or self.table is None else len(self.table)
        if self.indices is None or not 0 < size <= HISTOGRAM_LIMIT:
            return CodeFeatures(pooled)
        return CodeFeatures(pooled, code_histogram(self.indices, size))

    def shuffled(self, seed: int) -> "FrozenCodes":
        """Return the codes in an order where no image keeps its own: the control of a probe."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        moved = torch.empty_like(order)
        moved[order] = order.roll(1)
        return self.take(moved)

    def take(self, rows: Tensor) -> "FrozenCodes":
        """Return the codes of some images, in this order."""
        indices, vectors = (x if x is None else x[rows] for x in (self.indices, self.vectors))
        return FrozenCodes(self.grid, indices, self.table, vectors)


class CodeCollector:
    """Collects a host's codes batch by batch, as indices and a table where that is enough.

    `codebook_size` is K, for hosts whose codes come without the codebook.
    """

    def __init__(self, codebook_size: int | None = None):
        self.codebook_size = codebook_size
        self._parts: list[Codes] = []

    def add(self, codes: Codes) -> None:
        """Add the codes of a batch.

        Raises:
            ValueError: if the grid differs from that of earlier batches.
        """
        if self._parts and self._parts[0].grid != codes.grid:
            raise ValueError(f"grids {self._parts[0].grid} and {codes.grid} in one set of images")
        vectors = codes.codes.detach().float().cpu()
        book = None if codes.codebook is None else codes.codebook.detach().cpu()
        indices = None if codes.indices is None else codes.indices.detach().cpu()
        if book is not None and indices is not None and _is_table(vectors, indices, book.float()):
            vectors = vectors[:, :0]  # redundant
        self._parts.append(Codes(vectors, indices, codes.grid, book))

    def result(self) -> FrozenCodes:
        """Return all codes.

        Raises:
            ValueError: if there are none.
        """
        if not self._parts:
            raise ValueError("the loader gave no batch, so there are no codes to probe")
        first = self._parts[0]
        book = None if first.codebook is None else first.codebook.float()
        if first.indices is None:
            return FrozenCodes(first.grid, None, book, self._vectors(book))
        indices = torch.cat([part.indices for part in self._parts])  # type: ignore[misc]
        if all(part.codes.shape[1] == 0 for part in self._parts):
            return FrozenCodes(first.grid, indices, book)
        vectors = self._vectors(book)
        size = len(book) if book is not None else self.codebook_size
        table = mean_table(vectors, indices, size or int(indices.max()) + 1)
        is_enough = _is_table(vectors, indices, table)
        return FrozenCodes(first.grid, indices, table, None if is_enough else vectors)

    def _vectors(self, book: Tensor | None) -> Tensor:
        parts = self._parts
        return torch.cat([p.codes if p.codes.shape[1] else book[p.indices] for p in parts])  # type: ignore[index]


@torch.no_grad()
def collect_codes(
    host_encode: Callable[[Tensor], Codes],
    loader: Iterable[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    *,
    image_key: str = "image",
    codebook_size: int | None = None,
) -> CodeFeatures:
    """Encode every image of a loader that does not shuffle, and return the codes' features.

    `host_encode` maps (B, 3, H, W) float32 on `device` to the codes of a host in evaluation mode.
    The loader's batches have images (B, H, W, 3) or (B, 3, H, W) at `image_key`. `codebook_size`
    is K, for hosts whose codes come without the codebook. The features are on the CPU.

    Raises:
        ValueError: if the loader is empty.
    """
    collector = CodeCollector(codebook_size)
    for batch in loader:
        codes = host_encode(channels_first(batch[image_key]).to(device))
        collector.add(codes)
    features = collector.result().features()
    is_size_known = codebook_size is not None or codes.codebook is not None
    return features if is_size_known else CodeFeatures(features.pooled)


def channels_first(images: Tensor) -> Tensor:
    """Return (B, C, H, W) float32 of (B, C, H, W) or (B, H, W, C), for C of 1, 3 or 4."""
    is_last = images.shape[-1] < images.shape[1]
    return (images.movedim(-1, 1) if is_last else images).float().contiguous()


def pool_codes(codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean code and the means of 2 x 2 parts of the grid: (B, N, C) to (B, 5 * C)."""
    maps = codes.detach().float().mT.unflatten(2, grid)
    return torch.cat([maps.mean(dim=(2, 3)), F.adaptive_avg_pool2d(maps, 2).flatten(1)], dim=1)


def code_histogram(indices: Tensor, size: int) -> Tensor:
    """Return square roots of the shares of `size` codes: (B, N) int to (B, size), of length 1.

    Example:
        >>> code_histogram(torch.tensor([[0, 0, 0, 2]]), 3)
        tensor([[0.8660, 0.0000, 0.5000]])
    """
    counts = torch.zeros(len(indices), size, device=indices.device)
    counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=counts.dtype))
    return (counts / indices.shape[1]).sqrt()


def require_captions(codes: FrozenCodes, captions: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless each image has at least one caption."""
    if len(codes) != len(captions) or not all(len(texts) for texts in captions):
        raise ValueError(
            f"{len(codes)} images, {len(captions)} lists of captions; each needs at least one"
        )


def _is_table(vectors: Tensor, indices: Tensor, table: Tensor) -> bool:
    """Return whether table[indices] equals the vectors."""
    if table.shape[-1] != vectors.shape[-1] or int(indices.max()) >= len(table):
        return False
    scale = vectors.square().mean().sqrt().clamp(min=1e-12)
    return bool((table[indices] - vectors).abs().max() <= TOLERANCE * scale)


def mean_table(vectors: Tensor, indices: Tensor, size: int) -> Tensor:
    """Return the mean of vectors (M, N, C) at each index (M, N), (size, C); 0 for unused ones."""
    sums = torch.zeros(size, vectors.shape[-1], dtype=torch.float64)
    for own, found in zip(indices, vectors, strict=True):  # a copy in float64 of all may be large
        sums.index_add_(0, own, found.double())
    count = torch.bincount(indices.flatten(), minlength=size).clamp(min=1)
    return (sums / count[:, None]).float()
