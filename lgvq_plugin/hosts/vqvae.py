"""The baseline of our own: a plain VQ-VAE that is driven like taming's VQModel.

image --encoder--> quant_conv --quantize--> post_quant_conv --decoder--> reconstruction
                                   |_ loss of Eq. 2 _|________________________|
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .._fields import to_plain
from .._safe_load import read_raw
from ..sockets import ConfigError, instantiate, suggest
from ._image_tokenizer import AbstractImageTokenizer
from ._vector_quantizer import VectorQuantizer
from ._vqvae_layers import Decoder, Encoder, PatchDecoder, PatchEncoder

logger = logging.getLogger(__name__)

STEMS = {"strided": (Encoder, Decoder), "patch": (PatchEncoder, PatchDecoder)}
DOWNSAMPLES = {2**n: n for n in range(1, 6)}


class VQVAELoss(nn.Module):
    """Reconstruction + codebook_weight * quantization loss (Eq. 2), called as taming's losses.

    For a perceptual or an adversarial term give VQVAE taming's `VQLPIPSWithDiscriminator`.

    Args:
        codebook_weight: of the quantizer's loss.
        pixel: mean squared ("l2") or mean absolute ("l1") difference.
    """

    def __init__(self, codebook_weight: float = 1.0, pixel: Literal["l2", "l1"] = "l2"):
        super().__init__()
        if pixel not in ("l2", "l1"):
            raise ConfigError(f"VQVAELoss: pixel must be 'l2' or 'l1', got {pixel!r}")
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
        """Return (loss, log); there is no discriminator, so only the first three matter."""
        difference = F.mse_loss if self.pixel == "l2" else F.l1_loss
        rec_loss = difference(reconstructions.float(), inputs.float())
        quant_loss = codebook_loss.float().mean()
        total = rec_loss + self.codebook_weight * quant_loss
        log = {"total_loss": total, "rec_loss": rec_loss, "quant_loss": quant_loss}
        return total, {f"{split}/{name}": value.detach() for name, value in log.items()}


class VQVAE(AbstractImageTokenizer):
    """VQ-VAE (van den Oord et al. 2017) with the attributes and methods of taming's VQModel.

    Args:
        lossconfig: `{target, params}` of a loss that is called as taming's.
        n_embed: K, the number of codes.
        embed_dim: C, the width of a code.
        channels: width of the convolutions, even.
        num_res_blocks: residual blocks in the encoder, and as many in the decoder.
        downsample: f, a power of 2: an image of H x W has H/f x W/f codes.
        stem: "strided" convolutions, or one linear map for each "patch" of f x f pixels, which is
            cheaper and learns faster, with seams between patches.
        quantizer: "ema" or "gradient", how the codebook learns.
        decay, commitment, restart_dead, dead_threshold: see
            :class:`~lgvq_plugin.hosts._vector_quantizer.VectorQuantizer`.
        image_key: where a batch holds its images.
        scheduler_config: `{target, params}` of a learning rate schedule of torch, stepped after
            every batch, such as torch.optim.lr_scheduler.CosineAnnealingLR with T_max, the steps.
        ckpt_path: weights to start from: a state dict, or a mapping with one at `state_dict`.

    Attributes:
        learning_rate: of Adam; set it before :meth:`configure_optimizers`.
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
        quantizer: Literal["ema", "gradient"] = "ema",
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
        if downsample not in DOWNSAMPLES:
            known = ", ".join(map(str, DOWNSAMPLES))
            raise ConfigError(f"VQVAE: downsample must be one of {known}, got {downsample!r}")
        if stem not in STEMS:
            raise ConfigError(f"VQVAE: stem: {stem!r}{suggest(str(stem), STEMS)}")
        if channels < 2 or channels % 2:
            raise ConfigError(f"VQVAE: channels must be even and positive, got {channels!r}")
        self.image_key, self.downsample = image_key, downsample
        sizes = {
            "channels": channels,
            "num_res_blocks": num_res_blocks,
            "num_halvings": DOWNSAMPLES[downsample],
        }
        encoder, decoder = STEMS[stem]
        self.encoder = encoder(**sizes)
        self.decoder = decoder(embed_dim=embed_dim, **sizes)
        self.loss = instantiate(to_plain(lossconfig))
        self.quantize = VectorQuantizer(
            n_embed,
            embed_dim,
            mode=quantizer,
            decay=decay,
            commitment=commitment,
            restart_dead=restart_dead,
            dead_threshold=dead_threshold,
        )
        self.quant_conv = nn.Conv2d(channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def get_last_layer(self) -> Tensor:
        """Return the weight of the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def init_from_ckpt(self, path: str) -> None:
        """Load weights; those of the loss may be missing or left over, no others.

        Raises:
            ConfigError: if the file does not exist or does not fit.
        """
        if not Path(path).is_file():
            raise ConfigError(f"ckpt_path: no file {path!r}")
        raw, _ = read_raw(Path(path))
        state = raw.get("state_dict", raw) if isinstance(raw, Mapping) else raw
        if not isinstance(state, Mapping) or not state:
            raise ConfigError(f"ckpt_path: {path!r} holds no state dict")
        try:
            missing, left_over = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ConfigError(f"ckpt_path: {path!r} has other sizes: {error}") from error
        strangers = [key for key in (*missing, *left_over) if not key.startswith("loss.")]
        if strangers:
            raise ConfigError(
                f"ckpt_path: {path!r} is of another model; missing or left over: {strangers[:5]}"
            )
        logger.info("weights loaded from %s", path)
