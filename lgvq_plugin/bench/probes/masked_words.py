"""Masked words: do the codes contain the words that are masked in the caption?

caption --mask words--> guide --> transformer --cross-attention--> frozen codes --> masked words

The network is trained on frozen codes, so it is the same for a baseline, which has no heads, and
an LG-VQ model, whose heads are not used. `leak_free` masks the words before the guide reads the
caption. `leaky` is the released code's protocol: the guide has read them all, so every later token
still contains information about them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...guides.base import AbstractGuide
from ...types import TextTokens
from .features import BATCH, FrozenCodes, require_captions
from .trainer import COUNT, LossFunction, NeuralProbe, ProbeConfig, generator_at, pick
from .transformer import CodeMemory, ProbeTransformer, used_length

PROTOCOLS = ("leak_free", "leaky")


@dataclass(frozen=True, kw_only=True)
class MaskedWordsConfig(ProbeConfig):
    """Training of the masked-word probe."""

    steps: Annotated[int, COUNT] = 400
    """Updates per protocol."""
    most_hidden: Annotated[int, COUNT] = 3
    """Training masks 1 to this many words per caption, >= 1."""
    leaky: bool = True
    """Whether an evaluation also runs the leaky protocol, for comparison; doubles the time."""


class MaskedWordsProbe(NeuralProbe[MaskedWordsConfig, Any]):
    """Fill in masked words of captions, which `guide` reads; `protocol`: leak_free or leaky."""

    Config = MaskedWordsConfig

    def __init__(
        self,
        guide: AbstractGuide,
        config: MaskedWordsConfig | None = None,
        *,
        protocol: Literal["leak_free", "leaky"] = "leak_free",
        **options: Any,
    ):
        super().__init__(config, **options)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
        self.guide, self.protocol, self.name = guide, protocol, f"masked_words_{protocol}"

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        require_captions(codes, target)
        config = self.config
        counts = _count_tokens(self.guide, target)
        self.network = _Filler(codes, self.guide, counts, config).to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            chosen = pick(target, rows, torch.rand(len(rows), generator=generator))
            tokens = self.guide.tokenize(chosen)
            number = torch.randint(1, config.most_hidden + 1, (len(rows),), generator=generator)
            masked = mask_words(tokens, number, generator)
            if not masked.any():
                return self.network.head.bias.sum() * 0
            logits = self._logits(chosen, masked, codes.codes(rows))
            return F.cross_entropy(logits, self._targets(tokens, masked))

        return loss_of, len(codes), [target, self.protocol, self.guide.fingerprint]

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[str], *, seed: int = 0
    ) -> dict[str, float]:
        """Return `mask_N/recall@k` for N = 1 and 3 masked words of one caption per image.

        `mask_N/words` is the number of masked words; the control has the prefix `shuffled/`.
        """
        results: dict[str, float] = {}
        for number in (1, 3):
            for prefix, seen in (("", codes), ("shuffled/", codes.shuffled(seed))):
                found = self.recall(seen, target, masked=number, seed=seed)
                name = f"{prefix}mask_{number}"
                results |= {f"{name}/recall@{k}": found[f"recall@{k}"] for k in (1, 5)}
                if not prefix:
                    results[f"{name}/words"] = found["words"]
        return results

    def recall(
        self, codes: FrozenCodes, captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, and `words`, the number of masked words."""
        values = self.values(codes, captions, masked=masked, seed=seed)
        means = {name: sum(value) / max(len(value), 1) for name, value in values.items()}
        return means | {"words": float(masked * len(values["recall@1"]))}

    def values(
        self, codes: FrozenCodes, captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> dict[str, list[float]]:
        """Return `recall@1` and `recall@5` of each caption, the shares of masked words found.

        Args:
            codes: of held-out images.
            captions: one per image; those with fewer than `masked` + 1 words are skipped.
            masked: number of words masked per caption.
            seed: of the choice of words, which is the same for any host.
        """
        return self.values_of([codes], captions, masked=masked, seed=seed)[0]

    @torch.no_grad()
    def values_of(
        self, several: Sequence[FrozenCodes], captions: Sequence[str], *, masked: int, seed: int = 0
    ) -> list[dict[str, list[float]]]:
        """Return :meth:`values` for several codes; the guide reads the captions once for all."""
        found: list[dict[int, list[float]]] = [{1: [], 5: []} for _ in several]
        for rows, texts, tokens, mask in self._masked(captions, masked, seed):
            targets = self._targets(tokens, mask)[:, None]
            # Tokens of one word have one number; a word is found if all its tokens are.
            length = mask.shape[1]
            words = (torch.arange(len(mask))[:, None] * length + tokens.word_ids.cpu())[mask.cpu()]
            total = torch.bincount(words.unique() // length, minlength=len(rows))
            all_logits = self._all_logits(texts, mask, [codes.codes(rows) for codes in several])
            for shares_at, logits in zip(found, all_logits, strict=True):
                is_right = logits.topk(min(5, logits.shape[1]), dim=-1).indices == targets
                for k, shares in shares_at.items():
                    missed = words[(~is_right[:, :k].any(dim=1)).cpu()].unique()
                    lost = torch.bincount(missed // length, minlength=len(rows))
                    shares += (1 - lost[total > 0] / total[total > 0]).tolist()
        return [{f"recall@{k}": shares for k, shares in each.items()} for each in found]

    def _masked(
        self, captions: Sequence[str], number: int, seed: int
    ) -> Iterator[tuple[Tensor, list[str], TextTokens, Tensor]]:
        """Yield batches of rows, captions, their tokens and which of these are masked."""
        for part, rows in enumerate(torch.arange(len(captions)).split(BATCH // 2)):
            texts = [captions[row] for row in rows.tolist()]
            tokens = self.guide.tokenize(texts)
            is_long = tokens.word_ids.amax(dim=1, keepdim=True) >= number
            numbers = torch.full((len(rows),), number)
            mask = mask_words(tokens, numbers, generator_at(seed, part)) & is_long
            if mask.any():
                yield rows, texts, tokens, mask

    def _logits(self, captions: Sequence[str], masked: Tensor, codes: Tensor) -> Tensor:
        return self._all_logits(captions, masked, [codes])[0]

    def _all_logits(
        self, captions: Sequence[str], masked: Tensor, several: Sequence[Tensor]
    ) -> list[Tensor]:
        is_free = self.protocol == "leak_free"
        features = self.guide.encode(captions, masked.to(self.guide.device) if is_free else None)
        length = used_length(features.attention_mask)
        inputs = (features.tokens, masked, features.attention_mask)
        text, hidden, attention = (x[:, :length].to(self.device) for x in inputs)
        return [self.network(text, hidden, seen.to(self.device), attention) for seen in several]

    def _targets(self, tokens: TextTokens, masked: Tensor) -> Tensor:
        """Return the class of each masked token; -1 for one that is not in the training set."""
        return self.network.number[tokens.token_ids[masked].to(self.device)]


def mask_words(tokens: TextTokens, number: Tensor, generator: torch.Generator) -> Tensor:
    """Return True at all tokens of `number` (B,) random words of each caption, (B, T) bool.

    At least one word per caption is left.

    Example:
        >>> ids = torch.tensor([[-1, 0, 1, 2, -1], [-1, 0, -1, -1, -1]])
        >>> seed = torch.Generator().manual_seed(0)
        >>> mask_words(TextTokens(ids, ids >= 0, ids), torch.tensor([2, 2]), seed).sum(1).tolist()
        [2, 0]
    """
    ids = tokens.word_ids.cpu()
    batch, length = ids.shape
    words = ids.amax(dim=1, keepdim=True) + 1
    draws = torch.rand(batch, length, generator=generator)
    draws = draws.masked_fill(torch.arange(length) >= words, 2.0)
    count = torch.minimum(number[:, None], (words - 1).clamp(min=0))
    is_masked = draws.argsort(dim=1).argsort(dim=1) < count
    return (is_masked.gather(1, ids.clamp(min=0)) & (ids >= 0)).to(tokens.word_ids.device)


def _count_tokens(guide: AbstractGuide, captions: Sequence[Sequence[str]]) -> Tensor:
    """Return how often each token is part of a word of the captions, (V,) int64."""
    counts = torch.zeros(len(guide.vocabulary), dtype=torch.long)
    flat = [text for texts in captions for text in texts]
    for begin in range(0, len(flat), 512):
        tokens = guide.tokenize(flat[begin : begin + 512])
        found = tokens.token_ids[tokens.word_ids >= 0].cpu()
        counts += torch.bincount(found, minlength=len(counts))
    return counts


class _Filler(nn.Module):
    """Text features with masked words, and codes -> one of the tokens of training captions."""

    number: Tensor

    def __init__(
        self, codes: FrozenCodes, guide: AbstractGuide, counts: Tensor, config: MaskedWordsConfig
    ):
        super().__init__()
        kept = counts.nonzero()[:, 0]
        number = torch.full_like(counts, -1)
        number[kept] = torch.arange(len(kept))
        self.register_buffer("number", number)
        self.memory = CodeMemory(codes, config.width)
        self.in_proj = nn.Linear(guide.token_dim, config.width)
        self.mask_embed = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        length = guide.max_length
        self.text = ProbeTransformer(config, vocabulary_size=1, length=length, causal=False)
        self.head = nn.Linear(config.width, len(kept))
        with torch.no_grad():  # start from the tokens' frequencies
            self.head.bias.copy_((counts[kept] / counts.sum()).log())

    def forward(self, text: Tensor, masked: Tensor, codes: Tensor, attention: Tensor) -> Tensor:
        """Return the logits of the masked tokens, in row-major order."""
        x = self.in_proj(F.layer_norm(text, text.shape[-1:]))
        x = torch.where(masked[..., None], self.mask_embed, x)
        count = masked.sum(dim=1, keepdim=True)
        read = masked.int().sort(dim=1, descending=True, stable=True).indices[:, : int(count.max())]
        states = self.text(x, self.memory(codes), token_mask=attention, read=read)
        return self.head(states[torch.arange(read.shape[1], device=x.device) < count])
