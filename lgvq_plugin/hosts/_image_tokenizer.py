"""What hosts of our own share: the attributes and methods of taming's VQModel.

image --encoder--> quant_conv --quantize--> decode --> reconstruction, loss called as taming's
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sockets import instantiate
from ._vector_quantizer import VectorQuantizer


class AbstractImageTokenizer(nn.Module, ABC):
    """A tokenizer that is driven like taming's VQModel; members build the parts.

    Attributes:
        learning_rate: of Adam; set it before :meth:`configure_optimizers`.
        betas: of Adam.
        downsample: f: an image of H x W has H/f x W/f codes.
        image_key: where a batch holds its images.
        scheduler_config: `{target, params}` of a learning rate schedule of torch, stepped after
            every batch, as latent-diffusion's key of that name; None: a constant rate.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    downsample: int
    image_key: str
    encoder: nn.Module
    decoder: Any
    loss: nn.Module
    quantize: VectorQuantizer
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    scheduler_config: Mapping[str, Any] | None = None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Return quant (B, C, h, w), the quantizer's loss and (perplexity, None, indices).

        Raises:
            ValueError: if x is not (B, 3, H, W) with H and W multiples of `downsample`.
        """
        if x.ndim != 4 or x.shape[1] != 3 or any(n % self.downsample for n in x.shape[2:]):
            raise ValueError(
                f"{type(self).__name__}: expected images (B, 3, H, W) with H and W multiples of "
                f"{self.downsample}, got {tuple(x.shape)}"
            )
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Map codes (B, C, h, w) to images (B, 3, H, W) near [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, indices: Tensor) -> Tensor:
        """Map indices (B, h, w) to images (B, 3, H, W)."""
        return self.decode(self.quantize.embed_code(indices))

    @abstractmethod
    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of x (B, 3, H, W) and the quantizer's loss."""
        quant, quant_loss, _ = self.encode(x)
        return self.decode(quant), quant_loss

    def get_input(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return `batch[key]`, (B, H, W, 3) or (B, 3, H, W), as (B, 3, H, W) float32."""
        x = batch[key]
        if x.shape[1] != 3:
            x = x.movedim(-1, 1)
        return x.to(memory_format=torch.contiguous_format).float()

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Return Adam over the tokenizer, a second one if the loss has a discriminator.

        And their schedules, as Lightning takes them: none without `scheduler_config`.

        Raises:
            ConfigError: if the schedule does not exist or does not take its params.
        """
        parts = (part for name, part in self.named_children() if name != "loss")
        groups = [[p for part in parts for p in part.parameters()]]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            groups.append(list(discriminator.parameters()))
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(g, lr=self.learning_rate, betas=self.betas) for g in groups
        ]
        if self.scheduler_config is None:
            return optimizers, []
        return optimizers, [
            {"scheduler": instantiate(self.scheduler_config, optimizer=each), "interval": "step"}
            for each in optimizers
        ]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Return `inputs` and `reconstructions` of a batch, (B, 3, H, W) near [-1, 1]."""
        x = self.get_input(batch, self.image_key).to(next(self.decoder.parameters()).device)
        return {"inputs": x, "reconstructions": self(x)[0]}
