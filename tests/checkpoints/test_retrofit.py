"""Old checkpoint in, LG-VQ run out; before the first step nothing of the host has changed."""

import copy
import csv
import json

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from lgvq_plugin import cli
from lgvq_plugin.checkpoints.load import load_checkpoint
from lgvq_plugin.checkpoints.retrofit import (
    _first_images,
    compare_hosts,
    over_old_loss,
    presets,
    require_same,
    retrofit,
    shift_discriminator,
    warnings_of,
)
from lgvq_plugin.checkpoints.retrofit import main as retrofit_main
from lgvq_plugin.host import reconstruct
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training import run as training_run
from lgvq_plugin.training.build import build_dataset, build_host
from lgvq_plugin.training.config import lgvq_block, read_config
from lgvq_plugin.training.driver import HostDriver

IMAGES = torch.rand(2, 3, 16, 16) * 2 - 1
LOSS = "model.params.lossconfig.params"
MICRO = {"guide": {"use": "micro_clip"}}
ROUGH = {"max_learning_rate": None, "warmup_steps": 0, "log_every": 1}


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "lgvq_plugin.LGVQLoss"),
        ("my.losses.Loss", "lgvq_plugin.over.my.losses.Loss"),
        ("lgvq_plugin.over.my.losses.Loss", "lgvq_plugin.over.my.losses.Loss"),
        ("lgvq_plugin.LGVQLoss", "lgvq_plugin.LGVQLoss"),
        (
            "lgvq_plugin.hosts.vqvae.VQVAELoss",
            "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
        ),
    ],
)
@pytest.mark.parametrize("key", ["lossconfig", "loss"])
def test_one_line_of_the_old_config_changes(key, target, wanted):
    inner = {"disc_start": 3, "lgvq": {"ramp": 5, "code_vit": {"depth": 1}}}
    old = {"target": "m.C", "params": {key: {"target": target, "params": inner}, "ckpt_path": "x"}}
    before = copy.deepcopy(old)
    new = over_old_loss(old, {"start": 2, "code_vit": {"heads": 2}})
    assert old == before
    assert new["params"][key]["target"] == wanted
    block = {"ramp": 5, "start": 2, "code_vit": {"depth": 1, "heads": 2}}
    assert new["params"][key]["params"] == {"disc_start": 3, "lgvq": block}
    assert "ckpt_path" not in new["params"]


def test_a_wrong_option_or_no_loss_is_refused():
    model = {"target": "m.C", "params": {"lossconfig": {"target": "a.B"}}}
    with pytest.raises(ConfigError, match=r"unknown key lgvq\.rmap; did you mean 'ramp'"):
        over_old_loss(model, {"rmap": 3})
    with pytest.raises(ConfigError, match="no loss to put LG-VQ over"):
        over_old_loss({"target": "m.C"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("taming", marks=pytest.mark.extended), "vqvae"])
def test_before_the_first_step_the_host_is_the_old_one_bit_identical(
    old, tmp_path, monkeypatch, name
):
    config, host, path = old(name)
    seen = []
    first = HostDriver.on_train_start

    def look(self):
        mode = self.host.training
        seen.append(reconstruct(self.host.eval(), IMAGES))
        self.host.train(mode)
        first(self)

    monkeypatch.setattr(HostDriver, "on_train_start", look)
    config["lgvq"] = MICRO
    result = retrofit(config, load_checkpoint(path), tmp_path / "new", progress=False)
    assert torch.equal(seen[0], reconstruct(host, IMAGES))
    assert not torch.equal(reconstruct(result.run.host, IMAGES), seen[0])  # and then it learns
    assert result.loaded is not None
    assert result.loaded.missing == ()
    assert all(key.startswith("loss.lgvq.") for key in result.loaded.new_heads)
    assert set(result.loaded.loaded) == set(host.state_dict())  # the discriminator's too


