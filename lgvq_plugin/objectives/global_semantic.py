"""Global semantic alignment (L_gsa, Eq. 5): the image's [CLS] finds its caption's [EOT]."""

import math

import torch
from torch import Tensor, nn

from ..config import GlobalSemanticConfig
from ..dist import gather_rows
from ..functional import cosines, global_semantic_loss
from ..guides.base import AbstractGuide
from ..types import CodeView, Term
from .base import AbstractObjective, Caption

LOWEST_TEMPERATURE = 0.01
"""CLIP clips its logit scale at 100."""


class GlobalSemantic(AbstractObjective):
    """InfoNCE between code-ViT summaries and captions.

    Args:
        config: see `GlobalSemanticConfig`.
        guide: gives Dt, the width of the code-ViT's output too, and Ds.
        code_dim: not needed here.
    """

    def __init__(
        self, config: GlobalSemanticConfig, *, guide: AbstractGuide, code_dim: int
    ) -> None:
        super().__init__()
        image_dim, sentence_dim = guide.token_dim, guide.sentence_dim  # the code-ViT's, the text's
        self.config = config
        same_width = image_dim == sentence_dim
        self.project = nn.Identity() if same_width else nn.Linear(image_dim, sentence_dim)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learnable_temperature
        )

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_gsa over the captions that are present, on all ranks if `gather`."""
        text, keep = caption.features, caption.present
        summary = view.tokens.mean(dim=1) if self.config.source == "pooled" else view.cls
        image, sentence = self.project(summary)[keep].float(), text.sentence[keep].float()
        # Captions of the same tokens have the same features: no negatives of each other.
        token_ids = text.token_ids[keep]
        if self.config.gather:
            # The whole loss on every rank: its mean gradient over ranks is that of one process
            # with all rows, and all ranks agree on whether the value is finite.
            image, sentence, token_ids = (gather_rows(x) for x in (image, sentence, token_ids))
        same = (token_ids[:, None] == token_ids[None]).all(dim=-1)
        temperature = self._temperature()
        value = global_semantic_loss(
            image,
            sentence,
            temperature=temperature,
            symmetric=self.config.symmetric,
            same=same if self.config.exclude_same else None,
        )
        top1 = _retrieval_top1(image.detach(), sentence, same)
        return Term(value, {"temperature": temperature.detach(), "retrieval_top1": top1})

    def _temperature(self) -> Tensor:
        if self.config.learnable_temperature:
            # On the parameter, as clamping its exponential would leave it without a gradient.
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))
        return self.log_temperature.exp()


def _retrieval_top1(image: Tensor, sentence: Tensor, same: Tensor) -> Tensor:
    """Share of images whose nearest caption reads as their own; 0 without images."""
    if len(image) == 0:
        return image.new_zeros(())
    best = cosines(image, sentence).argmax(dim=-1, keepdim=True)
    return same.gather(1, best).float().mean()
