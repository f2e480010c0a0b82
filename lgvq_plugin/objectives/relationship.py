"""Relationship alignment (L_ras, Eq. 7 and 8): codes relate to each other as their words do.

words  w1 w2 w3          cosines of words   ==   cosines of codes
        |  |  |  nearest visual token (Eq. 7)
codes  c7 c2 c9          compared over pairs of distinct words (Eq. 8)
"""

from torch import nn

from ..config import RelationshipConfig
from ..functional import pool_words, relationship_loss
from ..grains import caption_relationship_loss
from ..guides.base import AbstractGuide
from ..types import CodeView, Term
from .base import AbstractObjective, Caption


class Relationship(AbstractObjective):
    """Match each word to visual tokens, then compare all pairs of cosines.

    Args:
        config: see `RelationshipConfig`.
        guide: gives Dt.
        code_dim: C.
    """

    def __init__(self, config: RelationshipConfig, *, guide: AbstractGuide, code_dim: int) -> None:
        super().__init__()
        self.config = config
        self.project: nn.Module = nn.Identity()
        if config.project:
            linear = nn.Linear(code_dim, guide.token_dim)
            nn.init.normal_(linear.weight, std=0.01)
            self.project = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(guide.token_dim))

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_ras over the captions that are present."""
        text, keep = caption.features, caption.present
        codes = self.project(view.codes.codes)[keep]
        if self.config.between == "captions":
            return Term(caption_relationship_loss(text.sentence[keep], codes))
        if self.config.variant == "paper":
            # Released code: start and end count as words, and a word piece of id 0 as padding.
            words, mask = text.tokens, text.attention_mask & (text.token_ids != 0)
        else:
            words, mask = pool_words(text.tokens, text.word_ids)
        value = relationship_loss(
            words[keep],
            mask[keep],
            view.tokens[keep],
            codes,
            variant=self.config.variant,
            temperature=self.config.temperature,
            matching=self.config.matching,
        )
        return Term(value)
