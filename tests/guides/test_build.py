"""`build_guide` and what it says of wrong input."""

import pytest
import torch

from lgvq_plugin.guides.base import AbstractGuide, build_guide
from lgvq_plugin.sockets import ConfigError


class Constant(AbstractGuide):
    """A user's own guide, found by its dotted path."""

    def __init__(self, width: int, value: float = 1.0):
        self.width, self.value, self.max_length = width, value, 4

    def tokenize(self, captions):
        raise NotImplementedError

    def encode(self, captions, token_mask=None):
        raise NotImplementedError

    @property
    def vocabulary(self):
        return torch.full((3, self.width), self.value)

    @property
    def device(self):
        return torch.device("cpu")

    def to(self, device):
        return self

    @property
    def config(self):
        return {"width": self.width, "value": self.value}


@pytest.fixture
def path(monkeypatch):
    import sys
    import types

    module = types.ModuleType("users_guides")
    module.Constant, module.NoGuide, module.number = Constant, object, 3
    monkeypatch.setitem(sys.modules, "users_guides", module)
    return "users_guides.Constant"


def test_by_dotted_path(path):
    guide = build_guide({"use": path, "width": 5})
    assert isinstance(guide, Constant)
    assert guide.config == {"width": 5, "value": 1.0}


def test_the_default_fingerprint_follows_weights_and_config(path):
    prints = {
        build_guide({"use": path, **knobs}).fingerprint
        for knobs in ({"width": 5}, {"width": 5, "value": 2.0}, {"width": 6})
    }
    assert len(prints) == 3
    assert build_guide({"use": path, "width": 5}).fingerprint in prints


def test_omegaconf_blocks_are_fine(path):
    from omegaconf import OmegaConf

    assert build_guide(OmegaConf.create({"use": path, "width": 5})).width == 5


def test_open_clip_is_the_default():
    with pytest.raises(ConfigError, match="no open_clip model 'ViT-nowhere'"):
        build_guide({"model": "ViT-nowhere"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use": "micro_clip", "max_lenght": 9}, "lgvq.guide.max_lenght.*'max_length'"),
        ({"use": "micro_klip"}, "did you mean 'micro_clip'"),
        ({"use": "micro_clip", "max_length": 2}, "max_length: expected 3 to 32"),
        ({"use": "micro_clip", "max_length": 33}, "max_length: expected 3 to 32"),
        ({"use": "micro_clip", "max_length": "30"}, "max_length: expected an int"),
        ({"use": "users_guides.Constant"}, "needs the key 'width'"),
        ({"use": "users_guides.NoGuide"}, "gave a object, no guide"),
        ({"use": "users_guides.number"}, "is no guide"),
        ("micro_clip", "expected a mapping"),
    ],
)
def test_wrong_input(path, config, message):
    with pytest.raises(ConfigError, match=message):
        build_guide(config)
