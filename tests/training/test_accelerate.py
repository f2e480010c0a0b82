"""README's diff of a plain accelerate script, applied to one and run on two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = (Path(__file__).parent / "accelerate_vqgan.py").read_text()
RUN = """
import sys
import torch
import lgvq_plugin
import bare, changed

torch.set_num_threads(1)
losses, original = [], lgvq_plugin.Handle.loss

def loss(self, *args, **kwargs):
    result = original(self, *args, **kwargs)
    losses.append(result[0].detach())
    return result

attach = lgvq_plugin.attach
lgvq_plugin.Handle.loss = loss
lgvq_plugin.attach = lambda *args, **options: attach(*args, every=1, **options)  # 16 steps only
states = {script.__name__: script.main().state_dict() for script in (bare, changed)}
assert torch.distributed.get_world_size() == 2
torch.save({**states, "losses": losses}, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


def diff():
    """The lines of README's diff of the script."""
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = (block for block in blocks if "accelerator" in block)
    return found.splitlines()


def patched(script, lines):
    """Apply a diff whose hunks are parted by lines of dots; every other line must be there."""
    old, new, at = script.splitlines(), [], 0
    for line in lines:
        mark, text = line[:1], line[1:]
        if mark == "+":
            new.append(text)
        elif text.strip() != "...":
            place = old.index(text, at)
            new += old[at : place + (mark != "-")]
            at = place + 1
    return "\n".join([*new, *old[at:], ""])


def run(folder):
    """Run the script and the changed one on two processes; return what each process saved."""
    for name, text in (("bare", SCRIPT), ("changed", patched(SCRIPT, diff())), ("run", RUN)):
        (folder / f"{name}.py").write_text(text)
    environment = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
         "run.py", str(folder)],
        cwd=folder,
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_the_diff_is_five_lines_at_most():
    assert sum(line.startswith(("+", "-")) for line in diff()) <= 5
    assert "lgvq" not in SCRIPT.split('"""')[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_the_same_heads(tmp_path):
    for package in ("accelerate", "diffusers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    first, second = run(tmp_path)
    bare, changed = first["bare"], first["changed"]
    heads = {key for key in changed if key.startswith("heads.")}
    assert changed.keys() - bare.keys() == heads != set()
    for script in ("bare", "changed"):
        for key, value in first[script].items():
            assert torch.equal(value, second[script][key]), key
    losses = torch.stack(first["losses"])
    assert len(losses) == 16
    assert losses.isfinite().all()
    assert losses[-4:].mean() < 0.9 * losses[:4].mean()
    assert not torch.equal(changed["encoder.conv_in.weight"], bare["encoder.conv_in.weight"])
