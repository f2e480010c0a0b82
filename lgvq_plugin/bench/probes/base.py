"""What a probe is, and the features of frozen codes that the linear probes read.

loader --host_encode--> Codes --collect_codes--> CodeFeatures --probe.fit / .evaluate--> numbers
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...types import Codes
from .features import (
    HISTOGRAM_LIMIT,
    CodeCollector,
    CodeFeatures,
    FrozenCodes,
    code_histogram,
    collect_frozen,
    pool_codes,
)
from .transformer import ProbeConfig

__all__ = [
    "HISTOGRAM_LIMIT",
    "AbstractProbe",
    "CodeCollector",
    "CodeFeatures",
    "FrozenCodes",
    "ProbeConfig",
    "Question",
    "code_histogram",
    "collect_codes",
    "collect_frozen",
    "pool_codes",
]

Target = TypeVar("Target")
Self = TypeVar("Self", bound="AbstractProbe")


@dataclass(frozen=True)
class Question:
    """One question about an image.

    Args:
        row: of the image among the codes.
        text: the question.
        answer: the right one, or the usual one of several people's.
        kind: such as color or count; "" for none.
        people: the answers of several people (VQA v2), or none.
    """

    row: int
    text: str
    answer: str
    kind: str = ""
    people: tuple[str, ...] = ()


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
