"""Masked words: can the codes tell which words of the caption were hidden?

caption --hide words--> guide --> transformer --cross-attention--> frozen codes --> hidden words

A head of its own kind is trained on frozen codes: the same for a baseline, which has no heads, and
for an LG-VQ model, whose own are not used. `leak_free` hides the words before the guide reads the
caption. `leaky` is the released code's protocol: the guide has read them all, so that every later
token, and the end token, still tells of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import require
from ...functional import seeded
from ...guides.base import AbstractGuide
from ...types import TextTokens
from .features import FrozenCodes, require_captions
from .transformer import CodeMemory, ProbeConfig, ProbeTransformer, fit, generator_at

PROTOCOLS = ("leak_free", "leaky")
PART = 128


@dataclass(frozen=True, kw_only=True)
class MaskedWordsConfig(ProbeConfig):
    """How the masked-word heads are trained on frozen codes."""

    steps: int = 400
    """Updates of each protocol."""
    most_hidden: int = 3
    """Training hides one word to so many of each caption, >= 1."""
    leaky: bool = True
    """An evaluation also asks by the leaky protocol, for comparison; it takes as long again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.most_hidden >= 1, "most_hidden", "a whole number >= 1", self.most_hidden)


class MaskedWordsProbe:
    """Heads that fill in hidden words, trained on frozen codes.

    Args:
        guide: reads the captions; frozen.
        protocol: leak_free or leaky, see above.
    """

    Config = MaskedWordsConfig

    def __init__(
        self,
        guide: AbstractGuide,
        config: MaskedWordsConfig | None = None,
        *,
        protocol: Literal["leak_free", "leaky"] = "leak_free",
        device: torch.device | str = "cpu",
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
        self.guide, self.config, self.protocol = guide, config or MaskedWordsConfig(), protocol
        self.device = torch.device(device)

    def fit(
        self,
        codes: FrozenCodes,
        captions: Sequence[Sequence[str]],
        *,
        folder: Path | None = None,
        progress: bool = True,
    ) -> "MaskedWordsProbe":
        """Train on M images; a random caption of each, with one to `most_hidden` words hidden."""
        require_captions(codes, captions)
        config = self.config
        counts = _count_tokens(self.guide, captions)
        with seeded(config.seed):
            self.network = _Filler(codes, self.guide, counts, config)
        self.network.to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(len(rows), generator=generator)
            chosen = [
                captions[int(i)][int(u * len(captions[int(i)]))]
                for i, u in zip(rows, draws, strict=True)
            ]
            tokens = self.guide.tokenize(chosen)
            most = config.most_hidden
            number = torch.randint(1, most + 1, (len(rows),), generator=generator)
            hidden = hide_words(tokens, number, generator)
            if not hidden.any():
                return self.network.head.bias.sum() * 0
            logits = self._logits(chosen, hidden, codes.codes(rows))
            return F.cross_entropy(logits, self._targets(tokens, hidden))

        fit(
            self.network,
            loss_of,
            len(codes),
            config,
            name=f"masked_words_{self.protocol}",
            folder=folder,
            progress=progress,
            facts=[codes.fingerprint, captions, self.protocol, self.guide.fingerprint],
        )
        return self

    def recall(
        self, codes: FrozenCodes, captions: Sequence[str], *, hidden: int, seed: int = 0
    ) -> dict[str, float]:
        """Return the share of hidden words that are found, at 1 and at 5.

        Args:
            codes: of held-out images.
            captions: one of each; those of fewer than `hidden` + 1 words are left out.
            hidden: how many words of each caption are hidden; which ones, the seed says.
            seed: equal seeds hide equal words, whatever the host.

        Returns:
            `recall@1` and `recall@5` (a word of several tokens is found if all of them are) and
            `words`, how many were asked for.
        """
        values = self.values(codes, captions, hidden=hidden, seed=seed)
        share = {name: sum(value) / max(len(value), 1) for name, value in values.items()}
        return share | {"words": float(hidden * len(values["recall@1"]))}

    @torch.no_grad()
    def values(
        self, codes: FrozenCodes, captions: Sequence[str], *, hidden: int, seed: int = 0
    ) -> dict[str, list[float]]:
        """Return `recall@1` and `recall@5` of each caption that is long enough; see `recall`."""
        found: dict[int, list[float]] = {1: [], 5: []}
        for part, rows in enumerate(torch.arange(len(codes)).split(PART)):
            texts = [captions[int(i)] for i in rows]
            tokens = self.guide.tokenize(texts)
            enough = tokens.word_ids.amax(dim=1).cpu() >= hidden
            number = torch.full((len(rows),), hidden)
            mask = (
                hide_words(tokens, number, generator_at(seed, part))
                & enough.to(tokens.word_ids.device)[:, None]
            )
            if not mask.any():
                continue
            logits = self._logits(texts, mask, codes.codes(rows))
            nearest = logits.topk(min(5, logits.shape[1]), dim=-1).indices
            best = nearest == self._targets(tokens, mask)[:, None]
            words, length = _word_numbers(tokens, mask), mask.shape[1]
            asked = torch.bincount(words.unique() // length, minlength=len(rows))
            for k, shares in found.items():
                missed = words[(~best[:, :k].any(dim=1)).cpu()].unique()
                lost = torch.bincount(missed // length, minlength=len(rows))
                shares += (1 - lost[asked > 0] / asked[asked > 0]).tolist()
        return {f"recall@{k}": shares for k, shares in found.items()}

    def evaluate(
        self, codes: FrozenCodes, captions: Sequence[str], *, seed: int = 0
    ) -> dict[str, float]:
        """Return the recalls with one and with three words hidden, and those of shuffled codes."""
        results: dict[str, float] = {}
        for hidden in (1, 3):
            for prefix, seen in (("", codes), ("shuffled/", codes.shuffled(seed))):
                numbers = self.recall(seen, captions, hidden=hidden, seed=seed)
                name = f"{prefix}mask_{hidden}"
                results |= {f"{name}/recall@{k}": numbers[f"recall@{k}"] for k in (1, 5)}
                if not prefix:
                    results[f"{name}/words"] = numbers["words"]
        return results

    def _logits(self, captions: Sequence[str], hidden: Tensor, codes: Tensor) -> Tensor:
        device = self.guide.device
        is_free = self.protocol == "leak_free"
        features = self.guide.encode(captions, hidden.to(device) if is_free else None)
        return self.network(
            features.tokens.to(self.device),
            hidden.to(self.device),
            codes.to(self.device),
            features.attention_mask.to(self.device),
        )

    def _targets(self, tokens: TextTokens, hidden: Tensor) -> Tensor:
        """Return the output number of each hidden token; -1 for one that training never had."""
        return self.network.number[tokens.token_ids[hidden].to(self.device)]


def hide_words(tokens: TextTokens, number: Tensor, generator: torch.Generator) -> Tensor:
    """Return True at all tokens of `number` (B,) words of each caption, (B, T) bool.

    A caption keeps one word at least; which are hidden, the CPU generator says.

    Example:
        >>> ids = torch.tensor([[-1, 0, 1, 2, -1], [-1, 0, -1, -1, -1]])
        >>> seed = torch.Generator().manual_seed(0)
        >>> hide_words(TextTokens(ids, ids >= 0, ids), torch.tensor([2, 2]), seed).sum(1).tolist()
        [2, 0]
    """
    ids = tokens.word_ids.cpu()
    batch, length = ids.shape
    words = ids.amax(dim=1, keepdim=True) + 1
    draws = torch.rand(batch, length, generator=generator)
    draws = draws.masked_fill(torch.arange(length) >= words, 2.0)
    most = torch.minimum(number[:, None], (words - 1).clamp(min=0))
    is_hidden = draws.argsort(dim=1).argsort(dim=1) < most
    return (is_hidden.gather(1, ids.clamp(min=0)) & (ids >= 0)).to(tokens.word_ids.device)


def _count_tokens(guide: AbstractGuide, captions: Sequence[Sequence[str]]) -> Tensor:
    """Return how often each token stands in the captions, as a piece of a word, (V,) int64."""
    counts = torch.zeros(len(guide.vocabulary), dtype=torch.long)
    flat = [text for texts in captions for text in texts]
    for begin in range(0, len(flat), 512):
        tokens = guide.tokenize(flat[begin : begin + 512])
        found = tokens.token_ids[tokens.word_ids >= 0].cpu()
        counts += torch.bincount(found, minlength=len(counts))
    return counts


def _word_numbers(tokens: TextTokens, mask: Tensor) -> Tensor:
    """Return a number of each hidden token's word, unique in the batch, (tokens,) on the CPU."""
    rows = torch.arange(len(mask))[:, None] * mask.shape[1]
    return (rows + tokens.word_ids.cpu())[mask.cpu()]


class _Filler(nn.Module):
    """Text features with hidden words and codes -> one of the tokens of training captions."""

    number: Tensor

    def __init__(
        self, codes: FrozenCodes, guide: AbstractGuide, counts: Tensor, config: MaskedWordsConfig
    ):
        super().__init__()
        kept = counts.nonzero()[:, 0]
        number = torch.full_like(counts, -1)
        number[kept] = torch.arange(len(kept))
        self.register_buffer("number", number)
        some = codes.codes(torch.arange(min(len(codes), 1024)))
        self.memory = CodeMemory(some, config.width)
        self.enter = nn.Linear(guide.token_dim, config.width)
        self.hidden = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        self.text = ProbeTransformer(
            config, vocabulary_size=1, length=guide.max_length, causal=False
        )
        self.head = nn.Linear(config.width, len(kept))
        with torch.no_grad():  # begin at the tokens' frequencies
            self.head.bias.copy_((counts[kept] / counts.sum()).log())

    def forward(self, text: Tensor, hidden: Tensor, codes: Tensor, attention: Tensor) -> Tensor:
        """Return the logits of the hidden tokens, in row-major order."""
        entered = self.enter(F.layer_norm(text, text.shape[-1:]))
        entered = torch.where(hidden[..., None], self.hidden, entered)
        states = self.text.states(entered, self.memory(codes), token_mask=attention)
        return self.head(states[hidden])
