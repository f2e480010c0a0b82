"""The three objectives; each returns an unweighted `Term`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import GlobalSemanticConfig, MaskedTextConfig, RelationshipConfig
from .functional import (
    caption_relationship_loss,
    cosines,
    gather_rows,
    global_semantic_loss,
    masked_text_loss,
    pool_phrases,
    pool_words,
    relationship_loss,
    sample_token_mask,
    sample_truncated_ratio,
    word_semantic_loss,
)
from .guides.base import AbstractGuide
from .heads import TextDecoder
from .types import CodeView, PastPairs, Term, TextFeatures

MEMBERS = {
    "global_semantic": "GlobalSemantic",
    "masked_text": "MaskedText",
    "relationship": "Relationship",
}


# -- The contract of an objective: codes and captions in, one unweighted term out ----------------


@dataclass(frozen=True)
class Caption:
    """One batch of captions.

    Args:
        strings: B captions.
        present: True where an image has one, (B,) bool; the others take no part.
        features: the guide's view of the unmasked captions.
        guide: to encode masked captions.
        generator: CPU generator of this step's draws.
    """

    strings: Sequence[str]
    present: Tensor
    features: TextFeatures
    guide: AbstractGuide
    generator: torch.Generator


class AbstractObjective(nn.Module, ABC):
    """Owns its heads; sees codes through the code-ViT and captions through the guide."""

    @abstractmethod
    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return the unweighted term of one batch."""


# -- Global semantic alignment (L_gsa, Eq. 5): the image's [CLS] finds its caption's [EOT] -------


LOWEST_TEMPERATURE = 0.01
"""CLIP clips its logit scale at 100."""


class GlobalSemantic(AbstractObjective):
    """InfoNCE between code-ViT summaries and captions.

    Args:
        config: see `GlobalSemanticConfig`.
        guide: gives Dt, the width of the code-ViT's output too, and Ds.
        code_dim: not needed here.

    Attributes:
        memory: the last pairs, if `queue` asks for them.
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
        self.memory: PairMemory | None = None
        if config.queue:
            self.memory = PairMemory(config.queue, width=sentence_dim, length=guide.max_length)

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
        same = _same(token_ids, token_ids)
        temperature = self._temperature()
        excluded = same if self.config.exclude_same else None
        past = None
        if self.memory is not None and self.training:
            past = self.memory.recall(token_ids)
            self.memory.add(image, sentence, token_ids)
        value = global_semantic_loss(
            image,
            sentence,
            temperature=temperature,
            symmetric=self.config.symmetric,
            same=excluded,
            past=past,
        )
        if self.config.words_weight:
            value = value + self.config.words_weight * self._words(view, caption, temperature)
        top1 = _retrieval_top1(image.detach(), sentence, same)
        return Term(value, {"temperature": temperature.detach(), "retrieval_top1": top1})

    def _words(self, view: CodeView, caption: Caption, temperature: Tensor) -> Tensor:
        """Contrast words with patches, on this rank alone: the patches of all are too many."""
        text, keep = caption.features, caption.present
        words, is_word = pool_words(text.tokens[keep], text.word_ids[keep])
        words, is_word = pool_phrases(words, is_word, self.config.words_span)
        token_ids = text.token_ids[keep]
        return word_semantic_loss(
            view.tokens[keep],
            words,
            is_word,
            temperature=temperature,
            symmetric=self.config.symmetric,
            same=_same(token_ids, token_ids) if self.config.exclude_same else None,
        )

    def _temperature(self) -> Tensor:
        if self.config.learnable_temperature:
            # On the parameter, as clamping its exponential would leave it without a gradient.
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))
        return self.log_temperature.exp()


class PairMemory(nn.Module):
    """The last `size` pairs of image and caption features (cross-batch memory, Wang et al. 2020).

    Captions' features are frozen, so old ones are exact; images' are as old as their batch. It is
    part of a checkpoint, so that a resumed run has the negatives of one that was not stopped.

    Args:
        size: M, how many pairs.
        width: Ds.
        length: T, tokens of a caption.
    """

    image: Tensor
    text: Tensor
    token_ids: Tensor
    is_filled: Tensor
    place: Tensor

    def __init__(self, size: int, *, width: int, length: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(size, width))
        self.register_buffer("text", torch.zeros(size, width))
        self.register_buffer("token_ids", torch.zeros(size, length, dtype=torch.int64))
        self.register_buffer("is_filled", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_empty_non_finite)

    def recall(self, token_ids: Tensor) -> PastPairs:
        """Return copies, so that `add` may follow before the loss runs backward."""
        out = _same(token_ids, self.token_ids) | ~self.is_filled
        return PastPairs(self.image.clone(), self.text.clone(), out)

    @torch.no_grad()
    def add(self, image: Tensor, text: Tensor, token_ids: Tensor) -> None:
        """Put B pairs in the place of the oldest ones; no synchronization with a GPU.

        A pair whose image or text is not finite, as an overflow leaves it, takes an empty place.
        """
        size = len(self.image)
        image, text, token_ids = image[-size:], text[-size:], token_ids[-size:]
        number = torch.arange(len(image), device=self.place.device)
        places = (self.place + number) % size
        image, text = image.float(), text.float()
        is_finite = (image.isfinite() & text.isfinite()).all(dim=1)
        self.image.index_copy_(0, places, image.where(is_finite[:, None], 0.0))
        self.text.index_copy_(0, places, text.where(is_finite[:, None], 0.0))
        self.token_ids.index_copy_(0, places, token_ids)
        self.is_filled.index_copy_(0, places, is_finite)
        self.place.copy_((self.place + len(image)) % size)


@torch.no_grad()
def _empty_non_finite(memory: nn.Module, incompatible: object) -> None:
    """Empty the places of a loaded queue that earlier versions filled with NaN."""
    assert isinstance(memory, PairMemory)
    is_finite = (memory.image.isfinite() & memory.text.isfinite()).all(dim=1)
    memory.image.masked_fill_(~is_finite[:, None], 0.0)
    memory.text.masked_fill_(~is_finite[:, None], 0.0)
    memory.is_filled &= is_finite


def _same(left: Tensor, right: Tensor) -> Tensor:
    """Mark captions of the very same tokens, (B, T) and (M, T) -> (B, M) bool."""
    return (left[:, None] == right[None]).all(dim=-1)


def _retrieval_top1(image: Tensor, sentence: Tensor, same: Tensor) -> Tensor:
    """Share of images whose nearest caption reads as their own; 0 without images."""
    if len(image) == 0:
        return image.new_zeros(())
    best = cosines(image, sentence).argmax(dim=-1, keepdim=True)
    return same.gather(1, best).float().mean()


# -- Masked text prediction (L_mtp, Eq. 6): the image's codes fill in hidden words ---------------


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


# -- Relationship alignment (L_ras, Eq. 7 and 8): codes relate to each other as their words do ----


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
