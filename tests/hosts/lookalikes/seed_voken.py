"""SEED-Voken: IBQ and Open-MAGVIT2. Manual optimization, the discriminator first, one forward."""

from collections import namedtuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lookalikes.parts import Adversarial, Decoder, Encoder, LitEma, VectorQuantizer, from_config

Breakdown = namedtuple("Breakdown", "per_sample_entropy codebook_entropy commitment avg_probs")


def _log(split, loss, rec):
    """Without `rec_loss`: the keys of this repository differ from taming's."""
    return {f"{split}/total_loss": loss.detach(), f"{split}/reconstruct_loss": rec.detach()}


class IBQLoss(Adversarial):
    def forward(
        self,
        codebook_loss,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        last_layer=None,
        split="train",
    ):
        if optimizer_idx == 1:
            loss = self.critic(inputs, reconstructions)
            return loss, {f"{split}/discloss": loss.detach()}
        quant_loss = sum(codebook_loss)  # (quantization, sample entropy, average entropy, entropy)
        loss, rec = self.generator(quant_loss, inputs, reconstructions, last_layer, global_step)
        return loss, _log(split, loss, rec)


class MAGVIT2Loss(Adversarial):
    def forward(
        self,
        codebook_loss,
        loss_break,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        last_layer=None,
        split="train",
    ):
        if optimizer_idx == 1:
            loss = self.critic(inputs, reconstructions)
            return loss, {f"{split}/discloss": loss.detach()}
        quant_loss = codebook_loss + 0.1 * loss_break.commitment
        loss, rec = self.generator(quant_loss, inputs, reconstructions, last_layer, global_step)
        return loss, _log(split, loss, rec)


class IndexPropagationQuantize(VectorQuantizer):
    def forward(self, z):
        quant, loss, info = super().forward(z)
        entropy = 1e-3 * z.square().mean()
        return quant, (loss, entropy, -0.5 * entropy, 0.5 * entropy), info


class LFQ(nn.Module):
    """Signs; no codebook matrix. Four values: (quant, emb_loss, info, loss_breakdown)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = self.codebook_dim = dim
        self.register_buffer("mask", 2 ** torch.arange(dim - 1, -1, -1), persistent=False)

    def forward(self, z):
        signs = torch.where(z > 0, 1.0, -1.0)
        quant = z + (signs - z).detach()
        indices = ((signs.movedim(1, -1) > 0).long() * self.mask).sum(dim=-1)
        commitment = F.mse_loss(z, signs)
        zero = torch.zeros(())
        return quant, commitment, indices.flatten(), Breakdown(zero, zero, commitment, zero)


class _Model(L.LightningModule):
    strict_loading = False

    def __init__(self, ddconfig, lossconfig, quantizer, use_ema=True):
        super().__init__()
        width = ddconfig["z_channels"]
        self.encoder, self.decoder = Encoder(width), Decoder(width)
        self.loss = from_config(lossconfig)
        self.quantize = quantizer
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        self.automatic_optimization = False
        self.learning_rate = 1e-3

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        state = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return {key: value for key, value in state.items() if "perceptual_loss" not in key}

    def get_input(self, batch, k):
        return batch[k].permute(0, 3, 1, 2).contiguous().float()

    def decode(self, quant):
        return self.decoder(quant)

    def get_last_layer(self):
        return self.decoder.conv_out.weight

    def on_train_batch_end(self, *args, **kwargs):
        if self.use_ema:
            self.model_ema(self)

    def training_step(self, batch, batch_idx):
        x = self.get_input(batch, "image")
        xrec, *losses = self(x)
        opt_gen, opt_disc = self.optimizers()

        def loss(which):
            return self.loss(
                *losses, x, xrec, which, 0, last_layer=self.get_last_layer(), split="train"
            )

        discloss, _ = loss(1)
        opt_disc.zero_grad()
        self.manual_backward(discloss)
        opt_disc.step()
        aeloss, log = loss(0)
        opt_gen.zero_grad()
        self.manual_backward(aeloss)
        opt_gen.step()
        self.log_dict(log)
        return aeloss.detach()

    def validation_step(self, batch, batch_idx):
        x = self.get_input(batch, "image")
        xrec, *losses = self(x)
        log = {}
        for which in (1, 0):
            log |= self.loss(*losses, x, xrec, which, 0, last_layer=None, split="val_ema")[1]
        return log

    def configure_optimizers(self):
        parts = (self.encoder, self.decoder, self.quantize)
        opt_gen = torch.optim.Adam([p for m in parts for p in m.parameters()], self.learning_rate)
        opt_disc = torch.optim.Adam(self.loss.discriminator.parameters(), self.learning_rate)
        halve = torch.optim.lr_scheduler.LambdaLR
        return tuple(
            {"optimizer": o, "lr_scheduler": {"scheduler": halve(o, lambda step: 0.5**step)}}
            for o in (opt_gen, opt_disc)
        )


class IBQ(_Model):
    def __init__(self, ddconfig, lossconfig, n_embed=16, embed_dim=8, use_ema=True):
        quantizer = IndexPropagationQuantize(n_embed, embed_dim)
        super().__init__(ddconfig, lossconfig, quantizer, use_ema)

    def encode(self, x):
        return self.quantize(self.encoder(x))

    def forward(self, x):
        quant, diff, _ = self.encode(x)
        return self.decode(quant), diff


class MAGVIT2(_Model):
    def __init__(self, ddconfig, lossconfig, use_ema=False):
        super().__init__(ddconfig, lossconfig, LFQ(ddconfig["z_channels"]), use_ema)

    def encode(self, x):
        return self.quantize(self.encoder(x))

    def forward(self, x):
        quant, diff, _, breakdown = self.encode(x)
        return self.decode(quant), diff, breakdown
