"""The contract with a host: find its quantizer, tap its codes, encode, attach and detach.

attach(model) --> Handle: heads beside the model, a forward hook on its quantizer, nothing else
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment, Captions
from ..config import parse
from ..guides.base import build_guide
from ..sockets import ConfigError, suggest
from ..types import Codes
from ._optimizers import add_heads
from ._reading import code_width, codebook_of, read_codes

__all__ = [
    "NAMES",
    "Handle",
    "Tap",
    "add_heads",
    "attach",
    "build_alignment",
    "code_width",
    "codebook_of",
    "decode",
    "encode",
    "find_quantizer",
    "reconstruct",
]

logger = logging.getLogger(__name__)

NAMES = ("quantize", "quantizer", "quantise", "vq", "bottleneck")
LIKELY = ("quantiz", "quantis", "codebook", "bottleneck", "fsq", "lfq", "simvq")


def find_quantizer(
    model: nn.Module, path: str | None = None, *, required: bool = True
) -> tuple[str, nn.Module] | None:
    """Return (path, module) of the model's quantizer.

    Args:
        model: any tokenizer.
        path: dotted path from the config; None looks for the usual names, then for the one
            outermost module whose class is named like a quantizer.
        required: raise if there is none, else return None.

    Raises:
        ConfigError: if the path does not exist, or there is no quantizer or more than one.
    """
    if path is not None:
        module = dict(model.named_modules()).get(path)
        if module is None:
            if not required:
                return None
            known = [name for name, _ in model.named_modules() if name]
            near = suggest(path, [name for name in known if name.count(".") <= path.count(".")])
            raise ConfigError(f"lgvq.quantizer: {type(model).__name__} has no {path!r}{near}")
        return path, module
    children = dict(model.named_children())
    for name in NAMES:
        if name in children:
            return name, children[name]
    found = _likely(model)
    if len(found) == 1:
        return found[0]
    if not required:
        return None
    told = ", ".join(name for name, _ in found)
    raise ConfigError(
        f"lgvq.quantizer: {type(model).__name__} has "
        + (f"several modules that could be it ({told})" if found else "no module that looks like it")
        + f"; name it with lgvq.quantizer: PATH. Modules: {', '.join(sorted(children))}"
    )


def _likely(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Outermost modules whose class or name says quantizer; the loss is not searched."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        last = name.rpartition(".")[2]
        if not name or inside or name.split(".")[0] in ("loss", "vq_loss"):
            continue
        if last in NAMES or any(word in type(module).__name__.lower() for word in LIKELY):
            found.append((name, module))
    return found


class Tap:
    """A forward hook on a quantizer that keeps the codes of the last pass until they are taken.

    Attributes:
        codes: the record of the last pass, or None.
        enabled: whether passes are recorded.
    """

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        self.grid, self.enabled = grid, True
        self.codes: Codes | None = None
        self._handle: Any = None

    def install(self, quantizer: nn.Module) -> "Tap":
        """Start listening to `quantizer`."""
        self._handle = quantizer.register_forward_hook(self.record)
        return self

    def remove(self) -> None:
        """Stop listening, and forget."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.codes = None, None

    @torch.compiler.disable
    def record(self, quantizer: nn.Module, args: Any, output: Any) -> None:
        """Keep what `quantizer` just returned; its hook."""
        if self.enabled:
            source = args[0] if args else torch.empty(0)
            self.codes = read_codes(output, quantizer, grid=self.grid, source=source)

    def take(self) -> Codes:
        """Return the codes and forget them.

        Raises:
            RuntimeError: if no pass was recorded.
        """
        codes, self.codes = self.codes, None
        if codes is None:
            raise RuntimeError(
                "the quantizer's hook saw no codes since the last step: run the model before its "
                "loss; under torch.compile attach before the first compiled call; or the model "
                "does not call this module (set lgvq.quantizer)"
            )
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "codes": None}  # no graph in a copy or a file

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other


@contextmanager
def tapped(host: nn.Module, quantizer: str | None = None) -> Iterator[Tap]:
    """Listen to the host's quantizer inside the context."""
    found = find_quantizer(host, quantizer)
    assert found is not None
    tap = Tap().install(found[1])
    try:
        yield tap
    finally:
        tap.remove()


@torch.no_grad()
def encode(host: nn.Module, images: Tensor, *, quantizer: str | None = None) -> Codes:
    """Return the codes of images.

    Args:
        host: any tokenizer; its mode (train or eval) stays as it is.
        images: (B, 3, H, W) float32 in [-1, 1], on the host's device.
        quantizer: its path, if it is not found by name.

    Raises:
        ConfigError: if the quantizer cannot be found.
        RuntimeError: if the host does not call it.
    """
    with tapped(host, quantizer) as tap:
        if hasattr(host, "encode"):
            host.encode(images)
        if tap.codes is None:
            host(images)
        return tap.take()


