"""Finer and coarser grains of the objectives, words, phrases, captions (as TA-VQ, 2503.01261).

Pure functions, in float32 as those of `functional`; LG-VQ itself has one grain for each objective.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import contrast, cosines


def word_semantic_loss(
    tokens: Tensor,
    words: Tensor,
    word_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    symmetric: bool = False,
    same: Tensor | None = None,
) -> Tensor:
    """InfoNCE between images and captions that are compared word by patch.

    A caption's score in an image is the mean, over its words, of the cosine with the word's best
    patch (late interaction, Yao et al. 2022): Eq. 5 at a finer grain.

    Args:
        tokens: the code-ViT's patch tokens, (B, N, D).
        words: text features, (B, W, D); a target, so no gradient flows into it.
        word_mask: True at words, (B, W) bool; a caption without words scores 0 everywhere.
        temperature, symmetric, same: as of :func:`global_semantic_loss`.

    Returns:
        Scalar, the mean over the batch; 0 with a gradient path for an empty batch.

    Example:
        >>> eye = torch.eye(2)[:, None]  # one patch and one word each
        >>> word_semantic_loss(eye, eye, torch.ones(2, 1, dtype=torch.bool))
        tensor(0.3133)
    """
    if len(tokens) == 0:
        return (tokens.float() / temperature).sum()
    each = cosines(words.detach().flatten(0, 1), tokens.flatten(0, 1))  # (B * W, B * N)
    best = each.unflatten(1, tokens.shape[:2]).amax(dim=-1).unflatten(0, words.shape[:2])
    is_word = word_mask[..., None].to(best.dtype)
    scores = (best * is_word).sum(dim=1) / is_word.sum(dim=1).clamp(min=1)  # (captions, images)
    loss = contrast(scores.mT, temperature, same)
    return (loss + contrast(scores, temperature, same)) / 2 if symmetric else loss


def caption_relationship_loss(sentences: Tensor, codes: Tensor) -> Tensor:
    """Mean squared gap between caption-caption and image-image cosines: Eq. 8 of whole captions.

    Args:
        sentences: caption features, (B, Ds); a target, so no gradient flows into it.
        codes: code vectors, projected or raw, (B, N, E); an image is their mean.

    Returns:
        Scalar, the mean over pairs of distinct images; 0 with a gradient path for fewer than two.

    Example:
        >>> eye = torch.eye(2)
        >>> round(float(caption_relationship_loss(eye, torch.ones(2, 1, 3))), 4)  # cosines 0 and 1
        1.0
    """
    means = codes.float().mean(dim=1)
    gap = cosines(means, means) - cosines(sentences.detach(), sentences.detach())
    is_pair = ~torch.eye(len(gap), dtype=torch.bool, device=gap.device)
    return gap.square().masked_fill(~is_pair, 0.0).sum() / is_pair.sum().clamp(min=1)


def pool_phrases(words: Tensor, is_word: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Average each run of `span` words; a caption of fewer words is one phrase.

    Args:
        words: (B, W, D), zeros where `is_word` is False.
        is_word: True at the first words of each row, (B, W) bool.
        span: words a phrase, >= 1.

    Returns:
        Phrase features (B, W, D), the run that starts at each word, and where there is one (B, W).

    Example:
        >>> pool_phrases(torch.tensor([[[1.0], [3.0], [0.0]]]), torch.tensor([[1, 1, 0]]) > 0, 2)
        (tensor([[[2.0000],
                 [1.5000],
                 [0.0000]]]), tensor([[ True, False, False]]))
    """
    count = is_word.sum(dim=1, keepdim=True)
    padded = F.pad(words, (0, 0, 0, span - 1))
    runs = padded.unfold(1, span, 1).sum(dim=-1)
    runs = runs / count.clamp(min=1, max=span)[..., None]
    number = torch.arange(words.shape[1], device=words.device)
    return runs, is_word & (number < (count - span + 1).clamp(min=1))
