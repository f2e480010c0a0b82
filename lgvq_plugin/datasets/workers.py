"""Name the file that a process which loads samples held when it died."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, get_worker_info

from ..sockets import ConfigError
from .base import CaptionedImages

DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]+)")
"""What torch says of workers that died."""


_watched: "WeakSet[Watched]" = WeakSet()


class Watched(Dataset):
    """A data set that notes, in shared memory, which sample each worker took last.

    An index may be a tuple that ends in the number of the sample, as of `training.data.AtEpoch`.
    """

    def __init__(self, dataset: Any, workers: int):
        self.dataset = dataset
        _watched.add(self)
        self._taken = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()  # process, sample

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return a sample."""
        if (worker := get_worker_info()) is not None:
            number = index[-1] if isinstance(index, tuple) else index
            self._taken[worker.id] = torch.tensor([os.getpid(), number])
        return self.dataset[index]

    def taken_by(self, process: int) -> str | None:
        """Return the file, or else the number, of the sample that a worker took last."""
        for worker, number in self._taken.tolist():
            if worker == process:
                return _name(self.dataset, number)
        return None


def _name(dataset: Any, index: int) -> str:
    while hasattr(dataset, "dataset"):  # a data set around another one
        order = getattr(dataset, "indices", None)  # torch's Subset
        dataset, index = dataset.dataset, index if order is None else order[index]
    is_known = isinstance(dataset, CaptionedImages)
    return dataset.origin(index) if is_known else f"sample {index}"


@contextmanager
def naming_files() -> Iterator[None]:
    """Turn torch's error about a worker that died into a ConfigError with the file it held.

    torch raises it wherever the main process is at that moment, not only where it reads a batch.
    """
    try:
        yield
    except Exception as error:
        found = DEAD.search(str(error))
        if found is None:
            raise
        processes = [*map(int, found[1].split(","))]
        held = [one.taken_by(process) for process in processes for one in [*_watched]]
        files = ", ".join(filter(None, held)) or "not known"
        raise ConfigError(
            f"a worker of num_workers died: process {found[1]} {found[2].strip()}; the last that "
            f"it read: {files}. If the system ran out of memory, lower num_workers; if that file "
            "crashes its decoder, with num_workers: 0 too, remove it"
        ) from error
