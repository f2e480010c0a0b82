"""Scenes as symbols, and true captions, questions and answers about them.

:mod:`.scenes` draws them; the words are in `scene_words.yaml`. Coordinates are fractions of the
picture: x to the right, y downwards, both in [0, 1].
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .images import Draws

_DATA = yaml.safe_load(Path(__file__).with_name("scene_words.yaml").read_text(encoding="utf-8"))
_PHRASES, _QUESTIONS = _DATA["phrases"], _DATA["questions"]
COLORS: dict[str, tuple[int, ...]] = {name: tuple(rgb) for name, rgb in _DATA["colors"].items()}
TONES: dict[str, tuple[int, ...]] = {name: tuple(rgb) for name, rgb in _DATA["tones"].items()}
SIZES: dict[str, list[float]] = _DATA["sizes"]
SHAPES = tuple(_DATA["shapes"])
TEXTURES = tuple(_DATA["textures"])
BACKGROUNDS = tuple(_DATA["backgrounds"])
NUMBERS, NOUNS = _PHRASES["numbers"], _PHRASES["nouns"]
MAX_OBJECTS = 4
SIMPLE_SCALE = 1.5  # of the radii of simple scenes
MARGIN = 0.02  # free border of the picture, so that no object is clipped
OBJECT_CONTRAST = 95.0  # minimum RGB distance of an object to its background
TONE_CONTRAST = 60.0  # the same between the two tones of one background
LEVEL = 0.12  # objects nearer than this along an axis are called neither left nor right
MIN_WORDS, MAX_WORDS = 3, 25
KINDS = (
    *("single", "couple", "counted", "related", "related", "placed", "compared", "shared"),
    "grounded",
)
"""Of captions, methods of `_Captioner`."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


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
    """One to four objects that do not overlap."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def main(self) -> SceneObject:
        """The object with the largest radius."""
        return max(self.objects, key=lambda thing: thing.radius)


def compose(draws: Draws, *, simple: bool = False) -> Scene:
    """Return a random scene; a simple one has one or two large objects on a calm background."""
    kinds = ("plain", "plain", "gradient", "checkered", "noisy")
    background = _draw_background(draws, kinds[:3] if simple else kinds)
    colors = [name for name, rgb in COLORS.items() if _stands_out(rgb, background)]
    count = 1 + draws.pick((0, 1) if simple else (0, 1, 1, 2, 2, 3))
    scale = SIMPLE_SCALE if simple else 1.0
    objects: list[SceneObject] = []
    while len(objects) < count:
        placed = _place(objects, colors, scale, draws)
        objects = [] if placed is None else [*objects, placed]
    return Scene(tuple(objects), background)


def _draw_background(draws: Draws, kinds: tuple[str, ...]) -> Background:
    kind = draws.pick(kinds)
    tones = [first := draws.pick(tuple(TONES))]
    if kind in ("gradient", "checkered"):
        far = [t for t in TONES if math.dist(TONES[t], TONES[first]) >= TONE_CONTRAST]
        tones.append(draws.pick(far))
    vertical, cells = draws.chance(0.5), draws.pick((5, 6, 7, 8))
    return Background(kind, tuple(tones), vertical, cells, int(draws.unit() * 2**31))


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
    return all(math.dist(rgb, end) >= OBJECT_CONTRAST for end in ends)


def captions(scene: Scene, draws: Draws, count: int = 5) -> list[str]:
    """Return `count` different captions, 3 to 25 words each; the first names all objects."""
    found: dict[str, str] = {}
    captioner, makers = _Captioner(scene, draws), ["everything"]
    while len(found) < count:
        makers = makers or draws.shuffled(KINDS)
        sentence = getattr(captioner, makers[-1])()
        is_short = MIN_WORDS <= len(sentence.split()) <= MAX_WORDS
        if is_short:
            style = draws.unit()  # people type with or without capital and full stop
            typed = sentence[0].upper() + sentence[1:] if style < 0.35 else sentence
            found.setdefault(sentence, typed + "." if style < 0.45 else typed)
        if is_short or makers != ["everything"]:
            makers = makers[:-1]
    return list(found.values())


def questions(scene: Scene, draws: Draws) -> list[dict[str, str]]:
    """Return up to one question of each type, as dicts of question, answer and type."""
    found = [(kind, ask(scene, draws)) for kind, ask in _ASKERS.items()]
    return [{"question": qa[0], "answer": qa[1], "type": kind} for kind, qa in found if qa]


def vocabulary() -> list[str]:
    """Return all words of captions, questions and answers, lower-case and sorted."""
    plurals = [_plural(noun, 2) for noun in (*SHAPES, *NOUNS)]
    names = [*COLORS, *TONES, *SIZES, *SHAPES, *TEXTURES, *BACKGROUNDS]
    texts = [*_texts(_PHRASES), *_texts(_QUESTIONS), *names, *plurals, "a an and is are"]
    return sorted({*re.findall("[a-z]+", re.sub(r"{\w+}", " ", " ".join(texts).lower()))})


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for entry in node.values() if isinstance(node, dict) else node:
            yield from _texts(entry)


def _say(draws: Draws, phrases: Sequence[str], *places: str, **names: str) -> str:
    return draws.pick(phrases).format(*places, **names)


def _plural(noun: str, count: int) -> str:
    """Return the noun's form for this count.

    >>> _plural("cross", 2), _plural("ring", 1)
    ('crosses', 'ring')
    """
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _relations(a: SceneObject, b: SceneObject) -> list[str]:
    """Return the relations of a to b that hold: left, right, above, below."""
    gaps = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return [name for name, gap in gaps.items() if gap > LEVEL]


@dataclass(frozen=True, slots=True)
class _Captioner:
    """Makes captions of each kind; "" where the scene has nothing to say of this kind."""

    scene: Scene
    draws: Draws

    def everything(self) -> str:
        is_sized = len(self.scene.objects) <= 2 and self.draws.chance(0.5)
        by = ("size", "color", "shape") if is_sized else ("color", "shape")
        return self._listed(self._groups(by), backed=0.5)

    def single(self) -> str:
        group = (1, self._phrase(self.draws.pick(self.scene.objects)))
        return self._listed([group], backed=0.25)

    def couple(self) -> str:
        pair = self._pair()
        return self._listed([(1, phrase) for phrase in pair[2:]], backed=0.2) if pair else ""

    def counted(self) -> str:
        by = self.draws.pick((("color", "shape"), ("shape",), ("color",), ()))
        total = len(self.scene.objects)
        whole = [(total, f"{NUMBERS[total]} {_plural(self.draws.pick(NOUNS), total)}")]
        count, group = max(self._groups(by) if by else whole)
        return self._say("counted", group=group, be="is" if count == 1 else "are")

    def related(self) -> str:
        pair = self._pair()
        if not pair or not (held := _relations(*pair[:2])):
            return ""
        relation = self.draws.pick(_PHRASES["relation"][self.draws.pick(held)])
        a, b = map(_article, pair[2:])
        return self._backed(self._say("related", a=a, b=b, relation=relation), 0.15)

    def placed(self) -> str:
        pick = self.draws.pick
        thing = pick(self.scene.objects)
        if not (places := self._places(thing)):
            return ""
        name = _article(self._phrase(thing))
        return pick(_PHRASES["placed"]).format(a=name, place=pick(places))

    def compared(self) -> str:
        pair = self._pair(sized=False)
        if not pair or pair[0].size == pair[1].size:
            return ""
        first, second = pair[2:]
        templates = _PHRASES["compared"][pair[0].size]
        return _say(self.draws, templates, a=_article(first), b=_article(second), c=first)

    def shared(self) -> str:
        total, found = len(self.scene.objects), []
        for name in ("color", "shape", "size", "texture"):
            values = {getattr(thing, name) for thing in self.scene.objects}
            if total > 1 and len(values) == 1 and values != {"plain"}:
                found.append(_plural(values.pop(), total) if name == "shape" else values.pop())
        if not found:
            return ""
        pick = self.draws.pick
        return pick(_PHRASES["shared"]).format(all=pick(_PHRASES["all"][total]), what=pick(found))

    def grounded(self) -> str:
        background = self.scene.background
        return self.draws.pick(_PHRASES["grounded"]).format(
            tone=_say(self.draws, _PHRASES["tone"][background.kind], *background.tones),
            ground=self._ground(),
            a=_article(self._phrase(self.draws.pick(self.scene.objects))),
        )

    def _say(self, kind: str, **names: str) -> str:
        return _say(self.draws, _PHRASES[kind], **names)

    def _ground(self) -> str:
        """Return a noun phrase with article for the background."""
        background = self.scene.background
        phrase = _say(self.draws, _PHRASES["ground"][background.kind], *background.tones)
        return _article(phrase.removeprefix("a "))

    def _phrase(self, thing: SceneObject, *, sized: bool = True) -> str:
        """Return a true noun phrase without article, such as "small striped red circle"."""
        draws = self.draws
        parts = [draws.pick(_PHRASES["size"][thing.size])] if sized and draws.chance(0.45) else []
        if draws.chance(0.6 if thing.texture != "plain" else 0.05):
            parts.append(thing.texture)
        if draws.chance(0.9):
            parts.append(thing.color)
        noun = draws.pick(NOUNS) if parts and draws.chance(0.08) else thing.shape
        return " ".join([*parts, noun])

    def _pair(self, *, sized: bool = True) -> tuple[SceneObject, SceneObject, str, str] | None:
        """Return two objects and phrases that tell them apart, or None."""
        a, b = (self.draws.shuffled(self.scene.objects) * 2)[:2]
        first, second = self._phrase(a, sized=sized), self._phrase(b, sized=sized)
        return None if a is b or first == second else (a, b, first, second)

    def _groups(self, by: tuple[str, ...]) -> list[tuple[int, str]]:
        """Return (count, "two red circles") of all objects, grouped by the attributes `by`."""
        objects = self.draws.shuffled(self.scene.objects)
        counts = Counter(tuple(getattr(thing, name) for name in by) for thing in objects)
        found = []
        for (*words, last), count in counts.items():
            noun = last if by[-1] == "shape" else f"{last} shape"
            found.append((count, " ".join([NUMBERS[count], *words, _plural(noun, count)])))
        return found

    def _listed(self, groups: list[tuple[int, str]], backed: float) -> str:
        texts = (_article(text.removeprefix("one ")) if n == 1 else text for n, text in groups)
        *first, last = texts
        things = f"{', '.join(first)} and {last}" if first else last
        be = "is" if groups[0][0] == 1 else "are"
        are = "is" if groups[0][0] == len(groups) == 1 else "are"
        return self._backed(self._say("list", things=things, be=be, are=are), backed)

    def _backed(self, sentence: str, probability: float) -> str:
        """Name the background, too, with this probability."""
        if not self.draws.chance(probability):
            return sentence
        template = self.draws.pick(_PHRASES["scenery"])
        return f"{sentence} {template.format(ground=self._ground())}"

    def _places(self, thing: SceneObject) -> list[str]:
        pick, halves = self.draws.pick, _PHRASES["half"]
        h = "left" if thing.x < 0.35 else "right" if thing.x > 0.65 else ""
        v = "top" if thing.y < 0.35 else "bottom" if thing.y > 0.65 else ""
        if h and v:
            corner = pick(_PHRASES["corner"]).format(h=h, v=pick(_PHRASES["vertical"][v]))
            return [corner, corner, pick(halves[pick((h, v))])]
        if h or v:
            return [pick(halves[h or v])]
        is_central = max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.1
        return [pick(_PHRASES["middle"])] if is_central else []


# Kinds of questions, each with one true answer of one word


def _unique(scene: Scene, draws: Draws, *, known: str, wanted: str) -> tuple[str, str] | None:
    """Ask for an attribute of an object that is the only one with its `known` attribute."""
    counts = Counter(getattr(thing, known) for thing in scene.objects)
    single = [thing for thing in scene.objects if counts[getattr(thing, known)] == 1]
    if not single:
        return None
    thing = draws.pick(single)
    question = _say(draws, _QUESTIONS[wanted], noun=thing.shape, color=thing.color)
    return question, getattr(thing, wanted)


def _count(scene: Scene, draws: Draws) -> tuple[str, str]:
    thing = draws.pick(scene.objects)
    name = draws.pick(("shape", "color", "all"))
    chosen = draws.pick(SHAPES) if draws.chance(0.15) else thing.shape
    if name == "shape":
        count, nouns = sum(o.shape == chosen for o in scene.objects), _plural(chosen, 2)
    elif name == "color":
        count, nouns = sum(o.color == thing.color for o in scene.objects), f"{thing.color} shapes"
    else:
        count, nouns = len(scene.objects), _plural(draws.pick(NOUNS), 2)
    return _say(draws, _QUESTIONS["count"], nouns=nouns), NUMBERS[count]


def _exists(scene: Scene, draws: Draws) -> tuple[str, str]:
    thing = draws.pick(scene.objects)
    color, shape = thing.color, thing.shape
    if draws.chance(0.5):  # a near miss: only one of the two words is wrong
        is_color = draws.chance(0.5)
        color = draws.pick(tuple(COLORS)) if is_color else color
        shape = shape if is_color else draws.pick(SHAPES)
    exists = any((other.color, other.shape) == (color, shape) for other in scene.objects)
    question = _say(draws, _QUESTIONS["yes-no"], a=_article(f"{color} {shape}"))
    return question, "yes" if exists else "no"


def _where(scene: Scene, draws: Draws) -> tuple[str, str] | None:
    counts = Counter((thing.color, thing.shape) for thing in scene.objects)
    single = [o for o in draws.shuffled(scene.objects) if counts[o.color, o.shape] == 1]
    if len(single) < 2 or not (held := _relations(*single[:2])):
        return None
    answer = draws.pick(held)
    first, second = draws.shuffled((answer, OPPOSITE[answer]))
    a, b = (f"{thing.color} {thing.shape}" for thing in single[:2])
    sides = {"one": _QUESTIONS["sides"][first], "other": _QUESTIONS["sides"][second]}
    return _say(draws, _QUESTIONS["relation"], a=a, b=b, **sides), answer


def _background(scene: Scene, draws: Draws) -> tuple[str, str]:
    background = scene.background
    if len(background.tones) == 1 and draws.chance(0.5):
        return draws.pick(_QUESTIONS["tone"]), background.tones[0]
    return draws.pick(_QUESTIONS["background"]), background.kind


_ASKERS: dict[str, Callable[[Scene, Draws], tuple[str, str] | None]] = {
    "color": partial(_unique, known="shape", wanted="color"),
    "shape": partial(_unique, known="color", wanted="shape"),
    **{"count": _count, "yes-no": _exists, "relation": _where, "background": _background},
}
