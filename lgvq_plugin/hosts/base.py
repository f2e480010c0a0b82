"""The contract with a host: find its quantizer, tap its codes, encode, attach and detach.

attach(model) --> Handle: heads beside the model, a forward hook on its quantizer, nothing else
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import ConfigError
from ..types import Codes
from ._adoption import (
    HostMethods,
    gets_quantizer,
    grid_of,
    is_average_of_heads,
    listen,
    replace_module,
    stop_listening,
)
from ._attach import (
    HEADS_CONFIG,
    HEADS_WEIGHTS,
    Handle,
    attach,
    build_alignment,
    load_heads,
    save_heads,
    status,
)
from ._optimizers import add_heads, undecayed_parameters
from ._reading import code_width, codebook_of
from ._tap import NAMES, Tap, find_quantizer, find_quantizers

__all__ = [
    "HEADS_CONFIG",
    "HEADS_WEIGHTS",
    "NAMES",
    "Handle",
    "HostMethods",
    "Tap",
    "add_heads",
    "attach",
    "build_alignment",
    "code_width",
    "codebook_of",
    "decode",
    "encode",
    "find_quantizer",
    "find_quantizers",
    "gets_quantizer",
    "grid_of",
    "is_average_of_heads",
    "listen",
    "load_heads",
    "reconstruct",
    "replace_module",
    "save_heads",
    "status",
    "stop_listening",
    "tapped",
    "undecayed_parameters",
]


@contextmanager
def tapped(
    host: nn.Module, quantizer: str | Sequence[str] | None = None, layout: str | None = None
) -> Iterator[Tap]:
    """Listen to the host's quantizer inside the context; LGVQLoss knows which, if it is on it."""
    loss = getattr(host, "loss", None)
    known = getattr(loss, "quantizer_path", None)
    grid, told = getattr(loss, "reading", (None, None))
    quantizers = find_quantizers(host, quantizer or known)
    tap = Tap(grid, layout=layout or told).install(quantizers)
    try:
        yield tap
    finally:
        tap.remove()


@torch.no_grad()
def encode(
    host: nn.Module,
    images: Tensor,
    *,
    quantizer: str | Sequence[str] | None = None,
    layout: str | None = None,
) -> Codes:
    """Return the codes of images.

    Args:
        host: any tokenizer; its mode (train or eval) stays as it is.
        images: (B, 3, H, W) float32 in [-1, 1], on the host's device.
        quantizer: its path, if it is not found by name, or the paths of several levels.
        layout: channels_first or channels_last, if it cannot be decided.

    Raises:
        ConfigError: if the quantizer cannot be found.
        RuntimeError: if the host does not call it.
    """
    with tapped(host, quantizer, layout) as tap:
        encoder: Any = getattr(host, "encode", None)
        if encoder is not None:
            encoder(images)
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
    if "force_not_quantize" in inspect.signature(host.decode).parameters:  # diffusers
        return host.decode(codes, force_not_quantize=True).sample
    output = host.decode(codes)
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
