"""The probes' trainer: cut off and resumed equals run through; other settings begin anew."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lgvq_plugin.bench.probes.trainer import ProbeConfig, fit, learning_rate_at
from lgvq_plugin.config import build
from lgvq_plugin.functional import seeded
from lgvq_plugin.sockets import ConfigError

CONFIG = ProbeConfig(steps=12, batch_size=4, checkpoint_every=5, dropout=0.5, seed=3)
X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def new():
    with seeded(0):
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def train(network, folder=None, config=CONFIG, stop=None, facts=None):
    seen = []

    def loss_of(rows, generator):
        if stop is not None and len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        noise = torch.randn(len(rows), 3, generator=generator)
        return (network(X[rows]) - X[rows] - 0.01 * noise).square().mean()

    options = {"name": "toy", "folder": folder, "progress": False, "facts": facts}
    losses = fit(network, loss_of, len(X), config, **options)
    return losses, seen


def test_a_resumed_run_equals_one_run_through(tmp_path):
    whole = new()
    losses, rows = train(whole)
    cut = new()
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path, stop=8)
    again = new()
    rest, seen = train(again, tmp_path)
    assert rest == losses[5:]  # bit for bit, dropout included
    assert seen == rows[5:]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    assert train(new(), tmp_path) == ([], [])  # finished: not trained again


@pytest.mark.parametrize(
    "change", [{"config": replace(CONFIG, learning_rate=1e-2)}, {"facts": "other codes"}]
)
def test_another_setting_does_not_take_the_checkpoint(tmp_path, change):
    train(new(), tmp_path)
    losses, _ = train(new(), tmp_path, **change)
    assert len(losses) == CONFIG.steps


def test_an_epoch_sees_every_row_once():
    _, rows = train(new(), config=replace(CONFIG, batch_size=5))
    assert sorted(rows[0] + rows[1]) == list(range(10))
    assert sorted(rows[2] + rows[3]) == list(range(10))
    assert rows[0] != rows[2]


def test_the_global_generator_stays_as_it_was():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(new())
    assert torch.equal(torch.rand(3), wanted)


def test_the_rate_rises_and_falls():
    config = ProbeConfig(steps=100, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == 1
    assert rates[99] < 0.06
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("width", 6),
        ("learning_rate", 0),
        ("weight_decay", -1),
        ("dropout", 1.0),
        ("batch_size", "many"),
    ],
)
def test_wrong_settings_are_told_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"here\.{key}"):
        build(ProbeConfig, {key: value}, "here")
    with pytest.raises(ConfigError, match="steps"):
        build(ProbeConfig, {"step": 1}, "here")


class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(3, 3)

    def forward(self, x):
        return self.in_proj(x)


def test_checkpoints_have_the_parameter_names_of_version_0_1(tmp_path):
    network = Projection()
    train(network, tmp_path)
    stored = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert set(stored["network"]) == {"enter.weight", "enter.bias"}
    again = Projection()
    assert train(again, tmp_path) == ([], [])
    assert torch.equal(again.in_proj.weight, network.in_proj.weight)