def test_a_host_that_differs_in_one_bit_is_found_out(old):
    _, host, _ = old()
    other = copy.deepcopy(host)
    require_same(host, other, IMAGES)
    with torch.no_grad():
        other.decoder.conv_out.bias[0] = torch.nextafter(
            other.decoder.conv_out.bias[0], torch.tensor(9.0)
        )
    other.train()
    with pytest.raises(RuntimeError, match="does not reconstruct as the old one does"):
        require_same(host, other, IMAGES)
    assert other.training


@pytest.mark.parametrize(("step", "wanted"), [(0, 100), (40, 60), (500, 0)])
def test_the_discriminator_starts_when_the_old_run_would_have_started_it(old, step, wanted):
    config, _, path = old("taming", global_step=step)
    model = over_old_loss(config["model"])
    model["params"]["lossconfig"]["params"]["disc_start"] = 100
    shift_discriminator(model, load_checkpoint(path))
    assert model["params"]["lossconfig"]["params"]["disc_start"] == wanted


@pytest.mark.slow
def test_the_command(old, tmp_path, capsys):
    config, host, path = old("vqvae")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "old.yaml")
    out = tmp_path / "runs" / "new"
    argv = ["retrofit", "-b", str(tmp_path / "old.yaml"), "--ckpt", str(path), "-o", str(out)]
    argv += ["lgvq.guide.use=micro_clip", "lgvq.ramp=2", "training.max_steps=4", "--no-progress"]
    argv += ["--freeze", "decoder,codebook", "--heads-first", "2"]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    for metric in ("reconstruction/psnr", "reconstruction/ssim", "codebook/usage", "retrieval/"):
        assert f"| {metric}" in table
    assert table.strip() in (out / "retrofit.md").read_text()
    message = json.loads((out / "retrofit.json").read_text())
    assert message["loaded"]["tensors"] == len(host.state_dict())
    assert message["steps"] == 4
    row = message["metrics"]["reconstruction/psnr"]
    assert row["difference"] == pytest.approx(row["new"] - row["old"])
    assert row["n"] == 30
    new = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in host.state_dict().items():
        if key.startswith(("decoder.", "post_quant_conv.", "quantize.")):
            assert torch.equal(new[key], value), key
    assert not torch.equal(new["encoder.conv_out.weight"],
                           host.state_dict()["encoder.conv_out.weight"])  # fmt: skip
    assert (out / "configs" / "merged.yaml").is_file()
    with (out / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "4"]
    # Again: the folder holds a run; going on with a finished one only compares.
    assert cli.main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*argv, "--resume", "auto"]) == 0


