"""ViT-VQGAN: `loss:` key, `quantizer`, codes (B, N, D) of length 1, `batch_idx`, deleted keys."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lookalikes.parts import Adversarial, from_config


class VQLPIPSWithDiscriminator(Adversarial):
    def forward(
        self,
        codebook_loss,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        batch_idx,
        last_layer=None,
        split="train",
    ):
        if optimizer_idx == 1:
            loss = self.critic(inputs, reconstructions)
            return loss, {f"{split}/disc_loss": loss.detach()}
        loss, rec = self.generator(codebook_loss, inputs, reconstructions, last_layer, global_step)
        return loss, {f"{split}/total_loss": loss.detach(), f"{split}/rec_loss": rec.detach()}


class VectorQuantizer(nn.Module):
    def __init__(self, embed_dim: int, n_embed: int):
        super().__init__()
        self.embed_dim, self.n_embed, self.use_norm = embed_dim, n_embed, True
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z):
        z, rows = F.normalize(z, dim=-1), F.normalize(self.embedding.weight, dim=-1)
        index = torch.cdist(z.flatten(0, 1), rows).argmin(dim=1).view(z.shape[:2])
        found = rows[index]
        loss = F.mse_loss(found, z.detach()) + 0.25 * F.mse_loss(found.detach(), z)
        return z + (found - z).detach(), loss, index


class ViTVQ(pl.LightningModule):
    def __init__(self, image_key, image_size, loss, n_embed=16, embed_dim=6):
        super().__init__()
        self.image_key = image_key
        self.loss = from_config(loss)
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(8, 3, 4, stride=4)
        self.quantizer = VectorQuantizer(embed_dim, n_embed)
        self.pre_quant = nn.Linear(8, embed_dim)
        self.post_quant = nn.Linear(embed_dim, 8)
        self.learning_rate = 1e-3

    def encode(self, x):
        quant, loss, _ = self.quantizer(self.pre_quant(self.encoder(x).flatten(2).mT))
        return quant, loss

    def decode(self, quant):
        side = round(quant.shape[1] ** 0.5)
        return self.decoder(self.post_quant(quant).mT.unflatten(2, (side, side)))

    def forward(self, x):
        quant, diff = self.encode(x)
        return self.decode(quant), diff

    def get_input(self, batch, key="image"):
        return batch[key].float()  # channel first

    def training_step(self, batch, batch_idx, optimizer_idx=0):
        x = self.get_input(batch, self.image_key)
        xrec, qloss = self(x)
        loss, log = self.loss(
            qloss,
            x,
            xrec,
            optimizer_idx,
            self.global_step,
            batch_idx,
            last_layer=self.decoder.weight,
            split="train",
        )
        del log["train/total_loss" if optimizer_idx == 0 else "train/disc_loss"]
        self.log_dict(log)
        return loss

    def configure_optimizers(self):
        parts = (self.encoder, self.decoder, self.pre_quant, self.post_quant, self.quantizer)
        ours = [p for part in parts for p in part.parameters()]
        both = (ours, self.loss.discriminator.parameters())
        return [torch.optim.AdamW(p, lr=self.learning_rate, weight_decay=1e-4) for p in both], []
