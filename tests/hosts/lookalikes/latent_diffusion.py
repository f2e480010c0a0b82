"""latent-diffusion's VQModel: `predicted_indices=`, `n_classes`, an EMA, split "val_ema"."""

from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import nn

from lookalikes.parts import Adversarial, Decoder, Encoder, LitEma, VectorQuantizer, from_config


class VQLossWithDiscriminator(Adversarial):
    def __init__(self, n_classes=None, **knobs):
        super().__init__(**knobs)
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        last_layer=None,
        cond=None,
        split="train",
        predicted_indices=None,
    ):
        if optimizer_idx == 1:
            loss = self.critic(inputs, reconstructions)
            return loss, {f"{split}/disc_loss": loss.detach()}
        loss, rec = self.generator(codebook_loss, inputs, reconstructions, last_layer, global_step)
        log = {f"{split}/total_loss": loss.detach(), f"{split}/rec_loss": rec.detach()}
        if predicted_indices is not None:
            assert self.n_classes is not None
            counts = torch.bincount(predicted_indices.flatten(), minlength=self.n_classes)
            log[f"{split}/cluster_usage"] = (counts > 0).sum()
        return loss, log


class VQModel(pl.LightningModule):
    def __init__(self, lossconfig, n_embed=16, embed_dim=8, use_ema=True):
        super().__init__()
        self.image_key = "image"
        self.encoder, self.decoder = Encoder(8), Decoder(8)
        self.loss = from_config(lossconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(8, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, 8, 1)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        self.learning_rate = 1e-3

    @contextmanager
    def ema_scope(self):
        self.model_ema.swap_in(self)
        try:
            yield
        finally:
            self.model_ema.swap_out(self)

    def on_train_batch_end(self, *args, **kwargs):
        self.model_ema(self)

    def encode(self, x):
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant):
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, x, return_pred_indices=False):
        quant, diff, (_, _, indices) = self.encode(x)
        rec = self.decode(quant)
        return (rec, diff, indices) if return_pred_indices else (rec, diff)

    def get_input(self, batch, k):
        return batch[k].permute(0, 3, 1, 2).float()

    def _loss(self, batch, which, split):
        x = self.get_input(batch, self.image_key)
        xrec, qloss, indices = self(x, return_pred_indices=True)
        return self.loss(
            qloss,
            x,
            xrec,
            which,
            self.global_step,
            last_layer=self.get_last_layer(),
            split=split,
            predicted_indices=indices,
        )

    def training_step(self, batch, batch_idx, optimizer_idx):
        loss, log = self._loss(batch, optimizer_idx, "train")
        self.log_dict(log)
        return loss

    def validation_step(self, batch, batch_idx):
        found = self._validation(batch, "")
        with self.ema_scope():
            found |= self._validation(batch, "_ema")
        return found

    def _validation(self, batch, suffix):
        x = self.get_input(batch, self.image_key)
        xrec, qloss, indices = self(x, return_pred_indices=True)
        log = {}
        for which in (0, 1):
            log |= self.loss(
                qloss,
                x,
                xrec,
                which,
                self.global_step,
                last_layer=self.get_last_layer(),
                split="val" + suffix,
                predicted_indices=indices,
            )[1]
        return log

    def configure_optimizers(self):
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        ours = [p for part in parts for p in part.parameters()]
        return [
            torch.optim.Adam(ours, lr=self.learning_rate),
            torch.optim.Adam(self.loss.discriminator.parameters(), lr=self.learning_rate),
        ], []

    def get_last_layer(self):
        return self.decoder.conv_out.weight
