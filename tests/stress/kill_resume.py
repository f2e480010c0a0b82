"""Kill commands at random moments, resume them, and compare with a run that was left alone.

    python tests/stress/kill_resume.py --moments 50 [--only train-vqvae ...] [--seed 0]

A moment is one of the command's own writes (a file opened for writing, renamed, linked, removed, a
folder made), drawn evenly, and a delay of 0 to 0.3 s after it. Each kind of damage takes its turn:
signals, a disk that is full from then on, a folder that becomes read-only, a dead data worker.
Imports happen once, in a process that is forked for every run. Linux only.
"""

import argparse
import collections
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from lgvq_plugin import cli
from lgvq_plugin.bench import ablate, evaluate, evaluation, job, jobs, plan  # noqa: F401
from lgvq_plugin.datasets import cache, commands, images  # noqa: F401
from lgvq_plugin.guides import cached
from lgvq_plugin.training import callbacks, run, state  # noqa: F401

DAMAGES = ("kill", "term", "kill", "int", "kill", "disk", "kill", "read-only", "term", "worker")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
TIMED = re.compile(r"seconds|cost|memory|timing|_per_second|report|device|resumed")
CHANGING = re.compile(r"events\.out\.|log\.txt$|cost\.json$|report\.(html|md)$|\.part$")
ORPHAN_SECONDS = 30.0
WRITES = os.O_WRONLY | os.O_RDWR


@dataclass
class Command:
    """A command line that writes into `out`, and what resumes it."""

    name: str
    argv: list[str]
    out: Path
    resume: tuple[str, ...] = ()
    workers: bool = False
    whole: Path = Path()
    writes: int = 0


@dataclass
class Tally:
    """What became of the runs of one command."""

    cases: collections.Counter = field(default_factory=collections.Counter)
    same: collections.Counter = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    exact_bytes: int = 0
    slowest_orphan: float = 0.0
    fell_back: int = 0


class Child:
    """A forked process that runs `lgvq ARGV`, and stops at its `moment`-th write."""

    def __init__(
        self,
        command: Command,
        argv: list[str],
        moment: int = 0,
        disk: int | None = None,
        modules: Path | None = None,
    ):
        self.count = mmap.mmap(-1, 8)
        self.stopped, stop = os.pipe()
        go, self.go = os.pipe()
        self.text, text = os.pipe()
        fcntl.fcntl(text, 1031, 1 << 20)  # F_SETPIPE_SZ: RLIMIT_FSIZE would cut a log file
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(text, 1)
            os.dup2(text, 2)
            for number in (self.stopped, self.go, self.text):
                os.close(number)
            sys.addaudithook(_hook(str(command.out), self.count, moment, stop, go, disk))
            code = 70
            try:
                logging.root.handlers.clear()
                jobs._launch = _launch
                code = cli.main(argv)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                    if modules:
                        modules.write_text("\n".join(sys.modules))
                os._exit(code)
        for number in (stop, go, text):
            os.close(number)

    def reached(self) -> bool:
        """Wait for the moment; False if the process ended before."""
        return bool(os.read(self.stopped, 1))

    def proceed(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.go, b"!")

    def end(self) -> tuple[int, str, float]:
        """Return exit code, output, and the seconds that its last descendant outlived it."""
        _, status = os.waitpid(self.pid, 0)
        code, since, waited = os.waitstatus_to_exitcode(status), time.monotonic(), 0.0
        while _reap():
            waited = time.monotonic() - since
            if waited > ORPHAN_SECONDS:
                for process in _children(os.getpid()):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        os.set_blocking(self.text, False)
        output = b""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.text, 1 << 20):
                output += more
        for number in (self.stopped, self.go, self.text):
            os.close(number)
        return code, output.decode(errors="replace"), waited


def _hook(
    out: str, count: mmap.mmap, moment: int, stop: int, go: int, disk: int | None
) -> Callable[[str, tuple], None]:
    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            if not (set(mode or "") & set("wax+") or (flags or 0) & WRITES):
                return
        elif event in ("os.rename", "os.link", "os.remove", "os.mkdir"):
            path = args[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(out):
            return
        number = int.from_bytes(count[:8], "little") + 1
        count[:8] = number.to_bytes(8, "little")
        if number == moment:
            if disk is not None:
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (disk, hard))
            os.write(stop, b"!")
            os.read(go, 1)

    return hook


class Forked:
    """A job of `lgvq ablate` as a fork, with the methods of a Popen that `jobs` calls."""

    def __init__(self, folder: Path, root: Path):
        parent, self.returncode = os.getpid(), None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
            code = 1
            try:
                log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = job.main([str(folder), str(root), str(parent)])
            except BaseException:
                logging.exception("the job ended")
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("job", timeout)
            time.sleep(0.02)


