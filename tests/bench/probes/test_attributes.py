"""The attributes probe: reads what the codes hold, and falls back to the usual answer."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from lgvq_plugin.bench.probes.features import CodeFeatures
from lgvq_plugin.bench.probes.ridge import AttributesProbe, stack_labels
from lgvq_plugin.datasets.scenes import Scenes


def scene_labels(split: str, count: int) -> dict[str, torch.Tensor]:
    data = Scenes(split, size=8, length=count)
    return stack_labels([data[i]["attributes"] for i in range(count)])


def one_hot(labels: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [torch.nn.functional.one_hot(v, 10) if v.ndim == 1 else v for v in labels.values()]
    return torch.cat(parts, dim=1).float()


@pytest.fixture(scope="module")
def labels():
    return scene_labels("train", 300), scene_labels("validation", 100)


def test_codes_that_hold_the_labels_tell_them(labels):
    train, test = labels
    probe = AttributesProbe().fit(CodeFeatures(one_hot(train)), train)
    got = probe.evaluate(CodeFeatures(one_hot(test)), test)
    assert got["mean_accuracy"] == 1
    assert got["has_color/auc"] == 1


def test_codes_that_say_nothing_give_the_usual_answer(labels):
    train, test = labels
    probe = AttributesProbe().fit(CodeFeatures(torch.ones(300, 4)), train)
    got = probe.evaluate(CodeFeatures(torch.ones(100, 4)), test)
    assert got["has_color/auc"] == 0.5
    usual = np.bincount(train["main_shape"]).argmax()
    assert got["main_shape/accuracy"] == got["main_shape/majority"]
    assert got["main_shape/majority"] == pytest.approx((test["main_shape"] == usual).float().mean())
    columns = (train["has_color"].double().mean(0) > 0.5).long()
    assert got["has_color/accuracy"] == pytest.approx((test["has_color"] == columns).float().mean())


def test_a_class_that_training_lacks_is_an_error_of_the_answer_only():
    codes = CodeFeatures(torch.eye(20))
    probe = AttributesProbe().fit(codes, {"kind": torch.arange(20) % 2})
    assert probe.evaluate(codes, {"kind": torch.full((20,), 5)})["kind/accuracy"] == 0


def test_wrong_use_is_told():
    codes = CodeFeatures(torch.eye(20))
    with pytest.raises(RuntimeError, match="fit"):
        AttributesProbe().evaluate(codes, {})
    probe = AttributesProbe().fit(codes, {"kind": torch.arange(20) % 2})
    with pytest.raises(ValueError, match="kind"):
        probe.evaluate(codes, {"color": torch.zeros(20).long()})


def test_auc_equals_the_rank_statistic_of_scipy(labels):
    train, test = labels
    generator = torch.Generator().manual_seed(0)
    clean = [one_hot(train), one_hot(test)]
    codes = [CodeFeatures(c + torch.randn(c.shape, generator=generator)) for c in clean]
    probe = AttributesProbe().fit(codes[0], train)
    got = probe.evaluate(codes[1], test)["has_color/auc"]
    scores = probe._ridges["has_color"](probe._scaling(codes[1])).numpy()
    areas = []
    for column, there in zip(scores.T, test["has_color"].bool().numpy().T, strict=True):
        pairs = there.sum() * (~there).sum()
        areas.append(mannwhitneyu(column[there], column[~there]).statistic / pairs)
    assert got == pytest.approx(np.mean(areas), abs=1e-9)
    assert 0.5 < got < 1
