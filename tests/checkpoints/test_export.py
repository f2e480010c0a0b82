"""What is exported is read by others: bare host, safetensors, diffusers, another run's heads."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from lgvq_plugin.checkpoints import export, pretrained
from lgvq_plugin.checkpoints.load import load_checkpoint, load_host
from lgvq_plugin.checkpoints.retrofit import over_old_loss
from lgvq_plugin.host import encode, reconstruct
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.run import train

IMAGES = torch.rand(2, 3, 16, 16) * 2 - 1
MICRO = {"guide": {"use": "micro_clip"}}


def lgvq_run(config, tmp_path, name, block=None, **training):
    """Train two steps of LG-VQ over a tiny host."""
    whole = config(name, **training)
    whole["model"] = over_old_loss(whole["model"], block or MICRO)
    return whole, train(whole, name="run", logdir=tmp_path, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("taming", marks=pytest.mark.slow), "vqvae"])
def test_the_bare_host_loads_strictly_and_computes_the_same(config, tmp_path, name):
    _, run = lgvq_run(config, tmp_path, name)
    assert (
        export.main(["--ckpt", str(run.folder), "--format", "host", "-o", f"{tmp_path}/h.ckpt"])
        == 0
    )
    content = torch.load(tmp_path / "h.ckpt", weights_only=True)
    assert content["global_step"] == 2
    bare = build_host(config(name))  # the old config: nothing of ours in it
    bare.load_state_dict(content["state_dict"], strict=True)
    assert content["state_dict"].keys() == bare.state_dict().keys()
    trained = run.host.eval()
    assert torch.equal(reconstruct(bare.eval(), IMAGES), reconstruct(trained, IMAGES))
    assert torch.equal(encode(bare, IMAGES).indices, encode(trained, IMAGES).indices)


@pytest.mark.slow
def test_tamings_own_loader_reads_it(config, tmp_path, monkeypatch):
    _, run = lgvq_run(config, tmp_path, "taming")
    export.main(["--ckpt", str(run.folder), "--format", "host", "-o", f"{tmp_path}/h.ckpt"])
    whole = config("taming")
    whole["model"]["params"]["ckpt_path"] = str(tmp_path / "h.ckpt")
    host = build_host(whole).eval()
    assert torch.equal(reconstruct(host, IMAGES), reconstruct(run.host.eval(), IMAGES))


@pytest.mark.slow
def test_averaged_weights_and_safetensors_files(config, tmp_path):
    _, run = lgvq_run(config, tmp_path, "vqvae", ema_decay=0.5)
    out = tmp_path / "h.safetensors"
    export.main(["--ckpt", str(run.checkpoint), "--format", "host", "-o", str(out), "--averaged"])
    wanted = torch.load(run.checkpoint, weights_only=True)["ema_state_dict"]
    found = load_file(out)
    assert found
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert not torch.equal(found["encoder.conv_out.weight"],
                           run.host.state_dict()["encoder.conv_out.weight"])  # fmt: skip
    _, path = config(), tmp_path / "plain.ckpt"
    torch.save({"state_dict": run.host.state_dict()}, path)
    with pytest.raises(ConfigError, match="no averaged weights"):
        export.main(["--ckpt", str(path), "--format", "host", "-o", f"{out}2", "--averaged"])


def test_a_foreign_file_gets_its_own_names_back(shared, tmp_path):
    path = shared / "vqvae_cifar10_swasun" / "shuffled_model_ema.pth"
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    model = {"target": "lgvq_plugin.hosts.sonnet_vqvae.SonnetVQVAE", "params": {"lossconfig": loss}}
    config = {"model": {**model, "learning_rate": 1e-3}}
    found = export.host_state_dict(load_checkpoint(path), config)
    wanted = torch.load(path, map_location="cpu", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("taming", marks=pytest.mark.slow), "vqvae"])
def test_a_saved_folder_comes_back_without_its_loss(config, tmp_path, name):
    whole, run = lgvq_run(config, tmp_path, name)
    out = tmp_path / "saved"
    export.main(["--ckpt", str(run.folder), "--format", "safetensors", "-o", str(out)])
    host = pretrained.from_pretrained(out)
    assert not host.training
    assert torch.equal(reconstruct(host, IMAGES), reconstruct(run.host.eval(), IMAGES))
    assert not any(key.startswith("loss.") for key in load_file(out / "model.safetensors"))
    assert (
        json.loads((out / "config.json").read_text())["model"]["target"] == whole["model"]["target"]
    )
    card = (out / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: lgvq_plugin\n", card)
    assert "micro_clip" in card
    assert "n_embed: 16" in card


def test_the_model_card_tells_the_numbers_beside_the_checkpoint(old, tmp_path):
    config, _, path = old()
    row = {"value": 21.5, "n": 30, "unit": "dB", "higher_is_better": True}
    results = {"metrics": {"reconstruction/psnr": row}}
    (path.parent / "results.json").write_text(json.dumps(results))
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    export.main(["--ckpt", str(path), "--format", "safetensors", "-o", str(tmp_path / "out"),
                 "-b", str(tmp_path / "c.yaml")])  # fmt: skip
    assert "| reconstruction/psnr | 21.5 dB | 30 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_diffusers_computes_the_same(config, old, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusers]")
    whole, host, path = old("taming")
    found = export.export_diffusers(load_checkpoint(path), whole, tmp_path / "d")
    assert max(found["latents"], found["images"]) < 1e-4
    twin = diffusers.VQModel.from_pretrained(tmp_path / "d").eval()
    assert twin.config.block_out_channels == [32, 64, 64]
    assert "Attn" in twin.config.down_block_types[1]
    assert "Attn" in twin.config.up_block_types[1]
    with torch.no_grad():
        # The whole way, quantizer included, against taming's own forward pass.
        assert (twin(IMAGES).sample - host(IMAGES)[0]).abs().max() < 1e-4
        latents = host.quant_conv(host.encoder(IMAGES))
        assert (twin.encode(IMAGES).latents - latents).abs().max() < 1e-4


def test_diffusers_refuses_another_architecture(old):
    config, _, path = old("vqvae")
    with pytest.raises(ConfigError, match="diffusers' VQModel is taming's"):
        export.export_diffusers(load_checkpoint(path), config, "never")


@pytest.mark.slow
def test_a_wrong_diffusers_model_is_not_written(old, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="needs the extra [diffusers]")
    whole, _, path = old("taming")
    right = export.build_diffusers

    def wrong(*args):
        model = right(*args)
        torch.nn.init.ones_(model.decoder.conv_out.bias)
        return model

    monkeypatch.setattr(export, "build_diffusers", wrong)
    with pytest.raises(RuntimeError, match="nothing written"):
        export.export_diffusers(load_checkpoint(path), whole, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_heads_alone_go_to_another_run(config, tmp_path):
    _, run = lgvq_run(config, tmp_path, "vqvae")
    out = tmp_path / "heads"
    export.main(["--ckpt", str(run.folder), "--format", "heads", "-o", str(out)])
    wanted = run.host.loss.alignment.state_dict()
    found = load_file(out / "lgvq_heads.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert json.loads((out / "lgvq_config.json").read_text())["lgvq"] == MICRO
    from lgvq_plugin.host import attach

    other = build_host(config())
    handle = attach(other, **MICRO)
    handle.load_pretrained(out)
    assert all(torch.equal(v, wanted[k]) for k, v in handle.heads.state_dict().items())


@pytest.mark.slow
def test_heads_of_a_diverged_run_are_not_written(config, tmp_path):
    _, run = lgvq_run(config, tmp_path, "vqvae")
    content = torch.load(run.checkpoint, weights_only=True)
    content["state_dict"]["loss.lgvq.code_vit.cls"].fill_(torch.nan)
    torch.save(content, tmp_path / "bad.ckpt")
    out = tmp_path / "heads"
    with pytest.raises(ConfigError, match=r"bad\.ckpt.*code_vit\.cls holds NaN or inf"):
        export.main(["--ckpt", str(tmp_path / "bad.ckpt"), "--format", "heads", "-o", str(out)])
    assert not list(out.glob("*"))


def test_a_checkpoint_without_heads(old, tmp_path):
    _, _, path = old()
    with pytest.raises(ConfigError, match="no heads"):
        export.main(["--ckpt", str(path), "--format", "heads", "-o", str(tmp_path / "x")])


def test_wrong_use(old, tmp_path):
    _, _, path = old()
    with pytest.raises(ConfigError, match="give -b CONFIG"):
        export.main(["--ckpt", str(path), "--format", "safetensors", "-o", str(tmp_path / "x")])
    with pytest.raises(ConfigError, match="--push uploads folders"):
        export.main(["--ckpt", str(path), "--format", "host", "-o", "x", "--push", "me/it"])
    with pytest.raises(ConfigError, match=r"no folder 'nothing'"):
        pretrained.from_pretrained("nothing")


def test_a_failed_upload_leaves_the_folder_and_says_so(old, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"no network.*is complete"):
        pretrained.push_to_hub(tmp_path, "me/it")
    uploaded = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kw: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **kw: uploaded.update(kw)
    )
    pretrained.push_to_hub(tmp_path, "me/it")
    assert uploaded == {"folder_path": tmp_path, "repo_id": "me/it"}


def test_load_host_reads_the_folder_like_any_checkpoint(old, tmp_path):
    config, host, _ = old("vqvae")
    pretrained.save_pretrained(host.state_dict(), config, tmp_path / "s")
    assert torch.equal(
        reconstruct(load_host(None, tmp_path / "s"), IMAGES), reconstruct(host, IMAGES)
    )


@pytest.mark.parametrize("form", ["host", "heads", "safetensors"])
def test_what_is_there_is_kept_without_force(form, tmp_path):
    out = tmp_path / "there"
    kept = out if form == "host" else out / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ConfigError, match="exists already; --force"):
        export.main(["--ckpt", "no.ckpt", "--format", form, "-o", str(out)])
    assert kept.read_text() == "mine"


def test_averages_of_heads_are_left_out_of_the_hosts_file(tmp_path):
    """latent-diffusion's `use_ema` in a run of an earlier version, which averaged the heads."""
    names = ["encoder.weight", "loss.lgvq.code_vit.cls"]
    state = {name: torch.ones(1) for name in names}
    state |= {f"model_ema.{name.replace('.', '')}": torch.ones(1) for name in names}
    torch.save({"state_dict": state | {"model_ema.decay": torch.ones(())}}, tmp_path / "old.ckpt")
    found = export.host_state_dict(load_checkpoint(tmp_path / "old.ckpt"))
    assert found.keys() == {"encoder.weight", "model_ema.encoderweight", "model_ema.decay"}


