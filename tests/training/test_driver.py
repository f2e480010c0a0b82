"""HostDriver: taming's own scheme, step for step, and what it adds to it."""

import csv

import numpy as np
import pytest
import torch

from lgvq_plugin.datasets.base import collate
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.driver import HostDriver
from lgvq_plugin.training.run import train
from lgvq_plugin.training.settings import TrainingConfig

TOY = {"target": "toy.ToyHost", "learning_rate": 0.1}


def rows(result):
    with (result.folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def batches(config, count):
    """The samples that a user would work out: one seeded permutation an epoch, tail dropped."""
    dataset, size = Scenes(**config.data.train.params), config.data.batch_size
    epoch, taken = 0, 0
    while True:
        order = np.random.default_rng([config.training.get("seed", 0), epoch]).permutation(
            len(dataset)
        )
        dataset.set_epoch(epoch)
        for at in range(0, len(order) - size + 1, size):
            yield collate([dataset[int(i)] for i in order[at : at + size]])
            taken += 1
            if taken == count:
                return
        epoch += 1


def taming_by_hand(config, steps):
    """taming's training_step under Lightning 1.x, written out: two forwards, one frozen side."""
    torch.manual_seed(0)
    host = build_host(config)
    host.learning_rate = config.model.base_learning_rate
    (generator, discriminator), _ = host.configure_optimizers()
    sides = [[p for g in o.param_groups for p in g["params"]] for o in (generator, discriminator)]
    torch.manual_seed(0)
    logs = []
    for step, batch in enumerate(batches(config, steps)):
        x, log = host.get_input(batch, "image"), {}
        for which, optimizer in enumerate((generator, discriminator)):
            for side, parameters in enumerate(sides):
                for parameter in parameters:
                    parameter.requires_grad_(side == which)
            xrec, qloss = host(x)
            loss, terms = host.loss(
                qloss, x, xrec, which, step, last_layer=host.get_last_layer(), split="train"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log |= {key: float(value) for key, value in terms.items()}
        logs.append(log)
    return host, logs


@pytest.mark.slow
def test_two_forward_is_taming_bit_for_bit(config, tmp_path):
    given = config("training.two_forward=true", "training.max_steps=6")
    result = train(given, name="a", logdir=tmp_path, progress=False)
    host, logs = taming_by_hand(given, 6)
    for row, log in zip(rows(result), logs, strict=True):
        assert {key: row[key] for key in log} == pytest.approx(log, rel=1e-6)
    assert logs[-1]["train/d_weight"] > 0  # the adversarial part took part
    assert logs[-1]["train/disc_factor"] == 1
    ours = result.host.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in host.state_dict().items())


@pytest.mark.slow
def test_one_forward_makes_the_same_first_step_of_the_generator(config, tmp_path):
    two = train(
        config("training.two_forward=true", "training.max_steps=1"),
        name="two",
        logdir=tmp_path,
        progress=False,
    )
    one = train(config("training.max_steps=1"), name="one", logdir=tmp_path, progress=False)
    assert rows(one)[0]["train/aeloss"] == rows(two)[0]["train/aeloss"]
    for (name, ours), theirs in zip(
        one.host.named_parameters(), two.host.parameters(), strict=True
    ):
        if not name.startswith("loss."):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
def test_steps_are_counted_in_batches(config, tmp_path):
    # Lightning counts both optimizers: disc_start=2 would come after one batch.
    result = train(config("training.max_steps=5"), name="a", logdir=tmp_path, progress=False)
    assert [row["train/disc_factor"] for row in rows(result)] == [0, 0, 1, 1, 1]
    assert result.steps == 5
    saved = torch.load(result.checkpoint, weights_only=True)
    assert saved["global_step"] == 5
    assert saved["lgvq_training"]["samples"] == 10


def test_state_dict_is_the_hosts(config):
    host = build_host(config())
    driver = HostDriver(host, TrainingConfig(max_steps=1))
    assert list(driver.state_dict()) == list(host.state_dict())
    driver.load_state_dict({k: torch.zeros_like(v) for k, v in host.state_dict().items()})
    assert host.decoder.conv_out.weight.abs().sum() == 0


def toy(config, *overrides, weight=3.0, schedule=None, length=8, first=1.0):
    given = config(*overrides)
    given.model = {**TOY, "params": {"weight": weight, "schedule": schedule}}
    given.data = {
        "batch_size": 2,
        "train": {"target": "toy.Ones", "params": {"length": length, "first": first}},
    }
    return given


def test_one_optimizer_follows_its_closed_form(config, tmp_path):
    result = train(toy(config), name="a", logdir=tmp_path, progress=False)
    # gap' = gap - 0.1 * 2 * gap = 0.8 gap, from a gap of 2
    assert result.host.weight.item() == pytest.approx(1 + 2 * 0.8**4)
    assert [row["train/rec_loss"] for row in rows(result)] == pytest.approx(
        [(2 * 0.8**n) ** 2 for n in range(4)]
    )
    assert [row["train/step"] for row in rows(result)] == [0, 1, 2, 3]


def test_accumulation_takes_the_mean_over_its_batches(config, tmp_path):
    # One sample of 8 is a 3: with batches of 2 and 4 to a step, a step sees the whole set.
    given = toy(config, "training.accumulate_grad_batches=4", "training.max_steps=2", first=3.0)
    result = train(given, name="a", logdir=tmp_path, progress=False)
    mean_square = (7 * 1 + 9) / 8
    assert result.host.weight.item() == pytest.approx(1 + 2 * (1 - 0.2 * mean_square) ** 2)
    assert result.steps == 2
    assert result.host.seen == 16


@pytest.mark.parametrize(("clip", "moved"), [(1.0, 0.1), (100.0, 0.4)])
def test_gradients_are_clipped_by_norm(config, tmp_path, clip, moved):
    given = toy(config, "training.max_steps=1", f"training.gradient_clip_val={clip}")
    result = train(given, name="a", logdir=tmp_path, progress=False)
    assert result.host.weight.item() == pytest.approx(3 - moved, rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "rates"),
    [("step", [0.05, 0.025, 0.0125, 0.00625]), ("epoch", [0.1, 0.05, 0.05, 0.025])],
)
def test_schedules_of_the_host_are_stepped(config, tmp_path, interval, rates):
    given = toy(config, schedule=interval, length=5)  # 2 batches an epoch
    result = train(given, name="a", logdir=tmp_path, progress=False)
    assert [row["train/lr"] for row in rows(result)] == pytest.approx(rates)


