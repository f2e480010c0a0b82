"""Data sets of image files: their records, how these are served, and where images are found."""

import inspect
import logging
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from ..sockets import ConfigError, check_call, suggest
from . import images
from .base import CaptionedImages
from .captions import TableEntry, reading, unread_files
from .images import SUFFIXES, HashedDraws, Source, UnreadableImage
from .splits import CONVERTED_FROM, SPLITS, choose_split, first_file, held_out_share, split_name

logger = logging.getLogger(__name__)

RESERVED = ("caption", "captions", "file", "index")
SKIP = "set `skip_corrupt: true` to skip"
NO_TEXT = re.compile(
    r"(?P<numbers>[\d\s.,;:+-]*)|n\d{8}|nan|none|null|n/a|"
    r"(?P<names_of_files>\S+\.(?:jpe?g|png|webp|bmp|gif|tiff?|txt|json|npy|xml))",
    re.I,
)
"""Numbers and boxes, WordNet's classes, empty cells, and paths of files."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image file: the name that samples show, its place, and its captions."""

    file: str
    path: Source
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keys of the sample
    split: str | None = None  # that its row, a list or its folder names

    def is_held_out(self, holdout: float) -> bool:
        """Return whether a hash of its name, before a conversion, is below this share."""
        return held_out_share(str(self.extra.get(CONVERTED_FROM, self.file))) < holdout


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """The options that all data sets of image files take."""

    size: int | Sequence[int] = 64
    """Height and width in pixels: one number for both, or [height, width]."""
    channels: int = 3
    """1: grey; 3: RGB, transparency put on white; 4: RGB and alpha."""
    crop: str = "center"
    """center, random: the largest part of the shape of `size`; none: all, padded with white."""
    flip: bool = False
    """Mirror every other image; captions that say left and right become wrong."""
    captions_per_image: int | None = None
    """Keep at most this many captions per image, the first ones; null = all."""
    encoding: str = "utf-8"
    """Encoding of the caption files; a byte order mark of UTF-16 overrides utf-8."""
    image_key: str = "image"
    """A second key of a sample that holds the image, for hosts that expect another name."""
    seed: int = 0
    """Seed of the draws of caption, crop and flip."""
    channel_first: bool = False
    """(C, H, W) images instead of (H, W, C)."""
    skip_corrupt: bool = False
    """Replace an image that is missing or cannot be read by the next good one."""

    def __post_init__(self) -> None:
        images.height_and_width(self.size)
        if self.channels not in images.MODES or isinstance(self.channels, bool):
            raise ConfigError(f"channels must be 1, 3 or 4, got {self.channels!r}")
        if self.crop not in images.CROPS:
            raise ConfigError(f"crop: {self.crop!r}{suggest(str(self.crop), list(images.CROPS))}")
        count = self.captions_per_image
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ConfigError(f"captions_per_image must be an int >= 1 or null, got {count!r}")
        try:
            "a".encode(self.encoding)
        except (LookupError, TypeError) as error:
            known = "usual ones are utf-8, latin-1, cp1252, utf-16, gb18030, shift_jis"
            message = f"encoding: {self.encoding!r} is not known to Python; {known}"
            raise ConfigError(message) from error
        if not isinstance(self.image_key, str) or self.image_key in RESERVED:
            expected = f"a string and none of {', '.join(RESERVED)}"
            raise ConfigError(f"image_key must be {expected}, got {self.image_key!r}")
        HashedDraws(self.seed)  # refuses a negative seed here and not in a worker

    def load(self, source: Source, draws: images.Draws) -> np.ndarray:
        """Return the image as :func:`.images.to_array` does; for errors see `open_image`."""
        image = images.fit(images.open_image(source, self.channels), self.size, self.crop, draws)
        if self.flip and draws.chance(0.5):
            image = ImageOps.mirror(image)
        return images.to_array(image, self.channel_first)


