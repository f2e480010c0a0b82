"""Pictures as they are once saved: in steps of 1/255."""

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from ...sockets import ConfigError


def eight_bit(images: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1] in steps of 1/255.

    Example:
        >>> import torch
        >>> eight_bit(torch.tensor([-1.5, 0.0, 1.0])) * 255
        tensor([  0., 128., 255.])
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 255


# -- PSNR and SSIM as papers report them: per image, on 8-bit values in [0, 1], then the mean ----


IMPLEMENTATION = f"torchmetrics {torchmetrics.__version__}"
WINDOW, SIGMA = 11, 1.5  # of the Gaussian of SSIM
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]
PSNR_LIMIT = 100.0  # an image without any error counts so; else one such makes the mean infinite


class ReconstructionMetrics(Metric):
    """Mean PSNR in dB and mean SSIM (Gaussian window 11, sigma 1.5) over all images seen.

    Both sides are rounded to 8 bits first, as if saved and read again. The mean is over images:
    torchmetrics' own PSNR pools the squared error of the set instead, which gives less.

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
        """Add a batch: both (B, C, H, W) in [-1, 1]; what lies outside is clamped.

        Raises:
            ConfigError: if the images are smaller than SSIM's window.
            ValueError: if the shapes differ.
        """
        psnr, ssim = psnr_and_ssim(images, reconstructions)
        self.psnr_sum += psnr.double().sum()
        self.ssim_sum += ssim.double().sum()
        self.count += images.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Return `psnr` and `ssim`; nan if no image was seen."""
        return {"psnr": self.psnr_sum / self.count, "ssim": self.ssim_sum / self.count}


def psnr_and_ssim(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """Return PSNR in dB (100 at the most) and SSIM of each image, two (B,) float32.

    Raises:
        ConfigError, ValueError: as :meth:`ReconstructionMetrics.update`.
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
    # In float32 the variances cancel: an image would not even be quite like itself.
    ssim = _ssim(given.double(), wanted.double())
    return psnr.clamp(max=PSNR_LIMIT).reshape(-1), ssim.float()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of (B, C, H, W) in [0, 1], mirrored at their borders, (B,).

    torchmetrics' value, whose convolution with the whole window takes 50 times as long on a CPU.
    """
    x, y = (F.pad(z, [WINDOW // 2] * 4, mode="reflect") for z in (x, y))
    mean_x, mean_y, xx, yy, xy = (_blur(z) for z in (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    spread = xx - mean_x**2 + yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + C2) / (spread + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(maps: Tensor) -> Tensor:
    """Weigh the last two axes by a Gaussian, one after the other."""
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-(place**2) / (2 * SIGMA**2)).exp()
    for axis in (-1, -2):
        count = maps.shape[axis] - WINDOW + 1
        total = torch.zeros_like(maps.narrow(axis, 0, count))
        for i, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(maps.narrow(axis, i, count), alpha=weight)
        maps = total
    return maps
