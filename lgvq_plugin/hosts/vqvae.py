"""A plain VQ-VAE with the attributes and methods of taming's VQModel.

image (3, H, W) --Encoder--> (channels, H/f, W/f) --quant_conv--> (embed_dim, H/f, W/f)
    --VectorQuantizer, Eq. 1 and 2--> codes --post_quant_conv--> --Decoder--> image
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.read import read_raw
from ..config import require, to_plain
from ..functional import batch_perplexity
from ..sockets import ConfigError, as_config_error, instantiate, require_known

logger = logging.getLogger(__name__)

MODES, FSQ = ("ema", "gradient"), "fsq"
DOWNSAMPLES = {2**n: n for n in range(1, 6)}
MAX_BLOCKS = 256
GRACE = 2.0  # a restarted code has this many times the threshold: 70 steps to find users at .99
EPSILON = 1e-5  # Laplace smoothing of the counts


class AbstractImageTokenizer(nn.Module):
    """A tokenizer with the interface of taming's VQModel; subclasses build the parts.

    Attributes:
        learning_rate: learning rate of Adam; set it before :meth:`configure_optimizers`.
        betas: betas of Adam.
        downsample: f: an image of H x W has H/f x W/f codes.
        image_key: key of the images in a batch.
        scheduler_config: `{target, params}` of a torch learning rate scheduler, stepped after
            every batch, like latent-diffusion's key of that name; None: a constant rate.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    downsample: int
    image_key: str
    encoder: nn.Module
    decoder: Any
    loss: nn.Module
    quantize: "VectorQuantizer | FiniteScalarQuantizer"
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    scheduler_config: Mapping[str, Any] | None = None

    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of x (B, 3, H, W) and the quantizer's loss."""
        quant, quant_loss, _ = self.encode(x)
        return self.decode(quant), quant_loss

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

    def get_input(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return `batch[key]`, (B, H, W, 3) or (B, 3, H, W), as (B, 3, H, W) float32."""
        x = batch[key]
        if x.shape[1] != 3:
            x = x.movedim(-1, 1)
        return x.to(memory_format=torch.contiguous_format).float()

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Return Adam over the tokenizer, a second one if the loss has a discriminator.

        The second list holds their schedulers as Lightning expects them, empty without
        `scheduler_config`; ConfigError if the scheduler does not exist or take its params.
        """
        parts = (part for name, part in self.named_children() if name != "loss")
        groups = [[p for part in parts for p in part.parameters()]]
        if (discriminator := getattr(self.loss, "discriminator", None)) is not None:
            groups.append(list(discriminator.parameters()))
        lr, betas = self.learning_rate, self.betas
        adams: list[torch.optim.Optimizer] = [torch.optim.Adam(g, lr, betas) for g in groups]
        schedule = self.scheduler_config
        if schedule is None:
            return adams, []
        schedulers = [instantiate(schedule, optimizer=adam) for adam in adams]
        return adams, [{"scheduler": each, "interval": "step"} for each in schedulers]


class VQVAE(AbstractImageTokenizer):
    """VQ-VAE (van den Oord et al. 2017) with the attributes and methods of taming's VQModel.

    Args:
        lossconfig: `{target, params}` of a loss with taming's signature.
        n_embed: K, the number of codes.
        embed_dim: C, the width of a code.
        channels: width of the convolutions, even.
        num_res_blocks: residual blocks in the encoder, and in the decoder.
        downsample: f, a power of 2: an image of H x W has H/f x W/f codes.
        stem: "strided" convolutions, or one linear map per "patch" of f x f pixels, which is
            cheaper and learns faster, with seams between patches.
        quantizer: "ema" or "gradient", how the codebook learns; or "fsq", fixed levels.
        levels: of "fsq", one per component of a code; they replace n_embed and embed_dim.
        decay, commitment, restart_dead, dead_threshold: see :class:`VectorQuantizer`.
        image_key: key of the images in a batch.
        scheduler_config: see :class:`AbstractImageTokenizer`; for instance
            torch.optim.lr_scheduler.CosineAnnealingLR with T_max in steps.
        ckpt_path: initial weights: a state dict, or a mapping with one at `state_dict`.
    """

    learning_rate = 2e-4
    betas = (0.9, 0.99)

    def __init__(
        self,
        *,
        lossconfig: Mapping[str, Any],
        n_embed: int = 512,
        embed_dim: int = 64,
        channels: int = 128,
        num_res_blocks: int = 2,
        downsample: int = 8,
        stem: Literal["strided", "patch"] = "strided",
        quantizer: Literal["ema", "gradient", "fsq"] = "ema",
        levels: Sequence[int] | None = None,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_dead: bool = True,
        dead_threshold: float = 0.05,
        image_key: str = "image",
        scheduler_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
    ):
        super().__init__()
        self.scheduler_config = None if scheduler_config is None else to_plain(scheduler_config)
        known = f"one of {', '.join(map(str, DOWNSAMPLES))}"
        require(downsample in DOWNSAMPLES, "VQVAE: downsample", known, downsample)
        stems = {"strided": (Encoder, Decoder), "patch": (PatchEncoder, PatchDecoder)}
        require_known([stem], stems, "VQVAE: stem: {!r}")
        if channels < 2 or channels % 2:
            raise ConfigError(f"VQVAE: channels must be even and positive, got {channels!r}")
        if not 0 <= num_res_blocks <= MAX_BLOCKS:
            raise ConfigError(
                f"VQVAE: num_res_blocks must be >= 0 and <= {MAX_BLOCKS}, got {num_res_blocks!r}"
            )
        _require_levels(quantizer, levels)
        embed_dim = embed_dim if levels is None else len(levels)
        self.image_key, self.downsample = image_key, downsample
        sizes = {"channels": channels, "num_res_blocks": num_res_blocks}
        sizes["num_halvings"] = DOWNSAMPLES[downsample]
        encoder, decoder = stems[stem]
        self.encoder = encoder(**sizes)
        self.decoder = decoder(embed_dim=embed_dim, **sizes)
        self.loss = instantiate(to_plain(lossconfig))
        if levels is not None:
            self.quantize = FiniteScalarQuantizer(levels)
        else:
            self.quantize = VectorQuantizer(
                n_embed,
                embed_dim,
                mode=quantizer,  # type: ignore[arg-type]
                decay=decay,
                commitment=commitment,
                restart_dead=restart_dead,
                dead_threshold=dead_threshold,
            )
        self.quant_conv = nn.Conv2d(channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str) -> None:
        """Load weights; ConfigError unless the file is there and all but the loss's fit."""
        if not Path(path).is_file():
            raise ConfigError(f"ckpt_path: no file {path!r}")
        raw, _ = read_raw(Path(path))
        state = raw.get("state_dict", raw) if isinstance(raw, Mapping) else raw
        if not isinstance(state, Mapping) or not state:
            raise ConfigError(f"ckpt_path: {path!r} holds no state dict")
        with as_config_error(f"ckpt_path: {path!r} has other sizes", RuntimeError):
            missing, unexpected = self.load_state_dict(state, strict=False)
        strange = [key for key in (*missing, *unexpected) if not key.startswith("loss.")]
        if strange:
            raise ConfigError(
                f"ckpt_path: {path!r} is of another model; missing or unexpected: {strange[:5]}"
            )
        logger.info("weights loaded from %s", path)


def _require_levels(quantizer: str, levels: Sequence[int] | None) -> None:
    """Raise ConfigError for an unknown quantizer, or levels without FSQ, or FSQ without levels."""
    require_known([quantizer], [*MODES, FSQ], "quantizer: no mode {!r}")
    if (quantizer == FSQ) != (levels is not None):
        raise ConfigError(
            f"VQVAE: levels are for quantizer 'fsq', for instance [8, 5, 5, 5]; got quantizer "
            f"{quantizer!r} with levels {levels!r}"
        )


class VQVAELoss(nn.Module):
    """Reconstruction + codebook_weight * quantization loss (Eq. 2), with taming's signature.

    For a perceptual or an adversarial term give VQVAE taming's `VQLPIPSWithDiscriminator`.

    Args:
        codebook_weight: weight of the quantizer's loss.
        pixel: mean squared ("l2") or mean absolute ("l1") difference.
    """

    def __init__(self, codebook_weight: float = 1.0, pixel: Literal["l2", "l1"] = "l2"):
        super().__init__()
        require(pixel in ("l2", "l1"), "VQVAELoss: pixel", "'l2' or 'l1'", pixel)
        self.codebook_weight, self.pixel = codebook_weight, pixel

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, log); without a discriminator only the first three arguments matter."""
        difference = F.mse_loss if self.pixel == "l2" else F.l1_loss
        rec_loss = difference(reconstructions.float(), inputs.float())
        quant_loss = codebook_loss.float().mean()
        total = rec_loss + self.codebook_weight * quant_loss
        log = {"total_loss": total, "rec_loss": rec_loss, "quant_loss": quant_loss}
        return total, {f"{split}/{name}": value.detach() for name, value in log.items()}


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest code (Eq. 1).

    In mode "gradient" the loss is Eq. 2 without its first term, codebook + commitment * encoder
    term; in mode "ema" it is commitment * encoder term, and the codes are moving averages of the
    vectors assigned to them. The codebook only changes in training mode with gradients enabled.

    Args:
        n_embed: K, the number of codes.
        embed_dim: C, the width of a code.
        mode: how the codebook learns.
        decay: decay of the moving averages.
        commitment: omega of Eq. 2.
        restart_dead: move dead codes to vectors of the batch; the first training batch draws the
            whole codebook this way.
        dead_threshold: a code is dead if its average count is below this share of the mean count
            and the batch does not use it.
        seed: seed of the draws; they follow from (seed, step), so a resumed run draws the same.

    Attributes:
        embedding: `embedding.weight` (K, C); without gradient in mode "ema".
        cluster_size: moving average of the counts, (K,) float32.
        embed_avg: moving average of the sums, (K, C) float32; mode "ema" only.
        steps: number of updates, int64 scalar.
    """

    layout = "channels_first"  # of input and output, (B, C, h, w)

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        *,
        mode: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_dead: bool = True,
        dead_threshold: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        require_known([mode], MODES, "quantizer: no mode {!r}")
        for name, value in (("decay", decay), ("dead_threshold", dead_threshold)):
            require(0 <= value < 1, f"quantizer: {name}", "a number in [0, 1)", value)
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.mode, self.decay, self.commitment = mode, decay, commitment
        self.restart_dead, self.dead_threshold, self.seed = restart_dead, dead_threshold, seed
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        self.cluster_size = nn.Buffer(torch.ones(n_embed))
        self.steps = nn.Buffer(torch.zeros((), dtype=torch.int64))
        if mode == "ema":
            self.embedding.weight.requires_grad_(False)
            self.embed_avg = nn.Buffer(self.embedding.weight.detach().clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantize (B, C, H, W).

        Returns:
            z_q (B, C, H, W) float32, whose gradient passes straight through to `z`; the loss, a
            scalar; and (perplexity of the batch, None, indices (B * H * W,) int64).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            vectors = z.movedim(1, -1).reshape(-1, self.embed_dim)
            indices = nearest_codes(vectors.detach(), self.embedding.weight.detach())
            z_q = self.embed_code(indices.view(z.shape[0], *z.shape[2:]))
            loss = self.commitment * F.mse_loss(z, z_q.detach())
            if self.mode == "gradient":
                loss = loss + F.mse_loss(z_q, z.detach())
            counts = _sum_by_code(torch.ones_like(vectors[:, :1]), indices, self.n_embed)[:, 0]
            if self.training and torch.is_grad_enabled():
                # The codebook changes in place from here on; the graph holds no view of it.
                self._update(vectors.detach(), indices)
            # z - z.detach() is exactly 0: decoding the indices later gives the same image.
            return z_q.detach() + (z - z.detach()), loss, (batch_perplexity(counts), None, indices)

    def embed_code(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, H, W) of indices (B, H, W)."""
        return F.embedding(indices, self.embedding.weight).movedim(-1, 1)

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        """Update averages and codes with the statistics of one batch, summed over all ranks."""
        finite = vectors.isfinite().all(dim=1, keepdim=True)  # an overflow must not stay forever
        vectors = vectors.where(finite, 0.0)
        counts = _all_sum(_sum_by_code(finite.float(), indices, self.n_embed)[:, 0])
        self.cluster_size.lerp_(counts, 1 - self.decay)
        if self.mode == "ema":
            sums = _all_sum(_sum_by_code(vectors, indices, self.n_embed))
            self.embed_avg.lerp_(sums, 1 - self.decay)
            total = self.cluster_size.sum()
            smooth = (self.cluster_size + EPSILON) / (total + self.n_embed * EPSILON) * total
            self.embedding.weight.copy_(self.embed_avg / smooth[:, None])
        if self.restart_dead:
            self._restart(vectors, finite[:, 0], counts)
        self.steps.add_(1)

    def _restart(self, vectors: Tensor, finite: Tensor, counts: Tensor) -> None:
        """Move dead codes to vectors of this batch, without synchronizing with a GPU."""
        size = self.dead_threshold * counts.mean()
        is_dead = ((self.cluster_size < size) & (counts == 0)) | (self.steps == 0)
        keys = _scrambled(vectors.shape[0], self.seed, self.steps).masked_fill(~finite, 2**62)
        order = keys.argsort()  # distinct vectors as long as there are enough
        places = torch.arange(self.n_embed, device=order.device) % vectors.shape[0]
        fresh = vectors[order[places]]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(fresh, src=0)
        weight = self.embedding.weight
        weight.copy_(fresh.where(is_dead[:, None], weight))
        self.cluster_size.copy_((GRACE * size).where(is_dead, self.cluster_size))
        if self.mode == "ema":
            average = fresh * self.cluster_size[:, None]
            self.embed_avg.copy_(average.where(is_dead[:, None], self.embed_avg))


class FiniteScalarQuantizer(nn.Module):
    """FSQ (Mentzer et al. 2024): bound and round each component, without a learned codebook.

    Args:
        levels: number of values of each component, whole numbers >= 2.

    Attributes:
        embedding: `embedding.weight` (K, C), all codes, fixed; K is the product of the levels.

    >>> quantizer = FiniteScalarQuantizer([3, 2])
    >>> quantizer(torch.tensor([[9.0, -9.0], [0.0, 0.0]])[..., None, None])[0][..., 0, 0]
    tensor([[ 1., -1.],
            [ 0.,  0.]])
    """

    layout = "channels_first"

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        levels = [*levels]
        if not levels or any(not isinstance(n, int) or n < 2 for n in levels):
            raise ConfigError(f"quantizer: levels must be whole numbers >= 2, got {levels!r}")
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.levels = nn.Buffer(torch.tensor(levels), persistent=False)
        self.basis = nn.Buffer(torch.tensor(basis), persistent=False)
        self.n_embed, self.embed_dim = math.prod(levels), len(levels)
        numbers = torch.arange(self.n_embed)[:, None] // self.basis % self.levels
        codes = (numbers - self.levels // 2) / (self.levels // 2)
        self.embedding = nn.Embedding.from_pretrained(codes, freeze=True)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantize (B, C, H, W); returns as :class:`VectorQuantizer`, with a loss of 0."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)
            half = (self.levels - 1) * (1 + 1e-3) / 2
            offset = (self.levels % 2 == 0) / 2
            bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
            numbers = bounded.detach().round()
            indices = ((numbers + self.levels // 2) * self.basis).sum(dim=-1).long().flatten()
            codes = (numbers + (bounded - bounded.detach())) / (self.levels // 2)
        counts = _sum_by_code(z.new_ones(len(indices), 1), indices, self.n_embed)[:, 0]
        return codes.movedim(-1, 1), z.new_zeros(()), (batch_perplexity(counts), None, indices)

    def embed_code(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, H, W) of indices (B, H, W)."""
        return F.embedding(indices, self.embedding.weight).movedim(-1, 1)


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return argmin_k ||vectors_i - codebook_k|| (Eq. 1): (M, C) and (K, C) to (M,) int64.

    >>> nearest_codes(torch.tensor([[0.9], [-2.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([1, 0])
    """
    squares = codebook.square().sum(dim=1)  # ||v||^2 is the same for all codes
    return torch.addmm(squares, vectors, codebook.mT, alpha=-2).argmin(dim=1)


def _sum_by_code(rows: Tensor, indices: Tensor, n_embed: int) -> Tensor:
    """Sum rows (M, D) by index to (K, D), without an M x K matrix."""
    return rows.new_zeros(n_embed, rows.shape[1]).index_add_(0, indices, rows)


def _all_sum(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def _scrambled(count: int, seed: int, step: Tensor) -> Tensor:
    """Return (count,) pseudo-random int64 >= 0 that follow from (seed, step) on any device."""
    x = torch.arange(1, count + 1, device=step.device) + step * 1_000_003 + seed * 998_244_353
    for factor in (0x45D9F3B3335B369, 0x3335B36945D9F3B):  # integer hash; products wrap
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * factor
    return (x ^ (x >> 29)) & (2**62 - 1)


class Encoder(nn.Sequential):
    """Strided convolutions: image (B, 3, H, W) to features (B, channels, H / f, W / f).

    Args:
        channels: width after the first strided convolution, which has half of it.
        num_res_blocks: residual blocks at the lowest resolution.
        num_halvings: log2 of the factor f; H and W are multiples of f.
    """

    def __init__(self, *, channels: int, num_res_blocks: int, num_halvings: int):
        down: list[nn.Module] = []
        widths = [3, channels // 2, *[channels] * (num_halvings - 1)]
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        blocks = nn.Sequential(*_blocks(channels, num_res_blocks), nn.ReLU())
        super().__init__(OrderedDict(down=nn.Sequential(*down), conv_out=conv_out, blocks=blocks))


class Decoder(nn.Sequential):
    """Codes (B, embed_dim, h, w) to image (B, 3, h * f, w * f), not clamped.

    Attributes:
        conv_out: the last layer, for adaptive GAN weights.
    """

    def __init__(self, *, embed_dim: int, channels: int, num_res_blocks: int, num_halvings: int):
        conv_in = nn.Conv2d(embed_dim, channels, 3, padding=1)
        blocks = nn.Sequential(*_blocks(channels, num_res_blocks), nn.ReLU())
        up: list[nn.Module] = []
        widths = [channels] * max(num_halvings - 1, 1) + [channels // 2] * (num_halvings > 1)
        for before, after in pairwise(widths):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        conv_out = nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1)
        parts = {"conv_in": conv_in, "blocks": blocks, "up": nn.Sequential(*up)}
        super().__init__(OrderedDict(parts, conv_out=conv_out))


class PatchEncoder(nn.Sequential):
    """A linear map per f x f patch and residual blocks; arguments as :class:`Encoder`.

    The linear path from pixels to codes learns colors within a few hundred steps, where
    :class:`Encoder` takes thousands.
    """

    def __init__(self, *, channels: int, num_res_blocks: int, num_halvings: int):
        factor = 2**num_halvings
        patch = nn.Conv2d(3, channels, factor, stride=factor)
        blocks = nn.Sequential(*_blocks(channels, num_res_blocks))
        super().__init__(OrderedDict(patch=patch, blocks=blocks))


class PatchDecoder(nn.Sequential):
    """The inverse of :class:`PatchEncoder`; arguments and attributes as :class:`Decoder`."""

    def __init__(self, *, embed_dim: int, channels: int, num_res_blocks: int, num_halvings: int):
        factor = 2**num_halvings
        conv_in = nn.Conv2d(embed_dim, channels, 3, padding=1)
        blocks = nn.Sequential(*_blocks(channels, num_res_blocks))
        conv_out = nn.ConvTranspose2d(channels, 3, factor, stride=factor)
        super().__init__(OrderedDict(conv_in=conv_in, blocks=blocks, conv_out=conv_out))


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))) with `inner` channels inside, (B, channels, h, w)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return x + self.body(x)


def _blocks(channels: int, count: int) -> list[ResidualBlock]:
    return [ResidualBlock(channels, max(channels // 4, 1)) for _ in range(count)]
