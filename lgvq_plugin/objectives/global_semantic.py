"""Global semantic alignment (L_gsa, Eq. 5): the image's [CLS] finds its caption's [EOT]."""

import math
import zlib

import torch
from torch import nn

from ..config import GlobalSemanticConfig
from ..dist import gather_rows
from ..functional import global_semantic_loss
from ..types import CodeView, Term
from .base import AbstractObjective, Caption

LOWEST_TEMPERATURE = 0.01
"""CLIP clips its logit scale at 100."""


class GlobalSemantic(AbstractObjective):
    """InfoNCE between code-ViT summaries and captions.

    Args:
        config: see `GlobalSemanticConfig`.
        image_dim: D, width of the code-ViT's output.
        sentence_dim: Ds.
    """

    def __init__(self, config: GlobalSemanticConfig, *, image_dim: int, sentence_dim: int) -> None:
        super().__init__()
        self.config = config
        same_width = image_dim == sentence_dim
        self.project = nn.Identity() if same_width else nn.Linear(image_dim, sentence_dim)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learnable_temperature
        )

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_gsa over the captions that are present, on all ranks if `gather`."""
        keep = caption.present
        image, text = self.project(view.cls)[keep], caption.features.sentence[keep]
        same = [
            zlib.crc32(s.encode()) for s, k in zip(caption.strings, keep.tolist(), strict=True) if k
        ]
        keys = torch.tensor(same, dtype=torch.long, device=image.device)
        if self.config.gather:
            image, text, keys = gather_rows(image), gather_rows(text), gather_rows(keys)
        temperature = self.log_temperature.exp().clamp(min=LOWEST_TEMPERATURE)
        value = global_semantic_loss(
            image,
            text,
            temperature=temperature,
            symmetric=self.config.symmetric,
            same=keys[:, None] == keys[None] if self.config.exclude_same else None,
        )
        with torch.no_grad():
            cosines = torch.nn.functional.normalize(image.float(), dim=-1) @ (
                torch.nn.functional.normalize(text.float(), dim=-1).mT
            )
            best = cosines.argmax(dim=-1) if len(cosines) else cosines.new_zeros(0).long()
            top1 = (keys[best] == keys).float().sum() / max(len(keys), 1)
        return Term(value, {"temperature": temperature.detach(), "retrieval_top1": top1})
