"""Image-text retrieval by a ridge regression from frozen codes to the guide's sentences."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.retrieval import retrieval_by_query
from .base import AbstractProbe, CodeFeatures
from .ridge import Ridge, Scaling, fit_ridges


class RetrievalProbe(AbstractProbe[Tensor]):
    """Predict an image's sentence feature from its codes, and rank by cosine.

    Args:
        ks: how many nearest items the recalls look at.
        seed: of the part of the training images that chooses the ridge's strength.
    """

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0):
        self.ks, self.seed = tuple(ks), seed
        self._scaling: Scaling | None = None

    @property
    def strength(self) -> float:
        """Of the ridge, as chosen in :meth:`fit`."""
        return self._ridge.strength

    def fit(self, features: CodeFeatures, target: Tensor) -> "RetrievalProbe":
        """Train on M images.

        Args:
            features: of the training images.
            target: the guide's sentence features, (M, Ds) or, with n captions an image,
                (M, n, Ds), whose mean over captions is taken.
        """
        sentences = F.normalize(target.double(), dim=-1)
        if sentences.ndim == 3:
            sentences = F.normalize(sentences.mean(dim=1), dim=-1)
        self._text_mean = sentences.mean(dim=0)
        self._scaling = Scaling.of(features)
        wanted = sentences - self._text_mean
        self._ridge: Ridge = fit_ridges(
            self._scaling(features), {"sentence": wanted}, seed=self.seed
        )["sentence"]
        return self

    def evaluate(
        self,
        features: CodeFeatures,
        target: Tensor,
        captions: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, whose arguments and errors these are.

        With them `strength` of the ridge and `count` of images.
        """
        values = self.values(features, target, captions)
        means = {name: float(value.mean()) for name, value in values.items()}
        return means | {"strength": self.strength, "count": float(len(features))}

    def values(
        self,
        features: CodeFeatures,
        target: Tensor,
        captions: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Search among the M captions for each of the M images, and the other way round.

        Args:
            features: of held-out images.
            target: the sentence feature of one caption an image, (M, Ds).
            captions: these captions; equal ones all count as right. Without them, captions
                whose features are equal bit by bit do.

        Returns:
            `image_to_text/recall@k`, `image_to_text/mean_rank`, the same for `text_to_image`, and
            `chance@1` (the expected recall at 1 of features that say nothing); of each image,
            (M,) float64.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if the numbers of images, features and captions differ.
        """
        if self._scaling is None:
            raise RuntimeError("RetrievalProbe: call fit(...) on training images first")
        if target.ndim != 2 or len(target) != len(features):
            raise ValueError(
                f"expected one sentence feature for each of {len(features)} images, "
                f"got {tuple(target.shape)}"
            )
        guesses = F.normalize(self._ridge(self._scaling(features)), dim=-1)
        sentences = F.normalize(target.double(), dim=-1) - self._text_mean
        similarity = guesses @ F.normalize(sentences, dim=-1).mT
        # Equal codes must tie, but a matrix product may differ in the last bits between rows.
        similarity = similarity.round(decimals=9)
        same = _same(target, captions)
        results = {
            f"{direction}/{name}": value
            for direction, matrix in (
                ("image_to_text", similarity),
                ("text_to_image", similarity.mT),
            )
            for name, value in retrieval_by_query(matrix, same, self.ks).items()
        }
        return results | {"chance@1": same.double().mean(dim=1)}


def _same(sentences: Tensor, captions: Sequence[str] | None) -> Tensor:
    """Mark pairs of one caption, (M, M) bool."""
    if captions is None:
        group = torch.unique(sentences, dim=0, return_inverse=True)[1]
    else:
        if len(captions) != len(sentences):
            raise ValueError(f"{len(sentences)} sentence features, but {len(captions)} captions")
        numbers: dict[str, int] = {}
        group = torch.tensor([numbers.setdefault(c, len(numbers)) for c in captions])
    return group[:, None] == group[None, :]
