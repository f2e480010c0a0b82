"""How far one training step travels: which of our files it enters, in how many hops."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lgvq_plugin
from lgvq_plugin.training.driver import HostDriver
from lgvq_plugin.training.run import read_config, train

ROOT = f"{Path(lgvq_plugin.__file__).parent}/"
CONFIGS = Path(__file__).parents[1] / "configs"
MAX_FILES, MAX_HOPS = 12, 36
STEP = 3  # the first batches also build optimizers' states, check the host and meet new captions
LGVQ = "model.params.lossconfig.params.lgvq"
OVERRIDES = [
    *("training.max_steps=3", "data.num_workers=0", "data.batch_size=4"),
    *("data.train.params.size=16", "data.validation.params.size=16"),
    *("data.train.params.length=4", "data.validation.params.length=4"),
    *("model.params.channels=8", "model.params.embed_dim=8", "model.params.n_embed=16"),
    f"{LGVQ}.objectives.masked_text.weight=0.05",  # all three
    f"{LGVQ}.every=1",
    f"{LGVQ}.stop=null",
]


class Route:
    """Records the calls from one of our files into another, and the files entered, in order."""

    def __init__(self):
        self.files, self.hops, self._stack = [], [], []

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(ROOT):
            return
        file = frame.f_code.co_filename[len(ROOT) :]
        if event == "return" and self._stack:
            self._stack.pop()
        elif event == "call":
            if file not in self.files:
                self.files.append(file)
            if self._stack and self._stack[-1] != file:
                self.hops.append(f"{self._stack[-1]} -> {file} {frame.f_code.co_name}")
            self._stack.append(file)


def trace(folder):
    """Train for STEP steps and return the route of the last one."""
    route, steps, original = Route(), [], HostDriver.training_step

    def training_step(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) != STEP:
            return original(self, batch, batch_idx)
        gc.disable()  # it may close generators of earlier epochs inside the step
        sys.setprofile(route)
        try:
            return original(self, batch, batch_idx)
        finally:
            sys.setprofile(None)
            gc.enable()

    configs = [CONFIGS / "vqvae_scenes_64_lgvq.yaml", CONFIGS / "guide_micro_clip.yaml"]
    config = read_config([str(path) for path in configs], OVERRIDES)
    HostDriver.training_step = training_step
    train(config, name="route", logdir=folder, progress=False)
    return route


@pytest.fixture(scope="module")
def route(tmp_path_factory):
    """The route in a process of its own: losses of other tests would add their global hooks."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("logs"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_one_step_enters_few_files_in_few_hops(route):
    print(f"\n{len(route.files)} files: {', '.join(route.files)}\n{len(route.hops)} hops:")
    print("\n".join(route.hops))
    shown = "\n".join([*route.files, *route.hops])
    assert len(route.files) <= MAX_FILES, shown
    assert len(route.hops) <= MAX_HOPS, shown


@pytest.mark.slow
def test_the_step_passes_the_core_in_the_order_of_one_batch(route):
    core = ["host.py", "loss.py", "quantizer_hook.py", "alignment.py", "heads.py", "objectives.py"]
    assert [file for file in route.files if file in core] == core


if __name__ == "__main__":
    found = trace(sys.argv[1])
    print(json.dumps({"files": found.files, "hops": found.hops}))
