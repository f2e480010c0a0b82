"""The three objectives of LG-VQ; each returns an unweighted `Term`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from .heads import CodeViT, TextDecoder, accept_old_names
from .types import CodeView, PastPairs, Term, TextFeatures

MEMBERS = {
    "global_semantic": "GlobalSemantic",
    "masked_text": "MaskedText",
    "relationship": "Relationship",
}


MIN_TEMPERATURE = 0.01
"""CLIP clips its logit scale at 100."""


@dataclass(frozen=True)
class Caption:
    """One batch of captions.

    Args:
        strings: B captions.
        has_caption: True where an image has one, (B,) bool; the others do not contribute.
        features: the guide's features of the unmasked captions.
        guide: encodes masked captions.
        generator: CPU generator of this step's draws.
    """

    strings: Sequence[str]
    has_caption: Tensor
    features: TextFeatures
    guide: AbstractGuide
    generator: torch.Generator


class AbstractObjective(nn.Module, ABC):
    """Owns its heads; sees codes through the code-ViT and captions through the guide.

    Members are built as `Objective(config, guide=guide, code_dim=C)`.
    """

    @abstractmethod
    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return the unweighted term of one batch."""


class GlobalSemantic(AbstractObjective):
    """Global semantic alignment (L_gsa, Eq. 5): InfoNCE between code-ViT summaries and captions.

    Attributes:
        queue: the last pairs as further negatives, if the config asks for them, else None.
    """

    OLD_NAMES = {"memory.": "queue."}

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
        self.queue: NegativeQueue | None = None
        if config.queue:
            self.queue = NegativeQueue(config.queue, width=sentence_dim, length=guide.max_length)
        self.register_load_state_dict_pre_hook(accept_old_names)

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_gsa over the images with a caption, on all ranks if `gather`."""
        text, keep = caption.features, caption.has_caption
        summary = view.tokens.mean(dim=1) if self.config.source == "pooled" else view.cls
        image, sentence = self.project(summary)[keep].float(), text.sentence[keep].float()
        # Captions of the same tokens have the same features: they are no negatives of each other.
        token_ids = text.token_ids[keep]
        if self.config.gather:
            # The whole loss on every rank: its mean gradient over ranks is that of one process
            # with all rows, and all ranks agree on whether the value is finite.
            image, sentence, token_ids = gather_rows(image, sentence, token_ids)
        same = _same(token_ids, token_ids)
        temperature = self._temperature()
        past = None
        if self.queue is not None and self.training:
            past = self.queue.recall(token_ids)
            self.queue.add(image, sentence, token_ids)
        value = global_semantic_loss(
            image,
            sentence,
            temperature=temperature,
            symmetric=self.config.symmetric,
            same=same if self.config.exclude_same else None,
            past=past,
        )
        if self.config.words_weight:
            value = value + self.config.words_weight * self._words(view, caption, temperature)
        top1 = _retrieval_top1(image.detach(), sentence, same)
        return Term(value, {"temperature": temperature.detach(), "retrieval_top1": top1})

    def _words(self, view: CodeView, caption: Caption, temperature: Tensor) -> Tensor:
        """Contrast words with patches, on this rank alone: all ranks' patches are too many."""
        text, keep = caption.features, caption.has_caption
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
            # Clamp the parameter: clamping its exponential would leave it without a gradient.
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        return self.log_temperature.exp()


