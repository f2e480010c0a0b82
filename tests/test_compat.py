"""taming imports, and its LPIPS is built only where it is used."""

import pytest
import torch

from lgvq_plugin import compat
from lgvq_plugin.sockets import ConfigError

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


def test_missing_vgg_weights_are_told_in_full(monkeypatch, tmp_path):
    import torchvision.models._api as api

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(api, "load_state_dict_from_url", offline)
    with pytest.raises(ConfigError) as error:
        compat.build_loss(LOSS, (), SMALL)
    told = str(error.value)
    assert "vgg16-397923af.pth" in told  # which file
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in told  # from where
    assert str(tmp_path / "checkpoints") in told  # to where
    assert "perceptual_weight: 0" in told  # which option does without


def test_with_vgg_there_lpips_is_torchmetrics_own(monkeypatch, tmp_path):
    """The linear heads taming would download are those in torchmetrics' wheel; no download."""
    import torchvision
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(vgg.state_dict(), folder / compat.VGG_FILE)
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


def test_a_context_within_another_builds_the_true_network():
    """build_host opens one, and so does LGVQLoss when it builds its base."""
    import taming.modules.losses.vqperceptual as module

    with compat.lpips_only_if_used(1.0):
        outer = module.LPIPS.network
        with compat.lpips_only_if_used(1.0):
            assert module.LPIPS.network is outer
        with compat.lpips_only_if_used(0.0):
            assert not list(module.LPIPS().parameters())
    assert module.LPIPS is outer
