"""The common part of data sets that are a list of image files with captions."""

import hashlib
import inspect
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..sockets import ConfigError, suggest
from .base import CONVERTED_FROM, CaptionedFiles, Health
from .captions import Listed, clean, open_text, split_name, unread_files
from .images import SUFFIXES, HashedDraws, Pipeline, Source, UnreadableImage, examine, shrink

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "all")
NO_TEXT = re.compile(
    r"[\d\s.,;:+-]*|n\d{8}|nan|none|null|n/a|\S+\.(jpe?g|png|webp|bmp|gif|tiff?|txt|json|npy|xml)",
    re.I,
)
"""Numbers and boxes, WordNet's classes, empty cells, and paths of files."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image file: the name that samples show, where it lies, and its captions."""

    file: str
    path: Source
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the sample, such as `questions`."""
    split: str | None = None
    """The split that its row, a list or its folder names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How listed images are served; the options that all data sets of image files take."""

    size: int | Sequence[int] = 64
    """Height and width in pixels: one number for both, or [height, width]."""
    channels: int = 3
    """1: grey; 3: RGB, transparency put on white; 4: RGB and alpha."""
    crop: str = "center"
    """center, random: the largest part of the shape of `size`; none: all, padded with white."""
    flip: bool = False
    """Mirror every other image; captions that say left and right become wrong."""
    captions_per_image: int | None = None
    """Keep at most so many captions of an image, the first ones; null = all."""
    encoding: str = "utf-8"
    """Of the files with captions; a byte order mark of UTF-16 wins over utf-8."""
    image_key: str = "image"
    """A second key of a sample that holds the image, beside `image`, for hosts that ask for it."""
    seed: int = 0
    """Of the draws of caption, crop and flip."""
    channel_first: bool = False
    """(C, H, W) images instead of (H, W, C)."""
    skip_corrupt: bool = False
    """Put the next good image in the place of one that is missing or cannot be read."""

    def __post_init__(self) -> None:
        most = self.captions_per_image
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ConfigError(f"captions_per_image must be an int >= 1 or null, got {most!r}")
        try:
            "a".encode(self.encoding)
        except (LookupError, TypeError) as error:
            known = "utf-8, latin-1, cp1252, utf-16, gb18030, shift_jis"
            raise ConfigError(
                f"encoding: {self.encoding!r} is not known to Python; usual ones are {known}"
            ) from error
        if not isinstance(self.image_key, str) or self.image_key in RESERVED:
            taken = ", ".join(RESERVED)
            raise ConfigError(
                f"image_key must be a string and none of {taken}, got {self.image_key!r}"
            )
        HashedDraws(self.seed)  # refuses a negative seed here and not in a worker

    @classmethod
    def of(cls, options: Mapping[str, Any], member: type) -> "Reading":
        """Build it from keyword arguments of a data set's class.

        Raises:
            ConfigError: for an unknown one; those of the class are named too.
        """
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                own = [key for key in inspect.signature(member).parameters if key != "options"]
                raise ConfigError(f"no option {name!r}{suggest(name, [*own, *known])}")
        return cls(**options)

    @property
    def pipeline(self) -> Pipeline:
        """From file to array."""
        return Pipeline(
            size=self.size,
            channels=self.channels,
            crop=self.crop,
            flip=self.flip,
            channel_first=self.channel_first,
        )


RESERVED = ("caption", "captions", "file", "index")


class ImageFinder:
    """Where the images lie that a table or list names.

    A path is taken from each of `homes`, then as the end of the one path below `below` that ends
    with it, so that a table finds the images of any folder; a name without suffix finds its image.

    Args:
        homes: folders that paths may be relative to.
        below: the folder that is searched for the others; None searches none.
    """

    def __init__(self, homes: Iterable[Path], below: Path | None = None):
        self.homes, self.below = list(dict.fromkeys(homes)), below
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """Return where an image lies; if nowhere, where it was expected.

        Raises:
            ConfigError: if several files could be meant, or it cannot be a path.
        """
        try:
            for home in self.homes:
                if (home / name).is_file():  # an absolute name stays as it is
                    return home / name
        except OSError as error:
            raise ConfigError(f"image {name[:60]!r}: {error.strerror}") from error
        hits = self._below(Path(name))
        if len(hits) > 1:
            raise ConfigError(
                f"image {name!r} could be {hits[0]} or {hits[1]}; give its path in the table or "
                "list, relative to it"
            )
        return hits[0] if hits else self.homes[0] / name

    def _below(self, name: Path) -> list[Path]:
        if self.below is None or name.is_absolute():
            return []
        if self._by_name is None:
            self._by_name = {}
            for path in image_files(self.below):
                for key in (path.name, path.stem):
                    self._by_name.setdefault(key, []).append(path)
        length = len(name.parts)
        hits = self._by_name.get(name.name, ())
        return [p for p in hits if p.parts[-length:-1] == name.parts[:-1]]


def image_files(root: Path) -> list[Path]:
    """Return all image files below a folder, sorted."""
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def records_of(listed: Mapping[str, Listed], finder: ImageFinder) -> list[Record]:
    """Return the records of a table's files."""
    return [
        Record(file, finder.find(file), tuple(told.captions), told.extra, told.split)
        for file, told in listed.items()
    ]


