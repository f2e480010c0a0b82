"""Captioning: a small transformer writes the caption with the frozen codes as its memory.

codes --CodeMemory--> memory --cross-attention--> next word, next word, ... --> sentence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import require
from ...functional import seeded
from ..metrics.captions import caption_scores, tokenize_words
from .features import FrozenCodes, require_captions
from .transformer import (
    END,
    PAD,
    START,
    UNKNOWN,
    Cache,
    CodeMemory,
    ProbeConfig,
    ProbeTransformer,
    Words,
    fit,
    trim,
)

PART = 128


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(ProbeConfig):
    """How the captioning probe is trained and asked."""

    steps: int = 800
    """Updates; 100 epochs in the paper."""
    max_words: int = 24
    """A caption is cut to so many words, in training and when written, >= 1."""
    least_count: int = 1
    """Words in fewer training captions are unknown ones, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_words", "least_count"):
            require(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))


class CaptioningProbe:
    """Write captions from codes; nothing of the host is trained."""

    Config = CaptioningConfig

    def __init__(
        self, config: CaptioningConfig | None = None, *, device: torch.device | str = "cpu"
    ):
        self.config, self.device = config or CaptioningConfig(), torch.device(device)

    def fit(
        self,
        codes: FrozenCodes,
        captions: Sequence[Sequence[str]],
        *,
        folder: Path | None = None,
        progress: bool = True,
    ) -> "CaptioningProbe":
        """Train on M images with one caption at least each; a random one of them a step.

        Args:
            codes: of the M images.
            captions: of each image.
            folder: where the probe's checkpoint is kept, see `_fit.fit`.
            progress: whether to show a bar.

        Raises:
            ValueError: if the numbers differ or an image has no caption.
        """
        require_captions(codes, captions)
        config = self.config
        tokenized = [[tokenize_words(text) for text in texts] for texts in captions]
        self.words = Words(
            (text for texts in tokenized for text in texts), least=config.least_count
        )
        length = config.max_words + 2
        rows = [self.words.encode(texts, length=length) for texts in tokenized]
        with seeded(config.seed):
            network = _Captioner(codes, config, len(self.words), length)
        self.network = network.to(self.device)

        def loss_of(images: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(len(images), generator=generator)
            tokens = torch.stack(
                [
                    rows[int(i)][int(u * len(rows[int(i)]))]
                    for i, u in zip(images, draws, strict=True)
                ]
            ).to(self.device)
            tokens = trim(tokens)
            logits = self.network(tokens[:, :-1], codes.codes(images).to(self.device))
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)

        fit(
            self.network,
            loss_of,
            len(codes),
            config,
            name="captioning",
            folder=folder,
            progress=progress,
            facts=[codes.fingerprint, tokenized],
        )
        return self

    @torch.no_grad()
    def write(self, codes: FrozenCodes) -> list[str]:
        """Return a caption of each image, the most likely word at each place."""
        written = []
        for rows in torch.arange(len(codes)).split(PART):
            memory = self.network.memory(codes.codes(rows).to(self.device))
            written += self._greedy(memory)
        return written

    def evaluate(
        self, codes: FrozenCodes, captions: Sequence[Sequence[str]], *, seed: int = 0
    ) -> dict[str, float]:
        """Return `bleu_1` to `bleu_4`, `rouge_l`, `cider_d` of held-out images.

        The same with `shuffled/` before it is the control: captions of other images' codes.
        """
        references = [[tokenize_words(text) for text in texts] for texts in captions]
        results = caption_scores(self.write(codes), references)
        control = caption_scores(self.write(codes.shuffled(seed)), references)
        return results | {f"shuffled/{name}": value for name, value in control.items()}

    def _greedy(self, memory: Tensor) -> list[str]:
        cache, count = Cache(), len(memory)
        last = torch.full((count, 1), START, device=memory.device)
        words: list[Tensor] = []
        is_done = torch.zeros(count, dtype=torch.bool, device=memory.device)
        for _ in range(self.config.max_words):
            logits = self.network.logits(last, memory, cache)[:, -1]
            logits[:, [PAD, START, UNKNOWN]] = -torch.inf
            last = logits.argmax(dim=-1, keepdim=True)
            words.append(last)
            is_done |= last[:, 0] == END
            if is_done.all():
                break
        return [self.words.decode(row) for row in torch.cat(words, dim=1).tolist()]


class _Captioner(nn.Module):
    def __init__(self, codes: FrozenCodes, config: CaptioningConfig, words: int, length: int):
        super().__init__()
        some = codes.codes(torch.arange(min(len(codes), 1024)))
        self.memory = CodeMemory(some, config.width)
        self.text = ProbeTransformer(config, vocabulary_size=words, length=length, causal=True)
        self.bias = nn.Parameter(torch.zeros(words))

    def logits(self, tokens: Tensor, memory: Tensor, cache: Cache | None = None) -> Tensor:
        states = self.text(tokens, memory, cache=cache)
        return states @ self.text.embed.weight.mT + self.bias

    def forward(self, tokens: Tensor, codes: Tensor) -> Tensor:
        return self.logits(tokens, self.memory(codes))
