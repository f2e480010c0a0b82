"""Every host of the contract tests: how to build it, how it trains a step, what its codes are."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lgvq_plugin import attach, compat
from lookalikes import plain

GUIDE = {"use": "lookalikes.toy_guide.ToyGuide"}
WEIGHTS = {"global_semantic": 0.3, "masked_text": 0.2, "relationship": 0.5}
LGVQ = {
    "guide": GUIDE,
    "objectives": {name: {"weight": weight} for name, weight in WEIGHTS.items()},
    "every": 1,  # by default the first and every fifth batch are aligned
}
OFF = {"guide": GUIDE, "objectives": {name: {"weight": 0} for name in WEIGHTS}}
CAPTIONS = ["a red circle on grey", "two small green squares", "one blue star"]


@dataclass
class Case:
    """A host.

    Args:
        name: of the test.
        make: builds it; over LGVQLoss if it is given an `lgvq:` block (not for attached ones).
        step: trains it one whole step, captions in the batch; leaves the generator's gradients
            on the host and returns the generator's loss. Takes the handle of an attached host.
        read: codes (B, N, C) out of what the quantizer returned, with no help of ours.
        quantizer: where it is.
        attached: whether there is no loss to wrap, but `attach`.
        channel_last: whether batches hold images (B, H, W, 3).
        key: of the images in a batch.
        named: whether the quantizer is found without a path.
        channels: of the images.
    """

    name: str
    make: Callable[[Any], nn.Module]
    step: Callable[..., torch.Tensor]
    read: Callable[[Any], torch.Tensor]
    quantizer: str = "quantize"
    attached: bool = False
    channel_last: bool = True
    key: str = "image"
    named: bool = True
    channels: int = 3

    def batch(self, captions=CAPTIONS):
        generator = torch.Generator().manual_seed(5)
        x = torch.rand(len(CAPTIONS), self.channels, 16, 16, generator=generator) * 2 - 1
        return {self.key: x.movedim(1, -1) if self.channel_last else x, "caption": captions}

    def images(self):
        x = self.batch()[self.key]
        return x.movedim(-1, 1).contiguous() if self.channel_last else x

    def build(self, lgvq=None, seed=0):
        """Return (host, what is attached to it or None)."""
        torch.manual_seed(seed)
        if not self.attached:
            host = self.make(lgvq)
            return host, host.loss if lgvq is not None else None
        host = self.make(None)
        if lgvq is None:
            return host, None
        return host, attach(host, None if self.named else self.quantizer, **lgvq)


def heads_of(attached):
    return attached.heads if hasattr(attached, "heads") else attached.alignment


# -- how hosts train -----------------------------------------------------------------------------


def taming_step(host, batch, attached=None):
    """Two optimizers, a forward pass for each, `training_step(batch, index, optimizer_idx)`."""
    host.learning_rate = 1e-3
    loss = None
    for which, optimizer in enumerate(host.configure_optimizers()[0]):
        value = host.training_step(batch, 0, which)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss = value.detach() if which == 0 else loss
    return loss


def single_step(host, batch, attached=None):
    """One optimizer, `training_step(batch, index)`."""
    host.learning_rate = 1e-3
    optimizer = host.configure_optimizers()
    loss = host.training_step(batch, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def manual_step(host, batch, attached=None):
    """The host drives its optimizers itself; what it asks of the Trainer is in the way only."""
    host.learning_rate = 1e-3
    optimizers = [entry["optimizer"] for entry in host.configure_optimizers()]
    vars(host).update(optimizers=lambda: optimizers, manual_backward=lambda loss: loss.backward())
    try:
        loss = host.training_step(batch, 0)
    finally:
        del host.optimizers, host.manual_backward
    host.on_train_batch_end()
    return loss


def vqvae_step(host, batch, attached=None):
    """Our own VQ-VAE, as the training driver drives it."""
    (optimizer,), _ = host.configure_optimizers()
    x = host.get_input(batch, host.image_key)
    reconstruction, quant_loss = host(x)
    loss, _ = host.loss(quant_loss, x, reconstruction, 0, 0, last_layer=host.get_last_layer())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def llamagen_step(host, batch, attached=None):
    """A script: its own optimizers, captions given by hand (the ImageNet loader has none)."""
    vq_loss = host.loss
    optimizer = torch.optim.Adam(host.parameters_of_model(), lr=1e-3)
    optimizer_disc = torch.optim.Adam(vq_loss.discriminator.parameters(), lr=1e-3)
    if attached is not None:
        attached.add_heads(optimizer)
        attached.set_captions(batch["caption"])
    imgs = batch["image"]
    recons, codebook_loss = host.model(imgs)
    last = host.model.decoder.conv_out.weight
    both = {"global_step": 0, "last_layer": last, "logger": None, "log_every": 100}
    loss_gen = vq_loss(codebook_loss, imgs, recons, optimizer_idx=0, **both)
    optimizer.zero_grad()
    loss_gen.backward()
    optimizer.step()
    loss_disc = vq_loss(codebook_loss, imgs, recons, optimizer_idx=1, **both)
    optimizer_disc.zero_grad()
    loss_disc.backward()
    optimizer_disc.step()
    return loss_gen.detach()


def plain_step(host, batch, attached=None):
    """A loop of one's own with `handle.loss`."""
    parameters = [*host.parameters(), *(attached.parameters() if attached else ())]
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=1e-3)
    output = host(batch["image"])
    is_diffusers = hasattr(output, "sample")
    xrec, aux = (output.sample, output.commit_loss) if is_diffusers else output
    loss = F.mse_loss(xrec, batch["image"]) + aux
    if attached is not None:
        loss = loss + attached.loss(batch["caption"])[0]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# -- how hosts are built -------------------------------------------------------------------------


