"""psnr, ssim, lpips, fid, fd: how near the reconstructions are, one by one and as a set."""

import logging
from typing import Any

import torch

from ..metrics.frechet import LEAST_IMAGES, FrechetDistance
from ..metrics.perceptual import PerceptualDistance
from ..metrics.reconstruction import IMPLEMENTATION, psnr_and_ssim
from ._context import Context
from ._rows import Row, Rows

logger = logging.getLogger(__name__)
PIXELS = {
    "implementation": IMPLEMENTATION,
    "quantization": "uint8",
    "resize": "none",
    "mean": "over images",
}


def psnr(context: Context) -> Rows:
    """PSNR of each image, in dB."""
    return {"reconstruction/psnr": _pixel_row(context, 0, "dB")}


def ssim(context: Context) -> Rows:
    """SSIM of each image, Gaussian window of 11."""
    return {"reconstruction/ssim": _pixel_row(context, 1, "")}


def _pixel_row(context: Context, which: int, unit: str) -> Row:
    parts = [psnr_and_ssim(images, given)[which] for images, given in context.pairs()]
    values = torch.cat(parts).double()
    window = {"window": "Gaussian 11, sigma 1.5"} if which else {}
    settings = {**PIXELS, **window}
    return Row(float(values.mean()), len(values), unit, True, values.tolist(), settings)


def lpips(context: Context) -> Rows:
    """LPIPS of each image."""
    options = context.config.lpips
    metric = PerceptualDistance(options.net, options.backbone).to(context.device)
    parts = [
        metric.distances(images.to(context.device), given.to(context.device)).cpu()
        for images, given in context.pairs()
    ]
    values = torch.cat(parts).double()
    name = f"reconstruction/lpips_{options.net}"
    settings = metric.settings
    row = Row(float(values.mean()), len(values), "", False, values.tolist(), settings)
    return {name: row}


def fid(context: Context) -> Rows:
    """FID of the reconstructions against the test images."""
    return _frechet(context, FrechetDistance("inception", weights=context.config.fid.weights))


def fd(context: Context) -> Rows:
    """Frechet distance in another feature net."""
    options = context.config.fd
    return _frechet(context, FrechetDistance(options.net, weights=options.weights))


def _frechet(context: Context, distance: FrechetDistance) -> Rows:
    for images, given in context.pairs():
        distance.update(images, real=True)
        distance.update(given, real=False)
    value, (count, _) = distance.compute(), distance.counts
    warn_of_few(distance.name, count)
    settings = distance.settings | reference(context)
    return {f"reconstruction/{distance.name}": Row(value, count, "", False, settings=settings)}


def reference(context: Context) -> dict[str, Any]:
    """Tell the reference set of a Frechet distance."""
    return {"reference": {"set": context.test_section, "images": context.test_images}}


def warn_of_few(name: str, count: int) -> None:
    """Say that a Frechet distance of few images is biased."""
    if count < LEAST_IMAGES:
        logger.warning(
            "%s on %d images (< %d) is biased upwards: compare it with rows of the same n only",
            *(name, count, LEAST_IMAGES),
        )
