"""PSNR and SSIM as papers report them: per image, on 8-bit values in [0, 1], then the mean."""

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from ...sockets import ConfigError

IMPLEMENTATION = f"torchmetrics {torchmetrics.__version__}"
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1]
MAX_PSNR = 100.0  # of an image without any error; infinity would make the mean infinite


def eight_bit(images: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1] in steps of 1/255, as if saved and read again.

    Example:
        >>> eight_bit(torch.tensor([-1.5, 0.0, 1.0])) * 255
        tensor([  0., 128., 255.])
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 255


def to_uint8(images: Tensor) -> Tensor:
    """Map [-1, 1] to uint8.

    Example:
        >>> to_uint8(torch.tensor([-1.5, 0.0, 1.0]))
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ReconstructionMetrics(Metric):
    """Mean PSNR in dB and mean SSIM (Gaussian window 11, sigma 1.5) over all images.

    torchmetrics' PSNR pools the squared error of the whole set instead, which gives less.

    Example:
        >>> metric = ReconstructionMetrics()
        >>> metric.update(-torch.ones(2, 3, 16, 16), torch.ones(2, 3, 16, 16))
        >>> float(metric.compute()["psnr"])
        0.0
    """

    full_state_update = False
    psnr_sum: Tensor
    ssim_sum: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("psnr_sum", "ssim_sum", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch; arguments and errors as :func:`psnr_and_ssim`."""
        psnr, ssim = psnr_and_ssim(images, reconstructions)
        self.psnr_sum += psnr.double().sum()
        self.ssim_sum += ssim.double().sum()
        self.count += images.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Return `psnr` and `ssim`; nan without images."""
        return {"psnr": self.psnr_sum / self.count, "ssim": self.ssim_sum / self.count}


def psnr_and_ssim(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """Return PSNR in dB (at most 100) and SSIM of each image, two (B,) float32.

    Both arguments are (B, C, H, W) in [-1, 1]; values outside are clamped.

    Raises:
        ConfigError: if the images are smaller than SSIM's window.
        ValueError: if the shapes differ.
    """
    if images.ndim != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            "expected two (B, C, H, W) of one shape, got "
            f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        )
    if min(images.shape[-2:]) < WINDOW:
        raise ConfigError(
            f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got "
            f"{images.shape[-2]} x {images.shape[-1]}; use larger images"
        )
    wanted, given = eight_bit(images), eight_bit(reconstructions)
    psnr = peak_signal_noise_ratio(given, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    # In float32 the variances cancel, so that the SSIM of an image with itself would not be 1.
    ssim = _ssim(given.double(), wanted.double())
    return psnr.clamp(max=MAX_PSNR).reshape(-1), ssim.float()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of (B, C, H, W) in [0, 1], reflected at the borders, (B,).

    Equal to torchmetrics', which convolves with the 2D window and takes 50 times as long on a CPU.
    """
    x, y = (F.pad(z, [WINDOW // 2] * 4, mode="reflect") for z in (x, y))
    mean_x, mean_y, xx, yy, xy = (_blur(z) for z in (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    variances = xx - mean_x**2 + yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + C2) / (variances + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(maps: Tensor) -> Tensor:
    """Average the last two axes with Gaussian weights, one after the other."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    for axis in (-1, -2):
        count = maps.shape[axis] - WINDOW + 1
        total = torch.zeros_like(maps.narrow(axis, 0, count))
        for i, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(maps.narrow(axis, i, count), alpha=weight)
        maps = total
    return maps