def lossconfig(target, lgvq, **params):
    """The host's own loss, or the same with the prefix and our block."""
    if lgvq is None:
        return {"target": target, "params": params}
    return {"target": f"lgvq_plugin.over.{target}", "params": {**params, "lgvq": lgvq}}


DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def taming(name="VQModel", target=None, params=None, **more):
    """A host of whichever package called taming is installed."""

    def make(lgvq):
        compat.patch()
        vqgan = importlib.import_module("taming.models.vqgan")
        importlib.import_module("taming.modules.losses.vqperceptual")
        knobs = {"disc_start": 0, "disc_num_layers": 2, "perceptual_weight": 0.0}
        knobs = knobs if params is None else params
        default = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
        if target is None and lgvq is not None:
            loss = {"target": "lgvq_plugin.LGVQLoss", "params": {**knobs, "lgvq": lgvq}}
        else:
            loss = lossconfig(target or default, lgvq, **knobs)
        given = {"ddconfig": DDCONFIG, "lossconfig": loss, "n_embed": 16, "embed_dim": 8, **more}
        with compat.lpips_only_if_used(0, target or default):  # LPIPS would want VGG16
            return getattr(vqgan, name)(**given)

    return make


def rows(quant):
    """(B, C, h, w) to (B, h * w, C)."""
    return quant.flatten(2).mT


def first(output):
    return rows(output[0])


def _cvq(lgvq):
    host = taming()(lgvq)
    host.quantize = plain.VectorQuantiser(16, 8)  # how CVQ gets into a VQGAN
    return host


def _latent_diffusion(lgvq):
    from lookalikes import latent_diffusion as ldm

    target = "lookalikes.latent_diffusion.VQLossWithDiscriminator"
    return ldm.VQModel(lossconfig(target, lgvq, n_classes=16))


def _ibq(lgvq):
    from lookalikes import seed_voken

    loss = lossconfig("lookalikes.seed_voken.IBQLoss", lgvq, disc_start=0)
    return seed_voken.IBQ({"z_channels": 8}, loss)


def _magvit2(lgvq):
    from lookalikes import seed_voken

    loss = lossconfig("lookalikes.seed_voken.MAGVIT2Loss", lgvq)
    return seed_voken.MAGVIT2({"z_channels": 6}, loss)


def _vit_vqgan(lgvq):
    from lookalikes import vit_vqgan

    loss = lossconfig("lookalikes.vit_vqgan.VQLPIPSWithDiscriminator", lgvq)
    return vit_vqgan.ViTVQ("image", 16, loss)