def declared_splits(records: Sequence[Record]) -> list[str]:
    """Return the splits that the data name themselves; [] if none, or if all are train.

    Known ones come first, in the order train, validation, test.
    """
    names = dict.fromkeys(record.split for record in records if record.split)
    ordered = [name for name in SPLITS if name in names]
    ordered += [name for name in names if name not in SPLITS]
    return [] if ordered == ["train"] else ordered


def of_split(
    records: list[Record], split: str | None, *, holdout: float, where: Any
) -> list[Record]:
    """Return the records of a split: as the data say, else train and validation by a hash.

    Args:
        records: all of them.
        split: its name; "all" is everything, and so is None where the data name no splits.
        holdout: share of validation where the data name no splits, 0 < holdout < 1.
        where: what to call the data set in an error.

    Raises:
        ConfigError: if there is no such split, or the data name splits and `split` is None.
    """
    if not isinstance(holdout, float | int) or not 0 < holdout < 1:
        raise ConfigError(f"holdout must lie between 0 and 1, got {holdout!r}")
    known = declared_splits(records)
    if not known:
        wanted = choose_split(split, SPLITS)
        if wanted == "test":
            raise ConfigError(
                f"{where}: split 'test' needs a folder `test`, or a column `split` that names it"
            )
        if wanted == "all":
            return records
        is_held_out = wanted == "validation"
        return [r for r in records if (held_out_share(_first_name(r)) < holdout) == is_held_out]
    if split is None:
        raise ConfigError(
            f"{where} names the splits {', '.join(known)}, and `split` is not set; set "
            f"`split: {known[0]}`, or `split: all` to use all of them together"
        )
    name = split_name(split)
    if name not in (*known, "all"):
        raise ConfigError(f"{where}: no split {split!r}; its splits are {', '.join(known)}")
    kept = [r for r in records if name in ("all", r.split)]
    unnamed = sum(record.split is None for record in records)
    if unnamed and name != "all":
        logger.warning("%s: %d of %d images are in no split", where, unnamed, len(records))
    return kept


def refuse_other_splits(records: Sequence[Record], split: str | None, where: Any) -> None:
    """Refuse rows of a split's own folder or shards that say that they are of another split.

    Raises:
        ConfigError: if there are some.
    """
    others = [r for r in records if r.split not in (None, split, "all")]
    if others:
        raise ConfigError(
            f"{where}: {len(others)} of {len(records)} images of split {split!r} say that they are "
            f"of split {others[0].split!r}, first: {others[0].file}; mend the rows or the names"
        )


def _first_name(record: Record) -> str:
    """The file's name before `lgvq data convert` gave it another, if it did."""
    return str(record.extra.get(CONVERTED_FROM, record.file))


def _kind(text: str) -> str:
    if text[:1].isdigit() or not text.strip(" .,;:+-"):
        return "numbers"
    return "names of files" if "." in text else "class names or empty cells"


def _refuse_no_text(records: Sequence[Record], where: Any) -> None:
    captioned = [record for record in records if record.captions]
    if captioned and all(NO_TEXT.fullmatch(c) for r in captioned for c in r.captions):
        first = captioned[0]
        kind = _kind(first.captions[0])
        raise ConfigError(
            f"{where}: all captions are {kind}, first: {first.captions[0][:40]!r} of "
            f"{first.file}; such are not captions. Give texts instead, or name the column that "
            "holds them with `caption_key`"
        )


