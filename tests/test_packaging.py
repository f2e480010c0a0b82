"""Outside the checkout: shipped configs, the wheel, an installation without extras."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lgvq_plugin import shipped
from lgvq_plugin.cli import main
from lgvq_plugin.sockets import ConfigError

ROOT = Path(__file__).parents[1]
EXTRAS = [  # what a plain installation lacks
    *("lightning", "pytorch_lightning", "taming", "tensorboard", "requests"),
    *("torchmetrics", "scipy", "matplotlib", "jinja2"),
]


def test_configs_lists_every_config_with_its_title(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines if line and not line.startswith("Copy")}
    files = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert names == files
    assert any(line.startswith("paper ") and "released code" in line for line in lines)


def test_configs_copies_the_named_ones_and_overwrites_nothing(tmp_path, capsys):
    assert main(["configs", "paper", "ablation/winner.yaml", "-o", str(tmp_path)]) == 0
    copied = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.yaml"))
    assert copied == ["ablation/winner.yaml", "paper.yaml"]
    assert (tmp_path / "paper.yaml").read_bytes() == (ROOT / "configs/paper.yaml").read_bytes()
    (tmp_path / "paper.yaml").write_text("mine")
    assert main(["configs", "-o", str(tmp_path)]) == 2
    assert "use --force" in capsys.readouterr().err
    assert (tmp_path / "paper.yaml").read_text() == "mine"
    assert not (tmp_path / "guide_micro_clip.yaml").exists()
    assert main(["configs", "paper", "-o", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "paper.yaml").read_text() != "mine"


def test_an_unknown_config_is_reported_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="no config 'papers'; did you mean 'paper'"):
        shipped.copy(["papers"], tmp_path)


@pytest.mark.slow
def test_the_loss_needs_no_extra():
    """As in an environment without Lightning, taming, scipy, matplotlib and torchmetrics."""
    code = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
import torch
from torch import nn
import lgvq_plugin
from lgvq_plugin import LGVQLoss

class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
    def forward(self, z):
        indices = torch.cdist(z.flatten(2).mT, self.embedding.weight[None]).argmin(-1)
        codes = self.embedding(indices).mT.view_as(z)
        return z + (codes - z).detach(), indices

class Host(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.encoder, self.quantize = nn.Conv2d(3, 4, 4, 4), Quantizer()
        for name, module in more.items():
            setattr(self, name, module)
    def forward(self, x):
        return self.quantize(self.encoder(x))[0]

host = Host()
handle = lgvq_plugin.attach(host, guide={{"use": "micro_clip"}})
host(torch.rand(2, 3, 16, 16))
handle.loss(["a red square", "a blue ring"])[0].backward()
assert host.encoder.weight.grad.abs().sum() > 0
block = {{"guide": {{"use": "micro_clip"}}}}
host = Host(loss=LGVQLoss(base={{"target": "torch.nn.MSELoss"}}, lgvq=block))
z = host(torch.rand(2, 3, 16, 16))
print(float(host.loss(z, z)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0"


@pytest.mark.slow
def test_the_wheel_trains_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lgvq_plugin", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", tmp_path, source], capture_output=True, text=True
    )
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("pip cannot fetch setuptools to build the wheel (offline?)")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", place, wheel], check=True
    )

    def lgvq(*words):
        environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-P", "-m", "lgvq_plugin", *words]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lgvq("configs", "-o", "configs")
    given = ["configs/vqvae_scenes_64_lgvq.yaml", "configs/guide_micro_clip.yaml"]
    small = ["data.train.params.length=32", "data.validation.params.length=8", "data.batch_size=4"]
    small += ["model.params.channels=16", "training.images_every=null"]
    lgvq("train", "-b", *given, *small, "--max-steps", "2", "--name", "run", "--no-progress")
    assert (tmp_path / "logs/run/checkpoints/last.ckpt").is_file()
