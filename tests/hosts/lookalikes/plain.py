"""Hosts without a loss class: rosinality's VQ-VAE-2, CVQ-VAE, and any quantizer in the middle."""

import torch
import torch.nn.functional as F
from torch import nn

from lookalikes.parts import Decoder, Encoder


class Quantize(nn.Module):
    """rosinality: (B, h, w, C) in and out, the codebook a buffer (C, K), an EMA in training."""

    def __init__(self, dim: int, n_embed: int):
        super().__init__()
        self.dim, self.n_embed = dim, n_embed
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, x):
        index = torch.cdist(x.flatten(0, 2), self.embed.mT).argmin(dim=1).view(x.shape[:-1])
        found = F.embedding(index, self.embed.mT)
        if self.training:
            self.embed_avg.mul_(0.99)
        return x + (found - x).detach(), (found.detach() - x).square().mean(), index


class VQVAE2(nn.Module):
    """Two levels; `width` codes wide, the bottom grid twice the top one."""

    def __init__(self, width: int = 8, n_embed: int = 16):
        super().__init__()
        self.enc_b, self.enc_t = Encoder(width), nn.Conv2d(width, width, 2, stride=2)
        self.quantize_t = Quantize(width, n_embed)
        self.upsample_t = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.quantize_conv_b = nn.Conv2d(2 * width, width, 1)
        self.quantize_b = Quantize(width, n_embed)
        self.dec = Decoder(2 * width)

    def encode(self, x):
        b = self.enc_b(x)
        t, diff_t, _ = self.quantize_t(self.enc_t(b).permute(0, 2, 3, 1))
        t = self.upsample_t(t.permute(0, 3, 1, 2))
        b = self.quantize_conv_b(torch.cat([t, b], dim=1)).permute(0, 2, 3, 1)
        b, diff_b, _ = self.quantize_b(b)
        return t, b.permute(0, 3, 1, 2), diff_t + diff_b

    def forward(self, x):
        t, b, diff = self.encode(x)
        return self.dec(torch.cat([t, b], dim=1)), diff


class VectorQuantiser(nn.Module):
    """CVQ-VAE: (z_q, loss, (perplexity, one-hot, indices)), cosine distance, anchors moved."""

    def __init__(self, num_embed: int, embed_dim: int):
        super().__init__()
        self.num_embed, self.embed_dim = num_embed, embed_dim
        self.embedding = nn.Embedding(num_embed, embed_dim)
        self.register_buffer("embed_prob", torch.zeros(num_embed))

    def forward(self, z):
        rows = z.movedim(1, -1)
        flat = rows.reshape(-1, self.embed_dim)
        index = (F.normalize(flat) @ F.normalize(self.embedding.weight).mT).argmax(dim=1)
        one_hot = F.one_hot(index, self.num_embed).to(z.dtype)
        found = (one_hot @ self.embedding.weight).view(rows.shape)
        loss = F.mse_loss(found, rows.detach()) + 0.25 * F.mse_loss(found.detach(), rows)
        quant = (rows + (found - rows).detach()).movedim(-1, 1)
        self.embed_prob.mul_(0.9).add_(one_hot.detach().mean(dim=0), alpha=0.1)
        return quant, loss, (one_hot.mean(dim=0).max(), one_hot, index)


class Autoencoder(nn.Module):
    """Any quantizer between two networks: images in, (reconstruction, quantizer's loss) out.

    Args:
        quantizer: takes (B, C, h, w), or (B, N, C) if `rows`.
        place: which of the quantizer's values are its codes and its loss.
    """

    def __init__(self, quantizer, *, width=8, rows=False, place=(0, 2)):
        super().__init__()
        self.encoder, self.decoder, self.vq = Encoder(width), Decoder(width), quantizer
        self.rows, self.place = rows, place

    def forward(self, x):
        z = self.encoder(x)
        output = self.vq(z.flatten(2).mT if self.rows else z)
        quant = output[self.place[0]]
        loss = output[self.place[1]].sum() if self.place[1] is not None else 0.0
        quant = quant.mT.unflatten(2, z.shape[2:]) if self.rows else quant
        return self.decoder(quant), loss