@pytest.mark.slow
def test_a_control_is_trained_on_with_the_old_loss(old, tmp_path):
    config, host, path = old("vqvae")
    config["lgvq"] = {**MICRO, "objectives": {"global_semantic": {"weight": 30.0}}}
    config["training"]["heads_first"] = 1
    out = tmp_path / "new"
    result = retrofit(config, load_checkpoint(path), out, control=True, progress=False)
    by_hand = copy.deepcopy(config)
    del by_hand["lgvq"], by_hand["training"]["heads_first"]
    by_hand["training"] |= {"max_learning_rate": 1e-4, "warmup_steps": 100}
    start = host.state_dict()
    reference = training_run.train(
        by_hand,
        name="by_hand",
        logdir=tmp_path,
        progress=False,
        prepare=lambda fresh: fresh.load_state_dict(start),
    ).host.state_dict()
    content = torch.load(out / "control" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == reference.keys()
    assert all(torch.equal(content["state_dict"][key], reference[key]) for key in reference)
    row = result.rows["reconstruction/psnr"]
    assert row["gain"] == pytest.approx(row["new"] - row["control"])
    assert row["control"] != row["old"]
    assert "| new - control |" in (out / "retrofit.md").read_text()


@pytest.mark.slow
def test_heads_of_another_run_are_taken(old, tmp_path):
    from lgvq_plugin.checkpoints.pretrained import save_heads

    config, _, path = old("vqvae")
    config["lgvq"] = {**MICRO, "every": 1}
    first = retrofit(config, load_checkpoint(path), tmp_path / "first", progress=False)
    heads = save_heads(load_checkpoint(first.run.checkpoint), tmp_path / "heads")
    wanted = first.run.host.loss.alignment.state_dict()
    config["training"] |= {"max_steps": 1}
    config["model"]["learning_rate"] = 1e-30  # the one step moves nothing
    second = retrofit(
        config, load_checkpoint(path), tmp_path / "second", heads=heads, progress=False
    )
    found = second.run.host.loss.alignment.state_dict()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "largest"),
    [({"log_every": 1}, 1e-4 * 3 / 101), pytest.param(ROUGH, 2e-3, marks=pytest.mark.extended)],
)
def test_cold_moments_do_not_ruin_a_good_checkpoint(old, tmp_path, settings, largest):
    """Adam's first steps move each weight by a learning rate, 1e-3 here, whatever its gradient."""
    config, host, path = old("vqvae")
    config["lgvq"] = MICRO
    config["training"] |= settings
    out = tmp_path / "new"
    new = retrofit(config, load_checkpoint(path), out, control=True, progress=False).run.host
    control = torch.load(out / "control/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for state in (new.state_dict(), control):
        moved = max(
            float((state[key] - value).abs().max())
            for key, value in host.state_dict().items()
            if key.startswith(("encoder.", "decoder."))  # codes move by restarts as well
        )
        assert largest / 3 < moved < largest * 1.01
    with (out / "metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file)]
    assert sum(rates) == pytest.approx(largest)


def test_the_report_says_that_the_control_fell_too():
    row = {"old": 19.6, "new": 6.6, "control": 6.5}
    for change, message in [
        ({}, ["and to 6.50 dB in the control", "not the text", "training.warmup_steps"]),
        ({"control": 19.5}, ["it is 19.50 dB in the control", "lgvq.gradient_ratio"]),
    ]:
        (line,) = warnings_of({"reconstruction/psnr": row | change})
        assert all(part in line for part in message)
    assert warnings_of({"reconstruction/psnr": {"old": 19.6, "new": 19.5}}) == []
    assert "--control" in warnings_of({"reconstruction/psnr": {"old": 19.6, "new": 6.5}})[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--freeze", "encodr"], "training.freeze must be a list of some of encoder"),
        (["training.freeze=[encodr]"], "training.freeze must be a list of some of encoder"),
        (["--heads", "nope"], "no heads at 'nope'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(
    old, tmp_path, capsys, monkeypatch, words, message
):
    config, _, path = old("vqvae")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "old.yaml")
    for module in ("checkpoints.retrofit.build_parts", "checkpoints.load.build_host"):
        monkeypatch.setattr(f"lgvq_plugin.{module}", lambda *_: pytest.fail("built"))
    argv = ["retrofit", "-b", str(tmp_path / "old.yaml"), "--ckpt", str(path)]
    assert cli.main([*argv, "-o", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("is_first", [True, False])
def test_images_may_have_any_number_of_channels_first_or_last(channels, is_first):
    params = {"channels": channels, "channel_first": is_first, "length": 3, "size": 16}
    section = {"target": f"{__name__}.Gray", "params": params}
    host = torch.nn.Module()
    host.weight = torch.nn.Parameter(torch.zeros(1))
    host.forward = lambda x: x.clamp(-0.5, 0.5)
    images = _first_images(section, 2)
    assert images.shape == (2, channels, 16, 16)
    assert images.is_contiguous()
    hosts = {"old": host, "new": host}
    rows = compare_hosts(hosts, {"train": section, "test": section}, guide=None)
    given = ((Gray(**params).images + 1) * 127.5).round() / 127.5 - 1
    error = (given - given.clamp(-0.5, 0.5)).square().mean() / 4
    assert rows["reconstruction/psnr"]["old"] == pytest.approx(float(-10 * error.log10()), abs=0.2)


class Gray(torch.utils.data.Dataset):
    """Noise of any number of channels."""

    def __init__(self, channels, channel_first, length, size):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(length, channels, size, size, generator=generator) * 2 - 1
        self.channel_first = channel_first

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return {"image": image if self.channel_first else image.movedim(0, -1)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "OLD", "-b", "CONFIG", "--heads-first", "50"], "leaves none of training.max_"),
        (["--ckpt", "nothing.ckpt"], "no checkpoint 'nothing.ckpt'"),
        (["--ckpt", "OLD", "-b", "CONFIG", "model.params.n_embed=8"], "model.params.n_embed=16"),
        (["--ckpt", "OLD"], "give -b CONFIG"),
        (["--ckpt", "OLD", "-b", "CONFIG", "--freeze", "encodr"], "training.freeze must be"),
        (["--ckpt", "OLD", "-b", "CONFIG", "lgvq.gide.use=x"], "did you mean 'guide'"),
    ],
)
def test_wrong_input_ends_in_one_message(old, tmp_path, capsys, words, message):
    config, _, path = old("vqvae")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "old.yaml")
    there = {"OLD": str(path), "CONFIG": str(tmp_path / "old.yaml")}
    argv = [there.get(word, word) for word in words]
    assert cli.main(["retrofit", "-o", str(tmp_path / "new"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_the_comparison_against_float64_by_hand(old, config):
    _, host, _ = old("vqvae")
    torch.manual_seed(5)
    other = build_host(config("vqvae")).eval()
    section = config()["data"]["validation"]
    rows = compare_hosts(
        {"old": host, "new": other},
        {"train": section, "test": section},
        guide=None,
        batch_size=3,
        max_images=10,
    )
    data = build_dataset(section)
    images = torch.stack([torch.as_tensor(data[i]["image"]) for i in range(10)]).movedim(-1, 1)
    values = {}
    for name, one in (("old", host), ("new", other)):
        shown = ((reconstruct(one, images).double() + 1) * 127.5).round().clamp(0, 255)
        given = ((images.double() + 1) * 127.5).round().clamp(0, 255)
        error = (shown - given).square().mean(dim=(1, 2, 3)) / 255**2
        values[name] = -10 * error.log10()
        assert rows["reconstruction/psnr"][name] == pytest.approx(
            float(values[name].mean()), abs=1e-3
        )
    gap = values["new"] - values["old"]
    width = 1.96 * float(gap.std()) / 10**0.5
    assert rows["reconstruction/psnr"]["half_width"] == pytest.approx(width, rel=1e-3)
    used = len(host.encode(images)[2][2].unique()) / 16
    assert rows["codebook/usage"]["old"] == pytest.approx(used)
    assert not any(name.startswith("retrieval/") for name in rows)


@pytest.mark.slow
@pytest.mark.extended
def test_a_collapsed_foreign_model_uses_more_codes_after_a_retrofit(shared, tmp_path):
    """85 of 512 codes in use before; real photos of COCO at 32 x 32.

    So few steps spread the codes; the decoder needs more of them to make up for it.
    """
    photos = {"root": str(shared / "coco_captioned_mini_256"), "size": 32}
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss", "params": {"codebook_weight": 0.06}}
    config = {
        "model": {
            "learning_rate": 1e-3,
            "target": "lgvq_plugin.hosts.sonnet_vqvae.SonnetVQVAE",
            "params": {"lossconfig": loss, "quantizer": "gradient", "dead_threshold": 0.25},
        },
        "data": {
            "batch_size": 32,
            "train": {"target": "folder", "params": {**photos, "split": "train"}},
            "validation": {"target": "folder", "params": {**photos, "split": "validation"}},
        },
        "training": {"max_steps": 100, "accelerator": "cpu", "val_every": None,
                     "images_every": None, "checkpoint_every": None},
        "lgvq": MICRO,
    }  # fmt: skip
    path = shared / "vqvae_cifar10_swasun" / "shuffled_model.pth"
    rows = retrofit(config, load_checkpoint(path), tmp_path / "new", progress=False).rows
    assert rows["codebook/usage"]["old"] < 0.2
    assert rows["codebook/usage"]["new"] > 2 * rows["codebook/usage"]["old"]
    assert rows["codebook/perplexity"]["new"] > 2 * rows["codebook/perplexity"]["old"]


@pytest.mark.slow
def test_heads_alone_give_an_old_tokenizer_semantics_and_leave_it_as_it_is(old, tmp_path):
    config, host, path = old("vqvae")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "lgvq": MICRO}))
    argv = ["-b", tmp_path / "c.yaml", "--ckpt", path, "-o", tmp_path / "new", "--no-progress"]
    retrofit_main([*map(str, argv), "--train", "heads", "--images", "4"])
    new = load_checkpoint(tmp_path / "new").state_dict
    before = host.state_dict()
    assert all(torch.equal(new[key], value) for key, value in before.items())
    heads = {key for key in new if key.startswith("loss.lgvq.")}
    assert "loss.lgvq.objectives.global_semantic.log_temperature" in heads
    config = load_checkpoint(tmp_path / "new").config
    assert lgvq_block(config)["stop"] is None
    with pytest.raises(ConfigError, match="--control continues with the old loss"):
        retrofit_main([*map(str, argv), "--train", "heads", "--control"])


