"""The three objectives of LG-VQ, and alignment with an image tower; each returns a `Term`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .config import (
    GlobalSemanticConfig,
    MaskedTextConfig,
    ObjectiveConfig,
    RelationshipConfig,
    VisionAlignmentConfig,
)
from .guides.base import AbstractGuide, AbstractImageGuide
from .heads import CodeViT, TextDecoder, accept_old_names
from .types import CodeView, PastPairs, Term, TextFeatures, TextTokens

MEMBERS = {
    "global_semantic": "GlobalSemantic",
    "masked_text": "MaskedText",
    "relationship": "Relationship",
    "vision_alignment": "VisionAlignment",
}


MIN_TEMPERATURE = 0.01
"""CLIP clips its logit scale at 100."""


@dataclass(frozen=True)
class Caption:
    """One batch of captions.

    Args:
        strings: B captions, "" for an image without one.
        tokens: the guide's tokens of them, (B, max_length) on the CPU.
        features: the guide's features of the unmasked captions.
        guide: the text guide; None, with empty tokens and features, if no objective reads text.
        generator: CPU generator of this step's draws.
        mask: what :meth:`AbstractObjective.draw_mask` returned, (B, max_length) bool on the CPU.
        masked: features of the captions under that mask.
    """

    strings: Sequence[str]
    tokens: TextTokens
    features: TextFeatures
    guide: AbstractGuide
    generator: torch.Generator
    mask: Tensor | None = None
    masked: TextFeatures | None = None

    @property
    def has_caption(self) -> Tensor:
        """True where an image has a caption, (B,) bool on the CPU; others do not contribute."""
        return torch.tensor([bool(string) for string in self.strings], dtype=torch.bool)

    def rows(self, device: torch.device) -> Tensor:
        """Index of the images with a caption, made on the CPU so that no GPU is waited for."""
        rows = self.has_caption.nonzero()[:, 0]
        return rows.to(device, non_blocking=device.type == "cuda")


def without_text(
    strings: Sequence[str], generator: torch.Generator, device: torch.device
) -> Caption:
    """Return a batch of captions that no guide reads: no tokens (T = 0), no guide."""
    ids, nothing = torch.zeros(len(strings), 0, dtype=torch.int64), torch.zeros(len(strings), 0)
    tokens = TextTokens(ids, ids.bool(), ids)
    ids, nothing = ids.to(device), nothing.to(device)
    features = TextFeatures(ids, ids.bool(), ids, nothing[..., None], nothing, nothing[:0])
    return Caption(strings, tokens, features, None, generator)  # type: ignore[arg-type]


class AbstractObjective(nn.Module, ABC):
    """Owns its heads; sees codes through the code-ViT, captions and images through the guides.

    Members are built as `Objective(config, guide=guide, code_dim=C)`; the text guide is None if no
    objective reads text. Those that read "vision" also get `vision=` the image guide and
    `view_dim=` D, the width of the code-ViT's tokens. One of another package is named by its path,
    `objectives: {my_package.module:MyObjective: {weight: 0.1}}`, or by an entry point of the group
    `lgvq_plugin.objectives`.
    """

    config_class: type = ObjectiveConfig
    """Dataclass of its keys, `weight` among them; `config` of the constructor is an instance."""

    reads: tuple[str, ...] = ("text",)
    """The guides that it reads, "text" and "vision"; those that no objective reads are not built.
    Without "text" the caption has strings alone."""

    needs_view = True
    """Whether it reads `view.cls` or `view.tokens`; if no objective does, there is no code-ViT, and
    they have no channels (D = 0)."""

    needs_captions = True
    """Whether it learns nothing from images without captions."""

    needs_tokens = True
    """Whether it reads `caption.features.tokens`; if no objective does, they have no token (T = 0)
    in steps whose captions were encoded before."""

    draws_mask = False
    """Whether it has :meth:`draw_mask`; the captions are then encoded once more, masked."""

    def draw_mask(
        self,
        strings: Sequence[str],
        tokens: TextTokens,
        guide: AbstractGuide,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the tokens to mask before the encoder, (B, max_length) bool."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return the unweighted term of one batch."""