@pytest.mark.slow
def test_heads_go_to_the_hub_with_a_card_and_become_an_encoder(config, tmp_path, monkeypatch):
    import huggingface_hub

    from lgvq_plugin import Handle

    _, run = lgvq_run(config, tmp_path, "vqvae")
    out, uploaded = tmp_path / "heads", {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kw: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **kw: uploaded.update(kw)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: str(out))
    argv = ["--ckpt", str(run.folder), "--format", "heads", "-o", str(out), "--push", "me/heads"]
    export.main(argv)
    assert uploaded == {"folder_path": out, "repo_id": "me/heads"}
    assert "Handle.from_pretrained" in (out / "README.md").read_text()
    assert json.loads((out / "lgvq_config.json").read_text())["defaults"] == 2
    host = load_host(None, run.checkpoint)
    handle = Handle.from_pretrained(host, "me/heads")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(handle.encode_image(images), run.host.loss.encode_image(images))


@pytest.mark.slow
def test_heads_of_a_run_of_version_01_keep_its_defaults(config, tmp_path):
    block = {**MICRO, "recipe": "corrected_v1"}
    _, run = lgvq_run(config, tmp_path, "vqvae", block)
    content = torch.load(run.checkpoint, weights_only=True)
    del content["state_dict"]["loss.lgvq.first_step"]
    loss = content["lgvq_training"]["config"]["model"]["params"]["lossconfig"]
    del loss["params"]["lgvq"]["recipe"]  # as that version, which had no such name
    torch.save(content, tmp_path / "old.ckpt")
    out = pretrained.save_heads(load_checkpoint(tmp_path / "old.ckpt"), tmp_path / "heads")
    about = json.loads((out / "lgvq_config.json").read_text())
    assert (about["defaults"], about["lgvq"]["recipe"]) == (2, "corrected_v1")
