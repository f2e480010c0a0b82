"""Dotted paths of earlier versions, in configs and in imports."""

import importlib

import pytest

from lgvq_plugin.moved import MOVED, new_module
from lgvq_plugin.sockets import ConfigError, import_target

OLD = [
    "lgvq_plugin.bench.metrics.clip_score.CLIPScorer",
    "lgvq_plugin.bench.probes.attributes.AttributesProbe",
    "lgvq_plugin.device.choose_device",
    "lgvq_plugin.guides.open_clip_vision.OpenCLIPVision",
    "lgvq_plugin.heads.code_vit.CodeViT",
    "lgvq_plugin.hosts.base.attach",
    "lgvq_plugin.metrics.retrieval.retrieval_recall",
    "lgvq_plugin.objectives.base.AbstractObjective",
    "lgvq_plugin.probes.image_judge.ImageJudge",
    "lgvq_plugin.probes.questions.VQAProbe",
]


@pytest.mark.parametrize("path", OLD)
def test_a_config_may_name_an_old_path(path):
    with pytest.warns(DeprecationWarning, match="has moved to lgvq_plugin"):
        assert import_target(path).__name__ == path.rpartition(".")[2]


def test_an_old_module_can_be_imported():
    with pytest.warns(DeprecationWarning, match="has moved to lgvq_plugin.bench.metrics.frechet"):
        old = importlib.import_module("lgvq_plugin.metrics.frechet")
    from lgvq_plugin.bench.metrics.frechet import FrechetDistance

    assert old.FrechetDistance is FrechetDistance


def test_the_names_of_a_module_that_was_split_are_all_found():
    with pytest.warns(DeprecationWarning, match="has moved to lgvq_plugin.training.build"):
        old = importlib.import_module("lgvq_plugin.training.base")
    assert all(hasattr(old, name) for name in ("build_host", "read_config", "TrainingConfig"))
    assert not hasattr(old, "nothing")


def test_every_old_path_leads_somewhere():
    for old in MOVED:
        importlib.import_module(new_module(f"lgvq_plugin.{old}"))


def test_a_module_that_never_was_is_still_an_error():
    with pytest.raises(ConfigError, match="does not exist"):
        import_target("lgvq_plugin.metrics.nothing.Here")
