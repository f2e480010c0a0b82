"""Text to image: an autoregressive transformer over the frozen codes, conditioned on the guide.

caption --guide--> token features --cross-attention--> code 1, code 2, ... --host's decoder--> image

Synthesis without text is the same, given labels, a semantic map, or nothing instead of a caption.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...config import Block, Limit
from ...guides.base import AbstractGuide
from ...sockets import ConfigError
from ..metrics.perceptual import state_hash
from .features import FrozenCodes, require_captions
from .trainer import COUNT, NOT_NEGATIVE, LossFunction, NeuralProbe, ProbeConfig, generator_at, pick
from .transformer import Cache, ProbeTransformer, used_length

SHARE = Limit("a number in (0, 1)", lambda share: 0 < share < 1)


@dataclass(frozen=True, kw_only=True)
class Sampling(Block):
    """How codes are sampled."""

    temperature: Annotated[float, NOT_NEGATIVE] = 1.0
    """Divides the logits, >= 0; 0: greedy."""
    top_k: Annotated[int | None, Limit("a number >= 1", lambda k: k >= 1)] = None
    """Sample only from the k most likely codes, >= 1; null: all."""
    top_p: Annotated[float, Limit("a number in (0, 1]", lambda p: 0 < p <= 1)] = 1.0
    """Sample only from the most likely codes with this total probability, in (0, 1]."""
    guidance: Annotated[float, NOT_NEGATIVE] = 2.0
    """Classifier-free guidance: logits = without + guidance * (with - without text); 1: none."""


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(ProbeConfig):
    """Training and sampling of the text-to-image probe."""

    steps: Annotated[int, COUNT] = 500
    """Updates."""
    depth: Annotated[int, COUNT] = 3
    """Number of blocks."""
    drop_text: Annotated[float, SHARE] = 0.1
    """Share of training captions that are dropped, for guidance and the bits without text."""
    sampling: Sampling = Sampling()
    """How codes are sampled."""
    images: Annotated[int, Limit("a whole number >= 2", lambda count: count >= 2)] = 256
    """Number of images to generate, >= 2."""


class TextToImageProbe(NeuralProbe[TextToImageConfig, Any]):
    """Sample codes given captions, which `guide` reads."""

    Config, name = TextToImageConfig, "text_to_image"

    def __init__(
        self, guide: AbstractGuide, config: TextToImageConfig | None = None, **options: Any
    ):
        super().__init__(config, **options)
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
        drawn = []
        starts = range(0, len(captions), batch)
        for begin in tqdm(starts, desc="sampling", disable=not progress, leave=False):
            some = slice(begin, begin + batch)
            known = None if first is None else first[some]
            drawn.append(self._draw_batch(captions[some], generator_at(seed, begin), known))
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


PLAIN = Sampling(guidance=1.0)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig(TextToImageConfig):
    """Training and sampling of a synthesis probe."""

    drop_text: Annotated[float, SHARE] = 0.1
    """Share of training images whose condition is dropped, for the bits without it."""
    sampling: Sampling = PLAIN
    """How codes are sampled."""


class SynthesisProbe(TextToImageProbe):
    """The network of text_to_image, given T vectors per image instead of a caption.

    Args:
        dim: width D of the vectors.
        config, options: as of :class:`~.trainer.NeuralProbe`.
    """

    Config: ClassVar[Any] = SynthesisConfig
    name = "synthesis"

    def __init__(
        self,
        dim: int,
        config: SynthesisConfig | None = None,
        *,
        name: str = "synthesis",
        **options: Any,
    ):
        super().__init__(_Vectors(dim), config, **options)  # type: ignore[arg-type]
        self.name = name

    def _build(self, codes: FrozenCodes, target: Any) -> Any:
        loss_of, count, _ = super()._build(codes, [[given] for given in target])
        return loss_of, count, [state_hash({"conditions": target})]

    def bits(
        self, codes: FrozenCodes, conditions: Tensor, *, given: bool = True, start: int = 0
    ) -> Tensor:
        """Return the mean -log2 probability per code of each image, (M,) float64.

        Args:
            codes: of held-out images.
            conditions: of the images, (M, T, D).
            given: whether the network sees them.
            start: first code that counts; it is predicted from those before it.
        """
        return self._bits([codes], list(conditions), with_text=given, start=start)[0]


class _Vectors:
    """Takes the place of the guide."""

    def __init__(self, dim: int):
        self.token_dim, self.fingerprint = dim, f"vectors of width {dim}"

    def encode(self, conditions: Sequence[Tensor]) -> Any:
        tokens = torch.stack(list(conditions))
        return SimpleNamespace(
            tokens=tokens, attention_mask=torch.ones(tokens.shape[:2], dtype=torch.bool)
        )


def label_vectors(labels: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Return one vector (M, 1, D) of all labels: classes one-hot, multi-hot columns as they are.

    Example:
        >>> labels = {"shape": torch.tensor([1, 0]), "has_color": torch.tensor([[1, 0], [1, 1]])}
        >>> label_vectors(labels, {"shape": 2, "has_color": 2})[:, 0].tolist()
        [[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    """
    parts = [
        F.one_hot(value, sizes[name]) if value.ndim == 1 else value
        for name, value in sorted(labels.items(), reverse=True)
    ]
    return torch.cat(parts, dim=1).float()[:, None]


def map_vectors(maps: Sequence[Tensor], classes: int, grid: tuple[int, int]) -> Tensor:
    """Return a vector per cell of the codes' grid, (M, N, classes + N).

    It has the share of each class in the cell, and which cell it is. `maps` are (H, W) of classes,
    each below `classes`.

    Example:
        >>> vectors = map_vectors([torch.tensor([[0, 0], [0, 1]])], 2, (1, 1))
        >>> vectors.tolist()
        [[[0.75, 0.25, 1.0]]]
    """
    place = torch.eye(grid[0] * grid[1])
    shares = [
        F.adaptive_avg_pool2d(F.one_hot(each.long(), classes).movedim(-1, 0).float(), grid)
        for each in maps
    ]
    flat = torch.stack(shares).flatten(2).mT
    return torch.cat([flat, place.expand(len(flat), -1, -1)], dim=2)