class Script(nn.Module):
    """Model and loss of a script side by side, so that the tests can look at both."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def parameters_of_model(self):
        return list(self.model.parameters())

    def forward(self, x):
        return self.model(x)


def _llamagen(lgvq):
    from lookalikes import llamagen, parts

    model = llamagen.VQModel()
    loss = parts.from_config(lossconfig("lookalikes.llamagen.VQLoss", lgvq))
    if lgvq is not None:
        loss.adopt(model)
    return Script(model, loss)


def _vqvae(lgvq):
    from lgvq_plugin.hosts.vqvae import VQVAE

    loss = lossconfig("lgvq_plugin.hosts.vqvae.VQVAELoss", lgvq)
    return VQVAE(
        lossconfig=loss, n_embed=16, embed_dim=8, channels=8, num_res_blocks=1, downsample=4
    )


def _diffusers(lgvq):
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=16,
    )


def _lucidrains(make_quantizer, **knobs):
    def make(lgvq):
        import vector_quantize_pytorch as vqp

        return plain.Autoencoder(make_quantizer(vqp), **knobs)

    return make


def _in_rows(output):
    return output[0]


def _attached(name, make, read=first, **more):
    more = {"quantizer": "vq", **more}
    return Case(name, make, plain_step, read, attached=True, channel_last=False, **more)


CASES = [
    Case("vqvae", _vqvae, vqvae_step, first),
    Case("taming-0.0.1", taming(), taming_step, first),
    Case("cvq-in-taming", _cvq, taming_step, first),
    Case("latent-diffusion", _latent_diffusion, taming_step, first),
    Case("ibq", _ibq, manual_step, first),
    Case("open-magvit2", _magvit2, manual_step, first),
    Case("vit-vqgan", _vit_vqgan, taming_step, _in_rows, "quantizer", channel_last=False),
    Case("llamagen", _llamagen, llamagen_step, first, "model.quantize", channel_last=False),
    _attached(
        "rosinality-bottom",
        lambda _: plain.VQVAE2(),
        lambda output: output[0].flatten(1, 2),
        quantizer="quantize_b",
        named=False,
    ),
    _attached("cvq", lambda _: plain.Autoencoder(plain.VectorQuantiser(16, 8), place=(0, 1))),
    _attached("diffusers", _diffusers, quantizer="quantize"),
    _attached(
        "VectorQuantize",
        _lucidrains(lambda v: v.VectorQuantize(dim=8, codebook_size=16, accept_image_fmap=True)),
    ),
    _attached(
        "VectorQuantize-rows",
        _lucidrains(lambda v: v.VectorQuantize(dim=8, codebook_size=16, codebook_dim=4), rows=True),
        _in_rows,
    ),
    _attached(
        "ResidualVQ",
        _lucidrains(lambda v: v.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2), rows=True),
        _in_rows,
    ),
    _attached("FSQ", _lucidrains(lambda v: v.FSQ([5, 5, 3], dim=8), place=(0, None))),
    _attached("LFQ", _lucidrains(lambda v: v.LFQ(codebook_size=16, dim=8))),
    _attached(
        "SimVQ",
        _lucidrains(lambda v: v.SimVQ(dim=8, codebook_size=16, channel_first=True)),
    ),
]


class Constant:
    """GumbelVQ wants a schedule of its temperature."""

    def __call__(self, step):
        return 1.0


ROM1504 = [
    Case("VQModel", taming(), taming_step, first),
    Case("VQModel-sane", taming(sane_index_shape=True), taming_step, first),
    Case(
        "GumbelVQ",
        taming("GumbelVQ", temperature_scheduler_config={"target": "lookalikes.cases.Constant"}),
        taming_step,
        first,
    ),
    Case(
        "VQSegmentationModel",
        taming(
            "VQSegmentationModel",
            target="taming.modules.losses.segmentation.BCELossWithQuant",
            params={},
            n_labels=5,
            image_key="segmentation",
            ddconfig={**DDCONFIG, "in_channels": 5, "out_ch": 5},
        ),
        single_step,
        first,
        key="segmentation",
        channels=5,
    ),
]

NEEDS = {
    "taming-0.0.1": "taming",
    "cvq-in-taming": "taming",
    "diffusers": "diffusers",
    **dict.fromkeys(
        ("VectorQuantize", "VectorQuantize-rows", "ResidualVQ", "FSQ", "LFQ", "SimVQ"),
        "vector_quantize_pytorch",
    ),
}


def missing(case):
    """The library that the host lives in, if it is not installed."""
    library = NEEDS.get(case.name)
    is_there = library is None or importlib.util.find_spec(library) is not None
    return None if is_there else library
