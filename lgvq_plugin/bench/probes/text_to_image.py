"""Text to image: an autoregressive transformer over the frozen codes, conditioned on the guide.

caption --guide--> token features --cross-attention--> code 1, code 2, ... --host's decoder--> image
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...config import require
from ...guides.base import AbstractGuide
from ...sockets import ConfigError
from .features import FrozenCodes, require_captions
from .trainer import LossFunction, NeuralProbe, ProbeConfig, generator_at, pick
from .transformer import Cache, ProbeTransformer, used_length


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are sampled."""

    temperature: float = 1.0
    """Divides the logits, >= 0; 0: greedy."""
    top_k: int | None = None
    """Sample only from the k most likely codes, >= 1; null: all."""
    top_p: float = 1.0
    """Sample only from the most likely codes with this total probability, in (0, 1]."""
    guidance: float = 2.0
    """Classifier-free guidance: logits = without + guidance * (with - without text); 1: none."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "a number >= 0", self.temperature)
        require(self.top_k is None or self.top_k >= 1, "top_k", "a number >= 1", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        require(self.guidance >= 0, "guidance", "a number >= 0", self.guidance)


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(ProbeConfig):
    """Training and sampling of the text-to-image probe."""

    steps: int = 500
    """Updates."""
    depth: int = 3
    """Number of blocks."""
    drop_text: float = 0.1
    """Share of training captions that are dropped, for guidance and the bits without text."""
    sampling: Sampling = Sampling()
    """How codes are sampled."""
    images: int = 256
    """Number of images to generate, >= 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.drop_text < 1, "drop_text", "a number in (0, 1)", self.drop_text)
        require(self.images >= 2, "images", "a whole number >= 2", self.images)


