"""A host that gives back its input, one that was never trained, and a few scenes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgvq_plugin.hosts.vqvae import VQVAE

PALETTE = 64


class Quantize(nn.Module):
    """Nearest of fixed patches; called as taming's quantizers are."""

    def __init__(self, book, is_exact):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(book)
        self.is_exact = is_exact

    def forward(self, z):
        flat = z.movedim(1, -1).flatten(0, 2)
        indices = torch.cdist(flat, self.embedding.weight).argmin(dim=1)
        chosen = self.embedding(indices).view(z.movedim(1, -1).shape).movedim(-1, 1)
        return z if self.is_exact else chosen, z.new_zeros(()), (None, None, indices)


class Patches(nn.Module):
    """Encoder: 8 x 8 patches as they are. With `is_exact` the quantizer changes nothing."""

    def __init__(self, book, is_exact):
        super().__init__()
        self.quantize = Quantize(book, is_exact)

    def encode(self, x):
        z = F.pixel_unshuffle(x, 8)
        return self.quantize(z)

    def decode(self, codes):
        return F.pixel_shuffle(codes, 8)

    def forward(self, x):
        quantized, loss, _ = self.encode(x)
        return self.decode(quantized), loss


def patches_host(*, is_exact):
    from lgvq_plugin.datasets.scenes import Scenes

    data = Scenes("train", size=32, length=16)
    images = torch.stack([torch.from_numpy(data[i]["image"]).permute(2, 0, 1) for i in range(16)])
    cells = F.pixel_unshuffle(images, 8).movedim(1, -1).flatten(0, 2)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))
    return Patches(cells[order[:PALETTE]].contiguous(), is_exact).eval()


@pytest.fixture
def identity():
    return patches_host(is_exact=True)


@pytest.fixture
def palette():
    return patches_host(is_exact=False)


@pytest.fixture
def untrained():
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    return VQVAE(lossconfig=loss, n_embed=32, embed_dim=8, channels=8, num_res_blocks=1).eval()


@pytest.fixture
def config():
    section = {"target": "scenes", "params": {"size": 32}}

    def part(split, length):
        return {**section, "params": {**section["params"], "split": split, "length": length}}

    return {
        "data": {"batch_size": 8, "train": part("train", 96), "validation": part("validation", 48)},
        "evaluation": {"guide": {"use": "micro_clip"}, "batch_size": 16},
    }
