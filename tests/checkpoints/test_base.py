"""Comparison with the host, loading, and where a config is found."""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from lgvq_plugin import cli
from lgvq_plugin.checkpoints.load import load_checkpoint, load_host, load_into, sizes_of
from lgvq_plugin.host import encode, reconstruct
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.run import train

IMAGES = torch.rand(2, 3, 16, 16) * 2 - 1


def change(path, **tensors):
    """Save the checkpoint again with some tensors put in or, if None, taken out."""
    content = torch.load(path, weights_only=True)
    for key, value in tensors.items():
        if value is None:
            del content["state_dict"][key]
        else:
            content["state_dict"][key] = value
    torch.save(content, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taming", "vqvae"])
def test_a_loaded_host_is_the_saved_one_bit_identical(old, name):
    config, host, path = old(name)
    loaded = load_host(config, path)
    assert not loaded.training
    assert torch.equal(reconstruct(loaded, IMAGES), reconstruct(host, IMAGES))


def test_without_its_loss_by_default_and_with_it_on_request(old):
    config, host, path = old("taming")
    assert list(load_host(config, path).loss.parameters()) == []
    loss = load_host(config, path, with_loss=True).loss
    for key, value in host.loss.discriminator.state_dict().items():
        assert torch.equal(loss.discriminator.state_dict()[key], value)


def test_the_report_counts(old):
    config, host, path = old("taming")
    report = load_into(build_host(config), load_checkpoint(path))
    assert report.missing == report.unexpected == report.mismatched == ()
    assert set(report.loaded) == set(host.state_dict())
    bare = copy.deepcopy(config)
    bare["model"]["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    report = load_into(build_host(bare), load_checkpoint(path))
    assert all(key.startswith("loss.") for key in report.unexpected)
    assert len(report.loaded) + len(report.unexpected) == len(host.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.conv_in.bias": None}, r"1 missing .*\n.*encoder\.conv_in\.bias"),
        ({"encoder.strange": torch.ones(1)}, r"1 unexpected .*\n.*encoder\.strange"),
        (
            {"decoder.conv_in.bias": torch.ones(3)},
            r"1 of another shape.*\n.*decoder\.conv_in\.bias: \(3,\) then, \(64,\) now",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(old, changes, message):
    config, _, path = old("taming")
    checkpoint = load_checkpoint(change(path, **changes))
    fresh = build_host(config)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        load_into(fresh, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_a_discriminator_of_another_size_is_left_out_and_reported(old):
    config, _, path = old("taming")
    config["model"]["params"]["lossconfig"]["params"]["disc_ndf"] = 16
    report = load_into(build_host(config), load_checkpoint(path))
    assert report.mismatched
    assert all(key.startswith("loss.discriminator.") for key, _, _ in report.mismatched)
    assert "of another shape" in str(report)


def test_a_checkpoint_of_something_else_never_loads(tmp_path, old):
    config, _, _ = old("vqvae")
    torch.save({"state_dict": {"loss.x": torch.ones(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="does not fit VQVAE"):
        load_host(config, tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("n_embed", 32, 16),
        ("embed_dim", 4, 8),
        ("ddconfig.ch", 64, 32),
        ("ddconfig.ch_mult", [1, 2], "[1,2,2]"),
        ("ddconfig.num_res_blocks", 1, 2),
        ("ddconfig.z_channels", 16, 4),
    ],
)
def test_the_error_says_which_key_of_the_config_is_wrong(old, key, wrong, right):
    config, _, path = old("taming")
    given = OmegaConf.create(config)
    OmegaConf.update(given, f"model.params.{key}", wrong)
    with pytest.raises(ConfigError) as raised:
        load_host(given, path)
    assert f"model.params.{key}={right}" in str(raised.value)


def test_sizes_are_read_off_tamings_tensors(old):
    config, host, _ = old("taming")
    params = config["model"]["params"]
    sizes = sizes_of(host.state_dict())
    for name in ("ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch"):
        assert sizes[name] == params["ddconfig"][name]
    assert (sizes["n_embed"], sizes["embed_dim"]) == (params["n_embed"], params["embed_dim"])


def test_the_tokenizer_of_a_transformers_checkpoint(old, tmp_path):
    config, host, _ = old("taming")
    inside = {f"first_stage_model.{key}": value for key, value in host.state_dict().items()}
    torch.save({"state_dict": {**inside, "transformer.w": torch.ones(2)}}, tmp_path / "t.ckpt")
    loaded = load_host(config, tmp_path / "t.ckpt")
    assert torch.equal(reconstruct(loaded, IMAGES), reconstruct(host, IMAGES))


def test_averaged_weights_that_lost_their_dots(old, tmp_path):
    config, host, _ = old("vqvae")
    state = host.state_dict()
    flat = {f"model_ema.{key.replace('.', '')}": value * 2 if value.is_floating_point() else value
            for key, value in state.items()}  # fmt: skip
    torch.save({"state_dict": {**state, **flat}}, tmp_path / "ema.ckpt")
    plain = load_host(config, tmp_path / "ema.ckpt").state_dict()
    averaged = load_host(config, tmp_path / "ema.ckpt", averaged=True).state_dict()
    key = "encoder.conv_out.weight"
    assert torch.equal(plain[key], state[key])
    assert torch.equal(averaged[key], state[key] * 2)
    torch.save({"state_dict": flat}, tmp_path / "only.ckpt")  # nothing but averages: no names
    assert torch.equal(load_host(config, tmp_path / "only.ckpt").state_dict()[key], state[key] * 2)


def test_a_host_that_keeps_its_own_average(old, tmp_path):
    config, _, _ = old("vqvae")
    host = build_host(config)
    host.model_ema = torch.nn.Linear(2, 2)
    torch.save({"state_dict": host.state_dict()}, tmp_path / "x.ckpt")
    other = build_host(config)
    other.model_ema = torch.nn.Linear(2, 2)
    load_into(other, load_checkpoint(tmp_path / "x.ckpt"))
    assert torch.equal(other.model_ema.weight, host.model_ema.weight)


def test_a_host_that_does_not_take_its_weights_is_found_out(old):
    config, _, path = old("vqvae")
    host = build_host(config)
    host.load_state_dict = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="did not take"):
        load_into(host, load_checkpoint(path))


def test_the_config_comes_from_our_own_checkpoint_or_from_its_folder(config, tmp_path):
    run = train(config(), name="run", logdir=tmp_path, progress=False)
    for where in (run.checkpoint, run.folder):
        assert load_checkpoint(where).config["model"] == config()["model"]
        assert torch.equal(
            reconstruct(load_host(None, where), IMAGES), reconstruct(run.host.eval(), IMAGES)
        )
    content = torch.load(run.checkpoint, weights_only=True)
    del content["lgvq_training"]
    torch.save(content, run.checkpoint)
    assert load_checkpoint(run.checkpoint).config["model"] == config()["model"]


def test_the_config_of_tamings_run_folder(old, tmp_path):
    config, host, path = old("taming")
    run = tmp_path / "logs" / "2021-01-01T00-00-00_x"
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    project = {"model": config["model"], "data": {"target": "main.DataModuleFromConfig"}}
    OmegaConf.save(OmegaConf.create(project), run / "configs" / "2021-01-01T00-00-00-project.yaml")
    path.rename(run / "checkpoints" / "last.ckpt")
    loaded = load_host(None, run)
    assert torch.equal(reconstruct(loaded, IMAGES), reconstruct(host, IMAGES))


def test_no_config_at_all(old):
    _, _, path = old()
    with pytest.raises(ConfigError, match="-b CONFIG"):
        load_host(None, path)


def test_the_path_of_a_yaml_file_is_a_config_too(old, tmp_path):
    config, host, path = old()
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    loaded = load_host(tmp_path / "c.yaml", path)
    assert torch.equal(encode(loaded, IMAGES).indices, encode(host, IMAGES).indices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantizer", "codes", "psnr"),
    [
        ("shuffled_model_ema", "ema", (500, 512), 23.0),
        ("shuffled_model", "gradient", (70, 90), 19.5),
    ],
)
def test_foreign_files_on_real_photos(shared, name, quantizer, codes, psnr):
    """SOURCE.txt: 24.56 dB and all 512 codes on CIFAR's own images; 20.34 dB and 85 codes."""
    from lgvq_plugin.datasets.base import collate
    from lgvq_plugin.training.build import build_dataset

    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    model = {
        "learning_rate": 1e-3,
        "target": "lgvq_plugin.hosts.sonnet_vqvae.SonnetVQVAE",
        "params": {"quantizer": quantizer, "lossconfig": loss},
    }
    host = load_host({"model": model}, shared / "vqvae_cifar10_swasun" / f"{name}.pth")
    root = str(shared / "coco_captioned_mini_256")
    photos = build_dataset({"target": "folder", "params": {"root": root, "size": 32}})
    images = collate([photos[i] for i in range(200)])["image"].movedim(-1, 1).float()
    error = (reconstruct(host, images).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    assert float(-10 * error.log10().mean()) == pytest.approx(psnr, abs=0.6)
    used = len(encode(host, images).indices.unique())
    assert codes[0] <= used <= codes[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": None}, "state_dict is a NoneType without tensors"),
        ({"state_dict": "text", "ema": {"a": torch.zeros(1)}}, "state_dict is a str"),
        ({"state_dict": [1, 2]}, "state_dict is a list"),
        ({"epoch": 3}, "no tensors in the checkpoint"),
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        (b"PK\x03\x04", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["export", "eval", "inspect", "retrofit"])
def test_every_command_refuses_a_tampered_file_in_one_line(
    tmp_path, capsys, config, command, content, message
):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    OmegaConf.save(OmegaConf.create(config()), tmp_path / "c.yaml")
    argv = [command, "-b", str(tmp_path / "c.yaml"), "--ckpt", str(path), "-o"]
    argv = argv[:-1] if command == "eval" else [*argv, str(tmp_path / "out")]
    argv += ["--format", "host"] if command == "export" else []
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "bad.ckpt" in shown
    assert len(shown.splitlines()) == 1
    assert "weights_only" not in shown


def test_a_diverged_checkpoint_is_named(old, tmp_path):
    config, host, _ = old("vqvae")
    with torch.no_grad():
        host.encoder.conv_out.weight[0] = torch.nan
    torch.save({"state_dict": host.state_dict()}, tmp_path / "nan.ckpt")
    with pytest.raises(ConfigError, match=r"NaN in encoder \(encoder\.conv_out\.weight\)"):
        load_host(config, tmp_path / "nan.ckpt")


@pytest.mark.parametrize("name", ["taming", "vqvae"])
def test_initial_weights_that_are_no_checkpoint_are_named(config, tmp_path, name):
    path = tmp_path / "no.ckpt"
    whole = config(name)
    whole["model"]["params"]["ckpt_path"] = str(path)
    for content in (b"hello", b"\x80\x02cos\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"no\.ckpt") as raised:
            build_host(whole)
        for advice in ("`weights_only`", "weights_only=", "PyTorch 2.6"):
            assert advice not in str(raised.value)
