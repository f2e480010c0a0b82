"""Frechet distance: the closed form in float64, and names that never call another net FID."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from lgvq_plugin.bench.metrics.frechet import INCEPTION, FrechetDistance
from lgvq_plugin.sockets import ConfigError


class Means(nn.Module):
    """Mean of each channel of each quarter, (B, 12)."""

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


def images(count, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1) * scale


def closed_form(reals, others):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), by scipy's matrix root."""
    features = []
    for x in (reals, others):
        pixels = np.clip(np.rint((x.double().numpy() + 1) * 127.5), 0, 255)
        quarters = pixels.reshape(len(x), 3, 2, 4, 2, 4).mean((3, 5))
        features.append(quarters.reshape(len(x), 12))
    (m1, s1), (m2, s2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


def test_equals_the_closed_form_however_split():
    reals, others = images(50, 0), images(60, 1, 0.7)
    distance = FrechetDistance(Means(), name="means")
    for part in reals.split(17):
        distance.update(part, real=True)
    for part in others.split(23):
        distance.update(part, real=False)
    assert distance.counts == (50, 60)
    assert distance.compute() == pytest.approx(closed_form(reals, others), rel=1e-5)


def test_another_net_is_never_called_fid(shared):
    assert FrechetDistance(Means()).name == "fd_Means"
    weights = shared / "lpips_squeeze_real" / "squeezenet1_1_features_fp32.npz"
    squeeze = FrechetDistance("squeeze", weights=weights)
    assert squeeze.name == "fd_squeeze"
    reals = images(12, 0)
    squeeze.update(nn.functional.interpolate(reals, 64), real=True)
    squeeze.update(nn.functional.interpolate(reals, 64), real=False)
    assert squeeze.compute() == pytest.approx(0, abs=1e-3)
    assert len(squeeze.settings["weights"]) == 16


def test_a_factory_by_dotted_path():
    assert FrechetDistance("torch.nn:Flatten").name == "fd_Flatten"


@pytest.mark.slow
@pytest.mark.extended
def test_fid_is_torchmetrics_inception(tmp_path):
    """With random weights in a file of Inception's layout: equals torchmetrics' own call."""
    extractor = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="needs torch-fidelity: the extra eval",
    )
    from torchmetrics.image.fid import FrechetInceptionDistance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        (tmp_path / "any").touch()
        net = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["64"], tmp_path / "any")
    path = tmp_path / INCEPTION
    torch.save(net.state_dict(), path)
    ours = FrechetDistance("inception", weights=path)
    theirs = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path))
    theirs.set_dtype(torch.float64)
    for seed, real in ((0, True), (1, False)):
        x = images(3, seed)
        ours.update(x, real=real)
        theirs.update(((x + 1) * 127.5).round().to(torch.uint8), real=real)
    assert ours.name == "fid"
    assert "299" in ours.settings["resize"]
    assert ours.compute() == float(theirs.compute())


def test_missing_inception_weights_are_told(tmp_path):
    pytest.importorskip("torch_fidelity", reason="FID needs the extra [eval]")
    with pytest.raises(ConfigError, match="no file"):
        FrechetDistance("inception", weights=tmp_path / "none.pth")


def test_wrong_input_is_told():
    with pytest.raises(ConfigError, match="no net 'incption'"):
        FrechetDistance("incption")
    with pytest.raises(ConfigError, match="two images"):
        FrechetDistance(Means()).compute()
