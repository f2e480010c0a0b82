"""LPIPS v0.1 through torchmetrics; its backbone may come from a file, so no download is needed.

images, reconstructions --8 bits--> backbone --unit length--> squared gaps --heads--> distance
"""

from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import Metric

from ..sockets import ConfigError, suggest
from ._perceptual_network import NETS, perceptual_network
from ._pixels import eight_bit


class PerceptualDistance(Metric):
    """Mean LPIPS over all images seen, on 8-bit values.

    Args:
        net: alex (what papers report), vgg (what VQGANs train on) or squeeze.
        backbone: file with torchvision's weights of that net (`features.…`); None lets
            torchvision fetch them, or take them from its cache.

    Raises:
        ConfigError: for another net, a file that does not fit, or a download that fails.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, net: str = "alex", backbone: str | Path | None = None) -> None:
        super().__init__()
        if net not in NETS:
            raise ConfigError(f"LPIPS: no net {net!r}{suggest(net, NETS)}")
        self.net = net
        self.network, self.weights_hash = perceptual_network(net, backbone)
        for name in ("total", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def settings(self) -> dict[str, Any]:
        """What the number depends on."""
        return {
            "implementation": f"torchmetrics {torchmetrics.__version__}",
            "weights": self.weights_hash,
            "heads": "LPIPS v0.1",
            "resize": "none",
            "quantization": "uint8",
        }

    @torch.no_grad()
    def distances(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distance of each pair, (B,) float32; both (B, 3, H, W) in [-1, 1]."""
        wanted, given = eight_bit(images) * 2 - 1, eight_bit(reconstructions) * 2 - 1
        return self.network(given, wanted).reshape(-1)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch."""
        distances = self.distances(images, reconstructions).double()
        self.total += distances.sum()
        self.count += len(distances)

    def compute(self) -> dict[str, Tensor]:
        """Return `lpips_<net>`; nan if no image was seen."""
        return {f"lpips_{self.net}": self.total / self.count}