PUBLISHED = {  # codes, width of a code, downsampling factor, as in the authors' tables of models
    "taming-f16-1024": (1024, 256, 16),
    "taming-f16-16384": (16384, 256, 16),
    "ldm-vq-f4": (8192, 3, 4),
    "ldm-vq-f8": (16384, 4, 8),
    "ldm-vq-f16": (16384, 8, 16),
}


def test_an_unknown_preset_is_named(tmp_path, capsys):
    elsewhere = {"llamagen-vq16", "llamagen-vq8", "diffusers-vq"}  # see the file beside this one
    assert {*presets()} == {*PUBLISHED} | elsewhere
    words = ["--preset", "ldm-vq-f44", "--ckpt", str(tmp_path), "-o", str(tmp_path / "o")]
    (tmp_path / "last.ckpt").touch()
    assert cli.main(["retrofit", *words]) == 2
    assert "--preset: no 'ldm-vq-f44'; did you mean 'ldm-vq-f4'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_builds_the_published_tokenizer(name):
    with torch.device("meta"):
        host = build_host(read_config([presets()[name]], [f"{LOSS}.perceptual_weight=0"]))
    codes, width, factor = PUBLISHED[name]
    assert host.quantize.embedding.weight.shape == (codes, width)
    latent = host.quant_conv(host.encoder(torch.empty(1, 3, 256, 256, device="meta")))
    assert latent.shape == (1, width, 256 // factor, 256 // factor)


@pytest.mark.slow
def test_a_file_of_the_generator_alone_is_retrofitted_by_its_preset(tmp_path, capsys):
    """With the keys of the published file, but narrower and with eight codes, to be quick."""
    sizes = ["ddconfig.ch=32", "ddconfig.resolution=32", "n_embed=8"]
    sizes = [f"model.params.{size}" for size in sizes] + [f"{LOSS}.perceptual_weight=0"]
    host = build_host(read_config([presets()["ldm-vq-f4"]], sizes)).eval()
    state = {k: v for k, v in host.state_dict().items() if not k.startswith("loss.")}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 90, 200)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a plain picture number {i}")
    words = [
        "--ckpt",
        str(tmp_path / "model.ckpt"),
        "-o",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
    ]
    words += [
        "--data",
        str(pictures),
        "--images",
        "2",
        "--no-progress",
        "lgvq.guide.use=micro_clip",
    ]
    words += [*sizes, "data.batch_size=2", "data.num_workers=0"]
    assert cli.main(["retrofit", "--preset", "ldm-vq-f4", *words]) == 0
    assert "psnr" in capsys.readouterr().out.lower()
    exported = tmp_path / "back.ckpt"
    words = ["--ckpt", str(tmp_path / "run"), "--format", "host", "-o", str(exported)]
    assert cli.main(["export", *words]) == 0
    back = torch.load(exported, weights_only=True)["state_dict"]
    assert {key for key in back if not key.startswith("loss.")} == state.keys()
    host.load_state_dict(back)  # strictly, into the original class
