"""Text to image: an autoregressive transformer over the frozen codes, conditioned on the guide.

caption --guide--> token features --cross-attention--> code 1, code 2, ... --host's decoder--> image
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...config import require
from ...functional import seeded
from ...guides.base import AbstractGuide
from ...sockets import ConfigError
from .features import FrozenCodes, require_captions
from .transformer import Cache, ProbeConfig, ProbeTransformer, fit, generator_at


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn."""

    temperature: float = 1.0
    """Divides the logits, >= 0; 0 takes the most likely code."""
    top_k: int | None = None
    """Only so many most likely codes can be drawn, >= 1; None: all."""
    top_p: float = 1.0
    """Only the most likely codes that together have this probability, in (0, 1]."""
    guidance: float = 2.0
    """Classifier-free guidance: logits = without + guidance * (with - without text); 1 = none."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "a number >= 0", self.temperature)
        require(self.top_k is None or self.top_k >= 1, "top_k", "a number >= 1", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        require(self.guidance >= 0, "guidance", "a number >= 0", self.guidance)


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(ProbeConfig):
    """How the text-to-image probe is trained and sampled."""

    steps: int = 500
    """Updates."""
    depth: int = 3
    """Blocks of the transformer."""
    drop_text: float = 0.1
    """Share of training captions that are hidden, for guidance and for the NLL without text."""
    sampling: Sampling = Sampling()
    """How codes are drawn."""
    images: int = 256
    """Images to generate, >= 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.drop_text < 1, "drop_text", "a number in (0, 1)", self.drop_text)
        require(self.images >= 2, "images", "a whole number >= 2", self.images)