@torch.no_grad()
def reconstruct(host: nn.Module, images: Tensor) -> Tensor:
    """Return the host's reconstructions of images, (B, 3, H, W) near [-1, 1], not clamped."""
    output: Any = host(images)
    while isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def decode(host: Any, codes: Tensor) -> Tensor:
    """Return images of code grids (B, C, h, w).

    Raises:
        ConfigError: if the host has no `decode`.
    """
    if not hasattr(host, "decode"):
        raise ConfigError(f"{type(host).__name__} has no decode(codes): its codes stay unseen")
    if "force_not_quantize" in getattr(host.decode, "__code__", _NoCode).co_varnames:  # diffusers
        return host.decode(codes, force_not_quantize=True).sample
    output = host.decode(codes)
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


class _NoCode:
    co_varnames = ()


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
    return Alignment(config, build_guide(config.guide), code_dim=width, grid=grid)


class Handle:
    """What :func:`attach` returns: the heads of a model whose training loop is the user's own.

    Attributes:
        model: the host, unchanged but for one forward hook.
        heads: an `nn.Module` to optimize beside the model.
    """

    def __init__(self, model: nn.Module, path: str, heads: Alignment, tap: Tap) -> None:
        self.model, self.path, self.heads, self._tap = model, path, heads, tap
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
        loss, log = self.heads(codes, captions, step=self._step if step is None else step, split=split)
        if step is None and split == "train":
            self._step += 1
        return loss, log

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the heads' parameters, for an optimizer of the user's."""
        return self.heads.parameters()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Train the model alone inside the context: `loss` gives 0."""
        self._tap.enabled, before = False, self._tap.enabled
        try:
            yield
        finally:
            self._tap.enabled = before

    def status(self) -> dict[str, Any]:
        """Return what is attached where: quantizer, objectives and weights, parameters, guide."""
        return status(self.heads, self.path) | {"enabled": self._tap.enabled}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads alone: `lgvq_heads.safetensors` and `lgvq_config.json`."""
        save_heads(self.heads, Path(folder))

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ConfigError: if it is missing or does not fit.
        """
        load_heads(self.heads, Path(folder))

    def detach(self) -> nn.Module:
        """Remove the hook; the model is as before. Returns it."""
        self._tap.remove()
        return self.model


def attach(
    model: nn.Module,
    quantizer: str | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Handle:
    """Attach the three objectives to any tokenizer; its state dict and its code stay as they are.

    Args:
        model: the tokenizer.
        quantizer: path of its quantizer, found by name if None.
        optimizer: gets the heads as a new parameter group; else optimize `handle.parameters()`.
        options: keys of the `lgvq:` block: recipe, objectives, guide, code_vit, ...

    Raises:
        ConfigError: for a wrong option, or if the quantizer cannot be found.

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
    heads = build_alignment({**options, "quantizer": path}, module)
    tap = Tap(heads.config.grid).install(module)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        heads.to(parameter.device)
    if optimizer is not None:
        add_heads([optimizer], list(heads.parameters()), list(model.parameters()))
    return Handle(model, path, heads, tap)


def status(heads: Alignment, path: str) -> dict[str, Any]:
    """Describe attached heads in plain values."""
    names = list(heads.objectives)
    return {
        "quantizer": path,
        "recipe": heads.config.recipe,
        "objectives": {name: heads.weight(name) for name in names},
        "guide": dict(heads.guide.config) | {"use": type(heads.guide).__name__},
        "parameters": sum(p.numel() for p in heads.parameters()),
        "truncated_captions": heads.guide.truncated,
    }


def save_heads(heads: Alignment, folder: Path) -> None:
    """Write the heads to `folder`; safetensors and the config they were built from."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in heads.state_dict().items()}
    save_file(state, str(folder / "lgvq_heads.safetensors"))
    told = status(heads, heads.config.quantizer or "") | {"code_dim": heads.code_dim}
    (folder / "lgvq_config.json").write_text(json.dumps(told, indent=2, default=str) + "\n")


def load_heads(heads: Alignment, folder: Path) -> None:
    """Read heads from `folder`.

    Raises:
        ConfigError: if the file is missing, or other heads lie in it.
    """
    from safetensors.torch import load_file

    path = folder / "lgvq_heads.safetensors"
    if not path.is_file():
        raise ConfigError(f"no heads at {path}; expected what save_pretrained wrote")
    try:
        heads.load_state_dict(load_file(str(path)))
    except RuntimeError as error:
        raise ConfigError(f"{path} holds other heads than these: {error}") from error
