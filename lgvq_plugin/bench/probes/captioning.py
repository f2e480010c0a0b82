"""Captioning: a small transformer writes the caption with the frozen codes as its memory.

codes --CodeMemory--> memory --cross-attention--> next word, next word, ... --> sentence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.captions import caption_scores, tokenize_words
from .features import BATCH, FrozenCodes, require_captions
from .trainer import COUNT, LossFunction, NeuralProbe, ProbeConfig, pick
from .transformer import END, PAD, START, UNKNOWN, Cache, CodeMemory, ProbeTransformer, Words, trim


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(ProbeConfig):
    """Training and decoding of the captioning probe."""

    steps: Annotated[int, COUNT] = 800
    """Updates; 100 epochs in the paper."""
    max_words: Annotated[int, COUNT] = 24
    """Maximum words of a caption, in training and decoding, >= 1."""
    least_count: Annotated[int, COUNT] = 1
    """Words in fewer training captions are unknown, >= 1."""


class CaptioningProbe(NeuralProbe[CaptioningConfig, Sequence[Sequence[str]]]):
    """Write captions from codes."""

    Config, name = CaptioningConfig, "captioning"

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        require_captions(codes, target)
        config, length = self.config, self.config.max_words + 2
        tokenized = [[tokenize_words(text) for text in texts] for texts in target]
        sentences = (text for texts in tokenized for text in texts)
        self.words = Words(sentences, min_count=config.least_count)
        rows = [[*self.words.encode(texts, length=length)] for texts in tokenized]
        self.network = _Captioner(codes, config, len(self.words), length).to(self.device)

        def loss_of(images: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(len(images), generator=generator)
            tokens = trim(torch.stack(pick(rows, images, draws)).to(self.device))
            memory = self.network.memory(codes.codes(images).to(self.device))
            logits = self.network(tokens[:, :-1], memory)
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)

        return loss_of, len(codes), [tokenized]

    @torch.no_grad()
    def write(self, codes: FrozenCodes) -> list[str]:
        """Return a caption of each image by greedy decoding."""
        written = []
        for rows in torch.arange(len(codes)).split(BATCH // 2):
            memory = self.network.memory(codes.codes(rows).to(self.device))
            written += [self.words.decode(row) for row in self._greedy(memory).tolist()]
        return written

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]], *, seed: int = 0
    ) -> dict[str, float]:
        """Return `bleu_1` to `bleu_4`, `rouge_l`, `cider_d` of held-out images.

        The control, captions written from the codes of other images, has the prefix `shuffled/`.
        """
        references = [[tokenize_words(text) for text in texts] for texts in target]
        results = caption_scores(self.write(codes), references)
        control = caption_scores(self.write(codes.shuffled(seed)), references)
        return results | {f"shuffled/{name}": value for name, value in control.items()}

    def _greedy(self, memory: Tensor) -> Tensor:
        cache = Cache()
        last = torch.full((len(memory), 1), START, device=memory.device)
        words: list[Tensor] = []
        is_done = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
        for _ in range(self.config.max_words):
            logits = self.network(last, memory, cache)[:, -1]
            logits[:, [PAD, START, UNKNOWN]] = -torch.inf
            last = logits.argmax(dim=-1, keepdim=True)
            words.append(last)
            is_done |= last[:, 0] == END
            if is_done.all():
                break
        return torch.cat(words, dim=1)


class _Captioner(nn.Module):
    def __init__(self, codes: FrozenCodes, config: CaptioningConfig, words: int, length: int):
        super().__init__()
        self.memory = CodeMemory(codes, config.width)
        self.text = ProbeTransformer(config, vocabulary_size=words, length=length, causal=True)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, tokens: Tensor, memory: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the next word after each token."""
        states = self.text(tokens, memory, cache=cache)
        return states @ self.text.embed.weight.mT + self.bias
