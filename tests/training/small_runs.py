"""Configs: a tiny taming VQGAN on a tiny data set, without downloads; and a smaller host."""

CONFIG = {
    "model": {
        "base_learning_rate": 1e-3,
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 4,
            "n_embed": 16,
            "ddconfig": {
                "double_z": False,
                "z_channels": 4,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.1,  # draws from the global generator in every step
            },
            "lossconfig": {
                "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                "params": {
                    "disc_start": 2,
                    "disc_weight": 0.8,
                    "disc_num_layers": 1,
                    "disc_ndf": 8,
                    "perceptual_weight": 0.0,
                },
            },
        },
    },
    "data": {
        "batch_size": 2,
        "train": {"target": "scenes", "params": {"size": 16, "length": 11}},
        "validation": {
            "target": "scenes",
            "params": {"split": "validation", "size": 16, "length": 3},
        },
    },
    "training": {
        "max_steps": 4,
        "accelerator": "cpu",
        "scale_lr": False,
        "val_every": None,
        "images_every": None,
        "checkpoint_every": None,
        "log_every": 1,
    },
}

SMALL_HOST = {
    "learning_rate": 1e-3,
    "target": "lgvq_plugin.hosts.vqvae.VQVAE",
    "params": {
        "n_embed": 8,
        "embed_dim": 4,
        "channels": 8,
        "num_res_blocks": 1,
        "downsample": 4,
        "lossconfig": {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"},
    },
}
