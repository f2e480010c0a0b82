"""--train lora: adapters that start as nothing, train alone, and end inside the old weights."""

import pytest
import torch
import yaml

from lgvq_plugin import cli
from lgvq_plugin.checkpoints.load import load_checkpoint
from lgvq_plugin.checkpoints.retrofit import retrofit
from lgvq_plugin.host import reconstruct
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.driver import HostDriver
from lgvq_plugin.training.lora import inject
from lgvq_plugin.training.settings import TrainingConfig

pytest.importorskip("peft", reason="peft is not installed")
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
EXTENDED = (pytest.mark.slow, pytest.mark.extended)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", pytest.param("taming", marks=EXTENDED)])
def test_only_adapters_and_heads_learn_and_the_export_is_the_trained_model(
    old, tmp_path, monkeypatch, name
):
    config, host, path = old(name)
    config["lgvq"] = {"guide": {"use": "micro_clip"}}
    config["training"] |= {"max_steps": 4, "warmup_steps": 0, "max_learning_rate": 1e-2}
    config["training"]["lora"] = {"rank": 2}
    config["model"]["learning_rate"] = 1e-2
    seen, first = {}, HostDriver.on_train_start

    def look(self):
        modes = {part: part.training for part in self.host.modules()}
        seen["images"] = reconstruct(self.host.eval(), IMAGES)
        seen["state"] = {key: value.clone() for key, value in self.host.state_dict().items()}
        for part, mode in modes.items():
            part.training = mode
        first(self)

    monkeypatch.setattr(HostDriver, "on_train_start", look)
    result = retrofit(config, load_checkpoint(path), tmp_path / "new", progress=False)
    before = host.state_dict()
    assert torch.equal(seen["images"], reconstruct(host, IMAGES))
    after = result.run.host.eval().state_dict()
    moved = {key for key, value in seen["state"].items() if not torch.equal(after[key], value)}
    adapters = {key for key in after if ".lora_" in key}
    assert {key.partition(".")[0] for key in adapters} == {"encoder", "decoder"}
    assert moved >= {key for key in adapters if ".lora_B." in key}
    others = {key for key in moved - adapters if not key.startswith("loss.")}
    assert others == set()  # the codebook, the 1 x 1 convolutions and all old weights
    assert any(key.startswith("loss.lgvq.code_vit.") for key in moved)

    exported = tmp_path / "back.ckpt"
    words = ["--ckpt", str(tmp_path / "new"), "--format", "host", "-o", str(exported)]
    assert cli.main(["export", *words]) == 0
    back = torch.load(exported, weights_only=True)["state_dict"]
    original = build_host(config).eval()
    original.load_state_dict(back)  # strictly
    wanted = reconstruct(result.run.host, IMAGES)
    assert (reconstruct(original, IMAGES) - wanted).abs().max() < 1e-5
    assert (wanted - seen["images"]).abs().max() > 1e-3
    assert back.keys() == before.keys()


@pytest.mark.slow
def test_a_run_with_adapters_resumes_to_the_bit(old, tmp_path):
    config, _, path = old("vqvae")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({**config, "lgvq": {"guide": {"use": "micro_clip"}}})
    )
    words = ["-b", str(tmp_path / "c.yaml"), "--ckpt", str(path), "--no-progress", "--images", "4"]
    words += ["--train", "lora", "training.lora.parts=[decoder]", "training.checkpoint_every=1"]
    runs = [tmp_path / "whole", tmp_path / "parts"]
    for folder, steps in ((runs[0], "2"), (runs[1], "1"), (runs[1], "2")):
        again = ["--resume", "auto"] if folder.is_dir() else []
        more = ["-o", str(folder), "--max-steps", steps, *again]
        assert cli.main(["retrofit", *words, *more]) == 0
    files = [folder / "checkpoints/last.ckpt" for folder in runs]
    whole, parts = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    adapters = [key for key in whole if ".lora_" in key]
    assert adapters
    assert all(key.startswith("decoder.") for key in adapters)
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_targets_and_rank_choose_the_adapters_and_torch_s_generator_stays(old):
    _, host, _ = old("taming")
    state = torch.get_rng_state()
    lora = {"rank": 3, "alpha": 6, "parts": ["decoder"], "targets": ["conv1"]}
    added = inject(host, lora, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    layers = {name for name, _ in host.named_parameters() if ".lora_A." in name}
    assert layers
    assert all(name.startswith("decoder.") and ".conv1.lora_A" in name for name in layers)
    assert {p.shape[0] for name, p in host.named_parameters() if name in layers} == {3}
    assert len(added) == 2 * len(layers)
    assert all(p.requires_grad for p in host.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rnak": 4}, r"training\.lora: no key 'rnak'; did you mean 'rank'"),
        ({"rank": 0}, r"training\.lora\.rank must be a whole number > 0"),
        ({"parts": ["codebook"]}, r"training\.lora\.parts must be a list of encoder, decoder"),
        ({"targets": "conv"}, r"training\.lora\.targets must be a list"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(max_steps=1, lora=given)


def test_a_part_without_such_layers_and_a_contradiction_are_refused(old, tmp_path):
    config, host, path = old("vqvae")
    with pytest.raises(ConfigError, match=r"no \['convX'\] in its 'encoder'"):
        inject(host, {"targets": ["convX"]}, seed=0)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["-b", str(tmp_path / "c.yaml"), "--ckpt", str(path), "-o", str(tmp_path / "new")]
    for train, more in (("decoder", "training.lora.rank=2"), ("lora", "training.freeze=[decoder]")):
        assert cli.main(["retrofit", *words, "--train", train, more]) == 2
    assert not (tmp_path / "new").exists()


def test_without_peft_the_extra_is_named(old, monkeypatch):
    _, host, _ = old("vqvae")
    monkeypatch.setattr("lgvq_plugin.training.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lgvq_plugin\[lora\]'"):
        inject(host, {}, seed=0)