class ListedImages(CaptionedFiles):
    """Serve records as a :class:`Reading` says; members only say how records are found.

    A file that cannot be read raises ConfigError; with `skip_corrupt` the next good record
    takes its place, always the same one, and `skipped` (file -> reason) tells.

    Args:
        records: the images, in order.
        reading: size, crop and so on.
        where: what to call the data set in an error: its table, list or folder.

    Raises:
        ConfigError: if there are no records, some files do not exist (without skip_corrupt), or
            no caption is a text.
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
            records = [replace(r, captions=r.captions[:most]) for r in records]
        if not records:
            raise ConfigError(f"{where}: no images; check root and split")
        _refuse_no_text(records, where)
        self.records, self.pipeline, self.where = list(records), reading.pipeline, where
        self.image_key, self.encoding = reading.image_key, reading.encoding
        self._warn_of_broken_text()
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

    def count_captioned(self) -> int:
        """Return how many images have a caption, without opening any."""
        return sum(bool(record.captions) for record in self.records)

    def broken_texts(self) -> list[tuple[str, str]]:
        """Return (file, caption) of captions with U+FFFD: their bytes were of another encoding."""
        return [(r.file, c) for r in self.records for c in r.captions if "\ufffd" in c]

    def unread_files(self) -> list[Path]:
        """Return files in the data set's folder that seem to hold captions and were not read."""
        where = Path(self.where)
        root = where if where.is_dir() else where.parent
        return unread_files(root, (r.file for r in self.records), read=[where])

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
        image = self.pipeline(record.path, draws)
        return {
            "image": image,
            self.image_key: image,
            "caption": caption,
            "captions": list(record.captions),
            "file": record.file,
            "index": index,
            **record.extra,
        }

    def _warn_of_broken_text(self) -> None:
        if broken := self.broken_texts():
            file, caption = broken[0]
            count = sum(text.count("\ufffd") for _, text in broken)
            logger.warning(
                "%s: %d captions are not %s: %d bytes became U+FFFD, first in %s: %r; set "
                "`encoding:`, such as latin-1 or cp1252",
                *(self.where, len(broken), self.encoding, count, file, caption[:60]),
            )

    def _skip(self, record: Record, error: UnreadableImage) -> None:
        if not self.skip_corrupt:
            raise ConfigError(
                f"{error}; mend or remove it, or set `skip_corrupt: true` to skip such files"
            ) from error
        if not self.skipped:
            logger.warning("%s; the next good image takes its place (skip_corrupt)", error)
        self.skipped[record.file] = str(error)


# -- Names of splits, lists of file names in pickles, and lines of caption files, read with care ---


SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


def choose_split(split: str | None, known: Sequence[str]) -> str:
    """Return the split by its full name; None is all of them, where a set has "all".

    Raises:
        ConfigError: if the data set has no such split.

    Example:
        >>> choose_split("val", ["train", "validation"])
        'validation'
    """
    name = "all" if split is None else SPLIT_ALIASES.get(split, split)
    if name not in known:
        raise ConfigError(f"split: {split!r}{suggest(str(split), list(known))}")
    return name


def held_out_share(file: str) -> float:
    """Return a number in [0, 1) that depends on the file's name alone; below holdout = held out.

    Example:
        >>> held_out_share("images/a.jpg") == held_out_share("a.jpg")
        True
    """
    digest = hashlib.sha256(file.removeprefix("images/").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a text file without surplus blanks, empty ones left out.

    Bytes that are not of the encoding become U+FFFD; any line end will do.

    Raises:
        ConfigError: if there is no such file.
    """
    return [line for line in map(clean, read_text(path, encoding).split("\n")) if line]


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file, a byte order mark dropped, broken bytes as U+FFFD."""
    with open_text(path, encoding) as file:
        return file.read()


def read_captions(path: Path, encoding: str = "utf-8") -> tuple[str, ...]:
    """Return the captions in a text file, one a line; () if there is no such file."""
    return tuple(read_lines(path, encoding)) if path.is_file() else ()


class _NamesOnly(pickle.Unpickler):
    """Unpickle lists and strings; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run code")


def read_name_pickle(path: Path) -> list[str]:
    """Return the file names in a pickled list, as CelebA-HQ, CUB and TextCaps splits come.

    Raises:
        ConfigError: if the file is missing or holds anything but a list of names.
    """
    try:
        with path.open("rb") as file:
            names = _NamesOnly(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; it lists the images of a split") from error
    except (OSError, MemoryError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected a pickled list of file names and nothing else ({error}); "
            "refused, as a pickle can run code"
        ) from error
    if not isinstance(names, list) or not all(isinstance(n, str | int) for n in names):
        raise ConfigError(f"{path}: expected a pickled list of names, got {names!r:.80}")
    return [str(name) for name in names]
