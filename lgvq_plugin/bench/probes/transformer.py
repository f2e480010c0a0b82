"""A vocabulary of words, made of training sentences."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.read import read_raw
from ...config import require
from ...files import replacing
from ...sockets import ConfigError

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


def trim(tokens: Tensor) -> Tensor:
    """Leave out the last columns that hold padding only, (B, L) to (B, l)."""
    return tokens[:, : int((tokens != PAD).sum(dim=1).max())]


class Words:
    """Words that stand in `least` sentences at least, the most frequent first.

    Example:
        >>> words = Words(["a red star", "a ring"], least=1)
        >>> words.encode(["a blue star"], length=6).tolist()
        [[1, 4, 3, 7, 2, 0]]
        >>> words.decode([4, 6, 2, 4])
        'a ring'
    """

    def __init__(self, sentences: Iterable[str], *, least: int):
        counts = Counter(word for sentence in sentences for word in set(sentence.split()))
        known = sorted(
            (word for word in counts if counts[word] >= least), key=lambda w: (-counts[w], w)
        )
        self.known = (*SPECIAL, *known)
        self._number = {word: i for i, word in enumerate(self.known)}

    def __len__(self) -> int:
        """Return the size, special tokens included."""
        return len(self.known)

    def encode(self, sentences: Sequence[str], *, length: int) -> Tensor:
        """Return (B, length) int64: start, words (cut to fit), end, padding."""
        rows = torch.full((len(sentences), length), PAD)
        for row, sentence in zip(rows, sentences, strict=True):
            words = [self._number.get(word, UNKNOWN) for word in sentence.split()][: length - 2]
            row[: len(words) + 2] = torch.tensor([START, *words, END])
        return rows

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the words before the first end token, without special ones."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number > UNKNOWN:
                words.append(self.known[number])
        return " ".join(words)


# -- The small trainer of the probes: AdamW, a progress bar, and checkpoints to go on from -------


logger = logging.getLogger(__name__)

LossOf = Callable[[Tensor, torch.Generator], Tensor]
"""Rows (B,) int64 on the CPU and a CPU generator -> scalar loss."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a probe is trained, and how large it is."""

    steps: int = 600
    """Updates, >= 1."""
    batch_size: int = 64
    """Images an update sees, >= 1."""
    learning_rate: float = 2e-3
    """Of AdamW at its highest, > 0: it rises over a twentieth of the steps, then falls (cosine)."""
    weight_decay: float = 0.01
    """Of AdamW, >= 0; not of biases and norms."""
    width: int = 128
    """Of the network; a multiple of `heads`."""
    depth: int = 2
    """Blocks of the network, >= 1."""
    heads: int = 4
    """Of the attention, >= 1."""
    dropout: float = 0.1
    """In [0, 1)."""
    seed: int = 0
    """Of the first weights, the order of the images, and every draw."""
    checkpoint_every: int = 200
    """Updates between two checkpoints, >= 1."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "depth", "heads", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, "a whole number >= 1", getattr(self, name))
        require(self.width % self.heads == 0, "width", f"a multiple of {self.heads}", self.width)
        require(self.learning_rate > 0, "learning_rate", "a number > 0", self.learning_rate)
        require(self.weight_decay >= 0, "weight_decay", "a number >= 0", self.weight_decay)
        require(0 <= self.dropout < 1, "dropout", "a number in [0, 1)", self.dropout)


def generator_at(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of a step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**62))


def fit(
    network: nn.Module,
    loss_of: LossOf,
    count: int,
    config: ProbeConfig,
    *,
    name: str,
    folder: Path | None = None,
    progress: bool = True,
    facts: Any = None,
) -> list[float]:
    """Train a network.

    Args:
        network: whose parameters that require a gradient are trained; in evaluation mode after.
        loss_of: of the network, for some of `count` rows.
        count: rows there are.
        config: how.
        name: of the progress bar and the checkpoint.
        folder: where `<name>.pt` is kept; None keeps nothing. A finished one is not trained again.
        progress: whether to show the bar.
        facts: further plain values that the result depends on; a checkpoint of others is not used.

    Returns:
        The loss of each step of this call.
    """
    optimizer = torch.optim.AdamW(_groups(network, config.weight_decay), betas=(0.9, 0.98))
    path = None if folder is None else folder / f"{name}.pt"
    mark = _mark(network, count, config, facts)
    start = _restore(path, mark, network, optimizer)
    losses: list[float] = []
    device = next(network.parameters()).device
    network.train()
    bar = tqdm(range(start, config.steps), desc=name, disable=not progress, leave=False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in bar:
            torch.manual_seed(config.seed * 1_000_003 + step)  # for dropout
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, config)
            rows = _rows(step, count, config)
            loss = loss_of(rows, generator_at(config.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            is_due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if path is not None and is_due:
                _save(path, mark, step + 1, network, optimizer)
    network.eval()
    return losses


def _groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _rate(step: int, config: ProbeConfig) -> float:
    warm = max(1, config.steps // 20)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, config.steps - warm))
    return config.learning_rate * float(0.05 + 0.475 * (1 + torch.cos(done * torch.pi)))


def _rows(step: int, count: int, config: ProbeConfig) -> Tensor:
    """Return the rows of a step: each epoch is a permutation of all, cut into batches."""
    batch = min(config.batch_size, count)
    epoch, place = divmod(step, count // batch)
    order = torch.randperm(count, generator=generator_at(config.seed + 1, epoch))
    return order[place * batch : (place + 1) * batch]


def _mark(network: nn.Module, count: int, config: ProbeConfig, facts: Any) -> str:
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    told = {key: value for key, value in asdict(config).items() if key != "checkpoint_every"}
    text = json.dumps([shapes, count, told, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _restore(
    path: Path | None, mark: str, network: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    if path is None or not path.is_file():
        return 0
    try:
        saved, _ = read_raw(path)
    except ConfigError as error:
        logger.warning("%s; the probe is fitted from the start", error)
        return 0
    if not isinstance(saved, Mapping) or saved.get("mark") != mark:
        return 0
    network.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _save(
    path: Path, mark: str, step: int, network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(path) as part:
        torch.save({"mark": mark, "step": step, **state}, part)


# -- The network of the probes: causal or full self-attention, cross-attention to a memory, a cache


@dataclass
class Cache:
    """Keys and values of the tokens seen so far, one pair a block."""

    pairs: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many tokens were seen."""
        return 0 if not self.pairs or self.pairs[0] is None else self.pairs[0][0].shape[2]