class NegativeQueue(nn.Module):
    """The last `size` pairs of image and caption features (cross-batch memory, Wang et al. 2020).

    Captions' features are frozen, so old ones are exact; images' are as old as their batch. Saved
    in checkpoints, so that a resumed run has the same negatives.

    Args:
        size: M, number of pairs.
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
        self.register_load_state_dict_post_hook(_drop_nonfinite_pairs)

    def recall(self, token_ids: Tensor) -> PastPairs:
        """Return copies, so that `add` may follow before the loss runs backward."""
        excluded = _same(token_ids, self.token_ids) | ~self.is_filled
        return PastPairs(self.image.clone(), self.text.clone(), excluded)

    @torch.no_grad()
    def add(self, image: Tensor, text: Tensor, token_ids: Tensor) -> None:
        """Replace the oldest pairs by B new ones, without synchronizing with a GPU.

        A pair whose image or text is not finite, as after an overflow, leaves its place empty.
        """
        size = len(self.image)
        image, text, token_ids = image[-size:].float(), text[-size:].float(), token_ids[-size:]
        number = torch.arange(len(image), device=self.place.device)
        places = (self.place + number) % size
        is_finite = (image.isfinite() & text.isfinite()).all(dim=1)
        self.image.index_copy_(0, places, image.where(is_finite[:, None], 0.0))
        self.text.index_copy_(0, places, text.where(is_finite[:, None], 0.0))
        self.token_ids.index_copy_(0, places, token_ids)
        self.is_filled.index_copy_(0, places, is_finite)
        self.place.copy_((self.place + len(image)) % size)


@torch.no_grad()
def _drop_nonfinite_pairs(queue: Any, incompatible: object) -> None:
    """Empty the places of a loaded queue that earlier versions filled with NaN."""
    is_finite = (queue.image.isfinite() & queue.text.isfinite()).all(dim=1)
    queue.image.masked_fill_(~is_finite[:, None], 0.0)
    queue.text.masked_fill_(~is_finite[:, None], 0.0)
    queue.is_filled &= is_finite


def _same(left: Tensor, right: Tensor) -> Tensor:
    """Compare captions by their tokens, (B, T) and (M, T) -> (B, M) bool."""
    return (left[:, None] == right[None]).all(dim=-1)


def _retrieval_top1(image: Tensor, sentence: Tensor, same: Tensor) -> Tensor:
    """Share of images whose nearest caption equals their own; 0 without images."""
    if len(image) == 0:
        return image.new_zeros(())
    best = cosines(image, sentence).argmax(dim=-1, keepdim=True)
    return same.gather(1, best).float().mean()


class MaskedText(AbstractObjective):
    """Masked text prediction (L_mtp, Eq. 6): the image's codes fill in masked words."""

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
        """Return L_mtp over the images with a caption, and the recall@1 of masked words."""
        text = caption.features
        mask = self._mask(caption) & caption.has_caption[:, None]
        if self.config.mask_at == "input":
            text = caption.guide.encode(caption.strings, token_mask=mask)
        memory = view.tokens
        if self.config.attend_cls:
            memory = torch.cat([view.cls[:, None], memory], dim=1)
        logits = self.decoder(
            text.tokens.detach().masked_fill(~self._is_not_padding(text)[..., None], 0.0),
            mask,
            memory,
            text.vocabulary,
            attention_mask=None if self.config.attend_padding else text.attention_mask,
        )
        targets = text.token_ids[mask]
        value = masked_text_loss(logits, targets, label_smoothing=self.config.label_smoothing)
        hits = (logits.detach().argmax(dim=-1) == targets).float()
        return Term(value, {"word_recall": hits.sum() / max(len(hits), 1)})

    def _mask(self, caption: Caption) -> Tensor:
        text, config = caption.features, self.config
        if config.mask_at == "input":
            return caption.guide.draw_mask(
                caption.strings, text.word_ids, ratio=config.ratio, generator=caption.generator
            )
        # Released code: a normal draw cut to the ratio's bounds, of which (0.1, 0.3) lie below
        # its mean, so that most draws are close to the upper one.
        low, high = config.ratio
        ratio = sample_truncated_ratio(
            mean=0.5, deviation=0.1, low=low, high=high, generator=caption.generator
        )
        return sample_token_mask(
            self._is_not_padding(text), text.word_ids, ratio=ratio, generator=caption.generator
        )

    def _is_not_padding(self, text: TextFeatures) -> Tensor:
        if self.config.mask_at == "input":
            return text.attention_mask
        # Released code: a word piece of id 0 counts as padding, too.
        return text.attention_mask & (text.token_ids != 0)


class Relationship(AbstractObjective):
    """Relationship alignment (L_ras, Eq. 7 and 8): codes relate to each other as their words do.

    Each word is matched to visual tokens, then all pairs of cosines are compared.
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
        """Return L_ras over the images with a caption."""
        text, keep = caption.features, caption.has_caption
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


def rename_old_heads(state: dict[str, Tensor], prefix: str = "loss.lgvq.") -> None:
    """Rename the keys that version 0.1.0 gave to heads, in a state dict that has them at `prefix`.

    `load_state_dict` does so by itself; this is for code that compares keys before.
    """
    owners: dict[str, type] = {
        "code_vit.": CodeViT,
        "objectives.global_semantic.": GlobalSemantic,
        "objectives.masked_text.decoder.": TextDecoder,
    }
    for path, owner in owners.items():
        accept_old_names(owner, state, prefix + path)
