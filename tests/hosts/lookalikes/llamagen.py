"""LlamaGen: a plain script, a scalar loss, a 4-tuple of codebook losses, codes of length 1."""

import torch
import torch.nn.functional as F
from torch import nn

from lookalikes.parts import Adversarial, Decoder, Encoder


class VQLoss(Adversarial):
    def forward(
        self,
        codebook_loss,
        inputs,
        reconstructions,
        optimizer_idx,
        global_step,
        last_layer=None,
        logger=None,
        log_every=100,
    ):
        if optimizer_idx == 1:
            return self.critic(inputs, reconstructions)
        quant_loss = codebook_loss[0] + codebook_loss[1] + codebook_loss[2]
        return self.generator(quant_loss, inputs, reconstructions, last_layer, global_step)[0]


class VectorQuantizer(nn.Module):
    def __init__(self, n_e: int = 16, e_dim: int = 8):
        super().__init__()
        self.n_e, self.e_dim, self.l2_norm = n_e, e_dim, True
        self.embedding = nn.Embedding(n_e, e_dim)
        self.register_buffer("codebook_used", torch.zeros(64))

    def forward(self, z):
        rows, codebook = F.normalize(z.movedim(1, -1), dim=-1), F.normalize(self.embedding.weight)
        index = torch.cdist(rows.flatten(0, 2), codebook).argmin(dim=1)
        found = codebook[index].view(rows.shape)
        vq, commit = F.mse_loss(found, rows.detach()), 0.25 * F.mse_loss(found.detach(), rows)
        quant = (rows + (found - rows).detach()).movedim(-1, 1)
        return quant, (vq, commit, 0.0 * vq, 0.5), (None, None, index)


class VQModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(8), Decoder(8)
        self.quantize = VectorQuantizer()
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def encode(self, x):
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant):
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, x):
        quant, diff, _ = self.encode(x)
        return self.decode(quant), diff
