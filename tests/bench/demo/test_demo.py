"""`lgvq demo`: two configs one line apart, one run of both, a table and a page that hold up."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lgvq_plugin.bench.demo as demo_module
from lgvq_plugin.bench.demo import PLAN
from lgvq_plugin.cli import main

FOLDER = Path(PLAN).parent
OFFLINE = Path(__file__).parents[2] / "stress" / "offline"


@pytest.fixture
def offline(monkeypatch):
    """No connection but to this machine, in this process and those that it starts."""
    paths = [str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def refuse(*arguments, **options):
        raise OSError(f"offline: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_offline_is_offline(offline):
    lookup = "import socket; socket.getaddrinfo('example.org', 80)"
    done = subprocess.run([sys.executable, "-c", lookup], capture_output=True, text=True)
    assert "OSError: offline: socket.getaddrinfo 'example.org'" in done.stderr


def test_baseline_and_lgvq_differ_in_one_line():
    before, after = (
        [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("baseline.yaml", "lgvq.yaml")
    )
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    old, new = (line.strip().removeprefix("target: ") for line in changed[0])
    assert new == f"lgvq_plugin.over.{old}"


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--seed", "-1"]])
def test_wrong_numbers_are_2(argv, capsys, tmp_path):
    assert main(["demo", "-o", str(tmp_path), *argv]) == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_the_demo_runs_and_its_table_is_the_results(tmp_path, capsys, monkeypatch):
    plan = tmp_path / "plan.yaml"
    text = Path(PLAN).read_text().replace("limit: 256", "limit: 24")
    text = text.replace("examples: 16", "examples: 4")
    for name in ("baseline.yaml", "lgvq.yaml"):
        config = (
            (FOLDER / name)
            .read_text()
            .replace("size: 64", "size: 32")
            .replace("length: 2048", "length: 32")
            .replace("channels: 96", "channels: 16")
        )
        (tmp_path / name).write_text(config.replace("batch_size: 16", "batch_size: 8"))
    plan.write_text(text)
    monkeypatch.setattr(demo_module, "PLAN", plan)
    out = tmp_path / "out"
    assert main(["demo", "-o", str(out), "--steps", "3", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == ["baseline", "lgvq"]
    row = next(line for line in printed.splitlines() if line.startswith("PSNR"))
    psnr = [run["evaluation"]["metrics"]["reconstruction/psnr"]["value"] for run in runs]
    assert row.split()[2:4] == [f"{value:.2f}" for value in psnr]
    each = [run["evaluation"]["metrics"]["reconstruction/psnr"]["per_image"] for run in runs]
    gap = sum(b - a for a, b in zip(*each, strict=True)) / 24
    low, high = (float(end.strip("[],")) for end in row.split()[5:7])
    assert row.split()[4] == f"{gap:+.2f}"
    assert low <= gap + 0.005
    assert high >= gap - 0.005
    signs = dict.fromkeys("▲△", low >= 0) | dict.fromkeys("▼▽", high <= 0)  # ends are rounded
    assert signs.get(row.split()[-1], low <= 0 <= high)
    for label in ("codebook usage", "image to text R@1", "attribute accuracy", "seconds per step"):
        assert len(next(li for li in printed.splitlines() if li.startswith(label)).split()) >= 4
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") >= 2 * 3  # inputs, and reconstructions of both
    curves = (out / "lgvq" / "seed_0" / "metrics.csv").read_text()
    assert "train/lgvq/global_semantic" in curves.splitlines()[0]
    # Called again it trains nothing, and says the same.
    before = (out / "lgvq" / "seed_0" / "run.json").stat().st_mtime_ns
    assert main(["demo", "-o", str(out), "--steps", "3", "--no-progress"]) == 0
    assert (out / "lgvq" / "seed_0" / "run.json").stat().st_mtime_ns == before
