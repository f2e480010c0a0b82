"""The VQ-VAE: driven like taming's VQModel, learns, round-trips, and runs foreign weights."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from lgvq_plugin import sockets
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.hosts.vqvae import VQVAE, FiniteScalarQuantizer, VQVAELoss
from lgvq_plugin.sockets import ConfigError

LOSS = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
SMALL = {"n_embed": 32, "embed_dim": 8, "channels": 16, "num_res_blocks": 1, "downsample": 8}


def build(**knobs) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(lossconfig=LOSS, **{**SMALL, **knobs})


def scenes(count: int, size: int = 32) -> torch.Tensor:
    data = Scenes("train", size=size, length=count, channel_first=True)
    return torch.from_numpy(np.stack([data[i]["image"] for i in range(count)]))


def train(model: VQVAE, images: torch.Tensor, steps: int) -> list[float]:
    model.learning_rate = 2e-3
    (optimizer,), schedulers = model.configure_optimizers()
    assert schedulers == []
    losses = []
    for step in range(steps):
        reconstructions, quant_loss = model(model.get_input({"image": images}, "image"))
        last = model.get_last_layer()
        loss, _ = model.loss(
            quant_loss, images, reconstructions, 0, step, last_layer=last, split="train"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# A gradient codebook lags while the encoder's features grow: its quantization loss peaks near
# step 40 (total 0.4 -> 0.7) and is gone by step 80, with and without restart. EMA has no peak.
@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "steps"), [("ema", 40), ("gradient", 100)])
def test_the_loss_falls(quantizer, steps):
    losses = train(build(quantizer=quantizer), scenes(16), steps)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


@pytest.mark.slow
def test_a_patch_stem_learns_colors_sooner():
    images = scenes(16)
    last = [np.mean(train(build(stem=stem), images, 60)[-5:]) for stem in ("patch", "strided")]
    assert last[0] < last[1]


@pytest.mark.parametrize("downsample", [2, 4, 16])
def test_grid_follows_the_factor(downsample):
    model, images = build(downsample=downsample), torch.zeros(2, 3, 32, 48)
    quant, loss, (_, none, indices) = model.encode(images)
    assert model(images)[0].shape == images.shape
    assert quant.shape == (2, 8, 32 // downsample, 48 // downsample)
    assert indices.shape == (2 * 32 * 48 // downsample**2,)
    assert loss.ndim == 0
    assert none is None


def test_decoding_the_indices_gives_the_very_same_image():
    model, images = build(), scenes(4)
    train(model, images, steps=3)
    model.eval()
    indices = model.encode(images)[2][2].view(4, 4, 4)
    assert torch.equal(model.decode(model.quantize.embed_code(indices)), model(images)[0])


def test_checkpoint_round_trip_is_bit_equal(tmp_path):
    model, images = build(), scenes(4)
    train(model, images, steps=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    other = build(ckpt_path=str(tmp_path / "model.ckpt"))
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(other.eval()(images)[0], model.eval()(images)[0])


def test_a_wrong_checkpoint_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        build(ckpt_path=str(tmp_path / "none.ckpt"))
    torch.save(build().state_dict(), tmp_path / "small.ckpt")
    with pytest.raises(ConfigError, match="other sizes"):
        build(n_embed=33, ckpt_path=str(tmp_path / "small.ckpt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "stranger.ckpt")
    with pytest.raises(ConfigError, match="another model"):
        build(ckpt_path=str(tmp_path / "stranger.ckpt"))


def test_the_optimizer_holds_the_tokenizer_and_not_the_loss():
    model = build()
    model.loss.head = nn.Linear(2, 2)
    (optimizer,), _ = model.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in held}
    assert names == {"loss.head.weight", "loss.head.bias"}


def test_a_discriminator_in_the_loss_gets_an_optimizer():
    model = build()
    model.loss.discriminator = nn.Linear(2, 2)
    optimizers, _ = model.configure_optimizers()
    assert optimizers[1].param_groups[0]["params"][0] is model.loss.discriminator.weight


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_images_may_have_their_channels_first_or_last(order):
    images = scenes(2).double()
    got = build().get_input({"picture": images.permute(order)}, "picture")
    assert got.dtype == torch.float32
    assert torch.equal(got, images.float())


@pytest.mark.parametrize(("pixel", "power"), [("l2", 2), ("l1", 1)])
def test_loss_equals_numpy(pixel, power):
    images, reconstructions = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    loss, log = VQVAELoss(codebook_weight=0.5, pixel=pixel)(
        torch.tensor(3.0), images, reconstructions, 0, 0, last_layer=None, split="val"
    )
    wanted = (np.abs(images.numpy() - reconstructions.numpy()) ** power).mean()
    assert float(log["val/rec_loss"]) == pytest.approx(wanted, rel=1e-6)
    assert float(loss) == pytest.approx(wanted + 1.5, rel=1e-6)
    assert log.keys() == {"val/total_loss", "val/rec_loss", "val/quant_loss"}


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"downsample": 6}, "2, 4, 8"),
        ({"channels": 15}, "even"),
        ({"stem": "pach"}, "patch"),
        ({"num_res_blocks": 10**59}, "num_res_blocks must be >= 0 and <= 256"),
        ({"num_res_blocks": -1}, "num_res_blocks must be >= 0"),
    ],
)
def test_a_wrong_knob_is_reported(knobs, words):
    with pytest.raises(ConfigError, match=words):
        build(**knobs)


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_a_wrong_image_is_reported(shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        build().encode(torch.zeros(shape))


def test_short_name():
    assert sockets.resolve("hosts", "vqvae") is VQVAE


def foreign_names(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of swasun/VQ-VAE-Images (van den Oord's layers) as ours."""
    heads = {
        "_encoder._conv_1": "encoder.down.0",
        "_encoder._conv_2": "encoder.down.2",
        "_encoder._conv_3": "encoder.conv_out",
        "_pre_vq_conv": "quant_conv",
        "_vq_vae._embedding": "quantize.embedding",
        "_decoder._conv_1": "decoder.conv_in",
        "_decoder._conv_trans_1": "decoder.up.0",
        "_decoder._conv_trans_2": "decoder.conv_out",
    }
    for name, value in state.items():
        head, _, tail = name.rpartition(".")
        if "_residual_stack" in head:
            side, _, _, block, _, layer = head.split(".")
            head = f"{side[1:]}.blocks.{block}.body.{layer}"
        if "_ema_" not in name:
            yield f"{heads.get(head, head)}.{tail}", value


