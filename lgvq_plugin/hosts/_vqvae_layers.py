"""Convolutions of the VQ-VAE: strided ones (van den Oord et al. 2017), or one for each patch.

image (3, H, W) --conv 4x4 /2, log2(f) times--> conv 3x3 --residual blocks--> (channels, H/f, W/f)
"""

from itertools import pairwise

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))) with a quarter of the channels inside."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 4, 1)
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return x + self.body(x)


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, channels, H / f, W / f).

    Args:
        channels: width after the first strided convolution, which has half of it.
        num_res_blocks: residual blocks at the lowest resolution.
        num_halvings: log2 of the factor f.
    """

    def __init__(self, *, channels: int, num_res_blocks: int, num_halvings: int):
        super().__init__()
        steps = pairwise([3, channels // 2, *[channels] * (num_halvings - 1)])
        down: list[nn.Module] = []
        for before, after in steps:
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.down = nn.Sequential(*down)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = _blocks(channels, num_res_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W); H and W are multiples of f."""
        return self.blocks(self.conv_out(self.down(x)))


class Decoder(nn.Module):
    """Quantized grid (B, embed_dim, h, w) to image (B, 3, h * f, w * f), not clamped.

    Attributes:
        conv_out: the last layer, whose weight an adaptive GAN weight would ask for.
    """

    def __init__(self, *, embed_dim: int, channels: int, num_res_blocks: int, num_halvings: int):
        super().__init__()
        self.conv_in = nn.Conv2d(embed_dim, channels, 3, padding=1)
        self.blocks = _blocks(channels, num_res_blocks)
        up: list[nn.Module] = []
        for before, after in pairwise([*[channels] * (num_halvings - 1), channels // 2]):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.up = nn.Sequential(*up)
        self.conv_out = nn.ConvTranspose2d(channels // 2, 3, 4, stride=2, padding=1)

    def forward(self, quant: Tensor) -> Tensor:
        """Decode (B, embed_dim, h, w)."""
        return self.conv_out(self.up(self.blocks(self.conv_in(quant))))


class PatchEncoder(nn.Module):
    """Image (B, 3, H, W) to features (B, channels, H / f, W / f): a linear map of each f x f patch.

    Residual blocks follow. The linear path from pixels to codes learns colors in some hundred
    steps, where :class:`Encoder` takes thousands.

    Args:
        channels: width of the features.
        num_res_blocks: residual blocks after the linear map.
        num_halvings: log2 of the factor f.
    """

    def __init__(self, *, channels: int, num_res_blocks: int, num_halvings: int):
        super().__init__()
        factor = 2**num_halvings
        self.patch = nn.Conv2d(3, channels, factor, stride=factor)
        self.blocks = nn.Sequential(*[ResidualBlock(channels) for _ in range(num_res_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W); H and W are multiples of f."""
        return self.blocks(self.patch(x))


class PatchDecoder(nn.Module):
    """The way back: quantized grid (B, embed_dim, h, w) to image (B, 3, h * f, w * f).

    Attributes:
        conv_out: the last layer, as :class:`Decoder`'s.
    """

    def __init__(self, *, embed_dim: int, channels: int, num_res_blocks: int, num_halvings: int):
        super().__init__()
        factor = 2**num_halvings
        self.conv_in = nn.Conv2d(embed_dim, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[ResidualBlock(channels) for _ in range(num_res_blocks)])
        self.conv_out = nn.ConvTranspose2d(channels, 3, factor, stride=factor)

    def forward(self, quant: Tensor) -> Tensor:
        """Decode (B, embed_dim, h, w)."""
        return self.conv_out(self.blocks(self.conv_in(quant)))


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*[ResidualBlock(channels) for _ in range(count)], nn.ReLU())
