"""Draw a symbolic scene: large first, then box-filtered down to the wanted size."""

import math

import numpy as np
from PIL import Image, ImageDraw

from ._scene import COLORS, TONES, Background, Scene, SceneObject

PALE = (250, 250, 250)  # the second color of stripes and dots
NOISE_CELLS, NOISE_SPAN = 32, 38
RING_HOLE = 0.55
Polygon = list[tuple[float, float]]


def draw(scene: Scene, size: int) -> np.ndarray:
    """Return the picture, uint8 (size, size, 3).

    Example:
        >>> from ._draws import Draws
        >>> from ._scene import compose
        >>> draw(compose(Draws(0)), 32).shape
        (32, 32, 3)
    """
    factor = 4 if size <= 96 else 3 if size <= 160 else 2
    canvas = _draw_background(scene.background, size * factor)
    for thing in scene.objects:
        _draw_object(canvas, thing)
    return np.asarray(canvas.reduce(factor))


def _draw_background(background: Background, side: int) -> Image.Image:
    first, *rest = (TONES[tone] for tone in background.tones)
    if background.kind == "plain":
        return Image.new("RGB", (side, side), first)
    smooth = Image.Resampling.NEAREST
    tile: np.ndarray
    if background.kind == "noisy":
        generator = np.random.default_rng(background.noise_seed)
        noise = generator.integers(-NOISE_SPAN, NOISE_SPAN + 1, (NOISE_CELLS, NOISE_CELLS, 1))
        tile = np.clip(np.array(first) + noise, 0, 255)
    elif background.kind == "checkered":
        parity = np.indices((background.cells, background.cells)).sum(0)[..., None] % 2
        tile = np.where(parity == 0, first, rest[0])
    else:
        share = np.linspace(0, 1, 64)[:, None, None]
        tile = np.array(first) * (1 - share) + np.array(rest[0]) * share
        tile = tile if background.vertical else tile.transpose(1, 0, 2)
        smooth = Image.Resampling.BILINEAR
    return Image.fromarray(tile.astype(np.uint8)).resize((side, side), smooth)


def _draw_object(canvas: Image.Image, thing: SceneObject) -> None:
    side, radius = canvas.width, thing.radius * canvas.width
    reach = math.ceil(radius) + 1
    left, top = round(thing.x * side) - reach, round(thing.y * side) - reach
    color = COLORS[thing.color]
    canvas.paste(color, (left, top), _mask(thing, reach, radius))
    if thing.texture != "plain":
        # A rim in the object's own color keeps its outline whole on a pale background.
        period = radius * (0.5 if thing.size == "large" else 0.66)
        pattern = _stripes if thing.texture == "striped" else _dots
        inner = _mask(thing, reach, radius, rim=0.14)
        canvas.paste(pattern(2 * reach, period, color), (left, top), inner)


def _mask(thing: SceneObject, reach: int, radius: float, rim: float = 0.0) -> Image.Image:
    mask = Image.new("L", (2 * reach, 2 * reach), 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon(_turned(_OUTLINES[thing.shape], thing.angle, radius * (1 - rim), reach), fill=255)
    if thing.shape == "ring":
        hole = RING_HOLE * radius * (1 + rim / 2)
        pen.ellipse((reach - hole, reach - hole, reach + hole, reach + hole), fill=0)
    return mask


def _turned(outline: Polygon, angle: float, radius: float, reach: int) -> Polygon:
    c, s = math.cos(math.radians(angle)) * radius, math.sin(math.radians(angle)) * radius
    return [(reach + x * c - y * s, reach + x * s + y * c) for x, y in outline]


def _stripes(side: int, period: float, color: tuple[int, ...]) -> Image.Image:
    tile = Image.new("RGB", (side, side), color)
    pen = ImageDraw.Draw(tile)
    for k in range(-1, 2 * math.ceil(side / period) + 1):
        x = k * period * 1.2  # diagonal, so that stripes cross the arms of a cross too
        pen.line((x, 0, x - side, side), fill=PALE, width=max(1, round(period * 0.34)))
    return tile


def _dots(side: int, period: float, color: tuple[int, ...]) -> Image.Image:
    tile = Image.new("RGB", (side, side), color)
    pen = ImageDraw.Draw(tile)
    half, dot = side / 2, period * 0.3
    steps = math.ceil(half / period)
    for row in range(-steps, steps + 1):
        for column in range(-steps, steps + 1):
            x, y = half + (column + row % 2 / 2) * period, half + row * period * 0.9
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=PALE)
    return tile


def _spokes(*radii_and_degrees: tuple[float, float]) -> Polygon:
    return [
        (r * math.cos(math.radians(d)), r * math.sin(math.radians(d))) for r, d in radii_and_degrees
    ]


def _heart() -> Polygon:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    points = [
        (16 * math.sin(t) ** 3, -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t))
        for t in turns
    ]
    return [(x / 16.5, (y - 2.0) / 16.5 + 0.08) for x, y in points]


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
    "heart": _heart(),
}