def test_weights_that_others_trained_reconstruct_here(shared):
    """Another project's CIFAR-10 model, 24.56 dB there: each layer is where it should be."""
    path = shared / "vqvae_cifar10_swasun" / "shuffled_model_ema.pth"
    model = VQVAE(lossconfig=LOSS, downsample=4).eval()
    state = dict(foreign_names(torch.load(path, map_location="cpu", weights_only=True)))
    missing, left_over = model.load_state_dict(state, strict=False)
    assert not left_over
    assert {name.split(".")[0] for name in missing} == {"quantize", "post_quant_conv"}
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True  # theirs, so their skip connections add relu(x)
    nn.init.dirac_(model.post_quant_conv.weight)
    nn.init.zeros_(model.post_quant_conv.bias)
    images = scenes(64)
    with torch.no_grad():
        reconstructions, _ = model(images)
        indices = model.encode(images)[2][2]
    error = (reconstructions.clamp(-1, 1) - images).square().mean((1, 2, 3))
    assert float((10 * torch.log10(4 / error)).mean()) > 20
    assert indices.unique().numel() > 100


def test_a_schedule_of_torchs_is_given_to_lightning_with_the_optimizer():
    config = {"target": "torch.optim.lr_scheduler.CosineAnnealingLR", "params": {"T_max": 10}}
    model = build(scheduler_config=config)
    model.learning_rate = 0.5
    (optimizer,), (schedule,) = model.configure_optimizers()
    scheduler = schedule["scheduler"]
    assert schedule["interval"] == "step"
    for step in range(11):
        rate = 0.25 * (1 + np.cos(np.pi * step / 10))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        scheduler.step()
    with pytest.raises(ConfigError, match=r"lr_scheduler.CosineAnnealingLR: .*Tmax"):
        build(scheduler_config={**config, "params": {"Tmax": 1}}).configure_optimizers()


def test_fsq_equals_a_foreign_implementation():
    foreign = pytest.importorskip("vector_quantize_pytorch").FSQ([8, 5, 5, 5])
    ours = FiniteScalarQuantizer([8, 5, 5, 5])
    z = 2 * torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    codes, loss, (_, _, indices) = ours(mine)
    rows, numbers = foreign(theirs.movedim(1, -1).reshape(4, 15, 4))
    assert torch.equal(indices, numbers.flatten().long())
    assert torch.allclose(codes, rows.reshape(4, 3, 5, 4).movedim(-1, 1), atol=1e-6)
    assert torch.equal(ours.embed_code(indices.view(4, 3, 5)), codes)
    pull = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1))
    (codes * pull).sum().backward()
    (rows.reshape(4, 3, 5, 4).movedim(-1, 1) * pull).sum().backward()
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
    assert loss == 0


@pytest.mark.parametrize("given", [{"quantizer": "fsq"}, {"levels": [5, 5]}])
def test_levels_go_with_fsq_alone(given):
    with pytest.raises(ConfigError, match="levels are for quantizer 'fsq'"):
        VQVAE(lossconfig={"target": "torch.nn.Identity"}, channels=8, **given)
