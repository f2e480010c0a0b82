"""The common part of data sets that are a list of image files with captions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sockets import ConfigError
from ._draws import Draws
from ._image import Pipeline, UnreadableImage
from .base import CaptionedImages

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One image file: the name that samples show, where it lies, and its captions."""

    file: str
    path: Path
    captions: tuple[str, ...]


class ListedImages(CaptionedImages):
    """Serve records through a :class:`Pipeline`; members only say how records are found.

    A file that cannot be read raises ConfigError; with `skip_corrupt` the next good record
    takes its place, always the same one, and `skipped` (file -> reason) tells.
    """

    def __init__(
        self,
        records: Sequence[Record],
        pipeline: Pipeline,
        *,
        seed: int = 0,
        skip_corrupt: bool = False,
    ):
        self.records, self.pipeline = list(records), pipeline
        self.seed, self.skip_corrupt = seed, skip_corrupt
        self.skipped: dict[str, str] = {}
        Draws(seed)  # refuses a negative seed here and not in a worker

    def __len__(self) -> int:
        """Return the number of records, broken ones included."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`; negative counts from the end."""
        total = len(self.records)
        if not -total <= index < total:
            raise IndexError(f"{type(self).__name__} has {total} samples, no {index}")
        for step in range(total):
            place = (index + step) % total
            record = self.records[place]
            if record.file in self.skipped:
                continue
            try:
                return self._sample(record, place)
            except UnreadableImage as error:
                self._skip(record, error)
        raise ConfigError(f"{type(self).__name__}: none of {total} images can be read")

    def skipped_summary(self) -> str:
        """Return one line about the images left out so far in this process.

        Workers of a DataLoader count for themselves.
        """
        if not self.skipped:
            return "no image skipped"
        first = next(iter(self.skipped.values()))
        return f"{len(self.skipped)} of {len(self)} images skipped; first: {first}"

    def _sample(self, record: Record, index: int) -> dict[str, Any]:
        draws = Draws(self.seed, self.epoch, index)
        # The caption is drawn first, so that another crop or size leaves it as it is.
        caption = draws.pick(record.captions) if record.captions else ""
        return {
            "image": self.pipeline(record.path, draws),
            "caption": caption,
            "captions": list(record.captions),
            "file": record.file,
            "index": index,
        }

    def _skip(self, record: Record, error: UnreadableImage) -> None:
        if not self.skip_corrupt:
            raise ConfigError(
                f"{error}; mend or remove it, or set `skip_corrupt: true` to skip such files"
            ) from error
        if not self.skipped:
            log.warning("%s; the next good image takes its place (skip_corrupt)", error)
        self.skipped[record.file] = str(error)
