"""Jobs run in parallel; failed ones are reported, killed ones resumed, finished ones kept."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from lgvq_plugin.bench.jobs import Interrupted, _phase, run_plan
from lgvq_plugin.bench.records import Job, Plan, Results
from lgvq_plugin.sockets import ConfigError

CONFIG = {"training": {"max_steps": 3}}

# What a job does instead of training: it says when it ran, and fails if its seed says so.
WORK = """
import glob, json, os, sys, time
folder = sys.argv[1]
job = json.load(open(folder + "/job.json"))
with open(folder + "/begun", "a") as file:
    file.write(os.environ.get("OMP_NUM_THREADS", "") + "\\n")
if job["variant"] == "slow":
    time.sleep(60)
if job["variant"].startswith("together"):  # ends only if four of them run at once
    for _ in range(600):
        if len(glob.glob(folder + "/../../together_*/seed_*/begun")) == 4:
            break
        time.sleep(0.1)
    else:
        raise TimeoutError("the others did not begin")
if job["variant"] == "broken" and not os.path.exists(folder + "/fixed"):
    raise FloatingPointError("step 7: the loss is not finite")
metrics = {"usage": {"value": job["seed"], "n": 1, "unit": "", "higher_is_better": True}}
run = {key: job[key] for key in ("data", "variant", "seed")} | {"evaluation": {"metrics": metrics}}
time.sleep(0.3)
with open(folder + "/run.part", "w") as file:
    json.dump(run, file)
