"""Weights of feature nets from a file, and hashes that tell two files apart."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .._safe_load import read_raw
from ..sockets import ConfigError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from .npz, .safetensors, or what torch.load reads as weights only.

    Raises:
        ConfigError: if the file is missing or of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"weights: no file {str(path)!r}; expected .pth, .npz or .safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found, _ = read_raw(path)
    except ConfigError as error:
        raise ConfigError(f"weights: {error}") from error
    except Exception as error:
        raise ConfigError(f"weights: {str(path)!r} cannot be read: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(f"weights: {str(path)!r} holds no state dict")
    return found


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, the first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def module_hash(module: nn.Module) -> str:
    """Return a hash of a module's state dict: the same for the same names, shapes and values.

    Example:
        >>> module_hash(nn.Identity()) == module_hash(nn.Identity())
        True
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
