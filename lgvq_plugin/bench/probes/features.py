"""Features of frozen codes that the linear probes read; pure functions."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...types import Codes

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


# -- All codes of a set of images, encoded once and kept as small as the host allows -------------


TOLERANCE = 1e-4  # of the codes' scale: an index whose vectors differ by more has no one vector
PART = 256


@dataclass(frozen=True)
class FrozenCodes:
    """Codes of M images, on the CPU.

    Args:
        grid: (h, w), h * w == N.
        indices: (M, N) int64, or None if the host tells none.
        table: the vector that stands for each index, (K, C), or None.
        vectors: (M, N, C) float32, only where `table[indices]` is not the same.
    """

    grid: tuple[int, int]
    indices: Tensor | None = None
    table: Tensor | None = None
    vectors: Tensor | None = None

    def __len__(self) -> int:
        """Return M."""
        return len(self.indices if self.vectors is None else self.vectors)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Return C."""
        return (self.table if self.vectors is None else self.vectors).shape[-1]  # type: ignore[union-attr]

    @property
    def fingerprint(self) -> str:
        """A hash: equal for equal codes."""
        digest = hashlib.sha256(str(self.grid).encode())
        for part in (self.indices, self.table, self.vectors):
            if part is not None:
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def codes(self, rows: Tensor) -> Tensor:
        """Return the vectors of some images, (B, N, C) float32."""
        if self.vectors is not None:
            return self.vectors[rows]
        assert self.indices is not None
        assert self.table is not None
        return self.table[self.indices[rows]]

    def features(self) -> CodeFeatures:
        """Return what the linear probes read."""
        pooled, histograms = [], []
        for rows in torch.arange(len(self)).split(PART):
            indices = None if self.indices is None else self.indices[rows]
            codes = Codes(self.codes(rows), indices, self.grid)
            pooled.append(pool_codes(codes))
            if (
                indices is not None
                and self.table is not None
                and len(self.table) <= HISTOGRAM_LIMIT
            ):
                histograms.append(code_histogram(indices, len(self.table)))
        return CodeFeatures(torch.cat(pooled), torch.cat(histograms) if histograms else None)

    def shuffled(self, seed: int) -> "FrozenCodes":
        """Return the codes in an order where no image keeps its own: the control of a probe."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        moved = torch.empty_like(order)
        moved[order] = order.roll(1)
        return self.take(moved)

    def take(self, rows: Tensor) -> "FrozenCodes":
        """Return the codes of some images, in this order."""
        return FrozenCodes(
            self.grid,
            None if self.indices is None else self.indices[rows],
            self.table,
            None if self.vectors is None else self.vectors[rows],
        )


@dataclass
class CodeCollector:
    """Takes batch after batch of a host's codes.

    Args:
        codebook_size: K, for hosts whose codes do not carry the codebook.
    """

    codebook_size: int | None = None
    _parts: list[Codes] = field(default_factory=list)

    def add(self, codes: Codes) -> None:
        """Add the codes of a batch.

        Raises:
            ValueError: if the grid is another than before.
        """
        if self._parts and self._parts[0].grid != codes.grid:
            raise ValueError(f"grids {self._parts[0].grid} and {codes.grid} in one set of images")
        vectors = codes.codes.detach().float().cpu()
        book = None if codes.codebook is None else codes.codebook.detach().cpu()
        indices = None if codes.indices is None else codes.indices.detach().cpu()
        if book is not None and indices is not None and _is_table(vectors, indices, book.float()):
            vectors = vectors[:, :0]  # the table tells them
        self._parts.append(Codes(vectors, indices, codes.grid, book))

    def result(self) -> FrozenCodes:
        """Return all that was added.

        Raises:
            ValueError: if nothing was.
        """
        if not self._parts:
            raise ValueError("the loader gave no batch, so there are no codes to probe")
        first = self._parts[0]
        book = None if first.codebook is None else first.codebook.float()
        indices = None
        if first.indices is not None:
            indices = torch.cat([part.indices for part in self._parts])  # type: ignore[misc]
        if indices is None:
            return FrozenCodes(first.grid, None, book, self._vectors(book))
        if all(part.codes.shape[1] == 0 for part in self._parts):
            return FrozenCodes(first.grid, indices, book)
        vectors = self._vectors(book)
        size = len(book) if book is not None else self.codebook_size
        size = int(indices.max()) + 1 if size is None else size
        table = _mean_table(vectors, indices, size)
        same = _is_table(vectors, indices, table)
        return FrozenCodes(first.grid, indices, table, None if same else vectors)

    def _vectors(self, book: Tensor | None) -> Tensor:
        return torch.cat(
            [
                part.codes if part.codes.shape[1] else book[part.indices]  # type: ignore[index]
                for part in self._parts
            ]
        )


@torch.no_grad()
def collect_frozen(
    host_encode: Callable[[Tensor], Codes],
    loader: Iterable[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    *,
    image_key: str = "image",
    codebook_size: int | None = None,
) -> FrozenCodes:
    """Encode every image of a loader that does not shuffle; arguments as `collect_codes`."""
    collector = CodeCollector(codebook_size)
    for batch in loader:
        images = batch[image_key]
        if images.shape[1] != 3:
            images = images.movedim(-1, 1)
        collector.add(host_encode(images.to(device).float().contiguous()))
    return collector.result()


def _is_table(vectors: Tensor, indices: Tensor, table: Tensor) -> bool:
    """Tell whether table[indices] gives the vectors."""
    if table.shape[-1] != vectors.shape[-1] or int(indices.max()) >= len(table):
        return False
    scale = vectors.square().mean().sqrt().clamp(min=1e-12)
    return bool((table[indices] - vectors).abs().max() <= TOLERANCE * scale)


def _mean_table(vectors: Tensor, indices: Tensor, size: int) -> Tensor:
    """Return the mean vector of each index, (K, C); zero for those that never came."""
    flat = indices.flatten()
    sums = torch.zeros(size, vectors.shape[-1], dtype=torch.float64)
    sums.index_add_(0, flat, vectors.flatten(0, 1).double())
    count = torch.bincount(flat, minlength=size).clamp(min=1)
    return (sums / count[:, None]).float()


def require_captions(codes: FrozenCodes, captions: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless each image has a caption at least."""
    if len(codes) != len(captions) or not all(len(texts) for texts in captions):
        raise ValueError(
            f"{len(codes)} images, {len(captions)} lists of captions; each needs one at least"
        )
