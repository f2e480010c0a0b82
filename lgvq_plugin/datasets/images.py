"""From an image file to the network's input: open, turn upright, put on white, crop, resize."""

import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..sockets import ConfigError

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CROPS = ("center", "random", "none")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class UnreadableImage(ConfigError):
    """An image file is missing or broken; a data set may skip it if the user says so."""


class DecompressionBomb(ConfigError):
    """An image file unpacks to more pixels than PIL's limit; never skipped silently."""


class Source(Protocol):
    """Something that holds an image's bytes: a `pathlib.Path`, or a member of an archive."""

    def read_bytes(self) -> bytes:
        """Return the encoded image; raises OSError."""


@dataclass(frozen=True, slots=True)
class Health:
    """The result of reading one image file, under the name that samples show.

    `problem` is missing, empty, corrupt, bomb, or "" for a good one; `digest` is the sha256 of the
    bytes, "" if they could not be read; width and height are in pixels, upright, 0 if unknown.
    """

    file: str
    problem: str = ""
    reason: str = ""
    digest: str = ""
    width: int = 0
    height: int = 0


def is_missing(source: Source) -> bool:
    """Return whether an image has no file; what is in an archive or a table was seen there."""
    return isinstance(source, Path) and not source.is_file()


def examine(file: str, source: Source) -> Health:
    """Read and decode one file as training would; never raises for what is in it."""
    if is_missing(source):
        return Health(file, "missing", f"{source} does not exist")
    digest = ""
    try:
        content = source.read_bytes()
        if not content:
            return Health(file, "empty", f"{source} has no bytes")
        digest = hashlib.sha256(content).hexdigest()
        image = open_image(source)
    except (UnreadableImage, DecompressionBomb, OSError) as error:
        problem = "bomb" if isinstance(error, DecompressionBomb) else "corrupt"
        place = f"{source}: " if isinstance(error, OSError) else ""
        return Health(file, problem, f"{place}{error}", digest)
    return Health(file, "", "", digest, image.width, image.height)


def open_image(source: Source, channels: int = 3) -> Image.Image:
    """Return the first frame as an upright 8-bit image: grey, RGB on white, or RGBA.

    Raises UnreadableImage if the file is missing or broken, and DecompressionBomb if it has more
    pixels than PIL's limit.
    """
    place = source if isinstance(source, Path) else None
    try:
        with Image.open(place or io.BytesIO(source.read_bytes())) as image:
            # PIL only warns above its limit, and raises above twice that.
            limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
            if limit is not None and width * height > limit:
                pixels = f"{width} x {height} pixels"
                raise Image.DecompressionBombError(f"{pixels} are above PIL's limit of {limit}")
            image.load()
            upright = image if _is_upright(image) else ImageOps.exif_transpose(image)
            if channels == 4 and _is_transparent(upright):
                return upright.convert("RGBA")
            rgb = _to_rgb(upright)
            return rgb if channels == 3 else rgb.convert(MODES[channels])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        hint = "shrink or remove the file, or exclude it by name"
        raise DecompressionBomb(f"image {source}: {error}; {hint}") from error
    except FileNotFoundError as error:
        raise UnreadableImage(f"image {source} does not exist") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:  # PIL's decoders
        raise UnreadableImage(f"image {source} cannot be read: {error}") from error


def shrink(source: Source, size: int, *, square: bool) -> tuple[bytes, str]:
    """Return an encoded image whose shorter side is at most `size` pixels, and its suffix.

    An upright RGB JPEG or PNG that is small enough is copied byte for byte; anything else is
    decoded as for training and written as JPEG of quality 95, or as PNG where it was lossless.
    `square` also cuts the largest square from the middle. Raises what :func:`open_image` does.
    """
    image = open_image(source)
    target = min(side := min(image.size), size)
    is_cut = square and image.width != image.height
    raw = source.read_bytes()
    with Image.open(io.BytesIO(raw)) as stored:
        kind, is_plain = stored.format, stored.mode == "RGB" and "transparency" not in stored.info
        is_plain = is_plain and stored.size == image.size and _is_upright(stored)
    suffixes = {"JPEG": ".jpg", "PNG": ".png"}
    if is_plain and target == side and not is_cut and kind in suffixes:
        return raw, suffixes[kind]
    if is_cut:
        image = fit(image, target, "center", HashedDraws(0))
    elif target != side:
        scaled = [max(1, round(length * target / side)) for length in image.size]
        image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    written, form = io.BytesIO(), "PNG" if kind in ("PNG", "BMP", "GIF", "TIFF") else "JPEG"
    image.save(written, form, quality=95, subsampling=0)  # PNG has neither
    return written.getvalue(), suffixes[form]


