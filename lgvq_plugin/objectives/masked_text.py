"""Masked text prediction (L_mtp, Eq. 6): the image's codes fill in hidden words.

mask_at input:   words are hidden before the text encoder, so no visible feature knows them.
mask_at output:  the released code; the encoder saw the whole caption, so later tokens leak them.
                 One ratio a batch hides each token by itself: words may be halved, or none hidden.
"""

import torch

from ..config import MaskedTextConfig
from ..functional import masked_text_loss, sample_token_mask, sample_truncated_ratio
from ..guides.base import AbstractGuide
from ..heads.text_decoder import TextDecoder
from ..types import CodeView, Term, TextFeatures
from .base import AbstractObjective, Caption


class MaskedText(AbstractObjective):
    """Hide words, let the decoder predict them from code-ViT tokens.

    Args:
        config: see `MaskedTextConfig`.
        guide: gives the widths, the code-ViT's too, and the vocabulary.
        code_dim: not needed here.
    """

    def __init__(self, config: MaskedTextConfig, *, guide: AbstractGuide, code_dim: int) -> None:
        super().__init__()
        self.config = config
        self.decoder = TextDecoder(
            guide.token_dim,
            memory_dim=guide.token_dim,
            vocabulary_size=len(guide.vocabulary),
            max_length=guide.max_length,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
        )

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_mtp over the captions that are present, and the recall@1 of hidden words."""
        text = caption.features
        mask = self._mask(caption) & caption.present[:, None]
        if self.config.mask_at == "input":
            text = caption.guide.encode(caption.strings, token_mask=mask)
        memory = view.tokens
        if self.config.attend_cls:
            memory = torch.cat([view.cls[:, None], memory], dim=1)
        logits = self.decoder(
            text.tokens.detach().masked_fill(~self._is_real(text)[..., None], 0.0),
            mask,
            memory,
            text.vocabulary,
            None if self.config.attend_padding else text.attention_mask,
        )
        targets = text.token_ids[mask]
        value = masked_text_loss(logits, targets, label_smoothing=self.config.label_smoothing)
        hits = (logits.detach().argmax(dim=-1) == targets).float()
        return Term(value, {"word_recall": hits.sum() / max(len(hits), 1)})

    def _mask(self, caption: Caption) -> torch.Tensor:
        text, config = caption.features, self.config
        if config.mask_at == "input":
            return caption.guide.draw_mask(
                caption.strings, text.word_ids, ratio=config.ratio, generator=caption.generator
            )
        low, high = config.ratio
        ratio = sample_truncated_ratio(
            mean=0.5, deviation=0.1, low=low, high=high, generator=caption.generator
        )
        return sample_token_mask(
            self._is_real(text), text.word_ids, ratio=ratio, generator=caption.generator
        )

    def _is_real(self, text: TextFeatures) -> torch.Tensor:
        if self.config.mask_at == "input":
            return text.attention_mask
        # Released code: a word piece of id 0 counts as padding, too.
        return text.attention_mask & (text.token_ids != 0)
