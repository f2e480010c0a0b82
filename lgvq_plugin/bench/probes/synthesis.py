"""Synthesis of codes without text: unconditional, or from labels or a semantic map."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.perceptual import state_hash
from .features import FrozenCodes
from .text_to_image import Sampling, TextToImageConfig, TextToImageProbe

PLAIN = Sampling(guidance=1.0)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig(TextToImageConfig):
    """Training and sampling of a synthesis probe."""

    drop_text: float = 0.1
    """Share of training images whose condition is dropped, for the bits without it."""
    sampling: Sampling = PLAIN
    """How codes are sampled."""


class SynthesisProbe(TextToImageProbe):
    """The network of text_to_image, given T vectors per image instead of a caption.

    Args:
        dim: width D of the vectors.
        config, device: as of :class:`~.trainer.NeuralProbe`.
    """

    Config: ClassVar[Any] = SynthesisConfig
    name = "synthesis"

    def __init__(
        self,
        dim: int,
        config: SynthesisConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        name: str = "synthesis",
    ):
        super().__init__(_Vectors(dim), config, device=device)  # type: ignore[arg-type]
        self.name = name

    def _build(self, codes: FrozenCodes, target: Any) -> Any:
        loss_of, count, _ = super()._build(codes, [[given] for given in target])
        return loss_of, count, [state_hash({"conditions": target})]

    def bits(
        self,
        codes: FrozenCodes,
        conditions: Tensor,
        *,
        given: bool = True,
        start: int = 0,
    ) -> Tensor:
        """Return the mean -log2 probability per code of each image, (M,) float64.

        Args:
            codes: of held-out images.
            conditions: of the images, (M, T, D).
            given: whether the network sees them.
            start: first code that counts; it is predicted from those before it.
        """
        return self._bits([codes], list(conditions), with_text=given, start=start)[0]


class _Vectors:
    """Takes the place of the guide."""

    def __init__(self, dim: int):
        self.token_dim, self.fingerprint = dim, f"vectors of width {dim}"

    def encode(self, conditions: Sequence[Tensor]) -> Any:
        tokens = torch.stack(list(conditions))
        return SimpleNamespace(
            tokens=tokens, attention_mask=torch.ones(tokens.shape[:2], dtype=torch.bool)
        )


def label_vectors(labels: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Return one vector (M, 1, D) of all labels: classes one-hot, multi-hot columns as they are.

    Example:
        >>> labels = {"shape": torch.tensor([1, 0]), "has_color": torch.tensor([[1, 0], [1, 1]])}
        >>> label_vectors(labels, {"shape": 2, "has_color": 2})[:, 0].tolist()
        [[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    """
    parts = [
        F.one_hot(value, sizes[name]) if value.ndim == 1 else value
        for name, value in sorted(labels.items(), reverse=True)
    ]
    return torch.cat(parts, dim=1).float()[:, None]


def map_vectors(maps: Sequence[Tensor], classes: int, grid: tuple[int, int]) -> Tensor:
    """Return a vector per cell of the codes' grid, (M, N, classes + N).

    It has the share of each class in the cell, and which cell it is. `maps` are (H, W) of classes,
    each below `classes`.

    Example:
        >>> vectors = map_vectors([torch.tensor([[0, 0], [0, 1]])], 2, (1, 1))
        >>> vectors.tolist()
        [[[0.75, 0.25, 1.0]]]
    """
    place = torch.eye(grid[0] * grid[1])
    shares = [
        F.adaptive_avg_pool2d(F.one_hot(each.long(), classes).movedim(-1, 0).float(), grid)
        for each in maps
    ]
    flat = torch.stack(shares).flatten(2).mT
    return torch.cat([flat, place.expand(len(flat), -1, -1)], dim=2)
