"""A tokenizer's folder, written by `save_pretrained` and read back, also from a hub."""

from pathlib import Path

import torch
from torch import nn

from ..sockets import ConfigError
from ._folder import CONFIG, WEIGHTS, push_to_hub, save_heads, save_pretrained
from .base import load_host

__all__ = ["from_pretrained", "push_to_hub", "save_heads", "save_pretrained"]


def from_pretrained(
    name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
) -> nn.Module:
    """Build the tokenizer of a folder that :func:`save_pretrained` wrote, in evaluation mode.

    Args:
        name: the folder, or `organization/repository` on the Hugging Face hub.
        device: where the host shall lie.
        revision: of the hub's repository.

    Raises:
        ConfigError: if there is no such folder or repository, or it holds no tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), revision)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} has no {CONFIG}; expected what save_pretrained wrote")
    return load_host(None, folder / WEIGHTS, device=device)


def _download(name: str, revision: str | None) -> Path:
    if name.count("/") != 1:
        raise ConfigError(f"no folder {name!r}, and no hub repository (organization/repository)")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision))
    except ImportError as error:
        raise ConfigError(
            f"no folder {name!r}; a hub needs: pip install huggingface_hub"
        ) from error
    except Exception as error:  # network, rights, names: all of them the hub's own classes
        raise ConfigError(
            f"no folder {name!r}, and the hub gave none ({type(error).__name__}: {error})"
        ) from error
