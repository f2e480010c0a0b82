"""One job: its numbers are the checkpoint's, and a job that is resumed ends as if never stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from lgvq_plugin.bench import job
from lgvq_plugin.bench.job import read_curves, run_job
from lgvq_plugin.bench.records import Job
from lgvq_plugin.checkpoints.load import load_host
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.files import write_json
from lgvq_plugin.host import reconstruct

CONFIG = {
    "model": {
        "target": "lgvq_plugin.hosts.vqvae.VQVAE",
        "learning_rate": 1e-3,
        "params": {
            **{"n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1, "downsample": 4},
            "lossconfig": {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"},
        },
    },
    "data": {
        "batch_size": 2,
        "train": {"target": "scenes", "params": {"size": 16, "length": 12}},
        "validation": {
            "target": "scenes",
            "params": {"split": "validation", "size": 16, "length": 6},
        },
    },
    "training": {
        **{"max_steps": 4, "accelerator": "cpu", "log_every": 1, "checkpoint_every": 2},
        **{"val_every": 2, "images_every": None, "seed": 0},
    },
}
JOB = Job(data="", variant="a", seed=0, config=CONFIG, evaluation={"metrics": ["psnr"]}, examples=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("job")
    return run_job(JOB, tmp_path / JOB.name, root=tmp_path), tmp_path


@pytest.mark.slow
def test_its_numbers_are_the_checkpoints(done):
    run, root = done
    host = load_host(CONFIG, root / "a/seed_0/checkpoints/last.ckpt")
    dataset = Scenes("validation", size=16, length=6)
    images = torch.stack([torch.as_tensor(dataset[i]["image"]) for i in range(6)]).movedim(-1, 1)
    gap = (reconstruct(host, images.contiguous()).clamp(-1, 1) - images).double() / 2
    psnr = -10 * torch.log10(gap.square().mean((1, 2, 3)))
    assert run.metrics["reconstruction/psnr"]["value"] == pytest.approx(
        float(psnr.mean()), abs=0.05
    )
    assert run.status == "done"


def test_it_keeps_curves_cost_and_examples(done):
    run, root = done
    assert [step for step, _ in run.curves["train/rec_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in run.curves["val/rec_loss"]] == [2, 4]
    assert run.cost["steps"] == 4
    assert run.cost["seconds_per_step"] > 0
    assert run.cost["peak_memory_mib"] > 50
    assert len(run.examples) == 2
    for example in run.examples:
        assert (root / example["original"]).read_bytes()[1:4] == b"PNG"
    saved = json.loads((root / "a/seed_0/run.json").read_text())
    assert saved["evaluation"]["metrics"] == run.evaluation["metrics"]


def test_starting_up_is_not_in_the_time_of_a_step(monkeypatch):
    """Fifty seconds until the first update, then three steps in six."""
    clock = iter([50.0, 52.0, 54.0, 56.0])
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with job._step_times() as times:
        for _ in range(4):
            optimizer.step()
    assert times == [50.0, 52.0, 54.0, 56.0]


def test_a_job_that_is_trained_is_only_evaluated(done):
    run, root = done
    rows = (root / "a/seed_0/metrics.csv").read_text()
    again = run_job(JOB, root / JOB.name, root=root)
    assert (root / "a/seed_0/metrics.csv").read_text() == rows
    assert again.evaluation["metrics"] == run.evaluation["metrics"]
    assert again.cost == run.cost


def test_curves_are_thinned_and_keep_their_ends(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "a", "b"])
        writer.writerows([[i, i / 2, "nan" if i % 2 else ""] for i in range(1001)])
    curves = read_curves(tmp_path / "metrics.csv", points=50)
    assert [*curves] == ["a"]
    assert len(curves["a"]) == 50
    assert (curves["a"][0], curves["a"][-1]) == ([0, 0.0], [1000, 500.0])


@pytest.mark.slow
def test_a_job_killed_and_resumed_ends_as_one_that_was_not(done, tmp_path):
    """The process is killed without a warning once its first checkpoint is there."""
    run, _ = done
    root = tmp_path / "killed"
    folder = root / JOB.name
    write_json(folder / "job.json", asdict(JOB))
    command = [sys.executable, "-m", "lgvq_plugin.bench.job", str(folder), str(root)]
    process = subprocess.Popen([*command, str(os.getpid())])
    while not (folder / "checkpoints/step=00000002.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_job(JOB, folder, root=root)
    resumed = json.loads((folder / "run.json").read_text())
    assert resumed["evaluation"]["metrics"] == run.evaluation["metrics"]
    assert resumed["curves"]["train/rec_loss"] == run.curves["train/rec_loss"]
