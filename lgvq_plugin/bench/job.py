"""One job, in a process of its own: train, evaluate, keep curves, cost and examples.

<ablation>/<variant>/seed_<n>/   job.json  run.json  log.txt, and the run folder of `lgvq train`
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

from ..checkpoints.load import load_host
from ..device import choose_device
from ..files import write_json
from ..host import reconstruct
from ..training.build import build_dataset
from ..training.run import train
from .evaluation import evaluate
from .page import write_png
from .records import EVALUATING, JOB, RUN, Cost, Evaluation, Example, Job, Run, read_record

POINTS = 200  # of a curve, at most
logger = logging.getLogger(__name__)


def run_job(job: Job, folder: Path, *, root: Path) -> Run:
    """Train and evaluate; goes on from the folder's newest checkpoint, if there is one.

    Args:
        job: what to do.
        folder: of the job.
        root: of the ablation; paths in the result are below it.
    """
    steps_before = _last_step(folder)
    clock = _Clock()
    with clock.running():
        trained = train(
            job.config, name=folder.name, logdir=folder.parent, resume="auto", progress=False
        )
    cost = _cost(trained.steps, trained.steps - steps_before, clock.seconds, folder)
    logger.info(EVALUATING.format(job.name))
    is_averaged = job.config["training"].get("ema_decay") is not None
    checkpoint, device = trained.checkpoint, choose_device()
    del trained  # its host need not stay beside the one that is evaluated
    host = load_host(job.config, checkpoint, device=device, averaged=is_averaged)
    options = {k: v for k, v in job.evaluation.items() if k != "metrics"}
    evaluation = evaluate(
        host,
        job.config,
        metrics=job.evaluation.get("metrics"),
        output=folder / "evaluation",
        options=options,
        progress=False,
    )
    run = Run(
        data=job.data,
        variant=job.variant,
        seed=job.seed,
        evaluation=Evaluation(**evaluation),  # type: ignore[typeddict-item]
        curves=read_curves(folder / "metrics.csv"),
        cost=cost,
        examples=_examples(host, job, folder, root),
    )
    write_json(folder / RUN, asdict(run))
    return run


class _Clock:
    """Notes the times of the first and the last update of any optimizer."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    @property
    def seconds(self) -> float:
        return self.last - self.first

    @contextmanager
    def running(self) -> Iterator[None]:
        handle = register_optimizer_step_post_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, *_: Any) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last


def read_curves(path: Path, *, points: int = POINTS) -> dict[str, list[list[float]]]:
    """Return metrics.csv as log key -> list of [step, value], thinned to `points` or fewer."""
    curves: dict[str, list[list[float]]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for key, text in row.items():
                if text and math.isfinite(float(text)):
                    curves.setdefault(key, []).append([step, float(text)])
    return {key: _thinned(curve, points) for key, curve in curves.items()}


def _thinned(curve: list[list[float]], points: int) -> list[list[float]]:
    """The first and the last value stay."""
    if len(curve) <= points:
        return curve
    last = len(curve) - 1
    return [curve[round(i * last / (points - 1))] for i in range(points)]


def _last_step(folder: Path) -> int:
    saved = [int(path.stem.partition("=")[2]) for path in folder.glob("checkpoints/step=*.ckpt")]
    return max(saved, default=0)


def _cost(steps: int, steps_now: int, seconds: float, folder: Path) -> Cost:
    """Seconds a step (of this process; kept from before if it trained nothing) and peak memory.

    `seconds` went by between the first and the last update, so starting up is not in them.
    """
    file = folder / "cost.json"
    if steps_now <= 0 and file.is_file():
        return read_record(file, Cost)
    has_gpu = torch.cuda.is_available()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if has_gpu:
        peak = torch.cuda.max_memory_allocated()
    cost: Cost = {
        "steps": steps,
        "seconds_per_step": seconds / (steps_now - 1) if steps_now > 1 else None,
        "peak_memory_mib": peak / 2**20,
        "memory_of": "GPU" if has_gpu else "process",
        "device": torch.cuda.get_device_name()
        if has_gpu
        else f"CPU, {torch.get_num_threads()} threads",
    }
    write_json(file, cost)
    return cost


def _examples(host: nn.Module, job: Job, folder: Path, root: Path) -> list[Example]:
    """Write the first images and their reconstructions."""
    sections = {**(job.config["data"].get("params") or {}), **job.config["data"]}
    names = ("test", "validation", "train")
    dataset = build_dataset(next(sections[name] for name in names if sections.get(name)))
    samples = [dataset[i] for i in range(min(job.examples, len(dataset)))]
    if not samples:
        return []
    images = torch.stack([torch.as_tensor(sample["image"]) for sample in samples])
    images = images if images.shape[1] == 3 else images.movedim(-1, 1)
    images = images.float().contiguous()
    device = next(host.parameters()).device
    rebuilt = reconstruct(host, images.to(device)).cpu()
    examples: list[Example] = []
    for i, sample in enumerate(samples):
        paths = {
            kind: folder / "examples" / f"{kind}_{i:02d}.png"
            for kind in ("original", "reconstruction")
        }
        write_png(paths["original"], images[i])
        write_png(paths["reconstruction"], rebuilt[i])
        caption = str(sample.get("caption", ""))
        original, reconstruction = (str(path.relative_to(root)) for path in paths.values())
        examples.append(
            {"caption": caption, "original": original, "reconstruction": reconstruction}
        )
    return examples


def _end_with_parent(parent: int) -> None:
    """Stop, with a checkpoint, when the process that started this one is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """Run the job of a folder: `python -m lgvq_plugin.bench.job FOLDER ROOT PARENT`."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folder, root, parent = Path(argv[0]), Path(argv[1]), int(argv[2])
    _end_with_parent(parent)
    run_job(read_record(folder / JOB, Job), folder, root=root)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
