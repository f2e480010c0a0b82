"""Find a host's quantizer, and listen to it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError, suggest
from ..types import Codes
from ._balance import GradientBalance
from ._reading import codebook_of, read_codes

NAMES = ("quantize", "quantizer", "quantise", "vq", "bottleneck")
LIKELY = ("quantiz", "quantis", "codebook", "bottleneck", "fsq", "lfq", "simvq")
SIZES = ("n_e", "n_embed", "num_embed", "num_embeddings", "codebook_size", "num_codes")


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
    found = _outermost(model, _is_named_so) or _outermost(model, _has_codebook)
    if len(found) == 1:
        return found[0]
    if not required:
        return None
    told = ", ".join(name for name, _ in found)
    raise ConfigError(
        f"lgvq.quantizer: {type(model).__name__} has "
        + (
            f"several modules that could be it ({told})"
            if found
            else "no module that looks like it"
        )
        + f"; name it with lgvq.quantizer: PATH. Modules: {', '.join(sorted(children))}"
    )


def _outermost(model: nn.Module, accept: Callable[[str, nn.Module], bool]) -> list[Any]:
    """Outermost accepted modules as (path, module); the loss is not searched."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if not path or inside or path.split(".")[0] in ("loss", "vq_loss"):
            continue
        if accept(path.rpartition(".")[2], module):
            found.append((path, module))
    return found


def _is_named_so(name: str, module: nn.Module) -> bool:
    return name in NAMES or any(word in type(module).__name__.lower() for word in LIKELY)


def _has_codebook(name: str, module: nn.Module) -> bool:
    """A matrix of codes, and a number of codes that is its size; of torch's layers one has both."""
    codebook = None if isinstance(module, nn.Embedding) else codebook_of(module)
    return codebook is not None and any(
        getattr(module, size, None) == len(codebook) for size in SIZES
    )


def is_tapped(quantizer: nn.Module) -> bool:
    """Return whether somebody listens to the quantizer already."""
    hooks = quantizer._forward_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Tap) for hook in hooks)


class Tap:
    """A forward hook on a quantizer that keeps the codes of the last pass until they are taken.

    Attributes:
        quantizer: the module that is listened to, or None.
        codes: the record of the last pass, or None.
        enabled: whether passes are recorded.
        balance: of our gradient with the host's, or None.
    """

    def __init__(self, grid: tuple[int, int] | None = None, ratio: float | None = None) -> None:
        self.grid, self.enabled = grid, True
        self.balance = None if ratio is None else GradientBalance(ratio)
        self.quantizer: nn.Module | None = None
        self.codes: Codes | None = None
        self._handle: Any = None

    def install(self, quantizer: nn.Module) -> "Tap":
        """Start listening to `quantizer`, and to no other any more."""
        self.remove()
        self.quantizer = quantizer
        self._handle = quantizer.register_forward_hook(self.record)
        return self

    def remove(self) -> None:
        """Stop listening, and forget."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.codes, self.quantizer = None, None, None

    @torch.compiler.disable
    def record(self, quantizer: nn.Module, args: Any, output: Any) -> None:
        """Keep what `quantizer` just returned; its hook."""
        if self.enabled:
            through = None if self.balance is None else self.balance.split
            self.codes = read_codes(output, quantizer, grid=self.grid, through=through)

    def set_scale(self, scale: float) -> None:
        """Say which share of the balance's ratio the schedule has now."""
        if self.balance is not None:
            self.balance.scale = scale

    def balance_log(self, split: str) -> dict[str, Tensor]:
        """Return the gradients' ratio before balancing at the last backward pass, if known."""
        measured = self.balance.measured if self.balance is not None and split == "train" else None
        return {} if measured is None else {f"{split}/lgvq/gradient_ratio": measured}

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the context."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "codes": None}  # no graph in a copy or a file

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other
