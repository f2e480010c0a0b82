"""The small trainer of the probes: AdamW, a progress bar, and checkpoints to go on from.

What a step sees depends on (seed, step) alone, so a run that was cut off ends as one that was not.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._fields import require
from .._files import replacing
from .._safe_load import read_raw
from ..sockets import ConfigError

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
