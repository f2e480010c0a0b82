"""Shared fixtures: where the real data lies, and a fixed seed."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def shared() -> Path:
    """The folder of real data, or a skip that says how to give one."""
    root = os.environ.get("LGVQ_SHARED") or Path(__file__).parents[2] / "shared"
    data = Path(root) / "data"
    if not data.is_dir():
        pytest.skip(f"no real data at {data}: set LGVQ_SHARED to the folder that holds data/")
    return data


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
