"""Downstream tasks on frozen codes, the same for any tokenizer: the contract and the members."""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Literal, TypeVar

MEMBERS = {
    "retrieval": "ridge.RetrievalProbe",
    "attributes": "ridge.AttributesProbe",
    "linear_probe": "classifiers.LinearProbe",
    "knn": "classifiers.NearestNeighbors",
    "masked_words": "language.MaskedWordsProbe",
    "captioning": "language.CaptioningProbe",
    "vqa": "language.VQAProbe",
    "text_to_image": "text_to_image.TextToImageProbe",
    "unconditional": "text_to_image.SynthesisProbe",
    "class_to_image": "text_to_image.SynthesisProbe",
    "semantic_to_image": "text_to_image.SynthesisProbe",
    "grounding": "grounding.GroundingProbe",
    "image_judge": "classifiers.ImageJudge",
}

Source = TypeVar("Source")
Target = TypeVar("Target")
Self = TypeVar("Self", bound="AbstractProbe")


class AbstractProbe(ABC, Generic[Source, Target]):
    """A small model from frozen codes to a task, trained on one split and tested on another.

    A probe of another package is measured by `lgvq eval --metrics my_pkg.mod:MyProbe`, see
    :mod:`lgvq_plugin.bench.foreign`; the two attributes say what it then reads.
    """

    source: ClassVar[Literal["features", "codes"]] = "features"
    """`CodeFeatures` (pooled codes and their histogram), or `FrozenCodes` (all positions)."""
    target: ClassVar[Literal["captions", "attributes", "questions"]] = "captions"
    """Of each image: its captions, its labels; or the data set's questions."""

    @abstractmethod
    def fit(self: Self, codes: Source, target: Target) -> Self:
        """Train on M images; returns self.

        Args:
            codes: of the images, or features of them.
            target: of the task, in the order of the images.
        """

    @abstractmethod
    def evaluate(self, codes: Source, target: Target) -> dict[str, float]:
        """Return the task's numbers on images that were not in :meth:`fit`."""