class TextToImageProbe(NeuralProbe[TextToImageConfig, Any]):
    """Sample codes given captions, which `guide` reads."""

    Config, name = TextToImageConfig, "text_to_image"

    def __init__(
        self,
        guide: AbstractGuide,
        config: TextToImageConfig | None = None,
        *,
        device: torch.device | str = "cpu",
    ):
        super().__init__(config, device=device)
        self.guide = guide

    def _build(
        self, codes: FrozenCodes, target: Sequence[Sequence[str]]
    ) -> tuple[LossFunction, int, list[Any]]:
        indices, table = _require_indices(codes, self.name)
        require_captions(codes, target)
        config = self.config
        network = _CodePrior(config, self.guide.token_dim, len(table), indices.shape[1])
        self.network = network.to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(2, len(rows), generator=generator)
            memory, mask = self._read(pick(target, rows, draws[0]), draws[1] < config.drop_text)
            seen = indices[rows].to(self.device)
            logits = self.network(seen[:, :-1], memory, mask)
            return F.cross_entropy(logits.flatten(0, 1), seen.flatten())

        return loss_of, len(codes), [target, self.guide.fingerprint]

    def evaluate(
        self, codes: FrozenCodes, target: Sequence[str], *, seed: int = 0
    ) -> dict[str, float]:
        """Return the means of :meth:`values`, given one caption per image."""
        values = self.values(codes, target, seed=seed)
        return {name: float(value.mean()) for name, value in values.items()}

    def values(
        self, codes: FrozenCodes, captions: Sequence[str], *, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return `bits_per_code` of each held-out image given its caption, (M,) float64.

        `without_text/` is without a caption, `shuffled/` with the caption of another image, and
        `text_gain` is `without_text/bits_per_code` - `bits_per_code`: the information that the
        text has. Codes that are easy to predict without text also need few bits.
        """
        with_text, shuffled = self._bits([codes, codes.shuffled(seed)], captions)
        (without,) = self._bits([codes], captions, with_text=False)
        return {
            "bits_per_code": with_text,
            "without_text/bits_per_code": without,
            "shuffled/bits_per_code": shuffled,
            "text_gain": without - with_text,
        }

    def bits_per_code(
        self, codes: FrozenCodes, captions: Sequence[str], *, with_text: bool = True
    ) -> float:
        """Return the mean -log2 probability per code of held-out images."""
        return float(self._bits([codes], captions, with_text=with_text)[0].mean())

    @torch.no_grad()
    def _bits(
        self,
        several: Sequence[FrozenCodes],
        captions: Sequence[str],
        *,
        with_text: bool = True,
        start: int = 0,
    ) -> list[Tensor]:
        """Return the mean -log2 probability per code of each image, (M,) float64, of each codes.

        Codes before `start` do not count.
        """
        parts: list[list[Tensor]] = []
        for rows in torch.arange(len(captions)).split(self.config.batch_size):
            if with_text or len(rows) != len(parts[-1][0] if parts else ()):  # else the same memory
                dropped = torch.full((len(rows),), not with_text)
                memory, mask = self._read([captions[row] for row in rows.tolist()], dropped)
                memory, mask = (memory, mask) if with_text else (memory[:, :1], mask[:, :1])
            parts.append([])
            for codes in several:
                seen = _require_indices(codes, self.name)[0][rows].to(self.device)
                logits = self.network(seen[:, :-1], memory, mask)
                nats = F.cross_entropy(logits.mT, seen, reduction="none")
                parts[-1].append(nats[:, start:].double().mean(dim=1).cpu() / math.log(2))
        return [torch.cat(of_codes) for of_codes in zip(*parts, strict=True)]

    @torch.no_grad()
    def draw(
        self,
        captions: Sequence[str],
        *,
        first: Tensor | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Sample code indices (B, N) for each caption; deterministic given the seed.

        `first` (B, F) are the first codes, if they are known.
        """
        batch = self.config.batch_size
        starts = range(0, len(captions), batch)
        drawn = [
            self._draw_batch(
                captions[begin : begin + batch],
                generator_at(seed, begin),
                None if first is None else first[begin : begin + batch],
            )
            for begin in tqdm(starts, desc="sampling", disable=not progress, leave=False)
        ]
        return torch.cat(drawn)

    def _read(self, captions: Sequence[str], dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory (B, 1 + T, D) and where it may be attended to."""
        features = self.guide.encode(captions)
        length = used_length(features.attention_mask)
        inputs = (features.tokens[:, :length], features.attention_mask[:, :length], dropped)
        return self.network.memory(*(x.to(self.device) for x in inputs))

    def _draw_batch(
        self, captions: Sequence[str], generator: torch.Generator, first: Tensor | None
    ) -> Tensor:
        sampling, count = self.config.sampling, len(captions)
        copies = 1 if sampling.guidance == 1 else 2  # the second without text
        memory, mask = self._read(list(captions) * copies, torch.arange(copies * count) >= count)
        cache = Cache()
        codes = torch.empty(count, 0, dtype=torch.long, device=self.device)
        for place in range(self.network.length):
            logits = self.network.step(codes[:, -1:].repeat(copies, 1), memory, mask, cache)
            if copies == 2:
                given, free = logits.chunk(2)
                logits = free + sampling.guidance * (given - free)
            drawn = choose(logits.cpu(), sampling, generator)
            if first is not None and place < first.shape[1]:
                drawn = first[:, place : place + 1]
            codes = torch.cat([codes, drawn.to(codes)], dim=1)
        return codes.cpu()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one code from each row of logits (B, K), on the CPU; return (B, 1) int64.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 1.0]])
        >>> choose(logits, Sampling(temperature=0), torch.Generator()).tolist()
        [[1]]
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        lowest = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    shares = logits.softmax(dim=1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True, stable=True)
        is_past = ordered.cumsum(dim=1) - ordered >= sampling.top_p  # the first is always kept
        shares = torch.zeros_like(shares).scatter(1, order, ordered.masked_fill(is_past, 0.0))
    return torch.multinomial(shares, 1, generator=generator)


def _require_indices(codes: FrozenCodes, name: str) -> tuple[Tensor, Tensor]:
    if codes.indices is None or codes.table is None:
        raise ConfigError(
            f"{name}: this host's quantizer has no code indices, so no transformer can generate "
            "them; leave it out of --metrics"
        )
    return codes.indices, codes.table


class _CodePrior(nn.Module):
    """Codes so far and text to logits of the next code."""

    def __init__(self, config: TextToImageConfig, text_dim: int, size: int, length: int):
        super().__init__()
        self.size, self.length = size, length  # code `size` is the start token
        self.in_proj = nn.Sequential(nn.Linear(text_dim, config.width), nn.LayerNorm(config.width))
        self.no_text = nn.Parameter(torch.empty(1, 1, config.width).normal_(std=0.02))
        self.codes = ProbeTransformer(config, vocabulary_size=size + 1, length=length, causal=True)
        self.head = nn.Linear(config.width, size)

    def memory(self, text: Tensor, attention: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Return a learned row, then the text's rows, which dropped captions may not attend to."""
        rows = torch.cat([self.no_text.expand(len(text), -1, -1), self.in_proj(text)], dim=1)
        return rows, F.pad(attention & ~dropped[:, None], (1, 0), value=True)

    def forward(self, codes: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of all N codes given the first N - 1, (B, N, K)."""
        tokens = F.pad(codes, (1, 0), value=self.size)
        return self.head(self.codes(tokens, memory, memory_mask=mask))

    def step(self, last: Tensor, memory: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Return the logits of the next code, (B, K); `last` is (B, 1), or (B, 0) at the start."""
        if last.shape[1] == 0:
            last = torch.full((len(memory), 1), self.size, device=memory.device)
        states = self.codes(last, memory, memory_mask=mask, cache=cache)
        return self.head(states[:, -1])
