"""Shared fixtures: where the real data lies, and a fixed seed."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

STRESS = ("kill_resume", "nonfinite", "soak", "versions")
collect_ignore = [f"stress/{name}.py" for name in STRESS]  # scripts, with options of their own


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collection: a full one takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """The folder of real data, or a skip that says how to give one."""
    root = os.environ.get("LGVQ_SHARED") or Path(__file__).parents[2] / "shared"
    data = Path(root) / "data"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}: set LGVQ_SHARED to the folder that holds data/")
    return data


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install another package for the test: install(name, entry_points, source of its module)."""
    names, home = [], tmp_path / "site"
    home.mkdir()

    def make(name: str, entry_points: str, source: str = "") -> Path:
        if source:
            (home / f"{name}.py").write_text(source)
            names.append(name)
        info = home / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(home)
        return home

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
