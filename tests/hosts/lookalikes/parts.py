"""What the look-alikes have in common: tiny networks, a quantizer, an adversarial loss, LitEma."""

import importlib

import torch
import torch.nn.functional as F
from torch import nn


def from_config(config):
    """As taming and all its descendants resolve a target, without any of our help."""
    module, name = config["target"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config.get("params", {}))


class Encoder(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 4, stride=4)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.mix(torch.tanh(self.conv_in(x)))


class Decoder(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=4)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        return self.conv_out(torch.tanh(self.up(z)))


class VectorQuantizer(nn.Module):
    """(z_q, loss, (None, None, indices)) of (B, C, h, w), as VectorQuantizer2's."""

    def __init__(self, n_e: int, e_dim: int):
        super().__init__()
        self.n_e, self.e_dim = n_e, e_dim
        self.embedding = nn.Embedding(n_e, e_dim)

    def look_up(self, z):
        rows = z.movedim(1, -1)
        index = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(dim=1)
        return self.embedding(index).view(rows.shape).movedim(-1, 1), index

    def forward(self, z):
        found, index = self.look_up(z)
        loss = F.mse_loss(found, z.detach()) + 0.25 * F.mse_loss(found.detach(), z)
        return z + (found - z).detach(), loss, (None, None, index)


class Adversarial(nn.Module):
    """Arithmetic of a VQGAN's loss; each look-alike gives it the signature of its host."""

    def __init__(self, disc_start: int = 0, disc_weight: float = 0.8):
        super().__init__()
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3)
        )
        self.perceptual_loss = nn.Identity()
        self.discriminator_iter_start, self.disc_weight = disc_start, disc_weight
        self.weights_seen = []

    def generator(self, quant_loss, x, xrec, last_layer, step):
        rec = F.l1_loss(xrec, x)
        fooled = -self.discriminator(xrec).mean()
        weight = torch.zeros(())
        if self.training and torch.is_grad_enabled():
            of_rec = torch.autograd.grad(rec, last_layer, retain_graph=True)[0]
            of_gan = torch.autograd.grad(fooled, last_layer, retain_graph=True)[0]
            weight = (of_rec.norm() / (of_gan.norm() + 1e-4)).clamp(0, 1e4).detach()
        self.weights_seen.append(float(weight))
        factor = float(step >= self.discriminator_iter_start)
        return rec + quant_loss + self.disc_weight * factor * weight * fooled, rec

    def critic(self, x, xrec):
        real, fake = self.discriminator(x.detach()), self.discriminator(xrec.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class LitEma(nn.Module):
    """Averages of all parameters that require grad, as buffers with the dots taken out."""

    def __init__(self, model, decay: float = 0.9):
        super().__init__()
        self.decay = decay
        self.m_name2s_name = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(self.m_name2s_name[name], parameter.detach().clone())
        self.kept = []

    @torch.no_grad()
    def forward(self, model):
        shadows = dict(self.named_buffers())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadows[self.m_name2s_name[name]].lerp_(parameter, 1 - self.decay)
            else:
                assert name not in self.m_name2s_name

    def swap_in(self, model):
        self.kept = [p.detach().clone() for p in model.parameters()]
        shadows = dict(self.named_buffers())
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                parameter.data.copy_(shadows[self.m_name2s_name[name]])

    def swap_out(self, model):
        for kept, parameter in zip(self.kept, model.parameters(), strict=True):
            parameter.data.copy_(kept)
