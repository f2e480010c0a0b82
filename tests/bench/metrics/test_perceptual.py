"""LPIPS: the published value of torchmetrics and the stored ones, with SqueezeNet from a file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lgvq_plugin.bench.metrics.perceptual import PerceptualDistance, file_hash, read_weights
from lgvq_plugin.sockets import ConfigError

WEIGHTS = "squeezenet1_1_features_fp32.npz"


@pytest.fixture
def folder(shared):
    return shared / "lpips_squeeze_real"


@pytest.fixture
def squeeze(folder):
    return PerceptualDistance("squeeze", folder / WEIGHTS)


def picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_the_value_that_torchmetrics_documents(squeeze):
    torch.manual_seed(123)
    first, second = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    # Ours rounds to 8 bits first, so the network is asked for the documented value itself too.
    assert float(squeeze.network(first, second).mean()) == pytest.approx(0.1008, abs=5e-5)
    squeeze.update(first, second)
    assert float(squeeze.compute()["lpips_squeeze"]) == pytest.approx(0.1008, abs=3e-4)


@pytest.mark.parametrize(("name", "key"), [("p0", "ex_ref vs ex_p0"), ("p1", "ex_ref vs ex_p1")])
def test_the_stored_values_of_real_pictures(squeeze, folder, name, key):
    expected = json.loads((folder / "expected.json").read_text())[key]
    pair = picture(folder / "ex_ref.png"), picture(folder / f"ex_{name}.png")
    assert float(squeeze.distances(*pair)) == pytest.approx(expected, abs=1e-5)


def test_splits_and_identity(squeeze):
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    squeeze.update(images[:3], images[:3].flip(3))
    squeeze.update(images[3:], images[3:].flip(3))
    whole = squeeze.distances(images, images.flip(3)).double().mean()
    assert float(squeeze.compute()["lpips_squeeze"]) == pytest.approx(float(whole), rel=1e-6)
    assert float(squeeze.distances(images, images).abs().max()) == 0


def test_the_settings_tell_the_weights(squeeze, folder):
    assert squeeze.settings["weights"] == file_hash(folder / WEIGHTS)
    assert squeeze.settings["quantization"] == "uint8"


def test_weights_as_torch_and_safetensors_files(folder, tmp_path):
    from safetensors.torch import save_file

    weights = read_weights(folder / WEIGHTS)
    torch.save(weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        got = read_weights(tmp_path / name)
        assert all(torch.equal(got[key], value) for key, value in weights.items())


@pytest.mark.slow
def test_wrong_weights_are_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no net 'squeez'.*squeeze"):
        PerceptualDistance("squeez")
    with pytest.raises(ConfigError, match="no file"):
        PerceptualDistance("squeeze", tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"no vgg16 of torchvision: features\.\d+\.weight"):
        PerceptualDistance("vgg", folder / WEIGHTS)
    (tmp_path / "bad.pth").write_bytes(b"text")
    with pytest.raises(ConfigError, match="cannot be read"):
        PerceptualDistance("alex", tmp_path / "bad.pth")
    torch.save({"state_dict": [1]}, tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no state dict"):
        PerceptualDistance("alex", tmp_path / "list.pth")


@pytest.mark.slow
@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.extended)])
def test_every_net_takes_torchvisions_own_keys(net, tmp_path):
    import torchvision

    from lgvq_plugin.bench.metrics.perceptual import NETS

    model = getattr(torchvision.models, NETS[net])(weights=None)
    torch.save(model.features.state_dict(prefix="features."), tmp_path / "w.pth")
    del model
    metric = PerceptualDistance(net, tmp_path / "w.pth")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert float(metric.distances(images, images)) == 0
    assert float(metric.distances(images, -images)) > 0
