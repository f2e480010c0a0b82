"""The parts beside the step: averages, images, metrics.csv, the run folder."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lgvq_plugin.training import callbacks, rng
from lgvq_plugin.training.callbacks import EMA, MetricsFile
from lgvq_plugin.training.run import train


def test_the_average_follows_its_closed_form():
    host = nn.BatchNorm1d(1)  # a host with buffers
    average = EMA(host, decay=0.9)
    for value in (1.0, 2.0, 3.0):
        host.weight.data.fill_(value)
        host.running_mean.fill_(value)
        average.update()
    expected = 0.9**3 * 1 + 0.1 * (0.9**2 * 1 + 0.9 * 2 + 3)
    assert average.state_dict()["weight"].item() == pytest.approx(expected)
    assert average.state_dict()["running_mean"] == 3  # buffers are not averaged
    with average.applied():
        assert host.weight.item() == pytest.approx(expected)
    assert host.weight == 3
    assert average.weights["weight"].item() == pytest.approx(expected)


def test_grids_are_what_another_library_reads(tmp_path):
    top, bottom = torch.full((2, 3, 4, 5), -1.0), torch.full((2, 3, 4, 5), 7.0)
    top[0, 0] = 1.0
    callbacks.write_grid(tmp_path / "a" / "grid.png", (top, bottom), gap=1)
    pixels = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert pixels.shape == (1 + 2 * 5, 1 + 2 * 6, 3)
    assert (pixels[1:5, 1:6] == (255, 0, 0)).all()
    assert (pixels[1:5, 7:12] == 0).all()
    assert (pixels[6:10] == 255).all()  # clamped
    assert (pixels[0] == 255).all()


def test_generators_come_back_as_they_were():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn()

    rng.seed_all(5)
    np.random.randn()  # leaves half a pair in NumPy's state
    buffer = io.BytesIO()
    torch.save(rng.state(), buffer)
    expected = draw()
    buffer.seek(0)
    rng.restore(torch.load(buffer, weights_only=True))
    assert draw() == expected


def test_new_columns_and_later_values_of_a_step_join_its_row(tmp_path):
    file = MetricsFile(tmp_path)
    file.log_metrics({"a": 1.0}, step=1)
    file.log_metrics({"a": 2.0}, step=2)
    file.log_metrics({"b": 3.0}, step=2)
    file.log_metrics({"a": 4.0}, step=3)
    with (tmp_path / "metrics.csv").open() as written:
        assert list(csv.DictReader(written)) == [
            {"step": "1", "a": "1", "b": ""},
            {"step": "2", "a": "2", "b": "3"},
            {"step": "3", "a": "4", "b": ""},
        ]


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(config, tmp_path):
    extra = ["training.val_every=2", "training.images_every=4", "training.ema_decay=0.5"]
    run = train(config(*extra), name="a", logdir=tmp_path, progress=False)
    assert run.folder == tmp_path / "a"
    for path in (
        "configs/merged.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/step=00000004.ckpt",
        "metrics.csv",
        "images/train_00000004.png",
        "images/val_00000004.png",
        "tensorboard",
    ):
        assert (run.folder / path).exists(), path
    saved = torch.load(run.checkpoint, weights_only=True)
    assert list(saved["state_dict"]) == list(run.host.state_dict())
    assert saved["state_dict"].keys() == saved["ema_state_dict"].keys()
    assert len(saved["optimizer_states"]) == 2
    assert {"train/aeloss", "val/rec_loss"} <= run.metrics.keys()


def test_validation_is_with_the_averaged_weights_and_by_sample(config, tmp_path):
    given = config("training.max_steps=1", "training.val_every=1", "training.ema_decay=0.5")
    given.model = {"target": "toy.ToyHost", "learning_rate": 0.1}
    given.data = {
        "batch_size": 2,
        "train": {"target": "toy.Ones"},
        "validation": {"target": "toy.Ones", "params": {"length": 3, "first": 2.0}},
    }
    run = train(given, name="a", logdir=tmp_path, progress=False)
    averaged = 0.5 * 3.0 + 0.5 * 2.6  # one step of 0.1 x a slope of 4
    mean_square = (4 + 1 + 1) / 3  # the last batch has one sample and a third of the weight
    assert run.metrics["val/rec_loss"] == pytest.approx((averaged - 1) ** 2 * mean_square)
    assert run.host.weight.item() == pytest.approx(2.6)
    assert run.host.seen == 2  # eval mode: the buffer counts training samples alone


@pytest.mark.slow
def test_logging_and_saving_do_not_change_the_run(config, tmp_path):
    plain = train(config(), name="plain", logdir=tmp_path, progress=False)
    extra = ["training.val_every=1", "training.images_every=1", "training.checkpoint_every=1"]
    watched = train(config(*extra), name="watched", logdir=tmp_path, progress=False)
    for ours, theirs in zip(plain.host.parameters(), watched.host.parameters(), strict=True):
        assert torch.equal(ours, theirs)
