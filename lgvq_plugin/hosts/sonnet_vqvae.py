"""The VQ-VAE of DeepMind's Sonnet example, which reads the weights of its PyTorch ports.

image --2 x conv 4x4 /2, conv 3x3, residual stack--> quant_conv --quantize--> decoder, mirrored
Many small VQ-VAEs found on the web (f4, 512 codes of 64) are this one. Their files call the
parts `_encoder`, `_pre_vq_conv`, `_vq_vae` and `_decoder`, see :meth:`SonnetVQVAE.translate`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import to_plain
from ..sockets import instantiate
from .vqvae import AbstractImageTokenizer, ResidualBlock, VectorQuantizer

FOREIGN_NAMES = {  # part of our names: of the ports' names
    "encoder.conv_": "_encoder._conv_",
    "decoder.conv_": "_decoder._conv_",
    "encoder.blocks.": "_encoder._residual_stack._layers.",
    "decoder.blocks.": "_decoder._residual_stack._layers.",
    ".body.": "._block.",
    "quant_conv.": "_pre_vq_conv.",
    "quantize.embedding.": "_vq_vae._embedding.",
    "quantize.embed_avg": "_vq_vae._ema_w",
    "quantize.cluster_size": "_vq_vae._ema_cluster_size",
}


class SonnetVQVAE(AbstractImageTokenizer):
    """A foreign VQ-VAE with the attributes and methods of taming's VQModel.

    The ports divide the squared error by the variance of the data, 0.06 for CIFAR: to continue
    training such a file with `VQVAELoss`, set its `codebook_weight: 0.06`, or the codes drift
    together. A file without moving averages needs `quantizer: gradient`; where many of its codes
    are dead, `dead_threshold: 0.25` restarts them from the first batches on.

    Args:
        residual_channels: width inside a residual block.
        quantizer: "ema" for files with moving averages, "gradient" for those without.
        lossconfig, n_embed, embed_dim, channels, num_res_blocks, decay, commitment, restart_dead,
            dead_threshold, image_key: see :class:`~lgvq_plugin.hosts.vqvae.VQVAE`.
    """

    learning_rate = 1e-3
    downsample = 4

    def __init__(
        self,
        *,
        lossconfig: Mapping[str, Any],
        n_embed: int = 512,
        embed_dim: int = 64,
        channels: int = 128,
        residual_channels: int = 32,
        num_res_blocks: int = 2,
        quantizer: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_dead: bool = True,
        dead_threshold: float = 0.05,
        image_key: str = "image",
    ):
        super().__init__()
        self.image_key = image_key
        self.encoder = Encoder(channels, residual_channels, num_res_blocks)
        self.decoder = Decoder(embed_dim, channels, residual_channels, num_res_blocks)
        self.loss = instantiate(to_plain(lossconfig))
        self.quant_conv = nn.Conv2d(channels, embed_dim, 1)
        self.post_quant_conv = nn.Identity()
        self.quantize = VectorQuantizer(
            n_embed,
            embed_dim,
            mode=quantizer,
            decay=decay,
            commitment=commitment,
            restart_dead=restart_dead,
            dead_threshold=dead_threshold,
        )

    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution."""
        return self.decoder.conv_trans_2.weight

    def translate(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a foreign file's tensors under our names; our own keep theirs.

        What our quantizer keeps and the file lacks is filled in: the usage averages, and the
        moving sums that give the file's exact codebook.
        """
        our_names = {foreign: name for name, foreign in FOREIGN_NAMES.items()}
        ours = {_renamed(key, our_names): value for key, value in state_dict.items()}
        codebook = ours.get("quantize.embedding.weight")
        if codebook is None or "quantize.steps" in ours:
            return ours
        size = ours.setdefault("quantize.cluster_size", torch.ones(len(codebook)))
        if self.quantize.mode == "ema":
            ours.setdefault("quantize.embed_avg", codebook * size[:, None])
        else:
            ours.pop("quantize.embed_avg", None)
        ours["quantize.steps"] = torch.ones((), dtype=torch.int64)  # 0 would draw all codes anew
        return ours

    def foreign_state_dict(self) -> dict[str, Tensor]:
        """Return the tokenizer's tensors under the foreign file's names, without the loss."""
        left_out: tuple[str, ...] = ("loss.", "quantize.steps")
        if self.quantize.mode != "ema":
            left_out += ("quantize.cluster_size",)
        own = {k: value for k, value in self.state_dict().items() if not k.startswith(left_out)}
        return {_renamed(key, FOREIGN_NAMES): value for key, value in own.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, channels, H / 4, W / 4)."""

    def __init__(self, channels: int, inner: int, count: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(3, channels // 2, 4, stride=2, padding=1)
        self.conv_2 = nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[InPlaceBlock(channels, inner) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W); H and W are multiples of 4."""
        x = self.conv_2(self.conv_1(x).relu()).relu()
        return self.blocks(self.conv_3(x)).relu()


class Decoder(nn.Module):
    """Codes (B, embed_dim, h, w) to image (B, 3, 4 h, 4 w), not clamped."""

    def __init__(self, embed_dim: int, channels: int, inner: int, count: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(embed_dim, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[InPlaceBlock(channels, inner) for _ in range(count)])
        self.conv_trans_1 = nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1)
        self.conv_trans_2 = nn.ConvTranspose2d(channels // 2, 3, 4, stride=2, padding=1)

    def forward(self, quant: Tensor) -> Tensor:
        """Decode (B, embed_dim, h, w)."""
        x = self.blocks(self.conv_1(quant)).relu()
        return self.conv_trans_2(self.conv_trans_1(x).relu())


class InPlaceBlock(ResidualBlock):
    """relu(x) + conv1(relu(conv3(relu(x)))): the ports' first ReLU works in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return x.relu() + self.body(x)
