"""Drawn scenes with true captions: embedded data for the demo and the tests, no download."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..sockets import ConfigError, suggest
from . import scene_language
from .base import CaptionedImages, ImageLayout
from .images import MODES, Draws, height_and_width, to_array
from .scene_language import COLORS, SHAPES, TEXTURES, TONES, Background, Scene, SceneObject, compose

LENGTHS = {"train": 4096, "validation": 512, "test": 512}
LOOK, WORDS, CHOICE = range(3)  # random streams of one sample
MAX_CACHE = 2**26  # bytes of drawn images that a data set keeps
LABELS: dict[str, tuple[str, ...]] = {
    "count": tuple(map(str, range(scene_language.MAX_OBJECTS + 1))),
    "has_color": tuple(COLORS),
    "has_shape": SHAPES,
    "has_texture": TEXTURES,
    "main_color": tuple(COLORS),
    "main_shape": SHAPES,
    "background": scene_language.BACKGROUNDS,
    "background_color": tuple(TONES),
}
PALE = (250, 250, 250)  # the second color of stripes and dots
NOISE_CELLS, NOISE_SPAN = 32, 38
RING_HOLE = 0.55
Polygon = list[tuple[float, float]]
Drawn = tuple[Scene, Image.Image, list[str], list[dict[str, str]]]
"""What is the same in every epoch: scene, picture, captions, questions."""


class Scenes(CaptionedImages):
    """One to four colored shapes on a background; (seed, split, index) fixes the scene.

    Beside the keys of the contract a sample holds `questions`: list of `{"question",
    "answer", "type"}` with type color, shape, count, yes-no, relation or background, and
    `attributes`: dict of labels for probes, see :meth:`attribute_names`.

    Args:
        split: train, validation or test; no scene is in two of them.
        size: height and width of the image in pixels, or [height, width]; the scene is a square
            in the middle, and its edge is continued.
        length: number of scenes; 4096 for train, else 512.
        seed: another seed, other scenes.
        channel_first: (C, H, W) images instead of (H, W, C).
        channels: 1: grey; 3: RGB; 4: RGB and alpha, which is 1 everywhere.
        image_key: a second key of a sample that holds the image, beside `image`.
        simple: one or two objects, 1.5 times as large, on a plain or shaded background: pictures
            that a small tokenizer learns in minutes.

    Example:
        >>> sample = Scenes("validation", size=32)[0]
        >>> sample["image"].shape, len(sample["captions"]), sample["attributes"]["has_color"].shape
        ((32, 32, 3), 5, (10,))
    """

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 64,
        length: int | None = None,
        seed: int = 0,
        channel_first: bool = False,
        channels: int = 3,
        image_key: str = "image",
        simple: bool = False,
    ):
        if split not in LENGTHS:
            raise ConfigError(f"Scenes: no split {split!r}{suggest(split, list(LENGTHS))}")
        length = LENGTHS[split] if length is None else length
        if channels not in MODES:
            raise ConfigError(f"Scenes: channels must be 1, 3 or 4, got {channels!r}")
        self.shape = height_and_width(size, minimum=8)
        for name, value, minimum in (("length", length, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < minimum:
                raise ConfigError(f"Scenes: {name} must be an int >= {minimum}, got {value!r}")
        self.split, self.size, self.length = split, size, length
        self.seed, self.channel_first, self.simple = seed, channel_first, simple
        self.channels, self.image_key = channels, image_key
        self._drawn: dict[int, Drawn] = {}

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`; negative counts from the end."""
        if not -self.length <= index < self.length:
            raise IndexError(f"Scenes has {self.length} samples, no {index}")
        index %= self.length
        scene, picture, captions, questions = self._drawn.get(index) or self._draw(index)
        image = to_array(picture, self.channel_first)
        return {
            "image": image,
            self.image_key: image,
            "caption": self._draws(index, CHOICE, self.epoch).pick(captions),
            "captions": captions.copy(),
            "file": f"{self.split}_{index:06d}.png",
            "index": index,
            "questions": [dict(question) for question in questions],
            "attributes": _attributes(scene),
        }

    def captions_of(self, index: int) -> list[str]:
        """Return the captions of sample `index` (>= 0) without drawing it."""
        return scene_language.captions(self.scene(index), self._draws(index, WORDS))

    def scene(self, index: int) -> Scene:
        """Return the symbolic scene behind sample `index` (>= 0)."""
        return compose(self._draws(index, LOOK), simple=self.simple)

    def layout_of(self, index: int) -> ImageLayout:
        """Return the map of shapes (1 + their place in `SHAPES`), and boxes of shapes and colors.

        Example:
            >>> layout = Scenes("test", size=32).layout_of(0)
            >>> layout.semantic_map.shape, sorted(layout.boxes)
            ((32, 32), ['brown', 'star'])
        """
        height, width = self.shape
        side = min(self.shape)
        top, left = (height - side) // 2, (width - side) // 2
        kinds = np.zeros((height, width), np.uint8)
        boxes: dict[str, list[tuple[float, float, float, float]]] = {}
        for thing in self.scene(index).objects:
            rows, columns = np.nonzero(outline_of(thing, side))
            rows, columns = rows + top, columns + left
            kinds[rows, columns] = 1 + SHAPES.index(thing.shape)
            ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            box = tuple(float(end) / n for end, n in zip(ends, (width, height) * 2, strict=True))
            for word in (thing.shape, thing.color):
                boxes.setdefault(word, []).append(box)  # type: ignore[arg-type]
        return ImageLayout(kinds, boxes)

    @staticmethod
    def vocabulary() -> list[str]:
        """Return all words that captions, questions and answers can hold, sorted."""
        return scene_language.vocabulary()

    @staticmethod
    def attribute_names() -> dict[str, tuple[str, ...]]:
        """Return the class names of each label, or the column names of each multi-hot."""
        return dict(LABELS)

    def _draw(self, index: int) -> Drawn:
        """Draw a sample and keep it: drawing one takes as long as a small host's training step."""
        scene, draws = self.scene(index), self._draws(index, WORDS)
        captions = scene_language.captions(scene, draws)
        questions = scene_language.questions(scene, draws)
        side = min(self.shape)
        margins = [((n - side) // 2, (n - side) - (n - side) // 2) for n in self.shape]
        pixels = np.pad(draw(scene, side), (*margins, (0, 0)), mode="edge")
        picture = Image.fromarray(pixels).convert(MODES[self.channels])
        drawn = (scene, picture, captions, questions)
        if (len(self._drawn) + 1) * math.prod(self.shape) * self.channels <= MAX_CACHE:
            self._drawn[index] = drawn
        return drawn

    def _draws(self, index: int, stream: int, epoch: int = 0) -> Draws:
        return Draws(self.seed, list(LENGTHS).index(self.split), index, stream, epoch)


def _attributes(scene: Scene) -> dict[str, Any]:
    """Return labels (int, an index into `LABELS`) and multi-hots (int64 arrays)."""
    main, background = scene.main, scene.background
    labels: dict[str, Any] = {"count": len(scene.objects)}
    for name in ("color", "shape", "texture"):
        found = {getattr(thing, name) for thing in scene.objects}
        labels[f"has_{name}"] = np.array([n in found for n in LABELS[f"has_{name}"]], np.int64)
    values = {"main_color": main.color, "main_shape": main.shape}
    values |= {"background": background.kind, "background_color": background.tones[0]}
    return labels | {name: LABELS[name].index(value) for name, value in values.items()}


def draw(scene: Scene, size: int) -> np.ndarray:
    """Return the picture, uint8 (size, size, 3): drawn large, then box-filtered down."""
    factor = 4 if size <= 96 else 3 if size <= 160 else 2
    canvas = _draw_background(scene.background, size * factor)
    for thing in scene.objects:
        _draw_object(canvas, thing)
    return np.asarray(canvas.reduce(factor))


def outline_of(thing: SceneObject, size: int) -> np.ndarray:
    """Return which pixels of a picture an object covers by at least half, bool (size, size)."""
    canvas = Image.new("L", (4 * size, 4 * size), 0)
    mask, corner = _mask(thing, canvas.width)
    canvas.paste(255, corner, mask)
    return np.asarray(canvas.reduce(4)) >= 128


def _draw_background(background: Background, side: int) -> Image.Image:
    first, *rest = (TONES[tone] for tone in background.tones)
    smooth, tile = Image.Resampling.NEAREST, np.array([[first]])
    if background.kind == "noisy":
        generator = np.random.default_rng(background.noise_seed)
        noise = generator.integers(-NOISE_SPAN, NOISE_SPAN + 1, (NOISE_CELLS, NOISE_CELLS, 1))
        tile = np.clip(tile + noise, 0, 255)
    elif background.kind == "checkered":
        parity = np.indices((background.cells, background.cells)).sum(0)[..., None] % 2
        tile = np.where(parity == 0, first, rest[0])
    elif background.kind == "gradient":
        share = np.linspace(0, 1, 64)[:, None, None]
        tile = tile * (1 - share) + np.array(rest[0]) * share
        tile = tile if background.vertical else tile.transpose(1, 0, 2)
        smooth = Image.Resampling.BILINEAR
    return Image.fromarray(tile.astype(np.uint8)).resize((side, side), smooth)


def _draw_object(canvas: Image.Image, thing: SceneObject) -> None:
    color = COLORS[thing.color]
    mask, corner = _mask(thing, canvas.width)
    canvas.paste(color, corner, mask)
    if thing.texture != "plain":
        # A rim in the object's own color keeps its outline whole on a pale background.
        period = thing.radius * canvas.width * (0.5 if thing.size == "large" else 0.66)
        tile = Image.new("RGB", mask.size, color)
        (_draw_stripes if thing.texture == "striped" else _draw_dots)(tile, period)
        canvas.paste(tile, corner, _mask(thing, canvas.width, rim=0.14)[0])


def _mask(thing: SceneObject, side: int, rim: float = 0.0) -> tuple[Image.Image, tuple[int, int]]:
    """Return an object's pixels in a picture of this side, and the corner where they go."""
    radius = thing.radius * side
    reach = math.ceil(radius) + 1
    mask = Image.new("L", (2 * reach, 2 * reach), 0)
    pen, angle, size = ImageDraw.Draw(mask), math.radians(thing.angle), radius * (1 - rim)
    c, s = math.cos(angle) * size, math.sin(angle) * size
    outline = [(reach + x * c - y * s, reach + x * s + y * c) for x, y in _OUTLINES[thing.shape]]
    pen.polygon(outline, fill=255)
    if thing.shape == "ring":
        hole = RING_HOLE * radius * (1 + rim / 2)
        pen.ellipse((reach - hole, reach - hole, reach + hole, reach + hole), fill=0)
    return mask, (round(thing.x * side) - reach, round(thing.y * side) - reach)


def _draw_stripes(tile: Image.Image, period: float) -> None:
    pen, side = ImageDraw.Draw(tile), tile.width
    for k in range(-1, 2 * math.ceil(side / period) + 1):
        x = k * period * 1.2  # diagonal, so that stripes cross the arms of a cross too
        pen.line((x, 0, x - side, side), fill=PALE, width=max(1, round(period * 0.34)))


def _draw_dots(tile: Image.Image, period: float) -> None:
    pen, half, dot = ImageDraw.Draw(tile), tile.width / 2, period * 0.3
    steps = math.ceil(half / period)
    for row, column in product(range(-steps, steps + 1), repeat=2):
        x, y = half + (column + row % 2 / 2) * period, half + row * period * 0.9
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=PALE)


def _spokes(*spokes: tuple[float, float]) -> Polygon:
    """Return corners at (radius, degrees)."""
    return [(r * math.cos(math.radians(d)), r * math.sin(math.radians(d))) for r, d in spokes]


def _heart(t: float) -> tuple[float, float]:
    x = 16 * math.sin(t) ** 3
    y = -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t)
    return x / 16.5, (y - 2.0) / 16.5 + 0.08


_OUTLINES: dict[str, Polygon] = {
    "circle": _spokes(*((0.92, 360 * k / 48) for k in range(48))),
    "ring": _spokes(*((0.95, 360 * k / 48) for k in range(48))),
    "square": _spokes(*((1.0, 45 + 90 * k) for k in range(4))),
    "triangle": _spokes(*((1.0, -90 + 120 * k) for k in range(3))),
    "diamond": [(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)],
    "star": _spokes(*((1.0 if k % 2 == 0 else 0.45, -90 + 36 * k) for k in range(10))),
    "cross": [
        *((0.3, -0.92), (0.3, -0.3), (0.92, -0.3), (0.92, 0.3), (0.3, 0.3), (0.3, 0.92)),
        *((-0.3, 0.92), (-0.3, 0.3), (-0.92, 0.3), (-0.92, -0.3), (-0.3, -0.3), (-0.3, -0.92)),
    ],
    "heart": [_heart(2 * math.pi * k / 40) for k in range(40)],
}