class Attention(nn.Module):
    """Multi-head attention from x to a context."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def pair(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a context (B, L, D)."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.split(key), self.split(value)

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Return (B, L, D); `mask` is True where attention may go, (B, S)."""
        allowed = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(
            self.split(self.query(x)), *pair, attn_mask=allowed, dropout_p=dropout, is_causal=causal
        )
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP, norms first."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = Attention(width, config.heads, config.dropout)
        self.cross = Attention(width, config.heads, config.dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None,
        token_mask: Tensor | None,
        causal: bool,
        cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the states and the keys and values of the tokens so far."""
        normed = self.norms[0](x)
        pair = self.own.pair(normed)
        if cached is not None:
            pair = (torch.cat([cached[0], pair[0]], 2), torch.cat([cached[1], pair[1]], 2))
        x = x + self.drop(self.own(normed, pair, mask=token_mask, causal=causal))
        context = self.cross.pair(memory)
        x = x + self.drop(self.cross(self.norms[1](x), context, mask=memory_mask))
        return x + self.drop(self.mlp(self.norms[2](x))), pair


class ProbeTransformer(nn.Module):
    """Tokens with a memory to states.

    Args:
        config: its size.
        vocabulary_size: of the tokens.
        length: most tokens there can be.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self, config: ProbeConfig, *, vocabulary_size: int, length: int, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary_size, config.width)
        self.positions = nn.Parameter(torch.empty(1, length, config.width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return states (B, L, D).

        Args:
            tokens: (B, L) int64; with a cache the new ones only, one at a time.
            memory: (B, S, D).
            memory_mask, token_mask: True at what may be attended to, (B, S) and (B, L).
            cache: of the tokens before; the new ones are added to it.
        """
        return self.states(
            self.embed(tokens), memory, memory_mask=memory_mask, token_mask=token_mask, cache=cache
        )

    def states(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the states of embedded tokens, (B, L, D); arguments as :meth:`forward`."""
        begin = 0 if cache is None else cache.length
        causal = self.causal and x.shape[1] > 1
        x = x + self.positions[:, begin : begin + x.shape[1]]
        for i, block in enumerate(self.blocks):
            cached = cache.pairs[i] if cache is not None and i < len(cache.pairs) else None
            x, pair = block(
                x,
                memory,
                memory_mask=memory_mask,
                token_mask=token_mask,
                causal=causal,
                cached=cached,
            )
            if cache is not None:
                if len(cache.pairs) <= i:
                    cache.pairs.append(None)
                cache.pairs[i] = pair
        return self.norm(x)


class CodeMemory(nn.Module):
    """Codes (B, N, C) to a memory (B, N, D): shifted and scaled as in training, plus positions.

    Args:
        codes: of training images, (M, N, C); they give the shift and the scale.
        width: D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, width: int):
        super().__init__()
        flat = codes.flatten(0, 1).double()
        self.register_buffer("mean", flat.mean(dim=0).float())
        deviation = (flat - flat.mean(dim=0)).square().mean().sqrt().clamp(min=1e-8)
        self.register_buffer("scale", deviation.float())
        self.enter = nn.Linear(codes.shape[-1], width)
        self.positions = nn.Parameter(torch.empty(1, codes.shape[1], width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (B, N, D)."""
        return self.norm(self.enter((codes - self.mean) / self.scale) + self.positions)
