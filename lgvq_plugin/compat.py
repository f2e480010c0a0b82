"""What taming-transformers needs and today's stack no longer has, supplied at run time.

Nothing is touched that exists: a module is added to `sys.modules` only where importing it
fails, and only the names that taming reads are in it. `patches/` holds the same mends as diffs.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .sockets import ConfigError, check_call, check_numbers, import_target

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
LPIPS_LOSSES = (  # modules that build taming's LPIPS whatever its weight is
    "taming.modules.losses.vqperceptual",
    "ldm.modules.losses.vqperceptual",
    "ldm.modules.losses.contperceptual",
)

_SUPPLIED: dict[str, str] = {}


def patch() -> dict[str, str]:
    """Make `taming` importable; idempotent.

    Returns:
        What was supplied so far: module name -> why.
    """
    # taming 0.0.1 and HEAD import rank_zero_only from here; gone since Lightning 1.8.
    _supply(
        "pytorch_lightning.utilities.distributed",
        "removed in Lightning 1.8",
        parent="pytorch_lightning.utilities",
        attributes=lambda: {
            "rank_zero_only": importlib.import_module(
                "pytorch_lightning.utilities.rank_zero"
            ).rank_zero_only
        },
    )
    # taming.data.utils (HEAD) reads string_classes from torch._six; gone since torch 2.0.
    _supply(
        "torch._six",
        "removed in torch 2.0",
        parent="torch",
        attributes=lambda: {
            "string_classes": (str, bytes),
            "int_classes": int,
            "inf": float("inf"),
        },
    )
    return dict(_SUPPLIED)


def _supply(name: str, why: str, *, parent: str, attributes: Any) -> None:
    if name in sys.modules or importlib.util.find_spec(parent) is None:
        return
    if importlib.util.find_spec(name) is not None:
        return
    module = types.ModuleType(name, f"Supplied by lgvq_plugin.compat: {why}.")
    module.__dict__.update(attributes())
    sys.modules[name] = module
    setattr(importlib.import_module(parent), name.rpartition(".")[2], module)
    _SUPPLIED[name] = why


@contextmanager
def lpips_only_if_used(perceptual_weight: float) -> Iterator[None]:
    """Inside the context taming's losses build no LPIPS network if its weight is 0.

    With a weight above 0 the linear heads come from torchmetrics, which carries the very file
    that taming would download, and a missing VGG16 is told in full.

    Raises:
        ConfigError: if VGG16's weights are needed, not there, and cannot be downloaded.
    """
    modules = [sys.modules[name] for name in LPIPS_LOSSES if name in sys.modules]
    kept = [(module, module.LPIPS) for module in modules if hasattr(module, "LPIPS")]
    try:
        for module, network in kept:
            own = network.network if isinstance(network, _Told) else network  # a context in one
            module.LPIPS = (  # type: ignore[attr-defined]
                _no_lpips if perceptual_weight == 0 else _Told(own)
            )
        yield
    finally:
        for module, network in kept:
            module.LPIPS = network  # type: ignore[attr-defined]


def build_loss(target: str, args: tuple[Any, ...], params: Mapping[str, Any]) -> Any:
    """Build the loss class at `target`, taming's default weight of LPIPS being 1.

    Raises:
        ConfigError: if it does not exist or does not take the params, or misses weights.
    """
    patch()
    loss = import_target(target)
    check_loss(target, loss, args, params)
    with lpips_only_if_used(float(params.get("perceptual_weight", 1.0))):
        return loss(*args, **params)


def check_loss(
    target: str, loss: Any, args: Sequence[Any], params: Mapping[str, Any], where: str = ""
) -> None:
    """Check the params of a base loss at `where` in the config.

    Raises:
        ConfigError: if the class does not take them, or a weight is no finite number.
    """
    hint = (
        "; if they are another loss's, name it: target: lgvq_plugin.over.<its target>, or "
        "params.base: {target: <its target>}"
    )
    name = f"{where}: {target}" if where else target
    check_call(name, loss, args, params, hint=hint)
    check_numbers(where or target, loss, params)


def vgg_path() -> Path:
    """Return where torchvision looks for VGG16's weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _no_lpips(*args: Any, **kwargs: Any) -> Any:
    """Stand in for a network that a weight of 0 never calls; it has no parameters."""
    from torch import nn

    return nn.Identity()


class _Told:
    """Builds LPIPS with torchmetrics' copy of its heads; tells what is missing."""

    def __init__(self, network: Any):
        self.network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = sys.modules[self.network.__module__]
        kept = owner.get_ckpt_path
        owner.get_ckpt_path = _heads_path(kept)  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():  # `pretrained=` is torchvision's old name for weights
                warnings.simplefilter("ignore", UserWarning)
                return self.network(*args, **kwargs)
        except OSError as error:  # URLError, timeouts and requests' errors are all OSErrors
            raise ConfigError(
                f"perceptual_weight > 0 needs VGG16's weights: {VGG_FILE}, from {VGG_URL}, "
                f"to {vgg_path()}; that failed ({error}). Copy the file there, or set "
                "perceptual_weight: 0 to train without LPIPS"
            ) from error
        finally:
            owner.get_ckpt_path = kept  # type: ignore[attr-defined]


def _heads_path(fallback: Any) -> Any:
    """Return a stand-in for taming's get_ckpt_path that finds the file in torchmetrics' wheel."""
    spec = importlib.util.find_spec("torchmetrics")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    bundled = root / "functional" / "image" / "lpips_models" / "vgg.pth"

    def path(name: str, *args: Any, **kwargs: Any) -> str:
        is_there = name == "vgg_lpips" and bundled.is_file()
        return str(bundled) if is_there else fallback(name, *args, **kwargs)

    return path