class ListedImages(CaptionedImages):
    """A list of image files with captions; a member only says how its records are found.

    A member defines `_read(self, root, ...)`. The parameters of its class are those of `_read`
    and the fields of :class:`ImageOptions`. ConfigErrors report unknown options, files that are
    missing or cannot be read, and captions that are no texts. With `skip_corrupt` the next good
    record replaces a bad one, always the same one, and `skipped` (file -> reason) names it.
    """

    where: Path
    """What errors call the data set: its table, list or folder."""
    template = ""
    """The text, if any, that made captions from the names of class folders."""
    label_names: Mapping[str, tuple[str, ...]] = {}
    """The classes, or columns, of each label in `attributes` of a sample."""

    def __init_subclass__(cls) -> None:
        """Build the signature of the class from that of `_read`."""
        super().__init_subclass__()
        own = [*inspect.signature(cls._read).parameters.values()][1:]
        own += inspect.signature(ImageOptions).parameters.values()
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **params: Any):
        check_call(type(self).__name__, type(self), args, params)
        given = inspect.signature(type(self)).bind(*args, **params).arguments
        names = [name for name in inspect.signature(ImageOptions).parameters if name in given]
        self.options = options = ImageOptions(**{name: given.pop(name) for name in names})
        given["root"] = self.where = Path(given["root"]).expanduser()
        records, count = self._read(**given), options.captions_per_image
        if not records:
            raise ConfigError(f"{self.where}: no images; check root and split")
        if count is not None:
            records = [replace(r, captions=r.captions[:count]) for r in records]
        self.records, self.seed = records, options.seed
        self.skipped: dict[str, str] = {}
        self._check_texts()
        lost = [] if options.skip_corrupt else [r for r in records if images.is_missing(r.path)]
        if lost:
            raise ConfigError(
                f"{self.where}: {len(lost)} of {len(records)} images do not exist, first: "
                f"{lost[0].file}, sought at {lost[0].path}; fix the list, or {SKIP} them"
            )

    def _read(self, *args: Any, **params: Any) -> list[Record]:
        """Return the records; `self.options` and `self.where` are set, and `where` may be reset."""
        raise NotImplementedError

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
            if self.records[place].file in self.skipped:
                continue
            try:
                return self._sample(place)
            except UnreadableImage as error:
                if not self.options.skip_corrupt:
                    message = f"{error}; fix or remove it, or {SKIP} such files"
                    raise ConfigError(message) from error
                if not self.skipped:
                    logger.warning("%s; the next good image replaces it (skip_corrupt)", error)
                self.skipped[self.records[place].file] = str(error)
        raise ConfigError(f"{type(self).__name__}: none of {total} images can be read")

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of a sample without opening its image."""
        return list(self.records[index].captions)

    def origin(self, index: int) -> str:
        """Return the path of a sample's image, quoted."""
        return repr(str(self.records[index].path))

    def attribute_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the classes, or columns, of each label; {} without labels."""
        return {label: names for label, names in self.label_names.items() if names}

    def broken_texts(self) -> list[tuple[str, str]]:
        """Return (file, caption) of captions with U+FFFD: their bytes were of another encoding."""
        return [(r.file, c) for r in self.records for c in r.captions if "\ufffd" in c]

    def unread_files(self) -> list[Path]:
        """Return files in the data set's folder that seem to hold captions and were not read."""
        root = self.where if self.where.is_dir() else self.where.parent
        return unread_files(root, (r.file for r in self.records), read=[self.where])

    def unlisted_images(self) -> list[Path]:
        """Return images in the data set's folder that its table does not list."""
        return []

    def _of_split(self, records: list[Record], split: str | None, holdout: float) -> list[Record]:
        """Return the records of a split: as the data say, else train and validation by a hash.

        "all" is everything, and so is None where the data name no splits; where they do, None is a
        ConfigError. `holdout` is the share of validation by hash, in (0, 1).
        """
        if not isinstance(holdout, float | int) or not 0 < holdout < 1:
            raise ConfigError(f"holdout must be between 0 and 1, got {holdout!r}")
        known = declared_splits(records)
        if not known:
            wanted = choose_split(split, SPLITS)
            if wanted == "test":
                needed = "a folder `test`, or a column `split` that names it"
                raise ConfigError(f"{self.where}: split 'test' needs {needed}")
            if wanted == "all":
                return records
            return [r for r in records if r.is_held_out(holdout) == (wanted == "validation")]
        names, name = ", ".join(known), split_name(split)
        if split is None:
            unset = f"{self.where} names the splits {names}, and `split` is not set"
            hint = f"set `split: {known[0]}`, or `split: all` to use all of them together"
            raise ConfigError(f"{unset}; {hint}")
        if name not in (*known, "all"):
            raise ConfigError(f"{self.where}: no split {split!r}; its splits are {names}")
        unnamed = sum(record.split is None for record in records)
        if unnamed and name != "all":
            logger.warning("%s: %d of %d images are in no split", self.where, unnamed, len(records))
        return [r for r in records if name in ("all", r.split)]

    def _refuse_other_splits(self, records: list[Record], split: str | None) -> None:
        """Raise ConfigError if rows in a split's own folder or shards name another split."""
        others = [r for r in records if r.split not in (None, split, "all")]
        if others:
            raise ConfigError(
                f"{self.where}: {len(others)} of {len(records)} images of split {split!r} say that "
                f"they are of split {others[0].split!r}, first: {others[0].file}; fix the rows or "
                "the names"
            )

    def _sample(self, index: int) -> dict[str, Any]:
        record, draws = self.records[index], HashedDraws(self.seed, self.epoch, index)
        # The caption is drawn first, so that another crop or size leaves it as it is.
        caption = draws.pick(record.captions) if record.captions else ""
        image = self.options.load(record.path, draws)
        return {
            "image": image,
            self.options.image_key: image,
            "caption": caption,
            "captions": list(record.captions),
            "file": record.file,
            "index": index,
            **record.extra,
        }

    def _check_texts(self) -> None:
        first = next((record for record in self.records if record.captions), None)
        match = NO_TEXT.fullmatch(first.captions[0]) if first else None
        if first and match and all(NO_TEXT.fullmatch(c) for r in self.records for c in r.captions):
            kind = (match.lastgroup or "class names or empty cells").replace("_", " ")
            raise ConfigError(
                f"{self.where}: all captions are {kind}, first: {match[0][:40]!r} of {first.file}; "
                "these are not captions. Give texts instead, or name the column that holds them "
                "with `caption_key`"
            )
        if broken := self.broken_texts():
            file, caption = broken[0]
            count = sum(text.count("\ufffd") for _, text in broken)
            logger.warning(
                "%s: %d captions are not %s: %d bytes became U+FFFD, first in %s: %r; set "
                "`encoding:`, such as latin-1 or cp1252",
                *(self.where, len(broken), self.options.encoding, count, file, caption[:60]),
            )


