"""The common part of data sets that are a list of image files with captions."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..sockets import ConfigError, suggest
from ._draws import HashedDraws
from ._image import Pipeline, Source, UnreadableImage, examine, shrink
from .base import CaptionedFiles, Health

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One image file: the name that samples show, where it lies, and its captions."""

    file: str
    path: Source
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the sample, such as `questions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How listed images are served; the options that all data sets of image files take."""

    size: int = 64
    """Height and width in pixels."""
    crop: str = "center"
    """center, random: the largest square; none: the whole image, padded with white."""
    flip: bool = False
    """Mirror every other image; captions that say left and right become wrong."""
    captions_per_image: int | None = None
    """Keep at most so many captions of an image, the first ones; null = all."""
    seed: int = 0
    """Of the draws of caption, crop and flip."""
    channel_first: bool = False
    """(3, H, W) images instead of (H, W, 3)."""
    skip_corrupt: bool = False
    """Put the next good image in the place of one that is missing or cannot be read."""

    def __post_init__(self) -> None:
        most = self.captions_per_image
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ConfigError(f"captions_per_image must be an int >= 1 or null, got {most!r}")
        HashedDraws(self.seed)  # refuses a negative seed here and not in a worker

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Reading":
        """Build it from keyword arguments; raises ConfigError for an unknown one."""
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"no option {name!r}{suggest(name, known)}")
        return cls(**options)

    @property
    def pipeline(self) -> Pipeline:
        """From file to array."""
        return Pipeline(
            size=self.size, crop=self.crop, flip=self.flip, channel_first=self.channel_first
        )


class ListedImages(CaptionedFiles):
    """Serve records as a :class:`Reading` says; members only say how records are found.

    A file that cannot be read raises ConfigError; with `skip_corrupt` the next good record
    takes its place, always the same one, and `skipped` (file -> reason) tells.

    Args:
        records: the images, in order.
        reading: size, crop and so on.
        where: what to call the data set in an error.

    Raises:
        ConfigError: if there are no records, or some files do not exist (without skip_corrupt).
    """

    def __init_subclass__(cls) -> None:
        """Let the signature of a member list what its `**options` may hold."""
        super().__init_subclass__()
        own = inspect.signature(cls.__init__)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        if len(named) + 1 < len(own.parameters):
            names = {one.name for one in named}
            named += [
                inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default)
                for entry in fields(Reading)
                if entry.name not in names
            ]
        cls.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]

    def __init__(self, records: Sequence[Record], reading: Reading, *, where: Any = "data set"):
        most = reading.captions_per_image
        if most is not None:
            records = [Record(r.file, r.path, r.captions[:most], r.extra) for r in records]
        if not records:
            raise ConfigError(f"{where}: no images; check root and split")
        self.records, self.pipeline = list(records), reading.pipeline
        self.seed, self.skip_corrupt = reading.seed, reading.skip_corrupt
        self.skipped: dict[str, str] = {}
        lost = [] if self.skip_corrupt else [r for r in records if not r.path.is_file()]
        if lost:
            raise ConfigError(
                f"{where}: {len(lost)} of {len(records)} images do not exist, first: "
                f"{lost[0].file}, sought at {lost[0].path}; mend the list, or set "
                "`skip_corrupt: true` to skip them"
            )

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

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a sample without opening its image."""
        return list(self.records[index].captions)

    def file_of(self, index: int) -> str:
        """Return the name that a sample shows as `file`."""
        return self.records[index].file

    def shrunken(self, index: int, size: int, *, square: bool) -> tuple[bytes, str]:
        """Return the encoded image, its shorter side at most `size`, and the suffix."""
        return shrink(self.records[index].path, size, square=square)

    def examine(self, index: int) -> Health:
        """Read and decode one file as training would."""
        record = self.records[index]
        return examine(record.file, record.path)

    def extra_of(self, index: int) -> dict[str, Any]:
        """Return the further keys of a sample: questions, labels, ids."""
        return dict(self.records[index].extra)

    def skipped_summary(self) -> str:
        """Return one line about the images left out so far in this process.

        Workers of a DataLoader count for themselves.
        """
        if not self.skipped:
            return "no image skipped"
        first = next(iter(self.skipped.values()))
        return f"{len(self.skipped)} of {len(self)} images skipped; first: {first}"

    def _sample(self, record: Record, index: int) -> dict[str, Any]:
        draws = HashedDraws(self.seed, self.epoch, index)
        # The caption is drawn first, so that another crop or size leaves it as it is.
        caption = draws.pick(record.captions) if record.captions else ""
        return {
            "image": self.pipeline(record.path, draws),
            "caption": caption,
            "captions": list(record.captions),
            "file": record.file,
            "index": index,
            **record.extra,
        }

    def _skip(self, record: Record, error: UnreadableImage) -> None:
        if not self.skip_corrupt:
            raise ConfigError(
                f"{error}; mend or remove it, or set `skip_corrupt: true` to skip such files"
            ) from error
        if not self.skipped:
            log.warning("%s; the next good image takes its place (skip_corrupt)", error)
        self.skipped[record.file] = str(error)
