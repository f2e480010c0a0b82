"""The global generators that hosts draw from: seed, save and restore them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (CUDA's too)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def state(*, cuda: bool = True) -> dict[str, Any]:
    """Return all generators' states in containers that `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    kept: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64).copy()), *rest],
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        kept["cuda"] = torch.cuda.get_rng_state()
    return kept


def restore(kept: dict[str, Any]) -> None:
    """Set all generators to what :func:`state` returned."""
    version, words, gauss = kept["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = kept["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(kept["torch"].cpu())
    if "cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["cuda"].cpu())


@contextmanager
def preserved(*, cuda: bool = True) -> Iterator[None]:
    """Restore all generators at the end of the context."""
    kept = state(cuda=cuda)
    try:
        yield
    finally:
        restore(kept)