def declared_splits(records: Sequence[Record]) -> list[str]:
    """Return the splits that the data name, SPLITS first; [] if none, or if all are train."""
    names = dict.fromkeys(record.split for record in records if record.split)
    ordered = sorted(names, key=lambda name: (*SPLITS, name).index(name))
    return [] if ordered == ["train"] else ordered


class ImageFinder:
    """Finds the images that a table or list names.

    A path is taken from each of the folders `homes`, then as the end of the one path below `below`
    that ends with it, so that a table finds the images of any folder; a name without suffix finds
    its image. Without `below` no folder is searched.
    """

    def __init__(self, homes: Iterable[Path], below: Path | None = None):
        self.homes, self.below = list(dict.fromkeys(homes)), below

    def find(self, name: str) -> Path:
        """Return where an image is, or was expected; several that could be meant are an error."""
        with reading(f"image {name[:60]!r}"):
            # an absolute name stays as it is
            if found := first_file(home / name for home in self.homes):
                return found
        path = Path(name)
        hits = [] if path.is_absolute() else self._by_name.get(path.name, [])
        hits = [hit for hit in hits if hit.parts[-len(path.parts) : -1] == path.parts[:-1]]
        if len(hits) > 1:
            hint = "give its path in the table or list, relative to it"
            raise ConfigError(f"image {name!r} could be {hits[0]} or {hits[1]}; {hint}")
        return hits[0] if hits else self.homes[0] / name

    def records(self, listed: Mapping[str, TableEntry]) -> list[Record]:
        """Return the records of a table's files."""
        return [
            Record(file, self.find(file), tuple(entry.captions), entry.extra, entry.split)
            for file, entry in listed.items()
        ]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in image_files(self.below) if self.below else ():
            for key in (path.name, path.stem):
                found[key].append(path)
        return found


def image_files(root: Path) -> list[Path]:
    """Return all image files below a folder, sorted."""
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


class _NamesOnly(pickle.Unpickler):
    """Unpickle lists and strings; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run code")


def read_name_pickle(path: Path) -> list[str]:
    """Return the file names in a pickled list; anything else, which could run code, is refused."""
    try:
        with path.open("rb") as file:
            names = _NamesOnly(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; it lists the images of a split") from error
    except (OSError, MemoryError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        expected = f"expected a pickled list of file names and nothing else ({error})"
        raise ConfigError(f"{path}: {expected}; refused, as a pickle can run code") from error
    if not isinstance(names, list) or not all(isinstance(n, str | int) for n in names):
        raise ConfigError(f"{path}: expected a pickled list of names, got {names!r:.80}")
    return [str(name) for name in names]
