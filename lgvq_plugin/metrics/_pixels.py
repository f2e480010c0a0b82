"""Pictures as they are once saved: in steps of 1/255."""

from torch import Tensor


def eight_bit(images: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1] in steps of 1/255.

    Example:
        >>> import torch
        >>> eight_bit(torch.tensor([-1.5, 0.0, 1.0])) * 255
        tensor([  0., 128., 255.])
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 255