def fit(image: Image.Image, size: int | Sequence[int], crop: str, draws: "Draws") -> Image.Image:
    """Return an image of `size` pixels, aspect ratio kept, antialiased.

    `size` is a number or (height, width). The crop is center or random (at a place that is drawn),
    the largest part of that shape; or none: all of the image, padded with white.

    Example:
        >>> fit(Image.new("RGB", (40, 20)), 10, "none", HashedDraws(0)).getpixel((5, 0))
        (255, 255, 255)
        >>> fit(Image.new("RGB", (40, 40)), (5, 10), "center", HashedDraws(0)).size
        (10, 5)
    """
    high, wide = height_and_width(size)
    width, height = image.size
    if crop == "none":
        return ImageOps.pad(image, (wide, high), Image.Resampling.BICUBIC, color="white")
    is_tall = width * high <= height * wide
    across = width if is_tall else max(1, round(height * wide / high))
    down = max(1, round(width * high / wide)) if is_tall else height
    # Whole pixels, so that a crop without resize leaves the values as they are.
    if crop == "random":
        left = int(draws.unit() * (width - across + 1))
        top = int(draws.unit() * (height - down + 1))
    else:
        left, top = (width - across) // 2, (height - down) // 2
    # Cropping inside resize avoids the wide strip that resizing a panorama first would make.
    box = (left, top, left + across, top + down)
    if (across, down) == (wide, high):
        return image if (wide, high) == image.size else image.crop(box)
    return image.resize((wide, high), Image.Resampling.BICUBIC, box=box)


def height_and_width(size: Any, minimum: int = 1) -> tuple[int, int]:
    """Return (height, width) of a `size` option, 64 or [32, 64]; raises ConfigError otherwise."""
    is_list = isinstance(size, Sequence) and not isinstance(size, str)
    pair = tuple(size) if is_list else (size, size)
    if len(pair) != 2 or not all(type(side) is int and side >= minimum for side in pair):
        expected = f"an int >= {minimum}, or [height, width] of two such"
        raise ConfigError(f"size must be {expected}, got {size!r}")
    return pair[0], pair[1]


def to_array(image: Image.Image, channel_first: bool) -> np.ndarray:
    """Return an 8-bit image as float32 in [-1, 1], (H, W, C), or (C, H, W)."""
    levels = np.atleast_3d(np.asarray(image))
    levels = levels.transpose(2, 0, 1) if channel_first else levels
    values = levels.astype(np.float32, order="C")
    values /= np.float32(127.5)  # in place: one allocation per image
    values -= np.float32(1)
    return values


def _is_upright(image: Image.Image) -> bool:
    return bool(image.getexif().get(ORIENTATION, 1) == 1)


def _is_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        if image.mode != "F":  # 16-bit grey: PIL's own conversion clips at 255
            values = values / 257
        elif values.max() <= 1:
            values = values * 255
        return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if _is_transparent(image):
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


class Draws:
    """Random choices that depend on a key of ints >= 0 alone: the same in every process."""

    def __init__(self, *key: int):
        if min(key) < 0:
            raise ConfigError(f"seed, epoch and index must be >= 0, got {key}")
        self.unit: Callable[[], float] = self._numbers(key).__next__
        """Return the next number in [0, 1)."""

    def _numbers(self, key: tuple[int, ...]) -> Iterator[float]:
        """Yield numbers in [0, 1), in blocks: for the hundreds of choices of a drawn scene."""
        generator = np.random.default_rng(key)
        while True:
            yield from reversed(generator.random(64).tolist())

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.unit() < probability

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * self.unit()

    def pick(self, items: Sequence[T]) -> T:
        """Return one item."""
        return items[int(self.unit() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order."""
        return sorted(items, key=lambda _: self.unit())


class HashedDraws(Draws):
    """Draws from hashes of key and count: for the few choices of an image file.

    Creating a NumPy generator would take a tenth of the time of decoding a small photo.
    """

    def _numbers(self, key: tuple[int, ...]) -> Iterator[float]:
        start = struct.pack(f"<{len(key)}Q", *key)
        for number in count(1):
            digest = hashlib.blake2b(start + number.to_bytes(4, "little"), digest_size=8).digest()
            yield (int.from_bytes(digest, "little") >> 11) / 2**53  # all bits of a float64
