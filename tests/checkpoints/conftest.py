"""Tiny hosts and their configs; perceptual weights are 0, so nothing is downloaded."""

import copy

import pytest
import torch

from lgvq_plugin.training.build import build_host

TAMING = {
    "target": "taming.models.vqgan.VQModel",
    "base_learning_rate": 1e-4,
    "params": {
        "embed_dim": 8,
        "n_embed": 16,
        "ddconfig": {
            "double_z": False,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 2, 2],
            "num_res_blocks": 2,
            "attn_resolutions": [8],
            "dropout": 0.0,
        },
        "lossconfig": {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {
                "disc_start": 2,
                "disc_num_layers": 1,
                "disc_ndf": 8,
                "perceptual_weight": 0.0,
            },
        },
    },
}
VQVAE = {
    "target": "vqvae",
    "learning_rate": 1e-3,
    "params": {
        "n_embed": 16,
        "embed_dim": 4,
        "channels": 8,
        "num_res_blocks": 1,
        "downsample": 4,
        "lossconfig": {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"},
    },
}
VQVAE["target"] = "lgvq_plugin.hosts.vqvae.VQVAE"
SCENES = {
    "batch_size": 4,
    "train": {"target": "scenes", "params": {"size": 16, "length": 40}},
    "validation": {
        "target": "scenes",
        "params": {"split": "validation", "size": 16, "length": 30},
    },
}
SHORT = {"max_steps": 2, "accelerator": "cpu", "val_every": None, "images_every": None}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def config():
    """A function of a host's name that returns a fresh config of all three sections."""

    def build(name="vqvae", **training):
        model = {"taming": TAMING, "vqvae": VQVAE}[name]
        whole = {"model": model, "data": SCENES, "training": {**SHORT, **training}}
        return copy.deepcopy(whole)

    return build


@pytest.fixture
def old(config, tmp_path):
    """A function of a host's name: its config, a host with random weights, and its checkpoint."""

    def build(name="vqvae", **extra):
        whole = config(name)
        torch.manual_seed(1)
        host = build_host(whole).eval()
        with torch.no_grad():  # codes far apart, as trained ones are: no two are equally near
            host.quantize.embedding.weight.normal_()
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": host.state_dict(), "global_step": 5, **extra}, path)
        return whole, host, path

    return build
