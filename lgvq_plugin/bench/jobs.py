"""Run the jobs of a plan in parallel processes; failed jobs are reported, killed ones resumed."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import differing, require
from ..files import remove_parts, write_json
from ..guides.base import build_guide
from ..sockets import ConfigError
from .evaluate import DEFAULT
from .records import EVALUATING, JOB, LOG, RESULTS, RUN, Job, Plan, Results, Run, read_record

POLL_SECONDS = 0.2
logger = logging.getLogger(__name__)

Process = subprocess.Popen[bytes]
Launch = Callable[[Path, Path, Mapping[str, str]], Process]


class Interrupted(KeyboardInterrupt):
    """The user stopped an ablation; the message says how to resume it."""


def run_plan(
    plan: Plan,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int | None = None,
    progress: bool = True,
    launch: Launch | None = None,
) -> Results:
    """Run every job that is not done, and collect the results of all jobs.

    Args:
        plan, folder: the jobs, and the folder of the ablation; its results.json is rewritten after
            every job.
        resume: accept a folder that holds runs; failed ones are run again.
        jobs: number of parallel processes; default: one per CUDA device, else one.
        progress: show a progress bar.
        launch: starts the process of a job, given (folder of the job, folder of the ablation,
            environment); default: :mod:`.job`.

    Raises:
        ConfigError: if the folder holds runs and `resume` is off, or runs of another config, or
            the guide of the evaluation cannot be built.
        Interrupted: after SIGINT or SIGTERM, once the running jobs have saved a checkpoint.
    """
    slots = _slots(jobs)
    _check_guides(job for job in plan.jobs if not (folder / job.name / RUN).is_file())
    waiting = deque(_prepare(plan, folder, resume))
    running: dict[int, tuple[Job, Process]] = {}
    total = sum(job.config["training"]["max_steps"] for job in plan.jobs)
    bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=not progress, mininterval=1)
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        while waiting or running:
            while waiting and len(running) < len(slots):
                slot = next(i for i in range(len(slots)) if i not in running)
                job = waiting.popleft()
                running[slot] = job, (launch or _launch)(folder / job.name, folder, slots[slot])
            for slot, (job, process) in [*running.items()]:
                if process.poll() is not None:
                    del running[slot]
                    _finish(job, folder / job.name, process.returncode)
                    collect(plan, folder).save(folder / RESULTS)
            _show(bar, plan, folder, [job for job, _ in running.values()])
            time.sleep(POLL_SECONDS if running else 0)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; resume with the same command and --resume auto (runs in {folder})"
        ) from None
    finally:
        _stop([process for _, process in running.values()])
        bar.close()
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    results = collect(plan, folder)
    results.save(folder / RESULTS)
    return results


def collect(plan: Plan, folder: Path) -> Results:
    """Return the results on disk; a job without any is `missing`."""
    runs = tuple(_run_of(job, folder / job.name / RUN) for job in plan.jobs)
    configs = {job.variant: job.config for job in reversed(plan.jobs)}
    variants: Any = {n: {**shown, "config": configs[n]} for n, shown in plan.variants.items()}
    return Results(title=plan.title, references=plan.references, variants=variants, runs=runs)


def _run_of(job: Job, path: Path) -> Run:
    """Return the run of a job that is in a file, or one that is missing."""
    if not path.is_file():
        return _not_done(job, "missing", "not run yet")
    run = read_record(path, Run)
    for name in ("data", "variant", "seed"):
        expected, got = getattr(job, name), getattr(run, name)
        require(got == expected, f"{path}: {name}", repr(expected), got)
    return run


def _not_done(job: Job, status: Any, reason: str) -> Run:
    return Run(data=job.data, variant=job.variant, seed=job.seed, status=status, reason=reason)


def _prepare(plan: Plan, folder: Path, resume: bool) -> list[Job]:
    """Write every job.json; return the jobs to run."""
    started = [job for job in plan.jobs if (folder / job.name / JOB).is_file()]
    if started and not resume:
        raise ConfigError(
            f"{str(folder)!r} already holds runs; resume them with --resume auto, "
            "or choose another folder with -o"
        )
    remove_parts(folder)
    todo = []
    for job in plan.jobs:
        path, now = folder / job.name, asdict(job)
        before = asdict(read_record(path / JOB, Job)) if job in started else now
        if (path / "checkpoints").is_dir() and (
            changes := differing(before["config"], now["config"])
        ):
            raise ConfigError(
                f"{path} was run with another config ({', '.join(changes[:3])}); "
                "choose another folder with -o, or delete this one"
            )
        if _run_of(job, path / RUN).status != "done" or before != now:
            (path / RUN).unlink(missing_ok=True)
            write_json(path / JOB, now)
            todo.append(job)
    if len(todo) < len(plan.jobs):
        logger.info("%d of %d jobs are already done", len(plan.jobs) - len(todo), len(plan.jobs))
    return todo


def _check_guides(jobs: Iterable[Job]) -> None:
    """Build the guides of the evaluations, so that errors appear before the trainings."""
    built: list[Any] = []
    for guide in (job.evaluation.get("guide") for job in jobs):
        if guide and guide not in built:
            try:
                build_guide(guide)
            except ConfigError as error:
                raise ConfigError(f"the guide of the plan's `evaluation:`: {error}") from error
            built.append(guide)


def _slots(jobs: int | None) -> list[dict[str, str]]:
    """Return the environment variables of each parallel process."""
    devices = torch.cuda.device_count()
    count = (devices or 1) if jobs is None else jobs
    if count < 1:
        raise ConfigError(f"--jobs must be a whole number > 0, got {jobs}")
    if count == 1:
        return [{}]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(devices)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    return [
        {"OMP_NUM_THREADS": threads}
        | ({"CUDA_VISIBLE_DEVICES": names[i % len(names)]} if devices else {})
        for i in range(count)
    ]


def _launch(folder: Path, root: Path, environment: Mapping[str, str]) -> Process:
    module = f"{__package__}.job"
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(root), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the jobs
        )


def _finish(job: Job, folder: Path, code: int) -> None:
    """Write run.json for a job that failed; the reason is the last line of its log."""
    if code == 0 and (folder / RUN).is_file():
        return
    lines = [line.strip() for line in _tail(folder / LOG).splitlines()]
    reason = next(filter(None, reversed(lines)), "")[:500] or f"exit code {code}"
    if code < 0:
        reason = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    logger.warning("%s failed: %s (%s)", job.name, reason, folder / LOG)
    write_json(folder / RUN, asdict(_not_done(job, "failed", reason)))


def _stop(processes: list[Process]) -> None:
    """Ask the jobs to save a checkpoint and exit, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _show(bar: Any, plan: Plan, folder: Path, running: list[Job]) -> None:
    done = 0
    for job in plan.jobs:
        steps = job.config["training"]["max_steps"]
        is_finished = (folder / job.name / RUN).is_file()
        done += steps if is_finished else min(steps, _logged_step(folder / job.name))
    bar.set_postfix_str(", ".join(_phase(job, folder / job.name) for job in running), refresh=False)
    bar.update(max(0, done - bar.n))
    if time.monotonic() - getattr(bar, "shown", 0.0) >= 1:  # keep the clock running
        bar.shown = time.monotonic()
        bar.refresh()


def _phase(job: Job, folder: Path) -> str:
    """Say what a running job is doing, according to its log and metrics.csv."""
    _, is_evaluating, log = _tail(folder / LOG).rpartition(EVALUATING.format(job.name))
    if is_evaluating:
        measured = re.findall(r"^measuring (\w+)$", log, re.MULTILINE)
        count = len(job.evaluation.get("metrics") or DEFAULT)
        if not measured:
            return f"{job.name} evaluating"
        return f"{job.name} measuring {measured[-1]} ({len(measured)} of {count} metrics)"
    step, steps = _logged_step(folder), job.config["training"]["max_steps"]
    return f"{job.name} training, step {step} of {steps}" if step else f"{job.name} starting"


def _logged_step(folder: Path) -> int:
    """Return the step in the last line of metrics.csv, or 0."""
    try:
        return int(_tail(folder / "metrics.csv").splitlines()[-1].split(",")[0])
    except (ValueError, IndexError):
        return 0


def _tail(path: Path, count: int = 16384) -> str:
    """Return the last `count` bytes of a file as text; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