def _launch(folder: Path, root: Path, environment: object) -> Forked:
    return Forked(folder, root)


def _children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def _reap() -> bool:
    """Collect ended orphans, which come to this process; return whether one still runs."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    except ChildProcessError:
        return False


@contextlib.contextmanager
def read_only(out: Path) -> Iterator[bool]:
    """Make everything in `out` immutable: permissions do not bind root."""
    place = out if out.exists() else out.parent
    done = subprocess.run(["chattr", "-R", "+i", str(place)], capture_output=True).returncode == 0
    try:
        yield done
    finally:
        subprocess.run(["chattr", "-R", "-i", str(place)], capture_output=True)


# -- the commands --------------------------------------------------------------------------------


def build_commands(work: Path) -> list[Command]:
    """Write the data, the configs and the plan, and return the commands to kill."""
    _write_images(work / "images")
    guide = {"use": "micro_clip"}
    data = {
        "batch_size": 4,
        "num_workers": 1,
        **{
            split: {
                "target": "folder",
                "params": {"root": str(work / "images"), "size": 16, "split": split},
            }
            for split in ("train", "validation")
        },
    }
    steps = {"max_steps": 6, "checkpoint_every": 2, "keep_checkpoints": None, "log_every": 1}
    more = {"val_every": 5, "images_every": 9, "ema_decay": 0.9, "accelerator": "cpu"}
    small = {"n_embed": 16, "embed_dim": 8, "channels": 8, "num_res_blocks": 1, "downsample": 4}
    vqvae = {
        "learning_rate": 1e-3,
        "target": "lgvq_plugin.hosts.vqvae.VQVAE",
        "params": {
            **small,
            "quantizer": "ema",
            "lossconfig": {
                "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
                "params": {
                    "lgvq": {"guide": guide, "objectives": {"masked_text": {"weight": 0.05}}}
                },
            },
        },
    }
    sizes = {"z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape = {"double_z": False, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    gan = {"disc_start": 2, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}
    vqgan = {
        "base_learning_rate": 1e-3,
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 4,
            "n_embed": 16,
            "ddconfig": {**sizes, **shape, "dropout": 0.1},
            "lossconfig": {
                "target": "lgvq_plugin.LGVQLoss",
                "params": {**gan, "lgvq": {"guide": guide}},
            },
        },
    }
    for name, model in (("vqvae", vqvae), ("vqgan", vqgan)):
        config = {"model": model, "data": data, "training": {**steps, **more}}
        (work / f"{name}.yaml").write_text(yaml.safe_dump(config))
    variants = {
        "base": ["vqvae.yaml"],
        "seeds": [0],
        "variants": {
            "baseline": {
                "model.params.lossconfig.target": "lgvq_plugin.hosts.vqvae.VQVAELoss",
                "model.params.lossconfig.params": None,
            },
            "lgvq": {},
        },
        "evaluation": {"metrics": ["psnr", "usage"], "limit": 8},
        "examples": 2,
    }
    (work / "plan.yaml").write_text(yaml.safe_dump(variants))
    quiet, made = "--no-progress", []
    for name in ("vqvae", "vqgan"):
        argv = ["train", "-b", str(work / f"{name}.yaml"), "--name", name, "--logdir", str(work)]
        out = work / name
        made.append(Command(f"train-{name}", [*argv, quiet], out, ("--resume", "auto"), True))
    out = work / "ablation"
    argv = ["ablate", "-b", str(work / "plan.yaml"), "-o", str(out), "--jobs", "2", quiet]
    made.append(Command("ablate", argv, out, ("--resume", "auto"), True))
    out = work / "texts"
    argv = ["cache", "-b", str(work / "vqvae.yaml"), "-o", str(out), "--batch-size", "4", quiet]
    made.append(Command("cache", argv, out))
    for form in ("webdataset", "folder"):
        out = work / f"converted-{form}"
        argv = ["data", "convert", str(work / "images"), str(out), "--format", form, "--size", "16"]
        argv += ["--shard-size", "5", "--workers", "2", quiet]
        made.append(Command(f"convert-{form}", argv, out))
    out = work / "measured"
    argv = ["eval", "--ckpt", str(work / "trained"), "-o", str(out), "--json", str(out / "r.json")]
    argv += [
        "--csv",
        str(out / "r.csv"),
        "--metrics",
        "psnr,ssim,usage,retrieval",
        "--force",
        quiet,
    ]
    made.append(Command("eval", [*argv, "evaluation.num_workers=1"], out, (), True))
    return made


def _write_images(folder: Path) -> None:
    rng, words = np.random.default_rng(0), ("red", "blue", "green", "large", "small")
    folder.mkdir(parents=True)
    rows = []
    for number in range(36):
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(6, 0).repeat(6, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        captions = [f"a {words[number % 5]} square", f"{number} {words[number % 3]} circles"]
        split = "validation" if number % 4 == 0 else "train"
        row = {"file_name": f"{number:02d}.png", "captions": captions, "split": split}
        rows.append(json.dumps(row))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")


# -- comparing -----------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def content_of(path: Path) -> object:
    """Read a file completely; what cannot be read is half a file."""
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)
    if path.suffix in (".json", ".jsonl"):
        return [_untimed(json.loads(line)) for line in [path.read_text()] if path.suffix == ".json"
                ] or [json.loads(line) for line in path.read_text().splitlines()]  # fmt: skip
    if path.suffix in (".yaml", ".yml"):
        return yaml.safe_load(path.read_text())
    if path.suffix == ".png":
        return Image.open(path).convert("RGBA").tobytes()
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            return [(m.name, tar.extractfile(m).read()) for m in tar]
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if path.name == "values.csv":
        return [row for row in path.read_text().splitlines() if not TIMED.search(row)]
    return path.read_bytes()


def _untimed(node: object) -> object:
    if isinstance(node, dict):
        return {k: _untimed(v) for k, v in node.items() if not TIMED.search(str(k))}
    return [_untimed(v) for v in node] if isinstance(node, list) else node


def equal(a: object, b: object) -> bool:
    """Compare nested containers; tensors bit by bit, NaN equal to itself."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (
            a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        )  # fmt: skip
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def compare(command: Command) -> tuple[list[str], bool]:
    """Return what differs from the undisturbed run, and whether all bytes are the same."""
    have, want = files_of(command.out), files_of(command.whole)
    wrong, exact = [], True
    for name, path in want.items():
        if CHANGING.search(name):
            continue
        if name not in have:
            wrong.append(f"{name} is missing")
        elif have[name].read_bytes() != path.read_bytes():
            exact = False
            if not equal(content_of(have[name]), content_of(path)):
                wrong.append(f"{name} differs")
    extra = [n for n in have.keys() - want.keys() if not re.search(r"step=\d+\.ckpt$", n)]
    wrong += [f"{name} is left over" for name in sorted(extra) if "events.out" not in name]
    return wrong, exact


