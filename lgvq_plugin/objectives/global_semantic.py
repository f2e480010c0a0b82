"""Global semantic alignment (L_gsa, Eq. 5): the image's [CLS] finds its caption's [EOT]."""

import math

import torch
from torch import Tensor, nn

from ..config import GlobalSemanticConfig
from ..dist import gather_rows
from ..functional import cosines, global_semantic_loss, pool_words
from ..grains import pool_phrases, word_semantic_loss
from ..guides.base import AbstractGuide
from ..types import CodeView, PastPairs, Term
from .base import AbstractObjective, Caption

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
