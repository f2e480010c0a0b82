"""The trainer of the probes: AdamW, a progress bar, and checkpoints to resume from."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoints.read import read_raw
from ...config import Block, Limit, require
from ...files import replacing
from ...functional import seeded
from ...sockets import ConfigError
from . import AbstractProbe, Target
from .features import FrozenCodes

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, torch.Generator], Tensor]
"""Rows (B,) int64 on the CPU and a CPU generator -> scalar loss."""
STORED_NAMES = {"in_proj": "enter", "pos_embed": "positions", "mask_embed": "hidden"}
"""Parameters whose names in checkpoint files are those of version 0.1."""
COUNT = Limit("a whole number >= 1", lambda count: count >= 1)
NOT_NEGATIVE = Limit("a number >= 0", lambda number: number >= 0)
Config = TypeVar("Config", bound="ProbeConfig")
Probe = TypeVar("Probe", bound="NeuralProbe[Any, Any]")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Block):
    """Training and size of a probe."""

    steps: Annotated[int, COUNT] = 600
    """Updates, >= 1."""
    batch_size: Annotated[int, COUNT] = 64
    """Images per update, >= 1."""
    learning_rate: Annotated[float, Limit("a number > 0", lambda rate: rate > 0)] = 2e-3
    """AdamW's peak learning rate, > 0: linear warmup over a twentieth of the steps, then cosine."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """AdamW's weight decay, >= 0; none for biases and norms."""
    width: Annotated[int, COUNT] = 128
    """Width of the network; a multiple of `heads`."""
    depth: Annotated[int, COUNT] = 2
    """Number of blocks, >= 1."""
    heads: Annotated[int, COUNT] = 4
    """Attention heads, >= 1."""
    dropout: Annotated[float, Limit("a number in [0, 1)", lambda p: 0 <= p < 1)] = 0.1
    """Dropout rate in [0, 1)."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, and all random draws."""
    checkpoint_every: Annotated[int, COUNT] = 200
    """Updates between checkpoints, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width % self.heads == 0, "width", f"a multiple of {self.heads}", self.width)


class NeuralProbe(AbstractProbe[FrozenCodes, Target], Generic[Config, Target]):
    """A probe with a network; nothing of the host or the guide is trained.

    `config` is of the class's `Config`, whose defaults None stands for; the network is on `device`.
    """

    Config: ClassVar[type[ProbeConfig]]
    name: str  # of the progress bar and the checkpoint
    config: Any
    network: Any

    def __init__(self, config: ProbeConfig | None = None, *, device: torch.device | str = "cpu"):
        self.config = config or self.Config()
        self.device = torch.device(device)

    def fit(self: Probe, codes: FrozenCodes, target: Target, **options: Any) -> Probe:
        """Train on M images; returns self.

        Args:
            codes: of the images.
            target: of the task: at least one caption per image, of which each epoch takes a random
                one, or questions.
            options: `folder` and `progress`, see :func:`fit`.

        Raises:
            ConfigError: if the task needs code indices and the host has none.
            ValueError: if the numbers differ, an image has no caption, or there is no question.
        """
        with seeded(self.config.seed):
            loss_of, count, facts = self._build(codes, target)
        options |= {"name": self.name, "facts": [codes.fingerprint, *facts]}
        fit(self.network, loss_of, count, self.config, **options)
        return self

    @abstractmethod
    def _build(self, codes: FrozenCodes, target: Target) -> tuple[LossFunction, int, list[Any]]:
        """Make the network; return its loss, the number of rows, and what else it depends on."""


def fit(
    network: nn.Module,
    loss_of: LossFunction,
    count: int,
    config: ProbeConfig,
    *,
    name: str,
    folder: Path | None = None,
    progress: bool = True,
    facts: Any = None,
) -> list[float]:
    """Train a network, in evaluation mode afterwards; a finished one is not trained again.

    Args:
        network: the network.
        loss_of: its loss on some of `count` rows.
        count: number of rows.
        config: of the training.
        name: of the progress bar and the checkpoint.
        folder: of the checkpoint `<name>.pt`; None: no checkpoint.
        progress: whether to show the bar.
        facts: further plain values that the result depends on; a checkpoint that was made with
            other values is not used.

    Returns:
        The loss of each step of this call.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False, fused=True)
    path = None if folder is None else folder / f"{name}.pt"
    cache_key = _cache_key(network, count, config, facts)
    start = 0 if path is None else _restore(path, cache_key, network, optimizer)
    losses: list[float] = []
    device = next(network.parameters()).device
    network.train()
    bar = tqdm(range(start, config.steps), desc=name, disable=not progress, leave=False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in bar:
            torch.manual_seed(config.seed * 1_000_003 + step)  # for dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            loss = loss_of(_rows(step, count, config), generator_at(config.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            is_due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if path is not None and is_due:
                _save(path, cache_key, step + 1, network, optimizer)
    network.eval()
    return losses


def generator_at(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of a step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**62))


def pick(choices: Sequence[Sequence[Any]], rows: Tensor, draws: Tensor) -> list[Any]:
    """Return one of the choices of each row, by draws in [0, 1)."""
    several = [choices[row] for row in rows.tolist()]
    return [some[int(draw * len(some))] for some, draw in zip(several, draws, strict=True)]


def learning_rate_at(step: int, config: ProbeConfig) -> float:
    """Return the learning rate of a step: linear warmup, then a cosine down to a twentieth."""
    warm = max(1, config.steps // 20)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, config.steps - warm))
    return config.learning_rate * float(0.05 + 0.475 * (1 + torch.cos(done * torch.pi)))


def _rows(step: int, count: int, config: ProbeConfig) -> Tensor:
    """Return the rows of a step: each epoch is a permutation of all rows, cut into batches."""
    batch = min(config.batch_size, count)
    epoch, place = divmod(step, count // batch)
    order = torch.randperm(count, generator=generator_at(config.seed + 1, epoch))
    return order[place * batch : (place + 1) * batch]


def _cache_key(network: nn.Module, count: int, config: ProbeConfig, facts: Any) -> str:
    shapes = {_stored_name(key): list(value.shape) for key, value in network.state_dict().items()}
    settings = {key: value for key, value in asdict(config).items() if key != "checkpoint_every"}
    text = json.dumps([shapes, count, settings, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stored_name(key: str) -> str:
    return ".".join(STORED_NAMES.get(part, part) for part in key.split("."))


def _restore(
    path: Path, cache_key: str, network: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint that has this cache key; return the step to start from."""
    if not path.is_file():
        return 0
    try:
        saved, _ = read_raw(path)
    except ConfigError as error:
        logger.warning("%s; the probe is trained from the start", error)
        return 0
    if not isinstance(saved, Mapping) or saved.get("mark") != cache_key:
        return 0
    stored = saved["network"]
    network.load_state_dict({key: stored[_stored_name(key)] for key in network.state_dict()})
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _save(
    path: Path, cache_key: str, step: int, network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    state = {_stored_name(key): value for key, value in network.state_dict().items()}
    content = {"mark": cache_key, "step": step, "network": state}
    with replacing(path) as part:
        torch.save({**content, "optimizer": optimizer.state_dict()}, part)
