"""The contract of an objective: codes and captions in, one unweighted term out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..guides.base import AbstractGuide
from ..types import CodeView, Term, TextFeatures


@dataclass(frozen=True)
class Caption:
    """One batch of captions.

    Args:
        strings: B captions.
        present: True where an image has one, (B,) bool; the others take no part.
        features: the guide's view of the unmasked captions.
        guide: to encode masked captions.
        generator: CPU generator of this step's draws.
    """

    strings: Sequence[str]
    present: Tensor
    features: TextFeatures
    guide: AbstractGuide
    generator: torch.Generator


class AbstractObjective(nn.Module, ABC):
    """Owns its heads; sees codes through the code-ViT and captions through the guide."""

    @abstractmethod
    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return the unweighted term of one batch."""
