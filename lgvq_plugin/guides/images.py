"""What image guides share: resize, normalize, and run a frozen tower on the host's images."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sockets import ConfigError, as_config_error
from ..types import ImageFeatures
from .base import AbstractImageGuide

logger = logging.getLogger(__name__)

MOST = 1.5  # of absolute values; bicubic host pipelines overshoot [-1, 1] a little


@dataclass(frozen=True)
class TowerOptions:
    """Arguments of an image tower but its device, see :class:`AbstractImageTower`."""

    model: str
    layer: int | None
    pretrained: bool | str
    checkpoint: str | None
    image_size: int | None
    cache_dir: str | None
    seed: int


class Tower(NamedTuple):
    """A network and how its input is prepared."""

    network: nn.Module
    size: tuple[int, int]
    """(height, width) of its input."""
    mean: Sequence[float]
    """Of its normalization, one number per channel of images in [0, 1]; likewise `std`."""
    std: Sequence[float]


class AbstractImageTower(AbstractImageGuide):
    """A frozen network, in float32, that turns images of one size into a map of features.

    Images are resized to that size whole, not cropped, so that each place of the map is the same
    place of the image as in the host's grid of codes.

    Args:
        model: name of the model; null is `default_model`.
        layer: block whose output is used, from 0; negative ones count from the end, and null is the
            last.
        pretrained: load weights; false gives random ones, with a warning.
        checkpoint: local weights, in place of those that `pretrained` names.
        image_size: side of the images the network reads; null is its own.
        device: device of the network; the CPU by default.
        cache_dir: folder of downloaded weights; Hugging Face's own cache by default.
        seed: seed of random weights.

    Raises:
        ConfigError: if the model, its weights or the layer do not exist, or it cannot read images
            of that size.
    """

    default_model: str

    def __init__(
        self,
        model: str | None = None,
        layer: int | None = None,
        pretrained: bool | str = True,
        checkpoint: str | None = None,
        image_size: int | None = None,
        device: torch.device | str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        model = self.default_model if model is None else model
        self._options = TowerOptions(
            model, layer, pretrained, checkpoint, image_size, cache_dir, seed
        )
        network, size, mean, std = self._load(self._options)
        self._network, self.size = network.float().eval().requires_grad_(False), size
        self._mean, self._std = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
        self._is_checked = False  # whether a first batch was in [-1, 1]
        self.to("cpu" if device is None else device)
        failed = f"guides.vision: {model!r} cannot read an image of {size[0]} x {size[1]} pixels"
        kinds = (AssertionError, IndexError, RuntimeError, ValueError)
        with torch.no_grad(), as_config_error(failed, *kinds):
            found, _ = self._forward(torch.zeros(1, 3, *size, device=self.device))
        self.feature_dim = found.shape[1]

    @abstractmethod
    def _load(self, given: TowerOptions) -> Tower:
        """Load the network."""

    @abstractmethod
    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the map of features (B, Dv, h, w), and the class token (B, Dv) if there is one."""

    def _warn_of_random_weights(self) -> None:
        message = "guides.vision: %s has random weights (pretrained: false); for tests only"
        logger.warning(message, self._options.model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) in [-1, 1].

        Raises:
            ConfigError: if they are of another shape, or the first batch is of another range.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(
                "guides.vision: expected images (B, 3, H, W), as a host of color images has them, "
                f"got {tuple(images.shape)}"
            )
        self._check_range(images)
        device = self.device
        with torch.autocast(device.type, enabled=False):
            found, summary = self._forward(self._prepare(images.to(device, torch.float32)))
            patches = found.flatten(2).mT.float()
            summary = patches.mean(dim=1) if summary is None else summary.float()
        return ImageFeatures(patches, (found.shape[2], found.shape[3]), summary)

    def _prepare(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(
                images, size=self.size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(-1, 1)  # as in images of 8 bits, which the tower was trained on
        return ((images + 1) / 2 - self._mean) / self._std

    def _check_range(self, images: Tensor) -> None:
        """Check the first batch alone: it waits for a GPU."""
        if self._is_checked or images.numel() == 0:
            return
        self._is_checked = True
        low, high = (float(each) for each in images.aminmax())
        if max(-low, high) > MOST:
            raise ConfigError(
                f"guides.vision: expected images in [-1, 1], got {low:.3g} to {high:.3g}; give "
                "them as pixel / 127.5 - 1"
            )
        if low >= 0:
            logger.warning(
                "guides.vision: the first images are in [%.3g, %.3g]; the image tower expects "
                "[-1, 1]: give pixels as 2 * image - 1 if yours are in [0, 1]",
                *(low, high),
            )

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._mean.device

    def to(self, device: torch.device | str) -> "AbstractImageTower":
        """Move the network; returns self."""
        self._network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build this guide again."""
        return {**asdict(self._options), "device": str(self.device)}

    def weights(self) -> Mapping[str, Tensor]:
        """Return the network's tensors, and those of its normalization."""
        return {**self._network.state_dict(), "mean": self._mean, "std": self._std}


def require_file(path: str) -> Path:
    """Return the path of a checkpoint, ConfigError if there is no such file."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"guides.vision.checkpoint: no file {str(found)!r}")
    return found


def require_layer(layer: int | None, depth: int, model: str) -> int:
    """Return the number of a layer, from 0; None is the last one, -2 the one before.

    >>> require_layer(None, 12, "vit"), require_layer(-2, 12, "vit")
    (11, 10)
    """
    is_number = isinstance(layer, int) and not isinstance(layer, bool)
    if layer is not None and not (is_number and -depth <= layer < depth):
        raise ConfigError(
            f"guides.vision.layer: {model!r} has {depth} layers, so expected {-depth} to "
            f"{depth - 1}, or null for the last; got {layer!r}"
        )
    return range(depth)[-1 if layer is None else layer]


def square(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number.

    >>> square(224), square([3, 4])
    ((224, 224), (3, 4))
    """
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
