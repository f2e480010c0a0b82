"""The miniature trees of tests/datasets, and folders of small pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # for disk_trees


@pytest.fixture
def trees():
    """Makers of a tree: name of a member -> function of a folder, to constructor arguments."""
    from disk_trees import TREES

    return TREES


@pytest.fixture
def pictures():
    """A function that fills a folder with noisy pictures of 60 x 40 pixels and two captions."""

    def fill(root, count, suffix="jpg"):
        root.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0)
        for k in range(count):
            pixels = noise.integers(0, 255, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{k:03d}.{suffix}")
            (root / f"{k:03d}.txt").write_text(f"a dog number {k}\nsome animal\n")
        return root

    return fill
