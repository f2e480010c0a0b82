"""taming imports, and its LPIPS is built only where it is used."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgvq_plugin import compat
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host

ROOT = Path(__file__).parents[1]

LOSS = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
SMALL = {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8}


def test_taming_imports_and_patching_twice_changes_nothing():
    first = compat.patch()
    from taming.models.vqgan import VQModel

    assert VQModel.__name__ == "VQModel"
    assert compat.patch() == first


def test_a_weight_of_zero_builds_no_network_and_downloads_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    loss = compat.build_loss(LOSS, (), {**SMALL, "perceptual_weight": 0.0})
    assert not list(loss.perceptual_loss.parameters())
    images = torch.rand(1, 3, 16, 16)
    loss.eval()
    with torch.no_grad():
        layer = torch.nn.Parameter(torch.zeros(1))
        value, log = loss(torch.zeros(()), images, 0 * images, 0, 0, last_layer=layer, split="val")
    assert torch.isfinite(value)
    assert log["val/nll_loss"].item() == pytest.approx(images.mean().item(), rel=1e-6)


@pytest.mark.slow
def test_missing_vgg_weights_are_reported_in_full(monkeypatch, tmp_path):
    import torchvision.models._api as api

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(api, "load_state_dict_from_url", offline)
    with pytest.raises(ConfigError) as error:
        compat.build_loss(LOSS, (), SMALL)
    message = str(error.value)
    assert "vgg16-397923af.pth" in message  # which file
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message  # from where
    assert str(tmp_path / "checkpoints") in message  # to where
    assert "perceptual_weight: 0" in message  # which option does without


@pytest.mark.slow
def test_with_vgg_there_lpips_is_torchmetrics_own(monkeypatch, tmp_path):
    """The linear heads taming would download are those in torchmetrics' wheel; no download."""
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS

    vgg = torchvision.models.vgg16(weights=None, init_weights=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    import torchvision.models._api as api

    state = vgg.state_dict()
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda *a, **k: state)
    monkeypatch.chdir(tmp_path)
    loss = compat.build_loss(LOSS, (), SMALL)
    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, use_dropout=True)
    for i, ours in enumerate([loss.perceptual_loss.lin0, loss.perceptual_loss.lin4]):
        head = theirs.lins[[0, 4][i]]
        assert torch.equal(ours.model[-1].weight, head.model[-1].weight)
    assert not (tmp_path / "taming").exists()  # nothing written to the current folder


def test_the_loss_class_is_as_before_afterwards():
    compat.patch()
    import taming.modules.losses.vqperceptual as losses

    before = losses.LPIPS
    compat.build_loss(LOSS, (), {**SMALL, "perceptual_weight": 0.0})
    assert losses.LPIPS is before


def test_wrong_params_are_named():
    with pytest.raises(ConfigError, match="disc_strat"):
        compat.build_loss(LOSS, (), {"disc_strat": 1, "perceptual_weight": 0.0})


def test_a_second_host_meets_vgg_as_the_first_did(monkeypatch):
    """A host's loss is built inside another's context: both once stood in for LPIPS."""
    import taming.modules.losses.vqperceptual as losses

    made = []
    network = losses.LPIPS
    monkeypatch.setattr(network, "__init__", lambda self: made.append(self))
    with compat.lpips_only_if_used(1.0), compat.lpips_only_if_used(1.0):
        losses.LPIPS()
    assert len(made) == 1
    assert losses.LPIPS is network


def python(code, *, path=(), cwd):
    """Run code in a new process, `path` before all else on the path; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    words = [sys.executable, "-c", code]
    shown = subprocess.run(words, capture_output=True, text=True, env=env, cwd=cwd)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.strip()


def test_the_package_itself_imports_nothing(tmp_path):
    code = "import sys, lgvq_plugin; print(*{'torch', 'taming', 'omegaconf'} & {*sys.modules})"
    assert not python(code, cwd=tmp_path)


@pytest.mark.slow
def test_taming_imports_after_the_package(tmp_path):
    code = """