@pytest.mark.slow
def test_bf16_runs_and_keeps_the_weights_in_float32(config, tmp_path):
    given = config("training.precision=bf16-mixed", "training.max_steps=2")
    result = train(given, name="a", logdir=tmp_path, progress=False)
    assert result.host.decoder.conv_out.weight.dtype == torch.float32
    assert np.isfinite(result.metrics["train/aeloss"])


def test_a_loss_that_is_not_finite_names_term_and_step(config, tmp_path):
    given = toy(config, weight=float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 0: .*train/rec_loss = inf"):
        train(given, name="a", logdir=tmp_path, progress=False)


def test_hosts_that_cannot_be_driven_are_refused():
    with pytest.raises(ConfigError, match="no get_input, image_key"):
        HostDriver(torch.nn.Linear(1, 1), TrainingConfig(max_steps=1))
    manual = torch.nn.Linear(1, 1)
    manual.automatic_optimization = False
    with pytest.raises(ConfigError, match="by hand itself"):
        HostDriver(manual, TrainingConfig(max_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_bad_gradients_of_all_aligned_batches_end_the_training(config, tmp_path, every):
    """Batches without our terms in between do not count as healthy."""
    section = config("training.max_steps=200", "training.log_every=200")
    section.model.params.lossconfig.target = "lgvq_plugin.LGVQLoss"
    section.model.params.lossconfig.params.lgvq = {
        "guide": {"use": "micro_clip"},
        "every": every,
        "on_nonfinite": "skip",
    }

    def spoil(host):
        weight = next(host.loss.alignment.code_vit.parameters())
        weight.register_hook(lambda gradient: gradient * torch.nan)

    expected = 24 if every == 1 else 119  # the first, and 24 times five
    with pytest.raises(FloatingPointError, match=rf"step {expected}: .*25th skipped update"):
        train(section, name="a", logdir=tmp_path, progress=False, prepare=spoil)
