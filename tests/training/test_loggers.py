"""training.logger: which files a run writes, and what Weights & Biases gets, offline."""

import csv
import json
import struct
import sys
import time
from pathlib import Path

import pytest
import torch

from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.run import train

FILES = {"checkpoints", "configs", "metrics.csv"}


def run(config, folder, name="run", **options):
    return train(config, name=name, logdir=folder, progress=False, **options)


@pytest.mark.parametrize(
    ("chosen", "folders"),
    [("null", {"tensorboard"}), ("csv", set()), ("[csv,tensorboard]", {"tensorboard"})],
)
def test_a_run_writes_what_was_chosen(small, tmp_path, chosen, folders):
    run(small("training.max_steps=1", f"training.logger={chosen}"), tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | folders


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("wandbb", r"training\.logger: no 'wandbb'; did you mean 'wandb'\? Known: csv, tensorb"),
        ("[csv,tensorbord]", r"did you mean 'tensorboard'"),
        ("3", r"training\.logger must be one or a list of csv, tensorboard, wandb"),
    ],
)
def test_a_wrong_name_is_refused(small, tmp_path, chosen, message):
    with pytest.raises(ConfigError, match=message):
        run(small(f"training.logger={chosen}"), tmp_path)


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("tensorboard", "train")])
def test_a_missing_package_is_reported_with_its_extra_before_training(
    small, tmp_path, monkeypatch, name, extra
):
    monkeypatch.setattr("lgvq_plugin.training.settings.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed: .*lgvq_plugin\[{extra}\]"):
        run(small(f"training.logger={name}"), tmp_path)
    assert not (tmp_path / "run").exists()


def records(file):
    """Yield the records of a file of wandb: LevelDB's log format, blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def offline_runs(folder):
    """Return id -> [(run, rows of metrics)], one for each start, as wandb wrote them to disk."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb")):
        for _ in range(100):  # wandb's own process writes the file
            read = [Record.FromString(data) for data in records(file)]
            if any(one.HasField("exit") for one in read):
                break
            time.sleep(0.1)
        started = next(one.run for one in read if one.HasField("run"))
        rows = [
            {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in one.history.item
            }
            for one in read
            if one.HasField("history")
        ]
        found.setdefault(started.run_id, []).append((started, rows))
    return found


@pytest.mark.slow
def test_weights_and_biases_gets_the_rows_of_metrics_csv(small, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["training.max_steps=2", "training.checkpoint_every=1"]
    plain = run(small(*words, "training.logger=csv"), tmp_path, "plain").host
    host = run(small(*words, "training.logger=wandb"), tmp_path).host
    for key, value in plain.state_dict().items():  # the training itself is the same to the bit
        assert torch.equal(host.state_dict()[key], value), key
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == FILES | {"wandb"}
    run(small("training.max_steps=3", "training.logger=wandb"), tmp_path, resume="auto")
    assert sys.modules["wandb"].run is None  # the runs have ended
    with (folder / "metrics.csv").open() as file:
        wanted = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    (parts,) = offline_runs(folder).values()  # one run, continued
    rows = [row for _, part in parts for row in part]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    for row, line in zip(rows, wanted, strict=True):
        for key, value in line.items():
            assert key == "step" or row[key] == pytest.approx(value, rel=1e-6)
    started = parts[0][0]
    assert (started.project, started.display_name) == ("lgvq", "run")
    config = {item.key: item.value_json for item in started.config.update}
    assert json.loads(config["model"])["target"] == "lgvq_plugin.hosts.vqvae.VQVAE"
