"""Visual grounding: where the codes of a word are, learned from captions alone.

codes --> convolutions --> a map per word --> pooled: is the word in the captions?
                               |
                               +--> its peak and its extent, against known boxes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from ...sockets import ConfigError
from ..metrics.captions import word_sets
from .features import FrozenCodes, require_captions
from .trainer import COUNT, LossFunction, NeuralProbe, ProbeConfig
from .transformer import StandardizedCodes

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; shares of width and height."""
SHARPNESS = 4.0
"""Of the pooling over places: between their mean (0) and their maximum."""


@dataclass(frozen=True, kw_only=True)
class GroundingConfig(ProbeConfig):
    """Training of the grounding probe."""

    steps: Annotated[int, COUNT] = 400
    """Updates."""
    width: Annotated[int, COUNT] = 64
    """Channels of the hidden layer."""


class GroundingProbe(NeuralProbe[GroundingConfig, Any]):
    """Maps of words over the grid of codes, trained on the words of captions, without boxes.

    The image's logit of a word is the smooth maximum of its map; the loss is binary cross-entropy.

    Args:
        words: the words to find.
        config, options: as of :class:`~.trainer.NeuralProbe`.
    """

    Config, name = GroundingConfig, "grounding"

    def __init__(self, words: Sequence[str], config: GroundingConfig | None = None, **options: Any):
        super().__init__(config, **options)
        self.words = list(words)

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        require_captions(codes, target)
        has_word = torch.tensor([[w in found for w in self.words] for found in word_sets(target)])
        missing = [w for w, n in zip(self.words, has_word.sum(dim=0), strict=True) if n == 0]
        if missing:
            raise ConfigError(f"grounding: no training caption has the word {missing[0]!r}")
        self.network = _WordMaps(codes, len(self.words), self.config).to(self.device)
        wanted = has_word.float()

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            maps = self.network(codes.codes(rows).to(self.device), codes.grid)
            return F.binary_cross_entropy_with_logits(_pooled(maps), wanted[rows].to(self.device))

        return loss_of, len(codes), [self.words, has_word.sum(dim=0).tolist(), list(target)]

    @torch.no_grad()
    def maps(self, codes: FrozenCodes) -> Tensor:
        """Return the logits of each word at each place, (M, W, h, w), on the CPU."""
        parts = torch.arange(len(codes)).split(self.config.batch_size)
        found = [self.network(codes.codes(rows).to(self.device), codes.grid) for rows in parts]
        return torch.cat(found).cpu()

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[dict[str, list[Box]]]
    ) -> dict[str, float]:
        """Return the means of :meth:`values`."""
        return {name: float(value.mean()) for name, value in self.values(codes, target).items()}

    def values(
        self, codes: FrozenCodes, target: Sequence[dict[str, list[Box]]]
    ) -> dict[str, Tensor]:
        """Score the words of each image that has boxes, (M',) float64; means over its words.

        `pointing` is 1 if the peak of the word's map is in one of its boxes (the pointing game,
        doi:10.1007/s11263-017-1059-x), `iou` the overlap of the best of its boxes with the box
        around the places above half of the map's range, and `accuracy@0.5` whether that is at
        least 0.5 (paper, table 8). `chance/pointing` is the area that the boxes cover.

        Args:
            codes: of M held-out images.
            target: by word its boxes, of each image.

        Raises:
            ConfigError: if no image has a box of one of the words.
        """
        maps = self.maps(codes)
        names = ("pointing", "iou", "accuracy@0.5", "chance/pointing")
        values: dict[str, list[float]] = {name: [] for name in names}
        for each, boxes in zip(maps, target, strict=True):
            known = [word for word in boxes if word in self.words and boxes[word]]
            scores = [score_map(each[self.words.index(word)], boxes[word]) for word in known]
            for name, column in zip(names, zip(*scores, strict=True), strict=False):
                values[name].append(sum(column) / len(column))
        if not values["iou"]:
            raise ConfigError("grounding: no test image has a box of a word of the captions")
        return {name: torch.tensor(value).double() for name, value in values.items()}


def score_map(scores: Tensor, boxes: Sequence[Box]) -> tuple[float, float, float, float]:
    """Return `pointing`, `iou`, `accuracy@0.5` and `chance/pointing` of a map (h, w).

    Example:
        >>> scores = torch.zeros(4, 4)
        >>> scores[:2, 2:] = 1.0  # the upper right quarter
        >>> score_map(scores, [(0.5, 0.0, 1.0, 1.0)])
        (1.0, 0.5, 1.0, 0.5)
    """
    height, width = scores.shape
    rows, columns = (torch.arange(n) + 0.5 for n in (height, width))
    y, x = rows[:, None] / height, columns[None] / width
    covered = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        covered |= (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    row, column = divmod(int(scores.argmax()), width)
    is_hit = bool(covered[row, column])
    low, high = scores.aminmax()
    above = (scores >= (low + high) / 2).nonzero()
    (top, left), (bottom, right) = above.amin(dim=0).tolist(), above.amax(dim=0).tolist()
    guess = (left / width, top / height, (right + 1) / width, (bottom + 1) / height)
    overlap = max(iou(guess, box) for box in boxes)
    return float(is_hit), overlap, float(overlap >= 0.5), float(covered.double().mean())


def iou(one: Box, other: Box) -> float:
    """Return the intersection of two boxes over their union.

    >>> iou((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0))
    0.3333333333333333
    """
    return float(box_iou(*torch.tensor([[one], [other]], dtype=torch.float64)))


def _pooled(maps: Tensor) -> Tensor:
    """Return the smooth maximum over places, (B, W, h, w) to (B, W)."""
    flat = maps.flatten(2) * SHARPNESS
    return (flat.logsumexp(dim=2) - torch.tensor(float(flat.shape[2])).log()) / SHARPNESS


class _WordMaps(StandardizedCodes):
    """Standardized codes to logits of words; each place sees its neighbors, too."""

    def __init__(self, codes: FrozenCodes, words: int, config: ProbeConfig):
        super().__init__(codes)
        self.layers = nn.Sequential(
            nn.Conv2d(codes.width, config.width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(config.width, words, 1),
        )

    def forward(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, W, h, w) of codes (B, N, C)."""
        return self.layers(self.standardized(codes).mT.unflatten(2, grid))
