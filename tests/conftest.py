"""Shared fixtures: where the real data lies, and a fixed seed."""

import gc
import os
from pathlib import Path

import pytest
import torch


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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
