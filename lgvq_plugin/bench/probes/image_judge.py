"""A small CNN that classifies attributes of images, trained on real ones only.

It judges the generated images of any host, and its features give `fd_judge`.
"""

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import seeded
from ..metrics.reconstruction import to_uint8
from .trainer import ProbeConfig, fit

CONFIG = ProbeConfig(steps=500, batch_size=64, learning_rate=3e-3, width=128, heads=1, dropout=0.0)


class ImageJudge(nn.Module):
    """Images (B, 3, H, W) uint8 to features (B, 128); `heads` turn them into logits.

    `sizes` has by attribute the number of classes, or of columns if it is multi-hot.
    """

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after)]
            layers += [nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], n) for name, n in sizes.items()})

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, 128) float32."""
        maps = self.body(pixels.float() / 127.5 - 1)
        return maps.mean(dim=(2, 3)) + maps.amax(dim=(2, 3))

    @torch.no_grad()
    def accuracy(self, images: Tensor, target: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the accuracy of each attribute on images in [-1, 1], and their `mean`."""
        features = torch.cat([self(to_uint8(part)) for part in images.split(128)])
        results: dict[str, float] = {}
        for name, labels in target.items():
            logits = self.heads[name](features)
            answer = logits.argmax(dim=1) if labels.ndim == 1 else (logits > 0).to(labels.dtype)
            results[name] = float((answer == labels).double().mean())
        return results | {"mean": sum(results.values()) / len(results)}

    @staticmethod
    def train_on(
        images: Tensor,
        target: Mapping[str, Tensor],
        *,
        folder: Path | None = None,
        progress: bool = True,
        config: ProbeConfig = CONFIG,
    ) -> "ImageJudge":
        """Train a judge on real images (M, 3, H, W) uint8 and their labels, see `stack_labels`."""
        sizes = {n: int(v.max()) + 1 if v.ndim == 1 else v.shape[1] for n, v in target.items()}
        with seeded(config.seed):
            judge = ImageJudge(sizes)

        def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
            features = judge(images[rows])
            loss = features.new_zeros(())
            for name, labels in target.items():
                logits, wanted = judge.heads[name](features), labels[rows]
                if wanted.ndim == 1:
                    loss = loss + F.cross_entropy(logits, wanted)
                else:
                    loss = loss + F.binary_cross_entropy_with_logits(logits, wanted.float())
            return loss

        digest = hashlib.sha256(images.numpy().data).hexdigest()
        facts = [digest, {n: v.tolist() for n, v in target.items()}]
        options: dict[str, Any] = {"name": "judge", "folder": folder, "progress": progress}
        fit(judge, loss_of, len(images), config, facts=facts, **options)
        return judge.requires_grad_(False)
