"""Two processes (gloo): one run, the same weights on both, resumed bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from omegaconf import OmegaConf
from small_runs import CONFIG
from lgvq_plugin.training.run import train

torch.set_num_threads(1)
root = Path(sys.argv[1])

def run(name, *overrides, config=CONFIG, **given):
    dots = ["training.devices=2", "training.val_every=2", "data.validation.params.length=4"]
    config = OmegaConf.merge(config, OmegaConf.from_dotlist([*dots, *overrides]))
    return train(config, name=name, logdir=root, progress=False, **given)

def weights(result):
    values = result.host.state_dict().values()
    return torch.cat([value.detach().flatten().float() for value in values])

whole = run("whole")
mine = weights(whole)
others = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(others, mine)
assert torch.equal(others[0], others[1]), "ranks differ"

run("half", "training.max_steps=2")
half = run("half", resume="auto")
assert torch.equal(weights(half), mine), "resumed run differs"
a, b = (torch.load(r.checkpoint, weights_only=True) for r in (whole, half))
assert len(a["lgvq_training"]["generators"]) == 2
assert a["lgvq_training"]["samples"] == b["lgvq_training"]["samples"] == 16
assert (root / "whole/metrics.csv").read_text() == (root / "half/metrics.csv").read_text()

toy = {**CONFIG, "model": {"target": "toy.ToyHost", "learning_rate": 0.1}}
toy["data"] = {"batch_size": 2, "train": {"target": "toy.Ones", "params": {"first": 3.0}},
               "validation": {"target": "toy.Ones", "params": {}}}
# 8 samples = 2 processes x 2 samples x 2 batches: each step sees the whole set.
accumulated = run("toy", "training.accumulate_grad_batches=2", "training.max_steps=2", config=toy)
expected = 1 + 2 * (1 - 0.2 * (7 + 9) / 8) ** 2
assert abs(accumulated.host.weight.item() - expected) < 1e-5, accumulated.host.weight

unnamed = run(None, "training.max_steps=1")
folders = [None, None]
dist.all_gather_object(folders, str(unnamed.folder))
assert folders[0] == folders[1], folders
(root / f"done{os.environ.get('LOCAL_RANK', 0)}").touch()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes_make_one_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LGVQ_RUN_NAME"):
        env.pop(name, None)
    command = [sys.executable, str(script), str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert shown.returncode == 0, shown.stderr[-4000:]
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
