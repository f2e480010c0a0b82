"""What the processes of tests/hosts/test_processes.py run; importable by a spawned one."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from lgvq_plugin import attach
from lgvq_plugin.types import Codes
from lookalikes import plain
from lookalikes.cases import CAPTIONS, CASES, LGVQ
from lookalikes.parts import VectorQuantizer

BY_NAME = {case.name: case for case in CASES}
ONLY_RELATIONSHIP = {
    "global_semantic": {"weight": 0},
    "masked_text": {"weight": 0},
    "relationship": {"weight": 1},
}
WITHOUT_A_TERM = [  # options of a step without a term, and whether its term is not finite
    ({"start": 5}, False),
    ({"on_nonfinite": "skip", "objectives": ONLY_RELATIONSHIP}, True),
]


class AsLightning(torch.nn.Module):
    """Lightning wraps a host so that `forward` is its training step."""

    def __init__(self, host, captions):
        super().__init__()
        self.host, self.captions = host, captions

    def forward(self, images):
        host = self.host
        x = host.get_input({"image": images, "caption": self.captions}, "image")
        xrec, quant_loss = host(x)
        return host.loss(quant_loss, x, xrec, 0, 0, last_layer=host.get_last_layer())[0]


def run(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(
            {
                "host": _host(rank),
                "script": _script(rank),
                "own": _own(rank),
                "heads": [_heads(options, is_broken) for options, is_broken in WITHOUT_A_TERM],
            },
            f"{folder}/{rank}.pt",
        )
    finally:
        dist.destroy_process_group()


def _host(rank):
    """A host in one DDP; the second rank has captions in no batch, both have unequal many."""
    captions = [CAPTIONS, [None] * 2][rank]
    host, _ = BY_NAME["vqvae"].build(LGVQ)
    host.learning_rate = 1e-3
    (optimizer,), _ = host.configure_optimizers()
    wrapped = DistributedDataParallel(AsLightning(host, captions))
    images = BY_NAME["vqvae"].batch()["image"][: len(captions)] * (1 - 0.1 * rank)
    for _ in range(2):  # DDP notices a parameter without a gradient at the second pass
        optimizer.zero_grad()
        wrapped(images).backward()
        optimizer.step()
    return {n: p.detach() for n, p in host.loss.alignment.named_parameters()}


def _script(rank):
    """LlamaGen: model and loss each in its own DDP, the loss called for both passes."""
    host, loss = BY_NAME["llamagen"].build(LGVQ)
    optimizer = torch.optim.Adam(host.model.parameters(), lr=1e-3)
    loss.add_heads(optimizer)
    critic = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-3)
    model, vq_loss = (DistributedDataParallel(m) for m in (host.model, loss))
    images = BY_NAME["llamagen"].images()
    for step in range(2):
        vq_loss.module.set_captions([CAPTIONS, [None] * 3][rank])
        recons, codebook_loss = model(images)
        last = model.module.decoder.conv_out.weight
        for which, own in enumerate((optimizer, critic)):
            value = vq_loss(
                codebook_loss,
                images,
                recons,
                optimizer_idx=which,
                global_step=step,
                last_layer=last,
            )
            own.zero_grad()
            value.backward()
            own.step()
    assert F.mse_loss(recons, images).isfinite()
    return {n: p.detach() for n, p in loss.named_parameters()}


def _own(rank):
    """A script with `attach`: the heads are a submodule of the model before DDP wraps it."""
    torch.manual_seed(0)
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    handle = attach(model, **LGVQ)
    model.heads = handle.heads
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-3)
    images = BY_NAME["llamagen"].images() * (1 - 0.1 * rank)
    for _ in range(2):
        recons, aux = wrapped(images)
        ours, _ = handle.loss([CAPTIONS, [None] * 3][rank])
        optimizer.zero_grad()
        (F.mse_loss(recons, images) + aux + ours).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


class Heads(torch.nn.Module):
    """The heads alone in a DDP, their codes from outside."""

    def __init__(self, alignment):
        super().__init__()
        self.alignment = alignment

    def forward(self, codes, captions):
        return self.alignment(codes, captions, step=0)[0]


def _heads(options, is_broken):
    """Three backward passes; DDP raises at the second if a parameter had no gradient."""
    alignment = BY_NAME["vqvae"].build({**LGVQ, **options})[0].loss.alignment
    if is_broken:
        (objective,) = alignment.objectives.values()
        objective.register_forward_hook(
            lambda module, args, term: replace(term, value=term.value * float("nan"))
        )
    wrapped = DistributedDataParallel(Heads(alignment))
    for _ in range(3):
        codes = torch.randn(2, 16, alignment.code_dim, requires_grad=True)
        wrapped(Codes(codes, None, (4, 4)), CAPTIONS[:2]).backward()
    return {n: p.grad for n, p in alignment.named_parameters() if p.requires_grad}