def damaged(folder: Path) -> list[str]:
    """Return the files in `folder` that are not whole, though their names say so."""
    found = []
    for name, path in files_of(folder).items():
        if name.endswith((".part", ".txt")) or CHANGING.search(name) or path.suffix == ".csv":
            continue  # a half row at the end of metrics.csv is dropped on resume
        try:
            content_of(path)
        except Exception as error:
            found.append(f"{name} is half a file ({type(error).__name__})")
    return found


# -- one case ------------------------------------------------------------------------------------


def disturb(command: Command, damage: str, rng: random.Random, tally: Tally) -> list[str]:
    """Run a command, damage it once, resume it; return the faults."""
    shutil.rmtree(command.out, ignore_errors=True)
    moment = rng.randint(1, command.writes)
    delay = rng.choice((0.0, 0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
    disk = (
        rng.choice((0, rng.randint(1, 4096), rng.randint(1, 60_000))) if damage == "disk" else None
    )
    child, faults = Child(command, command.argv, moment, disk), []
    with contextlib.ExitStack() as stack:
        if child.reached():
            if damage in SIGNALS and delay == 0:
                os.kill(child.pid, SIGNALS[damage])
            elif damage == "read-only" and not stack.enter_context(read_only(command.out)):
                tally.cases["read-only (skipped: no chattr)"] += 1
                stack.close()
            child.proceed()
            if damage in SIGNALS and delay > 0:
                time.sleep(delay)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, SIGNALS[damage])
            elif damage == "worker":
                _kill_worker(child.pid)
        code, text, outlived = child.end()
    tally.slowest_orphan = max(tally.slowest_orphan, outlived)
    if outlived > ORPHAN_SECONDS:
        faults.append(f"a process outlived its parent by {outlived:.0f} s")
    expected = {"kill": (-9, 0), "term": (130, -15, 0), "int": (130, 0)}.get(damage, (0, 2))
    if command.name == "ablate" and damage in ("disk", "read-only", "worker"):
        expected = (0, 1, 2)  # the report names the job that failed
    if code not in expected or (code != 0 and "Traceback" in text):
        faults.append(f"exit code {code}: {text.strip()[-1500:]}")
    if damage == "worker" and code == 2 and not re.search(r"images/\d\d\.png", text):
        faults.append(f"the file of the dead worker is not named: {text.strip()[-300:]}")
    faults += damaged(command.out)
    is_truncated = (
        command.name.startswith("train") and rng.random() < 0.3 and _truncate(command.out)
    )
    code, text, _ = Child(command, [*command.argv, *command.resume]).end()
    if code != 0:
        return [*faults, f"resume: exit code {code}: {text.strip()[-600:]}"]
    if is_truncated:
        tally.fell_back += 1
        if "resuming from the one before it" not in text:
            faults.append(f"no warning of a fallback: {text[-300:]}")
    parts = [str(p.relative_to(command.out.parent)) for p in command.out.rglob("*.part")]
    faults += [f"{part} stays" for part in parts]
    wrong, exact = compare(command)
    tally.exact_bytes += exact and not wrong
    if not wrong:
        tally.same[damage] += 1
    return [*faults, *wrong]


def _truncate(folder: Path) -> bool:
    """Cut the newest checkpoint, if there is one before it."""
    steps = sorted((folder / "checkpoints").glob("step=*.ckpt"))
    if len(steps) < 2:
        return False
    for path in (steps[-1], folder / "checkpoints/last.ckpt"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    # last.ckpt may be the one before the newest: then it was the same file as that step's.
    return any(_is_sound(path) for path in steps)


def _is_sound(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def _kill_worker(process: int, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and Path(f"/proc/{process}").exists():
        below = _children(process)
        below += [worker for one in below for worker in _children(one)]
        named = [p for p in below if "pt_data_worker" in _name(p)]
        if named or (below and time.monotonic() > end - seconds / 2):
            with contextlib.suppress(ProcessLookupError):
                os.kill((named or below)[-1], signal.SIGKILL)
            return
        time.sleep(0.005)


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="of each command")
    parser.add_argument("--only", nargs="+", default=[""], help="commands whose name starts so")
    parser.add_argument("--damage", nargs="+", default=DAMAGES, choices=sorted(set(DAMAGES)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="default: a temporary folder, removed after")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
    cached.SHARD_BYTES = 1  # several shards
    with tempfile.TemporaryDirectory() as folder:
        work = (given.work or Path(folder)).resolve() / "w"
        commands = [c for c in build_commands(work) if c.name.startswith(tuple(given.only))]
        _train_once(work)
        failed = 0
        tallies = {}
        for command in commands:
            tallies[command.name] = _stress(command, given)
            failed += len(tallies[command.name].faults)
    print(f"\n{'command':<20}{'cases':<56}{'same':>5}{'bytes':>7}{'fell back':>11}{'orphan':>9}")
    for name, tally in tallies.items():
        cases = " ".join(f"{k} {v}" for k, v in sorted(tally.cases.items()))
        total = f"{sum(tally.same.values())}/{sum(tally.cases.values())}"
        print(f"{name:<20}{cases:<56}{total:>7}{tally.exact_bytes:>5}{tally.fell_back:>9}"
              f"{tally.slowest_orphan:>9.1f} s")  # fmt: skip
    print(f"{failed} faults")
    for name, tally in tallies.items():
        for fault in tally.faults:
            print(f"{name}: {fault}")
    return int(failed > 0)


def _train_once(work: Path) -> None:
    """Train the checkpoint that `lgvq eval` measures."""
    argv = ["train", "-b", str(work / "vqvae.yaml"), "--name", "trained", "--logdir", str(work)]
    code, text, _ = Child(Command("", argv, work / "trained"), [*argv, "--no-progress"]).end()
    if code:
        raise SystemExit(text)


def _stress(command: Command, given: argparse.Namespace) -> Tally:
    tally, rng = Tally(), random.Random(f"{given.seed} {command.name}")
    modules = command.out.with_name("modules.txt")
    Child(command, command.argv, modules=modules).end()
    for name in modules.read_text().split():  # so that no fork has to import them again
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    shutil.rmtree(command.out)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    begin = time.monotonic()
    child = Child(command, command.argv)
    code, text, _ = child.end()
    seconds = time.monotonic() - begin
    if code:
        raise SystemExit(f"{command.name}: the undisturbed run failed:\n{text}")
    command.writes = int.from_bytes(child.count[:8], "little")
    command.whole = command.out.with_name(f"{command.out.name}-whole")
    command.out.rename(command.whole)
    print(f"{command.name}: {command.writes} writes in {seconds:.1f} s", flush=True)
    kinds = [d for d in given.damage if command.workers or d != "worker"]
    for number in range(given.moments):
        damage = kinds[number % len(kinds)]
        tally.cases[damage] += 1
        faults = disturb(command, damage, rng, tally)
        tally.faults += [f"case {number}, {damage}: {fault}" for fault in faults]
        print(
            f"  {number + 1}/{given.moments} {damage}: {'; '.join(faults)[:2000] or 'ok'}",
            flush=True,
        )
    return tally


if __name__ == "__main__":
    raise SystemExit(main())
