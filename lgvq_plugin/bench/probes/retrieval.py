"""Image-text retrieval by ridge regression from frozen codes to the guide's sentence features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.retrieval import retrieval_by_query
from . import AbstractProbe
from .features import CodeFeatures
from .ridge import Ridge, Scaling, fit_ridges


class RetrievalProbe(AbstractProbe[CodeFeatures, Tensor]):
    """Predict an image's sentence feature from its codes, and rank by cosine.

    `ks` are those of the recalls; `seed` draws the held-out part that chooses the ridge's strength.
    """

    _ridge: Ridge

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0):
        self.ks, self.seed = tuple(ks), seed
        self._scaling: Scaling | None = None

    @property
    def strength(self) -> float:
        """The ridge's strength chosen by :meth:`fit`."""
        return self._ridge.strength

    def fit(self, codes: CodeFeatures, target: Tensor) -> "RetrievalProbe":
        """Train on M images.

        The target is the guide's sentence features, (M, Ds), or (M, n, Ds) with n captions per
        image, which are averaged.
        """
        sentences = F.normalize(target.double(), dim=-1)
        if sentences.ndim == 3:
            sentences = F.normalize(sentences.mean(dim=1), dim=-1)
        self._text_mean = sentences.mean(dim=0)
        self._scaling = Scaling.from_features(codes)
        wanted = {"sentence": sentences - self._text_mean}
        self._ridge = fit_ridges(self._scaling(codes), wanted, seed=self.seed)["sentence"]
        return self

    def evaluate(
        self, codes: CodeFeatures, target: Tensor, captions: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, the ridge's `strength` and the `count` of images."""
        values = self.values(codes, target, captions)
        means = {name: float(value.mean()) for name, value in values.items()}
        return means | {"strength": self.strength, "count": float(len(codes))}

    def values(
        self, codes: CodeFeatures, target: Tensor, captions: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Retrieve among the M captions for each of the M images, and vice versa.

        The target is the sentence feature of one caption per held-out image, (M, Ds). Of these
        `captions` equal ones are all relevant; None: captions with identical features are. Returns
        `image_to_text/recall@k`, `image_to_text/mean_rank`, the same for `text_to_image`, and
        `chance@1` (expected recall at 1 without information) of each image, (M,) float64.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: if the numbers of images, features and captions differ.
        """
        if self._scaling is None:
            raise RuntimeError("RetrievalProbe: call fit(...) on training images first")
        if target.ndim != 2 or len(target) != len(codes):
            raise ValueError(
                f"expected one sentence feature for each of {len(codes)} images, "
                f"got {tuple(target.shape)}"
            )
        guesses = F.normalize(self._ridge(self._scaling(codes)), dim=-1)
        sentences = F.normalize(target.double(), dim=-1) - self._text_mean
        similarity = guesses @ F.normalize(sentences, dim=-1).mT
        # Equal codes must tie, but rows of a matrix product may differ in the last bits.
        similarity = similarity.round(decimals=9)
        same = _is_same_caption(target, captions)
        results = {}
        for direction, matrix in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
            for name, value in retrieval_by_query(matrix, same, self.ks).items():
                results[f"{direction}/{name}"] = value
        return results | {"chance@1": same.double().mean(dim=1)}


def _is_same_caption(sentences: Tensor, captions: Sequence[str] | None) -> Tensor:
    """Return which pairs have the same caption, (M, M) bool."""
    if captions is None:
        group = torch.unique(sentences, dim=0, return_inverse=True)[1]
    else:
        if len(captions) != len(sentences):
            raise ValueError(f"{len(sentences)} sentence features, but {len(captions)} captions")
        numbers: dict[str, int] = {}
        group = torch.tensor([numbers.setdefault(c, len(numbers)) for c in captions])
    return group[:, None] == group[None, :]
