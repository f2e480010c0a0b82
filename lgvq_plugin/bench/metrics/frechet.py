"""Frechet distance between two sets of images in any feature net; only Inception's is FID.

reals, reconstructions --8 bits--> feature net --> two Gaussians --> distance
"""

from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ...sockets import ConfigError, import_target
from .perceptual import NETS, file_hash, module_hash, perceptual_network
from .reconstruction import to_uint8

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
MIN_IMAGES = 10_000
"""With fewer images the distance is so biased that only rows with the same n are comparable."""
Net = str | nn.Module


class FrechetDistance:
    """Frechet distance in float64, computed by torchmetrics.

    Args:
        net: inception; alex, vgg or squeeze (their pooled last features); "pkg.module:factory", a
            callable that returns a module; or a module from (B, 3, H, W) uint8 to (B, D).
        name: for a given module: the distance is called `fd_<name>`.
        weights: file with the net's weights; None: the library's cache or download.

    Example:
        >>> distance = FrechetDistance(nn.Flatten(), name="pixels")
        >>> images = torch.rand(40, 3, 2, 2) * 2 - 1
        >>> distance.update(images, real=True); distance.update(images, real=False)
        >>> distance.name, round(distance.compute(), 6)
        ('fd_pixels', 0.0)
    """

    def __init__(
        self, net: Net = "inception", *, name: str | None = None, weights: str | Path | None = None
    ):
        self.resize = "none"
        self._metric: FrechetInceptionDistance | None = None
        if net == "inception":
            self.name, self.resize = "fid", "bilinear, antialiased, to 299 x 299"
            self._metric, self.weights_hash = _inception(weights)
            self._metric.set_dtype(torch.float64)
        else:
            module, self.weights_hash, label = _feature_net(net, weights)
            self.name = f"fd_{name or label}"
            self._net = _Float64Features(module)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the distance depends on, besides the images."""
        implementation = f"torchmetrics {torchmetrics.__version__}"
        if self.name == "fid":
            import torch_fidelity

            implementation += f" on torch-fidelity {torch_fidelity.__version__}"
        rest = {"weights": self.weights_hash, "resize": self.resize, "quantization": "uint8"}
        return {"implementation": implementation, **rest}

    @torch.no_grad()
    def update(self, images: Tensor, *, real: bool) -> None:
        """Add images (B, 3, H, W) in [-1, 1] to the reference (real) or to the other set."""
        pixels = to_uint8(images)
        if self._metric is None:
            self._net.num_features = self._net(pixels[:1]).shape[1]
            self._metric = FrechetInceptionDistance(self._net)
            self._metric.set_dtype(torch.float64)
        self._metric.update(pixels, real=real)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of images seen of the reference and of the other set."""
        if self._metric is None:
            return 0, 0
        metric = self._metric
        return int(metric.real_features_num_samples), int(metric.fake_features_num_samples)

    def compute(self) -> float:
        """Return the distance.

        Raises:
            ConfigError: if one of the sets has fewer than two images.
        """
        if self._metric is None or min(self.counts) < 2:
            raise ConfigError(f"{self.name}: needs two images of each set, got {self.counts}")
        return max(0.0, float(self._metric.compute()))


class _Float64Features(nn.Module):
    """A feature net in evaluation mode; hidden from `set_dtype`, which must not convert it."""

    num_features: int

    def __init__(self, net: nn.Module):
        super().__init__()
        self._net = [net.eval()]

    def forward(self, pixels: Tensor) -> Tensor:
        return self._net[0](pixels).flatten(1).double()


class PooledFeatures(nn.Module):
    """Channel means of a perceptual net's last features: uint8 images to (B, D) float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, D)."""
        scaled = self.network.scaling_layer(pixels.float() / 127.5 - 1)  # type: ignore[operator]
        return self.network.net(scaled)[-1].mean(dim=(2, 3))  # type: ignore[operator]


def _inception(weights: str | Path | None) -> tuple[FrechetInceptionDistance, str]:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ConfigError("FID needs torch-fidelity: pip install 'lgvq_plugin[eval]'") from error
    path = Path(weights).expanduser() if weights is not None else None
    if path is not None and not path.is_file():
        raise ConfigError(f"FID: no file {str(path)!r}; expected {INCEPTION} of {INCEPTION_URL}")
    try:
        metric = FrechetInceptionDistance(
            2048, feature_extractor_weights_path=None if path is None else str(path)
        )
    except OSError as error:
        raise ConfigError(
            f"FID: {INCEPTION} is not in {torch.hub.get_dir()}/checkpoints and cannot be fetched "
            f"from {INCEPTION_URL}: {error}; set the file: evaluation.fid.weights=PATH"
        ) from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"FID: {str(path)!r} is not {INCEPTION}: {error}") from error
    return metric, module_hash(metric.inception) if path is None else file_hash(path)


def _feature_net(net: Net, weights: str | Path | None) -> tuple[nn.Module, str, str]:
    """Return the module, a hash of its weights, and a label."""
    if isinstance(net, nn.Module):
        return net, module_hash(net), type(net).__name__
    if net in NETS:
        network, digest = perceptual_network(net, weights)
        return PooledFeatures(network), digest, net
    if ":" not in net and "." not in net:
        raise ConfigError(
            f"Frechet distance: no net {net!r}; known: inception, {', '.join(NETS)}; "
            "or give 'pkg.module:factory'"
        )
    factory = import_target(net)
    module = factory() if weights is None else factory(weights)
    return module, module_hash(module), net.replace(":", ".").rpartition(".")[2]
