"""An objective of another package, named by its path or an entry point, with no edit of ours."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lgvq_plugin import LGVQLoss, attach
from lgvq_plugin.config import parse
from lgvq_plugin.hosts.vqvae import VQVAE, VectorQuantizer
from lgvq_plugin.sockets import ConfigError

MODULE = """
from dataclasses import dataclass

import torch
from lgvq_plugin import AbstractObjective
from lgvq_plugin.config import ObjectiveConfig
from lgvq_plugin.types import Term


@dataclass(frozen=True, kw_only=True)
class BrightConfig(ObjectiveConfig):
    power: int = 2


class Bright(AbstractObjective):
    '''Codes predict the mean brightness of their image.'''

    config_class = BrightConfig
    needs_captions = needs_tokens = False
    seen = []

    def __init__(self, config, *, guide, code_dim):
        super().__init__()
        self.config = config
        self.head = torch.nn.Linear(code_dim, 1)

    def forward(self, view, caption):
        self.seen.append((view, caption))
        brightness = view.images.mean(dim=(1, 2, 3))
        found = self.head(view.codes.codes).mean(dim=(1, 2))
        gap = (found - brightness).abs() ** self.config.power
        return Term(gap.mean(), {"gap": gap.detach().max()})


class Dark(Bright):
    seen = []


class NoConfig:
    pass
"""
OFF = {name: {"weight": 0} for name in ("global_semantic", "masked_text", "relationship")}


@pytest.fixture(autouse=True)
def module(install):
    lines = "[lgvq_plugin.objectives]\nbright = their_objectives:Bright\n"
    install("their_objectives", lines, MODULE)


@pytest.mark.parametrize(
    ("path", "name"), [("their_objectives:Bright", "Bright"), ("bright", "bright")]
)
def test_it_trains_beside_or_without_ours_and_needs_no_captions(path, name):
    objectives = {**OFF, path: {"weight": 0.5, "power": 1}}
    loss = {
        "target": "lgvq_plugin.LGVQLoss",
        "params": {
            "base": {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"},
            "lgvq": {"guide": {"use": "micro_clip"}, "objectives": objectives},
        },
    }
    host = VQVAE(channels=8, embed_dim=8, n_embed=16, lossconfig=loss)
    heads = host.loss.alignment
    assert isinstance(host.loss, LGVQLoss)
    assert list(heads.objectives) == [name]
    batch = {"image": torch.rand(2, 16, 16, 3)}  # without captions
    x = host.get_input(batch, "image")
    reconstruction, codebook_loss = host(x)[:2]
    total, log = host.loss(codebook_loss, x, reconstruction, 0, 0, split="train")
    total.backward()
    view, caption = heads.objectives[name].seen[-1]
    assert torch.equal(view.images, x)
    assert torch.equal(view.reconstructions, reconstruction)
    assert list(caption.strings) == ["", ""]
    assert heads.objectives[name].head.weight.grad.abs().sum() > 0
    expected = log[f"train/lgvq/{name}"] * 0.5
    assert log["train/lgvq/total"] == pytest.approx(expected.item())
    assert "train/lgvq/gap" in log
    with host.loss.disabled():
        alone = host.loss(codebook_loss, x, reconstruction, 0, 0, split="train")[0]
    assert total.item() == pytest.approx((alone + expected).item(), abs=1e-6)


def test_they_keep_the_order_of_the_config():
    """Else ranks would pair different parameters, and a resumed optimizer would mix them up."""
    names = [f"their_objectives:{name}" for name in ("Dark", "Bright")]
    for order in (names, names[::-1]):
        config = parse({"objectives": {name: {"weight": 1} for name in order}})
        assert [*config.objectives.others] == order


def test_saved_heads_name_it(tmp_path):
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    objectives = {**OFF, "bright": {"weight": 1, "power": 1}}
    handle = attach(model, "1", guide={"use": "micro_clip"}, objectives=objectives)
    handle.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "lgvq_config.json").read_text())["lgvq"]
    assert dict(parse(block).objectives.items())["bright"].power == 1
    handle.load_pretrained(tmp_path)


def test_beside_ours_batches_without_captions_are_still_an_error():
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    handle = attach(model, "1", guide={"use": "micro_clip"}, objectives={"bright": {"weight": 1}})
    images = torch.rand(2, 3, 4, 4)

    def train():
        model(torch.randn(2, 8, 2, 2, requires_grad=True))
        return handle.loss([None, None], images=images)[0]

    for _ in range(4):
        assert train().requires_grad  # Bright learns
    with pytest.raises(ConfigError, match="none of the first 5 training batches has a caption"):
        train()


def test_a_class_of_ours_may_be_extended():
    (Path(sys.path[0]) / "their_words.py").write_text(
        "from lgvq_plugin.objectives import MaskedText\nclass Mine(MaskedText):\n    pass\n"
    )
    config = parse({"objectives": {"their_words:Mine": {"weight": 1, "depth": 1}}})
    assert config.objectives.others["their_words:Mine"].depth == 1


def test_at_weight_0_it_is_not_built():
    config = parse({"objectives": {**OFF, "bright": {"weight": 0}}})
    assert dict(config.objectives.items())["bright"].weight == 0
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    handle = attach(model, "1", guide={"use": "micro_clip"}, objectives={"bright": {"weight": 0}})
    assert "bright" not in handle.heads.objectives


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"brigth": {"weight": 1}}, "unknown key lgvq.objectives.brigth.*did you mean 'bright'"),
        ({"masked_txt": {"weight": 1}}, "masked_txt.*did you mean 'masked_text'"),
        ({"bright": {"wieght": 1}}, "lgvq.objectives.bright.wieght; did you mean 'weight'"),
        ({"bright": {"weight": -1}}, "lgvq.objectives.bright.weight: expected >= 0"),
        ({"bright": {"power": "x"}}, "bright.power: expected a whole number"),
        ({"their_objectives:NoConfig": {}}, "NoConfig: expected a subclass of .*AbstractObjective"),
        ({"their_objectives:Nothing": {}}, "their_objectives.*Nothing"),
        ({"others": {}}, "lgvq.objectives.others"),
    ],
)
def test_mistakes_are_named(objectives, message):
    with pytest.raises(ConfigError, match=message):
        parse({"objectives": objectives})
