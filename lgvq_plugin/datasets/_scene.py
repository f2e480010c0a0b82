"""A scene as symbols: what :mod:`_scene_drawing` draws and :mod:`_scene_language` tells.

Coordinates are fractions of the picture: x to the right, y downwards, both in [0, 1].
"""

from dataclasses import dataclass

from ._draws import Draws

COLORS = {
    "red": (220, 35, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 40),
    "green": (35, 150, 60),
    "cyan": (25, 195, 215),
    "blue": (35, 80, 215),
    "purple": (130, 45, 170),
    "pink": (250, 130, 195),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
}
"""Colors of objects, RGB."""

TONES = {
    "white": (246, 246, 246),
    "gray": (165, 165, 165),
    "beige": (232, 216, 180),
    "lavender": (205, 195, 235),
    "mint": (190, 230, 205),
    "navy": (28, 34, 72),
}
"""Colors of backgrounds, RGB; no object has one of these."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = {"small": (0.09, 0.115), "large": (0.17, 0.21)}  # range of the radius
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "checkered", "noisy")
MAX_OBJECTS = 4
SIMPLE_SCALE = 1.5  # of the radii of simple scenes

MARGIN = 0.02  # free border of the picture, so that no object is clipped
OBJECT_CONTRAST = 95.0  # least RGB distance of an object to its background
TONE_CONTRAST = 60.0  # the same between the two tones of one background


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One figure: its words (shape, color, size, texture) and its place."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Background:
    """Its kind, one tone (plain, noisy) or two (gradient, checkered), and how it is laid."""

    kind: str
    tones: tuple[str, ...]
    vertical: bool
    cells: int
    noise_seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One to four objects that hide nothing of one another but touching rims."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def main(self) -> SceneObject:
        """The object with the largest radius."""
        return max(self.objects, key=lambda thing: thing.radius)


def compose(draws: Draws, *, simple: bool = False) -> Scene:
    """Return a random scene.

    Args:
        draws: the random choices.
        simple: one or two objects, half as large again, on a plain or shaded background.

    Example:
        >>> scene = compose(Draws(0))
        >>> 1 <= len(scene.objects) <= 4
        True
    """
    kinds = ("plain", "plain", "gradient", "checkered", "noisy")
    background = _background(draws, kinds[:3] if simple else kinds)
    colors = [name for name, rgb in COLORS.items() if _stands_out(rgb, background)]
    count = 1 + draws.pick((0, 1) if simple else (0, 1, 1, 2, 2, 3))
    scale = SIMPLE_SCALE if simple else 1.0
    while True:
        objects: list[SceneObject] = []
        for _ in range(count):
            placed = _place(objects, colors, scale, draws)
            if placed is None:
                break
            objects.append(placed)
        else:
            return Scene(tuple(objects), background)


def _background(draws: Draws, kinds: tuple[str, ...]) -> Background:
    kind = draws.pick(kinds)
    first = draws.pick(tuple(TONES))
    tones: tuple[str, ...] = (first,)
    if kind in ("gradient", "checkered"):
        far = [t for t in TONES if _distance(TONES[t], TONES[first]) >= TONE_CONTRAST]
        tones = (first, draws.pick(far))
    vertical, cells = draws.chance(0.5), draws.pick((5, 6, 7, 8))
    return Background(kind, tones, vertical, cells, int(draws.unit() * 2**31))


def _place(
    others: list[SceneObject], colors: list[str], scale: float, draws: Draws
) -> SceneObject | None:
    shape, color = draws.pick(SHAPES), draws.pick(colors)
    if others and draws.chance(0.4):  # else "two red circles" would be rare
        shape = draws.pick(others).shape
    if others and draws.chance(0.35):
        color = draws.pick(others).color
    size = draws.pick(tuple(SIZES))
    texture = draws.pick(("plain", "plain", "plain", *TEXTURES[1:]))
    radius = scale * draws.between(*SIZES[size])
    low = radius + MARGIN
    for _ in range(20):
        x, y = draws.between(low, 1 - low), draws.between(low, 1 - low)
        if all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius) ** 2 for o in others):
            return SceneObject(shape, color, size, texture, x, y, radius, draws.between(-12, 12))
    return None


def _stands_out(rgb: tuple[int, ...], background: Background) -> bool:
    ends = [TONES[tone] for tone in background.tones]
    if background.kind == "gradient":
        ends += [tuple((a + b) // 2 for a, b in zip(*ends, strict=True))]
    return all(_distance(rgb, end) >= OBJECT_CONTRAST for end in ends)


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5
