"""Makers of miniature data sets for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for disk_trees


@pytest.fixture
def trees():
    """Makers of a tree: name of a member -> function of a folder, to constructor arguments."""
    from disk_trees import TREES

    return TREES
