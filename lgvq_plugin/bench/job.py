"""One job, in a process of its own: train, evaluate, keep curves, cost and examples.

`[DATA/]VARIANT/seed_N/` in the ablation's folder holds job.json, run.json, log.txt and the files
of `lgvq train`.
"""

import csv
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..arguments import choose_device
from ..checkpoints.load import load_checkpoint, load_host
from ..checkpoints.pretrained import heads_of
from ..files import write_json
from ..host import reconstruct
from ..training.run import train
from .evaluation import evaluate
from .explorer import read_samples
from .page import png_bytes
from .records import EVALUATING, JOB, RUN, Cost, Example, Job, Run, read_record

POINTS = 200  # at most, per curve
logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run the job of a folder: `python -m lgvq_plugin.bench.job FOLDER ROOT PARENT`."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folder, root, parent = Path(argv[0]), Path(argv[1]), int(argv[2])
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    run_job(read_record(folder / JOB, Job), folder, root=root)
    return 0


def _end_with_parent(parent: int) -> None:
    """Save a checkpoint and exit when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def run_job(job: Job, folder: Path, *, root: Path) -> Run:
    """Train, from the newest checkpoint in `folder` if there is one, and evaluate.

    `root` is the folder of the ablation; paths in the result are relative to it.
    """
    saved = [int(path.stem.partition("=")[2]) for path in folder.glob("checkpoints/step=*.ckpt")]
    with _step_times() as times:
        trained = train(
            job.config, name=folder.name, logdir=folder.parent, resume="auto", progress=False
        )
    cost = _cost(trained.steps, trained.steps - max(saved, default=0), times, folder)
    logger.info(EVALUATING.format(job.name))
    is_averaged = job.config["training"].get("ema_decay") is not None
    checkpoint = load_checkpoint(trained.checkpoint)
    del trained  # frees the trained host before another one is loaded
    host = load_host(job.config, checkpoint, device=choose_device(), averaged=is_averaged)
    options = dict(job.evaluation)
    metrics, heads = options.pop("metrics", None), heads_of(checkpoint, averaged=is_averaged)
    kept: Any = {"output": folder / "evaluation", "progress": False}
    measured: Any = evaluate(
        host, job.config, metrics=metrics, options=options, heads=heads, **kept
    )
    run = Run(
        data=job.data,
        variant=job.variant,
        seed=job.seed,
        evaluation=measured,
        curves=read_curves(folder / "metrics.csv"),
        cost=cost,
        examples=_examples(host, job, folder, root) if job.examples else [],
    )
    write_json(folder / RUN, asdict(run))
    return run


@contextmanager
def _step_times() -> Iterator[list[float]]:
    """Collect the time of every optimizer step, in seconds; startup comes before the first."""
    times: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    try:
        yield times
    finally:
        handle.remove()


def _cost(steps: int, steps_now: int, times: list[float], folder: Path) -> Cost:
    """Return the cost of `steps_now` steps in this process; the saved one if there were none."""
    file = folder / "cost.json"
    if steps_now <= 0 and file.is_file():
        return read_record(file, Cost)
    if has_gpu := torch.cuda.is_available():
        peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        device = f"CPU, {torch.get_num_threads()} threads"
    cost: Cost = {
        "steps": steps,
        "seconds_per_step": (times[-1] - times[0]) / (steps_now - 1) if steps_now > 1 else None,
        "peak_memory_mib": peak / 2**20,
        "memory_of": "GPU" if has_gpu else "process",
        "device": device,
    }
    write_json(file, cost)
    return cost


def read_curves(path: Path, *, points: int = POINTS) -> dict[str, list[list[float]]]:
    """Return metrics.csv as log key -> list of [step, value], thinned to at most `points`."""
    if not path.is_file():
        return {}
    curves: dict[str, list[list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for key, text in row.items():
                if text and math.isfinite(float(text)):
                    curves.setdefault(key, []).append([step, float(text)])
    for key, curve in curves.items():
        if (last := len(curve) - 1) >= points:  # the first and the last value are kept
            curves[key] = [curve[round(i * last / (points - 1))] for i in range(points)]
    return curves


def _examples(host: nn.Module, job: Job, folder: Path, root: Path) -> list[Example]:
    """Write the first images and their reconstructions."""
    samples = read_samples(job.config, job.examples, progress=False)
    device = next(host.parameters()).device
    rebuilt = reconstruct(host, samples.images.to(device)).cpu()
    (folder / "examples").mkdir(exist_ok=True)
    examples: list[Example] = []
    for i, captions in enumerate(samples.captions):
        paths = {}
        for kind, images in (("original", samples.images), ("reconstruction", rebuilt)):
            path = folder / "examples" / f"{kind}_{i:02d}.png"
            path.write_bytes(png_bytes(images[i]))
            paths[kind] = str(path.relative_to(root))
        examples.append({"caption": (captions or [""])[0], **paths})  # type: ignore[typeddict-item]
    return examples


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
