"""Train for long: is memory, the number of open handles, and the time of a step flat?

    python tests/stress/soak.py [--steps 5000] [--every 500]

Trains a small VQ-VAE with LG-VQ with one data worker, and measures every `--every` steps. The
first interval warms up. From the second on, memory may grow by MEMORY (5 %), handles by HANDLES,
and the median CPU time of a step in the last interval by TIME (15 %).
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import nonfinite

from lgvq_plugin.training import driver
from lgvq_plugin.training.run import train

MEMORY, HANDLES, TIME = 1.05, 4, 1.15
Row = dict[str, float]


def measure(times: list[float], step: int) -> Row:
    """Return memory in MiB, open handles, live tensors, and the median step time in ms."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "handles": len(os.listdir("/proc/self/fd")),
        "tensors": sum(isinstance(each, torch.Tensor) for each in gc.get_objects()),
        "milliseconds": 1000 * statistics.median(times),
    }


def soak(steps: int, every: int, folder: Path) -> list[Row]:
    """Train for `steps` steps; return a row for every `every` of them."""
    rows: list[Row] = []
    times: list[float] = []
    inner = driver.HostDriver._train_on

    def train_on(self: Any, batch: Any) -> None:
        begin = time.process_time()
        inner(self, batch)
        times.append(time.process_time() - begin)
        if len(times) == every:
            rows.append(measure(times, self.global_step))
            print("  ".join(f"{key} {value:,.1f}" for key, value in rows[-1].items()), flush=True)
            times.clear()

    config = nonfinite.config(nonfinite.Case("", "nan", "raise"))
    config["data"]["num_workers"] = 1
    config["data"]["train"]["params"]["length"] = 64
    config["data"]["validation"] = config["data"]["train"]
    rare: dict[str, Any] = {"max_steps": steps, "checkpoint_every": every, "keep_checkpoints": 2}
    rare |= {"val_every": every, "images_every": every, "log_every": 10}
    config["training"] |= rare
    driver.HostDriver._train_on = train_on  # type: ignore[method-assign]
    try:
        train(config, name="soak", logdir=folder, progress=False)
    finally:
        driver.HostDriver._train_on = inner  # type: ignore[method-assign]
    return rows


def growth(rows: list[Row]) -> list[str]:
    """Return what grew by more than is tolerated, from the second row to the last."""
    first, last, found = rows[1], rows[-1], []
    for key, limit in (("memory", MEMORY), ("milliseconds", TIME)):
        if last[key] > limit * first[key]:
            found.append(f"{key}: {first[key]:.1f} -> {last[key]:.1f}, more than {limit} times")
    if last["handles"] > first["handles"] + HANDLES:
        found.append(f"handles: {first['handles']:.0f} -> {last['handles']:.0f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500)
    given = parser.parse_args()
    if given.steps < 3 * given.every:
        parser.error("--steps must be 3 times --every at least")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(given.steps, given.every, Path(folder))
    found = growth(rows)
    print("flat" if not found else "\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
