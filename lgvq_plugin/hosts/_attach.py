"""Attach the heads to a model whose training loop is the user's own."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_bytes, write_json
from ..alignment import Alignment, Captions
from ..config import parse
from ..guides.base import build_guide
from ..sockets import ConfigError
from ._optimizers import add_heads, remove_heads, undecayed_parameters
from ._reading import code_width
from ._tap import Tap, find_quantizer, is_tapped

HEADS_WEIGHTS, HEADS_CONFIG = "lgvq_heads.safetensors", "lgvq_config.json"


def build_alignment(
    given: Mapping[str, Any] | None, quantizer: nn.Module, grid: tuple[int, int] | None = None
) -> Alignment:
    """Build the heads for a quantizer from the `lgvq:` block.

    Raises:
        ConfigError: if the block is wrong, or the quantizer does not tell the width of a code.
    """
    config = parse(given)
    width = config.code_dim or code_width(quantizer)
    if width is None:
        raise ConfigError(
            f"lgvq.code_dim: {type(quantizer).__name__} does not tell the width of a code; set it"
        )
    with torch.random.fork_rng(devices=[]):  # a guide may draw, and overwrite, initial weights
        guide = build_guide(config.guide)
    return Alignment(config, guide, code_dim=width, grid=grid)


class Handle:
    """What :func:`attach` returns: the heads of a model whose training loop is the user's own.

    Attributes:
        model: the host, unchanged but for one forward hook.
        heads: an `nn.Module` to optimize beside the model.
    """

    def __init__(
        self, model: nn.Module, path: str, heads: Alignment, tap: Tap, optimizers: Any = None
    ) -> None:
        self.model, self.path, self.heads, self._tap = model, path, heads, tap
        self._optimizers = optimizers
        self._step = 0

    def loss(
        self, captions: Captions, *, step: int | None = None, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, log) for the model's last forward pass; add the loss to the model's own.

        Args:
            captions: one entry an image: a string, a list of strings, or None.
            step: of the training; counted here if None.
            split: prefix of the log's keys.

        Raises:
            RuntimeError: if the model did not run since the last call, or after detach.
            ConfigError: if the number of captions is wrong.
        """
        if not self._tap.enabled:
            return torch.zeros(()), {}
        codes = self._tap.take()
        if next(self.heads.parameters()).device != codes.codes.device:
            self.heads.to(codes.codes.device)
        now = self._step if step is None else step
        self._tap.set_scale(self.heads.scale(now))
        loss, log = self.heads(codes, captions, step=now, split=split)
        log |= self._tap.balance_log(split)
        if step is None and split == "train":
            self._step += 1
        return loss, log

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the heads' parameters, for an optimizer of the user's."""
        return self.heads.parameters()

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return the heads as two groups for an optimizer of the user's, as `add_heads` does.

        Biases, norms, positions and the temperature are in the second one, without weight decay:

            AdamW([{"params": model.parameters()}, *handle.parameter_groups(weight_decay=0.05)])
        """
        exempt = {id(p) for p in undecayed_parameters(self.heads)}
        trained = [p for p in self.heads.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
        ]

    def disabled(self) -> AbstractContextManager[None]:
        """Train the model alone inside the context: `loss` gives 0."""
        return self._tap.paused()

    def status(self) -> dict[str, Any]:
        """Return what is attached where: quantizer, objectives and weights, parameters, guide."""
        return status(self.heads, self.path) | {"enabled": self._tap.enabled}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads alone, as `lgvq export --format heads` does."""
        save_heads(self.heads, Path(folder))

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what :meth:`save_pretrained` or `lgvq export --format heads` wrote.

        Raises:
            ConfigError: if it is missing or does not fit.
        """
        load_heads(self.heads, Path(folder))

    def detach(self) -> nn.Module:
        """Remove the hook; model and optimizer are as before. Returns the model."""
        self._tap.remove()
        remove_heads(self._optimizers, list(self.heads.parameters()))
        self._optimizers = None
        return self.model


def attach(
    model: nn.Module,
    quantizer: str | None = None,
    *,
    optimizer: Any = None,
    **options: Any,
) -> Handle:
    """Attach the three objectives to any tokenizer; its state dict and its code stay as they are.

    Args:
        model: the tokenizer.
        quantizer: path of its quantizer, found by name if None.
        optimizer: gets the heads as a new parameter group; with a scheduler on it already, give
            `[optimizer, scheduler]`. If None, optimize `handle.parameters()` beside the model.
        options: keys of the `lgvq:` block: recipe, objectives, guide, code_vit, ...

    In a LightningModule of your own, attach in `__init__` once the quantizer is there, and make
    the heads a submodule, so that they are moved, averaged, synchronized and saved with the rest:

        self.handle = attach(self, guide={"use": "micro_clip"})
        self.heads = self.handle.heads          # configure_optimizers: self.parameters() has them
        ...                                     # training_step, after the model ran:
        loss = loss + self.handle.loss(batch["caption"])[0]

    In a plain DistributedDataParallel script do the same with the model before wrapping it.

    Raises:
        ConfigError: for a wrong option, or if the quantizer cannot be found or has heads already.

    Example:
        >>> from lgvq_plugin.hosts._vector_quantizer import VectorQuantizer
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))
        >>> handle = attach(model, "1", guide={"use": "micro_clip"})
        >>> _ = model(torch.randn(2, 3, 16, 16))
        >>> loss, log = handle.loss(["a red square", None])
        >>> loss.requires_grad, "train/lgvq/total" in log
        (True, True)
        >>> handle.detach() is model
        True
    """
    found = find_quantizer(model, quantizer)
    assert found is not None
    path, module = found
    if is_tapped(module):
        raise ConfigError(f"{type(model).__name__}.{path} has heads already; detach them first")
    heads = build_alignment({**options, "quantizer": path}, module)
    tap = Tap(heads.config.grid, heads.config.gradient_ratio).install(module)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        heads.to(parameter.device)
    if optimizer is not None:
        add_heads(
            optimizer,
            list(heads.parameters()),
            list(model.parameters()),
            undecayed=undecayed_parameters(heads),
        )
    return Handle(model, path, heads, tap, optimizer)


def status(heads: Alignment, path: str) -> dict[str, Any]:
    """Describe attached heads in plain values."""
    names = list(heads.objectives)
    return {
        "quantizer": path,
        "recipe": heads.config.recipe,
        "objectives": {name: heads.weight(name) for name in names},
        "gradient_ratio": heads.config.gradient_ratio,
        "guide": dict(heads.guide.config) | {"use": type(heads.guide).__name__},
        "parameters": sum(p.numel() for p in heads.parameters()),
        "truncated_captions": heads.guide.truncated,
    }


def save_heads(heads: Alignment, folder: Path) -> None:
    """Write the heads to `folder`; safetensors and the config they were built from."""
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in heads.state_dict().items()}
    write_bytes(folder / HEADS_WEIGHTS, save(state))  # save_file's files are their owner's alone
    write_json(folder / HEADS_CONFIG, {"lgvq": asdict(heads.config)})


def load_heads(heads: Alignment, folder: Path) -> None:
    """Read heads from `folder`.

    Raises:
        ConfigError: if the file is missing, or other heads lie in it.
    """
    from safetensors.torch import load_file

    path = folder / HEADS_WEIGHTS
    if not path.is_file():
        raise ConfigError(f"no heads at {path}; expected what save_pretrained wrote")
    try:
        heads.load_state_dict(load_file(str(path)))
    except RuntimeError as error:
        raise ConfigError(f"{path} holds other heads than these: {error}") from error
