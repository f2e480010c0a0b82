"""The records that flow through the package, with the shapes of their tensors.

Letters: B images in the batch, N code positions (h * w), K codebook entries, C code width,
T text positions, W words, V vocabulary, Dt token-feature width, Ds sentence-feature width,
M patches of an image tower, Dv their width, D width of the code-ViT's output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """The quantized grid of one batch, whatever the host's layout was.

    Args:
        codes: quantized vectors, (B, N, C); differentiable towards the encoder.
        indices: the code chosen at each position, (B, N) int64, or None if the host returns none.
        grid: (h, w) with h * w == N.
        codebook: all code vectors, (K, C), or None for look-up free quantizers.
        levels: of several quantizers, the codes of each by its path; empty for one. The codes are
            then those of all levels side by side, and have neither indices nor codebook.
    """

    codes: Tensor
    indices: Tensor | None
    grid: tuple[int, int]
    codebook: Tensor | None = None
    levels: "Mapping[str, Codes]" = field(default_factory=dict)


@dataclass(frozen=True)
class TextTokens:
    """Captions as the guide's tokens, before any network ran.

    Args:
        token_ids: (B, T) int64, with start and end tokens.
        attention_mask: True at start, words and end; False at padding, (B, T) bool.
        word_ids: the number of the word that a token is a piece of, counted from 0; -1 at
            start, end and padding, (B, T) int64.
        cut: number of captions that were too long.
    """

    token_ids: Tensor
    attention_mask: Tensor
    word_ids: Tensor
    cut: int = 0


@dataclass(frozen=True)
class TextFeatures:
    """Features of a batch of captions from the frozen guide, without gradients; cf. TextTokens.

    T is at most the guide's `max_length`; guides may trim it to the longest caption of the batch.
    """

    token_ids: Tensor
    attention_mask: Tensor
    word_ids: Tensor
    tokens: Tensor  # contextual feature of each token, (B, T, Dt)
    sentence: Tensor  # feature of the whole caption, (B, Ds)
    vocabulary: Tensor  # the guide's token embedding, (V, Dt)

    def padded(self, length: int, pad_id: int) -> "TextFeatures":
        """Return them with T = `length`, at least the present one; padding has zero features."""
        more = length - self.token_ids.shape[1]
        return replace(
            self,
            token_ids=F.pad(self.token_ids, (0, more), value=pad_id),
            attention_mask=F.pad(self.attention_mask, (0, more)),
            word_ids=F.pad(self.word_ids, (0, more), value=-1),
            tokens=F.pad(self.tokens, (0, 0, 0, more)),
        )


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a batch of images from a frozen image tower, without gradients."""

    patches: Tensor  # row by row, (B, M, Dv) float32
    grid: tuple[int, int]  # (h, w) of the patches, h * w == M
    summary: Tensor  # the class token, or the mean patch of towers without one, (B, Dv)


@dataclass(frozen=True)
class CodeView:
    """One batch of codes as the heads see it."""

    codes: Codes
    cls: Tensor  # the code-ViT's summary of the image, (B, D); D = 0 if no objective needs_view
    tokens: Tensor  # its patch tokens, (B, N, D)
    images: Tensor | None = None  # of the host, (B, 3, H, W) in [-1, 1]; None if its loss has none
    reconstructions: Tensor | None = None  # of the host, differentiable
    vision: ImageFeatures | None = None  # of the images; None if no objective reads "vision"


@dataclass(frozen=True)
class PastPairs:
    """Images and captions of earlier batches, as further negatives; without gradients."""

    image: Tensor  # features of M images, (M, Ds)
    text: Tensor  # features of their captions, (M, Ds)
    same: Tensor  # excluded from the negatives of a pair: equal caption or empty place, (B, M) bool


@dataclass(frozen=True)
class Term:
    """What an objective returns: an unweighted scalar, and further detached ones to log."""

    value: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)