os.replace(folder + "/run.part", folder + "/run.json")
"""


def launch(folder, root, environment):
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", WORK, str(folder)],
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )


def plan(*variants, seeds=2, config=CONFIG):
    jobs = [Job(data="", variant=v, seed=s, config=config) for v in variants for s in range(seeds)]
    shown = {variant: {} for variant in variants}
    return Plan(title="t", references=(variants[0],), variants=shown, jobs=tuple(jobs))


def go(a_plan, folder, **options):
    return run_plan(a_plan, folder, progress=False, launch=launch, **options)


@pytest.mark.slow
def test_all_jobs_are_collected(tmp_path):
    results = go(plan("a", "b"), tmp_path)
    assert [(run.variant, run.seed, run.status) for run in results.runs] == [
        *(("a", 0, "done"), ("a", 1, "done"), ("b", 0, "done"), ("b", 1, "done")),
    ]
    assert Results.load(tmp_path / "results.json") == results
    assert results.variants["a"]["config"] == CONFIG


@pytest.mark.slow
def test_a_failed_job_is_reported_and_the_others_continue(tmp_path):
    results = go(plan("a", "broken", "c", seeds=1), tmp_path)
    assert [run.status for run in results.runs] == ["done", "failed", "done"]
    assert results.runs[1].reason == "FloatingPointError: step 7: the loss is not finite"
    assert results.runs[1].metrics == {}


def test_a_guide_that_only_the_evaluation_needs_is_tried_before_the_first_job(tmp_path):
    guide = {"use": "cached", "folder": str(tmp_path / "nowhere")}
    good = plan("a", "b")
    jobs = tuple(replace(job, evaluation={"guide": guide}) for job in good.jobs)
    with pytest.raises(ConfigError, match=r"guide of the plan's `evaluation:`: .*nowhere"):
        go(replace(good, jobs=jobs), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_resume_runs_only_what_is_not_done(tmp_path):
    go(plan("a", "broken", seeds=1), tmp_path)
    (tmp_path / "broken/seed_0/fixed").touch()
    results = go(plan("a", "broken", seeds=1), tmp_path, resume=True)
    assert [run.status for run in results.runs] == ["done", "done"]
    begun = [(tmp_path / v / "seed_0/begun").read_text().count("\n") for v in ("a", "broken")]
    assert begun == [1, 2]


def test_a_folder_with_runs_is_not_overwritten(tmp_path):
    go(plan("a", seeds=1), tmp_path)
    with pytest.raises(ConfigError, match="--resume auto"):
        go(plan("a", seeds=1), tmp_path)


def test_runs_of_another_config_are_not_mixed_in(tmp_path):
    go(plan("a", seeds=1), tmp_path)
    (tmp_path / "a/seed_0/checkpoints").mkdir()
    other = {"training": {"max_steps": 5}}
    with pytest.raises(ConfigError, match=r"training\.max_steps: 3 then, 5 now"):
        go(plan("a", seeds=1, config=other), tmp_path, resume=True)


@pytest.mark.slow
def test_jobs_run_in_parallel_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    results = go(plan("together_a", "together_b"), tmp_path, jobs=4)
    assert [run.status for run in results.runs] == ["done"] * 4
    threads = (tmp_path / "together_a/seed_0/begun").read_text().strip()
    assert int(threads) == max(1, (os.cpu_count() or 1) // 4)


def test_a_killed_job_says_so(tmp_path):
    def kill(folder, root, environment):
        process = launch(folder, root, environment)
        process.send_signal(signal.SIGKILL)
        return process

    results = run_plan(plan("slow", seeds=1), tmp_path, progress=False, launch=kill)
    assert results.runs[0].reason == "killed by signal 9 (out of memory?)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_jobs_and_the_message_says_how_to_resume(tmp_path, number, request):
    # A shell that starts the tests in the background has them ignore SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    handlers = [signal.getsignal(some) for some in (signal.SIGINT, signal.SIGTERM)]
    processes = []

    def watched(folder, root, environment):
        processes.append(launch(folder, root, environment))
        return processes[-1]

    timer = threading.Timer(0.8, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(Interrupted, match="--resume auto"):
        run_plan(plan("slow", seeds=1), tmp_path, progress=False, launch=watched)
    assert processes[0].poll() is not None
    assert not (tmp_path / "slow/seed_0/run.json").exists()
    assert handlers == [signal.getsignal(some) for some in (signal.SIGINT, signal.SIGTERM)]


def test_the_bar_says_what_each_job_does(tmp_path):
    (job,) = plan("a", seeds=1).jobs
    job = replace(job, evaluation={"metrics": ["psnr", "usage"]})
    said = [_phase(job, tmp_path)]
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    said.append(_phase(job, tmp_path))
    for line in ("evaluating a/seed_0", "measuring psnr", "measuring usage"):
        with (tmp_path / "log.txt").open("a") as log:
            log.write(f"{line}\n")
        said.append(_phase(job, tmp_path))
    assert [text.removeprefix("a/seed_0 ") for text in said] == [
        *("starting", "training, step 2 of 3", "evaluating"),
        *("measuring psnr (1 of 2 metrics)", "measuring usage (2 of 2 metrics)"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "<script>alert(1)</script>"}, r"run\.json: seed: expected a whole number"),
        ({"seed": 7}, r"run\.json: seed: expected 0, got 7"),
        ({"curves": {"loss": [[1]]}}, r"run\.json: curves\.loss\[0\]: expected 2 values"),
        ({"evaluation": {"metrics": [1]}}, r"run\.json: evaluation\.metrics: expected a mapping"),
        ({"notes": 1}, r"run\.json: notes: expected one of data, variant, seed"),
        ({"status": None}, r"run\.json: status: expected 'done' or 'failed' or 'missing'"),
    ],
)
def test_a_changed_run_file_is_refused_by_its_key(tmp_path, change, message):
    go(plan("a", seeds=1), tmp_path)
    file = tmp_path / "a/seed_0/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        go(plan("a", seeds=1), tmp_path, resume=True)


def test_jobs_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="--jobs"):
        go(plan("a"), tmp_path, jobs=0)


def test_the_job_file_is_the_job(tmp_path):
    go(plan("a", seeds=1), tmp_path)
    job = Job(**json.loads((tmp_path / "a/seed_0/job.json").read_text()))
    assert job == plan("a", seeds=1).jobs[0]
