"""Questions about a scene, each with one true answer of one word."""

from collections import Counter

from ._draws import Draws
from ._scene import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, TONES, Scene, SceneObject
from ._scene_language import (
    ALL,
    COMPARED,
    CORNER,
    COUNTED,
    GROUND,
    GROUNDED,
    HALVES,
    LISTS,
    MIDDLE,
    NUMBERS,
    OPPOSITE,
    PLACED,
    RELATED,
    RELATIONS,
    SCENERY,
    SHARED,
    SIZE_WORDS,
    TONE,
    VERTICAL,
    article,
    plural,
    relations,
    words,
)

COLOR = ("what color is the {noun}?", "which color does the {noun} have?")
SHAPE = ("what shape is the {color} object?", "what is the {color} shape?")
COUNT = ("how many {nouns} are there?", "how many {nouns} do you see?")
EXISTS = ("is there {a}?", "do you see {a}?")
WHERE = ("is the {a} {one} or {other} the {b}?",)
SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
KIND = (
    "what kind of background is it?",
    "is the background " + ", ".join(BACKGROUNDS[:-1]) + " or noisy?",
)
TONED = ("what color is the background?",)
TYPES = ("color", "shape", "count", "yes-no", "relation", "background")


def questions(scene: Scene, draws: Draws) -> list[dict[str, str]]:
    """Return up to one question of each type, as dicts of question, answer and type."""
    asked = (_color, _shape, _count, _exists, _where, _background)
    found = [(kind, make(scene, draws)) for kind, make in zip(TYPES, asked, strict=True)]
    return [{"question": qa[0], "answer": qa[1], "type": kind} for kind, qa in found if qa]


def vocabulary() -> list[str]:
    """Return all words of captions, questions and answers, lower-case and sorted.

    Example:
        >>> words = vocabulary()
        >>> "circles" in words, "an" in words, "elephant" in words
        (True, True, False)
    """
    nouns = (*SHAPES, "shape", "object")
    lists: tuple[tuple[str, ...], ...]
    lists = (LISTS, SCENERY, RELATED, PLACED, CORNER, MIDDLE, COUNTED, SHARED, GROUNDED)
    lists += (COLOR, SHAPE, COUNT, EXISTS, WHERE, KIND, TONED, NUMBERS, BACKGROUNDS)
    lists += (tuple(COLORS), tuple(TONES), tuple(SIZES), TEXTURES, nouns)
    lists += (tuple(plural(noun, 2) for noun in nouns), tuple(SIDES.values()))
    tables = (RELATIONS, VERTICAL, HALVES, COMPARED, ALL, GROUND, TONE, SIZE_WORDS)
    lists += tuple(entry for table in tables for entry in table.values())
    rest = ("a an and is are yes no",)
    return sorted(words(text for entries in (*lists, rest) for text in entries))


def _color(scene: Scene, draws: Draws) -> tuple[str, str] | None:
    thing = _unique(scene, draws, "shape")
    return (draws.pick(COLOR).format(noun=thing.shape), thing.color) if thing else None


def _shape(scene: Scene, draws: Draws) -> tuple[str, str] | None:
    thing = _unique(scene, draws, "color")
    return (draws.pick(SHAPE).format(color=thing.color), thing.shape) if thing else None


def _unique(scene: Scene, draws: Draws, name: str) -> SceneObject | None:
    counts = Counter(getattr(thing, name) for thing in scene.objects)
    single = [thing for thing in scene.objects if counts[getattr(thing, name)] == 1]
    return draws.pick(single) if single else None


def _count(scene: Scene, draws: Draws) -> tuple[str, str]:
    thing = draws.pick(scene.objects)
    name = draws.pick(("shape", "color", "all"))
    chosen = draws.pick(SHAPES) if draws.chance(0.15) else thing.shape
    if name == "shape":
        count = sum(other.shape == chosen for other in scene.objects)
        nouns = plural(chosen, 2)
    elif name == "color":
        count = sum(other.color == thing.color for other in scene.objects)
        nouns = f"{thing.color} shapes"
    else:
        count, nouns = len(scene.objects), draws.pick(("shapes", "objects"))
    return draws.pick(COUNT).format(nouns=nouns), NUMBERS[count]


def _exists(scene: Scene, draws: Draws) -> tuple[str, str]:
    thing = draws.pick(scene.objects)
    color, shape = thing.color, thing.shape
    if draws.chance(0.5):  # a near miss: only one of the two words is wrong
        if draws.chance(0.5):
            color = draws.pick(tuple(COLORS))
        else:
            shape = draws.pick(SHAPES)
    there = any((other.color, other.shape) == (color, shape) for other in scene.objects)
    return draws.pick(EXISTS).format(a=article(f"{color} {shape}")), "yes" if there else "no"


def _where(scene: Scene, draws: Draws) -> tuple[str, str] | None:
    counts = Counter((thing.color, thing.shape) for thing in scene.objects)
    single = [o for o in draws.shuffled(scene.objects) if counts[o.color, o.shape] == 1]
    if len(single) < 2 or not (held := relations(*single[:2])):
        return None
    answer = draws.pick(held)
    first, second = draws.shuffled((answer, OPPOSITE[answer]))
    a, b = (f"{thing.color} {thing.shape}" for thing in single[:2])
    sides = {"one": SIDES[first], "other": SIDES[second]}
    return draws.pick(WHERE).format(a=a, b=b, **sides), answer


def _background(scene: Scene, draws: Draws) -> tuple[str, str]:
    background = scene.background
    if len(background.tones) == 1 and draws.chance(0.5):
        return draws.pick(TONED), background.tones[0]
    return draws.pick(KIND), background.kind
