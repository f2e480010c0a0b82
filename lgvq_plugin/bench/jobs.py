"""Run the jobs of a plan: processes side by side, a failed one told, a killed one resumed."""

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
from ..files import write_json
from ..guides.base import build_guide
from ..sockets import ConfigError
from .evaluate import DEFAULT
from .records import (
    EVALUATING,
    JOB,
    LOG,
    RESULTS,
    RUN,
    Job,
    Plan,
    Results,
    Run,
    Variant,
    read_record,
)

POLL_SECONDS = 0.2
logger = logging.getLogger(__name__)

Launch = Callable[[Path, Path, Mapping[str, str]], "subprocess.Popen[bytes]"]


class Interrupted(KeyboardInterrupt):
    """The user stopped an ablation; the message says how to go on."""


def run_plan(
    plan: Plan,
    folder: Path,
    *,
    resume: bool = False,
    jobs: int | None = None,
    progress: bool = True,
    launch: Launch | None = None,
) -> Results:
    """Run every job that is not done, and collect all of them.

    Args:
        plan: what to run.
        folder: of the ablation; results.json is rewritten after every job.
        resume: go on in a folder that holds runs; those that failed are tried again.
        jobs: processes side by side; None takes one for each CUDA device, else one.
        progress: whether to show a bar.
        launch: starts the process of a job, from (folder of the job, folder of the ablation,
            environment); by default this package's own.

    Raises:
        ConfigError: if the folder holds runs and `resume` is off, or runs of another config, or
            the guide of the evaluation cannot be built.
        Interrupted: after SIGINT, once the running jobs have saved.
    """
    slots = _slots(jobs)
    _check_guides(job for job in plan.jobs if not (folder / job.name / RUN).is_file())
    waiting = deque(_prepare(plan, folder, resume))
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    total = sum(job.config["training"]["max_steps"] for job in plan.jobs)
    bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=not progress, mininterval=1)
    handler = _interrupt_on_sigterm()
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
            f"interrupted; go on with the same command and --resume auto (runs in {folder})"
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
    """Return the results as they are on disk now; a job without any is `missing`."""
    runs = []
    for job in plan.jobs:
        path = folder / job.name / RUN
        if path.is_file():
            runs.append(_read_run(path, job))
        else:
            runs.append(_not_done(job, "missing", "not run yet"))
    configs = {job.variant: job.config for job in reversed(plan.jobs)}
    return Results(
        title=plan.title,
        references=plan.references,
        variants={
            k: Variant(**told, config=configs[k])  # type: ignore[typeddict-item]
            for k, told in plan.variants.items()
        },
        runs=tuple(runs),
    )


def _read_run(path: Path, job: Job) -> Run:
    run = read_record(path, Run)
    for name in ("data", "variant", "seed"):
        expected, got = getattr(job, name), getattr(run, name)
        require(got == expected, f"{path}: {name}", repr(expected), got)
    return run


def _interrupt_on_sigterm() -> Any:
    """Let SIGTERM do what Ctrl-C does; returns the handler before, None outside the main thread."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, interrupt)


def _prepare(plan: Plan, folder: Path, resume: bool) -> list[Job]:
    """Write job.json everywhere; return the jobs to run."""
    held = [job for job in plan.jobs if (folder / job.name / JOB).is_file()]
    if held and not resume:
        raise ConfigError(
            f"{str(folder)!r} holds runs already; go on with them by --resume auto, "
            "or choose another folder with -o"
        )
    todo = []
    for job in plan.jobs:
        path = folder / job.name
        given = asdict(job)
        before = asdict(read_record(path / JOB, Job)) if job in held else given
        if (path / "checkpoints").is_dir():
            _check_same(before["config"], given["config"], path)
        done = (path / RUN).is_file() and _read_run(path / RUN, job).status == "done"
        if done and before == given:
            continue
        (path / RUN).unlink(missing_ok=True)
        write_json(path / JOB, given)
        todo.append(job)
    if len(todo) < len(plan.jobs):
        logger.info("%d of %d jobs are done already", len(plan.jobs) - len(todo), len(plan.jobs))
    return todo


def _check_guides(jobs: Iterable[Job]) -> None:
    """Build the guides that evaluations ask for: a wrong one is told before the trainings."""
    built: list[Any] = []
    for guide in (job.evaluation.get("guide") for job in jobs):
        if guide and guide not in built:
            try:
                build_guide(guide)
            except ConfigError as error:
                raise ConfigError(f"the guide of the plan's `evaluation:`: {error}") from error
            built.append(guide)


def _check_same(before: Any, now: Any, path: Path) -> None:
    differ = differing(before, now)
    if differ:
        raise ConfigError(
            f"{path} was run with another config ({', '.join(differ[:3])}); "
            "choose another folder with -o, or delete this one"
        )


def _slots(jobs: int | None) -> list[dict[str, str]]:
    """Return what to add to the environment of each process that runs side by side."""
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


def _launch(folder: Path, root: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    module = f"{__package__}._job"
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(root), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches us alone; we tell the jobs
        )


def _finish(job: Job, folder: Path, code: int) -> None:
    """Put down why a job failed, if it did."""
    if code == 0 and (folder / RUN).is_file():
        return
    reason = _reason(folder / LOG, code)
    logger.warning("%s failed: %s (%s)", job.name, reason, folder / LOG)
    write_json(folder / RUN, asdict(_not_done(job, "failed", reason)))


def _reason(log: Path, code: int) -> str:
    """The last line of the log, which is the exception's; or the signal."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return last[:500] or f"exit code {code}"


def _not_done(job: Job, status: Any, reason: str) -> Run:
    return Run(data=job.data, variant=job.variant, seed=job.seed, status=status, reason=reason)


def _show(bar: Any, plan: Plan, folder: Path, running: list[Job]) -> None:
    done = 0
    for job in plan.jobs:
        steps = job.config["training"]["max_steps"]
        finished = (folder / job.name / RUN).is_file()
        done += steps if finished else min(steps, _logged_step(folder / job.name))
    bar.set_postfix_str(", ".join(_phase(job, folder / job.name) for job in running), refresh=False)
    bar.update(max(0, done - bar.n))
    if time.monotonic() - getattr(bar, "shown", 0.0) >= 1:  # the clock goes on in an evaluation
        bar.shown = time.monotonic()
        bar.refresh()


def _phase(job: Job, folder: Path) -> str:
    """Say what a running job does, as its log tells: starting, training, or which metric.

    Example:
        >>> job = Job(data="", variant="a", seed=0, config={"training": {"max_steps": 9}})
        >>> _phase(job, Path("nowhere"))
        'a/seed_0 starting'
    """
    log = folder / LOG
    told = _tail(log).rpartition(EVALUATING.format(job.name))
    measured = re.findall(r"^measuring (\w+)$", told[2], re.MULTILINE)
    names = job.evaluation.get("metrics") or DEFAULT
    if told[1] and measured:
        return f"{job.name} measuring {measured[-1]} ({len(measured)} of {len(names)} metrics)"
    if told[1]:
        return f"{job.name} evaluating"
    step = _logged_step(folder)
    steps = job.config["training"]["max_steps"]
    return f"{job.name} training, step {step} of {steps}" if step else f"{job.name} starting"


def _tail(path: Path, count: int = 16384) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _logged_step(folder: Path) -> int:
    """The step in the last line of metrics.csv."""
    try:
        return int(_tail(folder / "metrics.csv", 4096).splitlines()[-1].split(",")[0])
    except (ValueError, IndexError):
        return 0


def _stop(processes: list["subprocess.Popen[bytes]"]) -> None:
    """Ask the jobs to save and end, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