class TextToImageProbe:
    """Draw codes from captions; nothing of the host or the guide is trained."""

    Config = TextToImageConfig

    def __init__(
        self,
        guide: AbstractGuide,
        config: TextToImageConfig | None = None,
        *,
        device: torch.device | str = "cpu",
    ):
        self.guide, self.config = guide, config or TextToImageConfig()
        self.device = torch.device(device)

    def fit(
        self,
        codes: FrozenCodes,
        captions: Sequence[Sequence[str]],
        *,
        folder: Path | None = None,
        progress: bool = True,
    ) -> "TextToImageProbe":
        """Train on M images and a random caption of each.

        Raises:
            ConfigError: if the host tells no code indices.
            ValueError: if the numbers differ or an image has no caption.
        """
        indices, table = _indices(codes)
        require_captions(codes, captions)
        config = self.config
        size, length = len(table), indices.shape[1]
        with seeded(config.seed):
            network = _Drawer(config, self.guide.token_dim, size, length)
        self.network = network.to(self.device)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            draws = torch.rand(2, len(rows), generator=generator)
            chosen = [
                captions[int(i)][int(u * len(captions[int(i)]))]
                for i, u in zip(rows, draws[0], strict=True)
            ]
            memory, mask = self._read(chosen, draws[1] < config.drop_text)
            seen = indices[rows].to(self.device)
            logits = self.network(seen[:, :-1], memory, mask)
            return F.cross_entropy(logits.flatten(0, 1), seen.flatten())

        fit(
            self.network,
            loss_of,
            len(codes),
            config,
            name="text_to_image",
            folder=folder,
            progress=progress,
            facts=[codes.fingerprint, captions, self.guide.fingerprint],
        )
        return self

    def bits_per_code(
        self, codes: FrozenCodes, captions: Sequence[str], *, with_text: bool = True
    ) -> float:
        """Return the mean of -log2 of the probability of each code of held-out images."""
        return float(self._bits(codes, captions, with_text=with_text).mean())

    @torch.no_grad()
    def _bits(
        self, codes: FrozenCodes, captions: Sequence[str], *, with_text: bool = True
    ) -> Tensor:
        """Return the mean bits of a code of each image, (M,) float64."""
        indices, _ = _indices(codes)
        parts = []
        for rows in torch.arange(len(codes)).split(self.config.batch_size):
            hidden = torch.full((len(rows),), not with_text)
            memory, mask = self._read([captions[int(i)] for i in rows], hidden)
            seen = indices[rows].to(self.device)
            logits = self.network(seen[:, :-1], memory, mask)
            nats = F.cross_entropy(logits.mT, seen, reduction="none")
            parts.append(nats.double().mean(dim=1).cpu() / math.log(2))
        return torch.cat(parts)

    @torch.no_grad()
    def draw(self, captions: Sequence[str], *, seed: int = 0, progress: bool = False) -> Tensor:
        """Return code indices (B, N) drawn for each caption; the same for the same seed."""
        sampling, drawn = self.config.sampling, []
        batch = self.config.batch_size
        starts = range(0, len(captions), batch)
        for begin in tqdm(starts, desc="drawing", disable=not progress, leave=False):
            part = captions[begin : begin + batch]
            drawn.append(self._draw_part(part, sampling, generator_at(seed, begin)))
        return torch.cat(drawn)

    def evaluate(
        self, codes: FrozenCodes, captions: Sequence[str], *, seed: int = 0
    ) -> dict[str, float]:
        """Return the means of :meth:`values`."""
        values = self.values(codes, captions, seed=seed)
        return {name: float(value.mean()) for name, value in values.items()}

    def values(
        self, codes: FrozenCodes, captions: Sequence[str], *, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return `bits_per_code` of each held-out image, (M,) float64, with its caption.

        `without_text/` is without any, `shuffled/` with the captions of other images, and
        `text_gain` what the text tells: `without_text/bits_per_code` - `bits_per_code`. Codes
        that are easy to guess without text cost few bits too; this is the text's own share.
        """
        with_text, without = (self._bits(codes, captions, with_text=w) for w in (True, False))
        return {
            "bits_per_code": with_text,
            "without_text/bits_per_code": without,
            "shuffled/bits_per_code": self._bits(codes.shuffled(seed), captions),
            "text_gain": without - with_text,
        }

    def _read(self, captions: Sequence[str], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory (B, 1 + T, D) and where it may be attended to."""
        features = self.guide.encode(captions)
        return self.network.memory(
            features.tokens.to(self.device),
            features.attention_mask.to(self.device),
            hidden.to(self.device),
        )

    def _draw_part(
        self, captions: Sequence[str], sampling: Sampling, generator: torch.Generator
    ) -> Tensor:
        is_guided = sampling.guidance != 1
        count = len(captions)
        texts = list(captions) * (2 if is_guided else 1)
        hidden = torch.arange(len(texts)) >= count
        memory, mask = self._read(texts, hidden)
        cache = Cache()
        codes = torch.empty(count, 0, dtype=torch.long, device=self.device)
        for _ in range(self.network.length):
            last = codes[:, -1:].repeat(2 if is_guided else 1, 1)
            logits = self.network.step(last, len(texts), memory, mask, cache)
            if is_guided:
                given, free = logits.chunk(2)
                logits = free + sampling.guidance * (given - free)
            codes = torch.cat([codes, choose(logits.cpu(), sampling, generator).to(codes)], dim=1)
        return codes.cpu()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one code from each row of logits (B, K), on the CPU; returns (B, 1) int64.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 1.0]])
        >>> choose(logits, Sampling(temperature=0), torch.Generator()).tolist()
        [[1]]
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    shares = logits.softmax(dim=1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(dim=1, descending=True, stable=True)
        is_past = ordered.cumsum(dim=1) - ordered >= sampling.top_p  # the first is always kept
        shares = torch.zeros_like(shares).scatter(1, order, ordered.masked_fill(is_past, 0.0))
    return torch.multinomial(shares, 1, generator=generator)


def _indices(codes: FrozenCodes) -> tuple[Tensor, Tensor]:
    if codes.indices is None or codes.table is None:
        raise ConfigError(
            "text to image: this host's quantizer tells no code indices, so no transformer can "
            "draw them; leave t2i out of --metrics"
        )
    return codes.indices, codes.table


class _Drawer(nn.Module):
    def __init__(self, config: TextToImageConfig, text_dim: int, size: int, length: int):
        super().__init__()
        self.size, self.length = size, length
        self.enter = nn.Sequential(nn.Linear(text_dim, config.width), nn.LayerNorm(config.width))
        self.no_text = nn.Parameter(torch.empty(1, 1, config.width).normal_(std=0.02))
        self.codes = ProbeTransformer(
            config, vocabulary_size=size + 1, length=length, causal=True
        )  # code `size` stands before the first
        self.head = nn.Linear(config.width, size)

    def memory(self, text: Tensor, attention: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One learned row first, always there; the text's rows unless it is hidden."""
        rows = torch.cat([self.no_text.expand(len(text), -1, -1), self.enter(text)], dim=1)
        mask = F.pad(attention & ~hidden[:, None], (1, 0), value=True)
        return rows, mask

    def forward(self, codes: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of all N codes, given those before each, (B, N, K)."""
        tokens = F.pad(codes, (1, 0), value=self.size)
        return self.head(self.codes(tokens, memory, memory_mask=mask))

    def step(self, last: Tensor, count: int, memory: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Return the logits of the next code, (B, K)."""
        if last.shape[1] == 0:
            last = torch.full((count, 1), self.size, device=memory.device)
        states = self.codes(last, memory, memory_mask=mask, cache=cache)
        return self.head(states[:, -1])
