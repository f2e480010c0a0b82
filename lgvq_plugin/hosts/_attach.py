"""Attach the heads to a model whose training loop is the user's own."""

import logging
from collections.abc import Iterator, Mapping, Sequence
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
from ._tap import Tap, find_quantizers, is_tapped

logger = logging.getLogger(__name__)

HEADS_WEIGHTS, HEADS_CONFIG = "lgvq_heads.safetensors", "lgvq_config.json"


def build_alignment(
    given: Mapping[str, Any] | None,
    quantizers: Mapping[str, nn.Module],
    grid: tuple[int, int] | None = None,
) -> tuple[Alignment, Tap]:
    """Build the heads for a quantizer, or several, from the `lgvq:` block, and listen to it.

    Raises:
        ConfigError: if the block is wrong, or a quantizer does not tell the width of a code.
    """
    config = parse(given)
    widths = {path: config.code_dim or code_width(each) for path, each in quantizers.items()}
    unknown = [type(quantizers[path]).__name__ for path, width in widths.items() if width is None]
    if unknown:
        raise ConfigError(
            f"lgvq.code_dim: {unknown[0]} does not tell the width of a code; set it to the number "
            "of channels of the vectors that it returns"
        )
    known = {path: width for path, width in widths.items() if width is not None}
    with torch.random.fork_rng(devices=[]):  # a guide may draw, and overwrite, initial weights
        guide = build_guide(config.guide)
    heads = Alignment(config, guide, code_dim=sum(known.values()), grid=grid)
    tap = Tap(config.grid or grid, config.gradient_ratio, config.layout)
    return heads, tap.install(quantizers, known)


class Handle:
    """What :func:`attach` returns: the heads of a model whose training loop is the user's own.

    Attributes:
        model: the host, unchanged but for one forward hook.
        heads: an `nn.Module` to optimize beside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | list[str],
        heads: Alignment,
        tap: Tap,
        optimizers: Any = None,
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
            split: prefix of the log's keys; other than "train", nothing is trained.

        Raises:
            RuntimeError: if the model did not run since the last call, or after detach; if the
                codes carry no gradient although the model trains (a pass under torch.no_grad()
                came in between), or the quantizer ran twice.
            ConfigError: if the number of captions is wrong.
        """
        if not self._tap.enabled:
            return torch.zeros(()), {}
        codes = self._tap.take(host=self.model if split == "train" else None)
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

    def trainable_parameters(self) -> str:
        """Return in a line how many parameters train: of the heads, of the host, of all."""
        heads = {id(p): p for p in self.heads.parameters()}
        host = [p for p in self.model.parameters() if id(p) not in heads]
        every = [*heads.values(), *host]
        trained = sum(p.numel() for p in every if p.requires_grad)
        count = sum(p.numel() for p in every)
        return (
            f"trainable params: {trained:,} || heads params: "
            f"{sum(p.numel() for p in heads.values()):,} || host params: "
            f"{sum(p.numel() for p in host):,} || all params: {count:,} || "
            f"trainable%: {100 * trained / count:.4f}"
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT's models do."""
        print(self.trainable_parameters())

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
    quantizer: str | Sequence[str] | None = None,
    *,
    optimizer: Any = None,
    **options: Any,
) -> Handle:
    """Attach the three objectives to any tokenizer; its state dict and its code stay as they are.

    Args:
        model: the tokenizer.
        quantizer: path of its quantizer, found by name if None; a list for a model of several
            levels (VQ-VAE-2): one set of heads sees the codes of all of them side by side.
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
    quantizers = find_quantizers(model, quantizer)
    for name, module in quantizers.items():
        if is_tapped(module):
            raise ConfigError(f"{type(model).__name__}.{name} has heads already; detach them first")
    path = [*quantizers] if len(quantizers) > 1 else next(iter(quantizers))
    heads, tap = build_alignment({**options, "quantizer": path}, quantizers)
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
    handle = Handle(model, path, heads, tap, optimizer)
    logger.info("LG-VQ on %s.%s: %s", type(model).__name__, path, handle.trainable_parameters())
    return handle


def status(heads: Alignment, path: str | list[str]) -> dict[str, Any]:
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