import lgvq_plugin
from taming.models.vqgan import VQModel
from torch._six import string_classes
print(VQModel.__name__, string_classes)
"""
    assert python(code, cwd=tmp_path) == "VQModel (<class 'str'>, <class 'bytes'>)"


def test_what_is_there_is_not_replaced(tmp_path):
    six = tmp_path / "torch_with_six"
    (six / "torch").mkdir(parents=True)
    (six / "torch" / "__init__.py").touch()
    (six / "torch" / "_six.py").write_text("string_classes = 'its own'")
    code = "import lgvq_plugin; from torch._six import string_classes; print(string_classes)"
    assert python(code, path=[six], cwd=tmp_path) == "its own"


def clone(root):
    """A clone as commit 3ba01b2 lays it out: no __init__.py, so that Python prefers a wheel."""
    (root / "taming" / "models").mkdir(parents=True)
    (root / "taming" / "models" / "vqgan.py").write_text("class VQModel: ...\nclass GumbelVQ: ...")
    return root


@pytest.mark.parametrize("order", ["clone first", "wheel first"])
def test_a_clone_on_the_path_is_used_before_a_wheel(tmp_path, order):
    own, wheel = clone(tmp_path / "clone"), tmp_path / "wheels" / "site-packages"
    (wheel / "taming" / "models").mkdir(parents=True)
    for name in ("__init__.py", "models/__init__.py", "models/vqgan.py"):
        (wheel / "taming" / name).touch()
    path = [own, wheel] if order == "clone first" else [wheel, own]
    code = (
        "import lgvq_plugin; from taming.models.vqgan import GumbelVQ; import taming.models.vqgan"
    )
    code += " as used; print(used.__file__)"
    assert python(code, path=path, cwd=tmp_path) == str(own / "taming" / "models" / "vqgan.py")


FOREIGN = {  # how losses come by the network
    "its own module": "from nets_lpips import LPIPS\n",
    "a package": "import lpips_like as lpips\nLPIPS = None\n",
    "torchmetrics' name": "from nets_lpips import LPIPS as LearnedPerceptualImagePatchSimilarity\n",
}
NETWORK = """
from torch import nn
class LPIPS(nn.Module):
    def __init__(self, net="vgg"):
        super().__init__()
        raise OSError("a download of VGG16")
"""
FOREIGN_LOSS = """
import torch
from torch import nn
class Loss(nn.Module):
    def __init__(self, disc_start=0, perceptual_weight={default}):
        super().__init__()
        self.perceptual_loss = {network}(net="vgg").eval()
        self.weight = perceptual_weight
    def forward(self, x, y):
        return (x - y).abs().mean() + self.weight * self.perceptual_loss(x, y).mean()
"""


@pytest.mark.parametrize(
    ("how", "network"),
    [*zip(FOREIGN, ["LPIPS", "lpips.LPIPS", "LearnedPerceptualImagePatchSimilarity"], strict=True)],
)
@pytest.mark.parametrize("by", ["params", "default", "host"])
def test_no_base_loss_builds_lpips_at_weight_0(tmp_path, monkeypatch, how, network, by):
    for name in ("nets_lpips", "lpips_like"):
        (tmp_path / f"{name}.py").write_text(NETWORK)
    default = 0.0 if by == "default" else 1.0
    text = FOREIGN[how] + FOREIGN_LOSS.format(default=default, network=network)
    (tmp_path / "foreign_loss.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nets_lpips", "lpips_like", "foreign_loss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    params = {} if by == "default" else {"perceptual_weight": 0}
    if by == "host":  # without LG-VQ: the loss is built by the host itself
        lossconfig = {"target": "foreign_loss.Loss", "params": params}
        model = {"target": "lgvq_plugin.hosts.vqvae.VQVAE", "learning_rate": 1e-3}
        small = {"n_embed": 4, "embed_dim": 4, "channels": 8, "num_res_blocks": 1}
        loss = build_host({"model": {**model, "params": {**small, "lossconfig": lossconfig}}}).loss
    else:
        loss = compat.build_loss("foreign_loss.Loss", (), params)
    assert not list(loss.parameters())
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert torch.equal(loss(x, y), (x - y).abs().mean())
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, y), loss(x, y))
    with pytest.raises(ConfigError, match="set perceptual_weight: 0"):  # and it is built again
        compat.build_loss("foreign_loss.Loss", (), {"perceptual_weight": 0.5})


def test_latent_diffusion_over_the_wheel_says_where_the_missing_class_is(tmp_path, monkeypatch):
    (tmp_path / "old_ldm.py").write_text(
        "from taming.modules.vqvae.quantize import VectorQuantizer2\nclass VQModel: ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    if hasattr(quantize, "VectorQuantizer2"):
        pytest.skip("this taming has VectorQuantizer2")
    with pytest.raises(ConfigError, match=r"VectorQuantizer2.*git clone https.*PYTHONPATH"):
        build_host({"model": {"target": "old_ldm.VQModel", "learning_rate": 1e-3}})
