"""A host of one number, for which every step can be worked out by hand; and odd data sets."""

import os
import random
import signal
import time

import numpy as np
import torch
from torch import nn

from lgvq_plugin.hosts.vqvae import VQVAE


class ToyLoss(nn.Module):
    def forward(self, qloss, x, xrec, optimizer_idx, global_step, last_layer=None, split="train"):
        loss = (xrec - x).square().mean() + qloss
        return loss, {
            f"{split}/rec_loss": loss.detach(),
            f"{split}/step": torch.tensor(global_step),
        }


class ToyHost(nn.Module):
    """xrec = weight * x, so with x = 1 the loss is (weight - 1)^2 and its slope 2 (weight - 1)."""

    def __init__(self, weight=3.0, schedule=None):
        super().__init__()
        self.image_key, self.loss = "image", ToyLoss()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("seen", torch.zeros(()))
        self.schedule = schedule

    def get_input(self, batch, key):
        return batch[key].float()

    def forward(self, x):
        if self.training:
            self.seen += x.shape[0]
        return self.weight * x, torch.zeros(())

    def get_last_layer(self):
        return self.weight

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.weight], lr=self.learning_rate)
        if self.schedule is None:
            return optimizer
        halve = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": halve, "interval": self.schedule, "frequency": 1}]


class Ones:
    """Images of ones; `first` is the value of the sample at index 0."""

    def __init__(self, length=8, first=1.0):
        self.length, self.first = length, first

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        value = self.first if index == 0 else 1.0
        return {"image": np.full((2, 2, 3), value, np.float32), "index": index}


class Random(Ones):
    """Draws from all global generators, as careless data sets do."""

    def __getitem__(self, index):
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"image": np.array(noise, np.float32).reshape(1, 1, 3), "index": index}


class Killer:
    """Scenes, and a signal to this very process when sample `at` is read for the first time."""

    sent = False

    def __init__(self, at, number=int(signal.SIGTERM), **scenes):
        from lgvq_plugin.datasets.scenes import Scenes

        self.scenes, self.at, self.number = Scenes(**scenes), at, number

    def __len__(self):
        return len(self.scenes)

    def set_epoch(self, epoch):
        self.scenes.set_epoch(epoch)

    def __getitem__(self, index):
        if index == self.at and not Killer.sent:
            Killer.sent = True
            os.kill(os.getpid(), self.number)
            time.sleep(0.01)
        return self.scenes[index]


class DecayedVQVAE(VQVAE):
    """Trains with a weight decay and a schedule."""

    def configure_optimizers(self):
        parts = (part for name, part in self.named_children() if name != "loss")
        own = [p for part in parts for p in part.parameters()]
        optimizer = torch.optim.AdamW(own, lr=self.learning_rate, weight_decay=0.5)
        halve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return [optimizer], [{"scheduler": halve, "interval": "step"}]


class AttributeHost(nn.Module):
    """Reads its config as ViT-VQGAN does."""

    def __init__(self, encoder, loss):
        super().__init__()
        self.width, self.given = encoder.dim, encoder
        self.loss = nn.MSELoss()


class RatedHost(nn.Module):
    """Has a learning rate of its own, as SEED-Voken's hosts."""

    def __init__(self, lossconfig, learning_rate):
        super().__init__()
