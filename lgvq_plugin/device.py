"""The device that a command computes on."""

import torch

from .sockets import ConfigError


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of `--device`; None: a GPU if there is one.

    Raises:
        ConfigError: if torch knows no such device, or this machine has none.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r}: {cause}; `--device cpu` works everywhere") from error
    return device