class GlobalSemantic(AbstractObjective):
    """Global semantic alignment (L_gsa, Eq. 5): InfoNCE between code-ViT summaries and captions.

    Attributes:
        queue: the last pairs as further negatives, if the config asks for them, else None.
    """

    config_class = GlobalSemanticConfig
    OLD_NAMES = {"memory.": "queue."}

    def __init__(
        self, config: GlobalSemanticConfig, *, guide: AbstractGuide, code_dim: int
    ) -> None:
        super().__init__()
        image_dim, sentence_dim = guide.token_dim, guide.sentence_dim  # the code-ViT's, the text's
        self.config, self.needs_tokens = config, config.words_weight > 0
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
        device = view.cls.device
        text, keep = caption.features, caption.rows(device)
        image, sentence = self.embed(view)[keep].float(), text.sentence[keep].float()
        # Captions of the same tokens have the same features: they are no negatives of each other.
        token_ids = caption.tokens.token_ids.to(device, non_blocking=device.type == "cuda")[keep]
        if self.config.gather:
            # The whole loss on every rank: its mean gradient over ranks is that of one process
            # with all rows, and all ranks agree on whether the value is finite.
            image, sentence, token_ids = functional.gather_rows(image, sentence, token_ids)
        same = _same(token_ids, token_ids)
        temperature = self._temperature()
        past = None
        if self.queue is not None and self.training:
            past = self.queue.recall(token_ids)
            self.queue.add(image, sentence, token_ids)
        value = functional.global_semantic_loss(
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

    def embed(self, view: CodeView) -> Tensor:
        """Return the feature of each image in the guide's sentence space, (B, Ds)."""
        summary = view.tokens.mean(dim=1) if self.config.source == "pooled" else view.cls
        return self.project(summary)

    def _words(self, view: CodeView, caption: Caption, temperature: Tensor) -> Tensor:
        """Contrast words with patches, on this rank alone: all ranks' patches are too many."""
        text, keep = caption.features, caption.rows(view.cls.device)
        words, is_word = functional.pool_words(text.tokens[keep], text.word_ids[keep])
        words, is_word = functional.pool_phrases(words, is_word, self.config.words_span)
        token_ids = text.token_ids[keep]
        return functional.word_semantic_loss(
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

    def __init__(self, size: int, *, width: int, length: int) -> None:
        super().__init__()
        self.image = nn.Buffer(torch.zeros(size, width))
        self.text = nn.Buffer(torch.zeros(size, width))
        self.token_ids = nn.Buffer(torch.zeros(size, length, dtype=torch.int64))
        self.is_filled = nn.Buffer(torch.zeros(size, dtype=torch.bool))
        self.place = nn.Buffer(torch.zeros((), dtype=torch.int64))
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
    similarity = image @ F.normalize(sentence, dim=-1).mT  # the image's length does not matter
    best = similarity.argmax(dim=-1, keepdim=True)
    return same.gather(1, best).float().mean()


class MaskedText(AbstractObjective):
    """Masked text prediction (L_mtp, Eq. 6): the image's codes fill in masked words.

    With `vocabulary: seen` the words to choose from are those of the training captions so far, of
    all ranks; they are kept in checkpoints.
    """

    config_class = MaskedTextConfig

    def __init__(self, config: MaskedTextConfig, *, guide: AbstractGuide, code_dim: int) -> None:
        super().__init__()
        self.config = config
        self.draws_mask = config.mask_at == "input"
        self.needs_tokens = not self.draws_mask
        size = len(guide.vocabulary)
        self.decoder = TextDecoder(
            guide.token_dim,
            memory_dim=guide.token_dim,
            vocabulary_size=size,
            max_length=guide.max_length,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
        )
        self._is_seen: Tensor | None = None  # `seen` on the CPU
        if config.vocabulary == "seen":
            self.seen = nn.Buffer(torch.zeros(size, dtype=torch.bool))
        self.register_load_state_dict_pre_hook(_fit_seen_words)

    def draw_mask(
        self,
        strings: Sequence[str],
        tokens: TextTokens,
        guide: AbstractGuide,
        generator: torch.Generator,
    ) -> Tensor:
        """Draw whole words."""
        ratio = self.config.ratio
        return guide.draw_mask(strings, tokens.word_ids, ratio=ratio, generator=generator)

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_mtp over the images with a caption, and the recall@1 of masked words."""
        if caption.masked is not None and caption.mask is not None:
            text, mask = caption.masked, caption.mask[:, : caption.masked.token_ids.shape[1]]
        else:
            text = caption.features.padded(caption.guide.max_length, caption.guide.pad_id)
            mask = self._mask_at_output(text, caption.generator)
        if self.config.attend_padding:
            text = text.padded(caption.guide.max_length, caption.guide.pad_id)
            mask = F.pad(mask, (0, text.token_ids.shape[1] - mask.shape[1]))
        mask = mask & caption.has_caption[:, None].to(mask.device)
        memory = view.tokens
        if self.config.attend_cls:
            memory = torch.cat([view.cls[:, None], memory], dim=1)
        is_cuda = memory.device.type == "cuda"
        masked = mask.flatten().nonzero()[:, 0].to(memory.device, non_blocking=is_cuda)
        targets = text.token_ids.flatten()[masked]
        choices = self._words_seen(caption.tokens, memory.device)
        is_real = caption.tokens.attention_mask[:, : mask.shape[1]].to(mask.device)
        logits = self.decoder(
            text.tokens.detach().masked_fill(~self._is_not_padding(text)[..., None], 0.0),
            mask,
            memory,
            text.vocabulary,
            attention_mask=None if self.config.attend_padding else is_real,
            choices=choices,
        )
        if choices is not None:
            targets = torch.searchsorted(choices, targets)
        value = functional.masked_text_loss(
            logits, targets, label_smoothing=self.config.label_smoothing
        )
        hits = (logits.detach().argmax(dim=-1) == targets).float()
        return Term(value, {"word_recall": hits.sum() / max(len(hits), 1)})

    def _words_seen(self, tokens: TextTokens, device: torch.device) -> Tensor | None:
        """Return sorted ids of the words so far, those of this batch included; None: all words."""
        if self.config.vocabulary == "full":
            return None
        known = self._is_seen
        if known is None or not self.training:  # an EMA may have written to `seen`
            known = self.seen.cpu()
        is_seen = known.index_fill(0, tokens.token_ids[tokens.word_ids >= 0].cpu(), True)
        if self.training and torch.is_grad_enabled():
            if dist.is_available() and dist.is_initialized():
                of_all = is_seen.to(device, torch.uint8)
                dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
                is_seen = of_all.bool().cpu()
            if not torch.equal(is_seen, known):
                self.seen.copy_(is_seen)
            self._is_seen = is_seen
        choices = is_seen.nonzero()[:, 0] if is_seen.any() else torch.zeros(1, dtype=torch.int64)
        return choices.to(device, non_blocking=device.type == "cuda")

    def _mask_at_output(self, text: TextFeatures, generator: torch.Generator) -> Tensor:
        # Released code: a normal draw cut to the ratio's bounds, of which (0.1, 0.3) lie below
        # its mean, so that most draws are close to the upper one.
        low, high = self.config.ratio
        ratio = functional.sample_truncated_ratio(
            mean=0.5, deviation=0.1, low=low, high=high, generator=generator
        )
        is_word = self._is_not_padding(text)
        return functional.sample_token_mask(
            is_word, text.word_ids, ratio=ratio, generator=generator
        )

    def _is_not_padding(self, text: TextFeatures) -> Tensor:
        if self.config.mask_at == "input":
            return text.attention_mask
        # Released code: a word piece of id 0 counts as padding, too.
        return text.attention_mask & (text.token_ids != 0)


def _fit_seen_words(module: Any, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Accept states with and without the words seen so far; a pre-hook of `load_state_dict`."""
    key, module._is_seen = f"{prefix}seen", None
    if module.config.vocabulary == "full":
        state.pop(key, None)
    elif f"{prefix}decoder.bias" in state:  # not a host's own checkpoint
        state.setdefault(key, torch.zeros_like(module.seen))


class Relationship(AbstractObjective):
    """Relationship alignment (L_ras, Eq. 7 and 8): codes relate to each other as their words do.

    Each word is matched to visual tokens, then all pairs of cosines are compared.
    """

    config_class = RelationshipConfig

    def __init__(self, config: RelationshipConfig, *, guide: AbstractGuide, code_dim: int) -> None:
        super().__init__()
        self.config, self.needs_tokens = config, config.between == "words"
        self.project: nn.Module = nn.Identity()
        if config.project:
            linear = nn.Linear(code_dim, guide.token_dim)
            nn.init.normal_(linear.weight, std=0.01)
            self.project = nn.Sequential(linear, nn.GELU(), nn.LayerNorm(guide.token_dim))

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return L_ras over the images with a caption."""
        text, keep = caption.features, caption.rows(view.cls.device)
        codes = self.project(view.codes.codes)[keep]
        if self.config.between == "captions":
            return Term(functional.caption_relationship_loss(text.sentence[keep], codes))
        if self.config.variant == "paper":
            # Released code: start and end count as words, and a word piece of id 0 as padding.
            text = text.padded(caption.guide.max_length, caption.guide.pad_id)
            words, mask = text.tokens, text.attention_mask & (text.token_ids != 0)
        else:
            words, mask = functional.pool_words(text.tokens, text.word_ids)
        value = functional.relationship_loss(
            words[keep],
            mask[keep],
            view.tokens[keep],
            codes,
            variant=self.config.variant,
            temperature=self.config.temperature,
            matching=self.config.matching,
        )
        return Term(value)


class VisionAlignment(AbstractObjective):
    """Alignment of codes with a frozen image tower, in the forms of VA-VAE (arXiv 2501.01423).

    Codes are projected to the width of the tower's features by a learned linear layer.
    """

    config_class = VisionAlignmentConfig
    reads = ("vision",)
    needs_captions = needs_tokens = False

    def __init__(
        self,
        config: VisionAlignmentConfig,
        *,
        guide: AbstractGuide | None,
        vision: AbstractImageGuide,
        code_dim: int,
        view_dim: int,
    ) -> None:
        super().__init__()
        self.config, self.needs_view = config, config.source == "code_vit"
        width = view_dim if self.needs_view else code_dim
        self.project = nn.Linear(width, vision.feature_dim, bias=False)

    def forward(self, view: CodeView, caption: Caption) -> Term:
        """Return the loss over all images, and the mean cosine of codes and features."""
        config, features = self.config, view.vision
        if features is None:
            raise RuntimeError("vision_alignment got a batch without features of its images")
        codes = self.project(view.tokens if self.needs_view else view.codes.codes)
        if config.target == "patch":
            target = functional.resize_features(features.patches, features.grid, view.codes.grid)
        else:  # the images of a batch take the place of the positions of an image
            codes, target = codes.mean(dim=1)[None], features.summary[None]
        value = codes.new_zeros((), dtype=torch.float32)
        if config.form != "distance":
            value = value + functional.cosine_margin_loss(
                codes, target, margin=config.cosine_margin
            )
        if config.form != "cosine_margin":
            value = value + functional.distance_matrix_loss(
                codes, target, margin=config.distance_margin
            )
        cosine = functional.paired_cosines(codes.detach(), target)
        return Term(value, {"vision_cosine": cosine.sum() / max(1, cosine.numel())})


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


def complete_old_heads(state: dict[str, Tensor], prefix: str = "loss.lgvq.") -> None:
    """Make a state dict that may have heads of version 0.1 at `prefix` one of present heads."""
    rename_old_heads(state, prefix)
    if any(key.startswith(prefix) for key in state):
        state.setdefault(f"{prefix}first_step", torch.tensor(-1))
