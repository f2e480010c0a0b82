"""Captions of a scene, every one true of the drawing.

"two red circles" counts exactly; "a red circle" only says that there is one. Relations leave
out pairs that are nearly level, and places leave out objects near the border of a region.
"""

import re
from collections.abc import Iterable

from ._draws import Draws
from ._scene import Background, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
LEVEL = 0.12  # objects nearer than this along an axis are called neither left nor right
MIN_WORDS, MAX_WORDS = 3, 25

LISTS = (
    "{things}",
    "a picture of {things}",
    "a drawing with {things}",
    "this picture shows {things}",
    "we see {things}",
    "there {be} {things}",
    "in this image there {be} {things}",
    "{things} {are} shown",
)
SCENERY = ("on {ground}", "against {ground}", "in front of {ground}")
RELATED = (
    "{a} {relation} {b}",
    "{a} {relation} {b}",
    "{a} is {relation} {b}",
    "{a} sits {relation} {b}",
    "there is {a} {relation} {b}",
    "a picture with {a} {relation} {b}",
)
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACED = (
    "{a} {place}",
    "{a} is {place}",
    "{a} lies {place}",
    "{place} there is {a}",
    "{place} we see {a}",
    "a picture of {a} {place}",
)
CORNER = ("in the {v} {h} corner", "near the {v} {h} corner")
VERTICAL = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
MIDDLE = ("in the middle", "in the center of the picture")
HALVES = {
    "left": ("in the left half", "on the left side"),
    "right": ("in the right half", "on the right side"),
    "top": ("in the upper half", "at the top"),
    "bottom": ("in the lower half", "at the bottom"),
}
COUNTED = ("there {be} exactly {group}", "this image has {group}", "{group} can be seen")
COMPARED = {
    "large": ("{a} is larger than {b}", "{a} is bigger than {b}", "{b} and a larger {c}"),
    "small": ("{a} is smaller than {b}", "{b} and a smaller {c}"),
}
SHARED = (
    "{all} shapes are {what}",
    "{all} objects are {what}",
    "{all} shapes in the image are {what}",
)
ALL = {2: ("both",), 3: ("all", "all three"), 4: ("all", "all four")}
GROUNDED = ("the background is {tone}", "behind {a} there is {ground}", "{ground} with {a}")
GROUND = {
    "plain": ("a plain {0} background", "a {0} background"),
    "gradient": ("a background that fades from {0} to {1}", "a gradient from {0} to {1}"),
    "checkered": ("a {0} and {1} checkered background", "a checkerboard of {0} and {1}"),
    "noisy": ("a noisy {0} background", "a grainy {0} background"),
}
TONE = {
    "plain": ("plain {0}", "{0}"),
    "gradient": ("a gradient from {0} to {1}",),
    "checkered": ("checkered in {0} and {1}",),
    "noisy": ("noisy and {0}",),
}


def captions(scene: Scene, draws: Draws, count: int = 5) -> list[str]:
    """Return `count` different captions, 3 to 25 words each; the first tells of all objects."""
    told: dict[str, str] = {}
    makers = [_everything]
    while len(told) < count:
        makers = makers or draws.shuffled(_MAKERS)
        sentence = makers[-1](scene, draws)
        is_short = MIN_WORDS <= len(sentence.split()) <= MAX_WORDS
        if is_short:
            told.setdefault(sentence, _finished(sentence, draws))
        if is_short or makers != [_everything]:
            makers = makers[:-1]
    return list(told.values())


def words(sentences: Iterable[str]) -> set[str]:
    """Return the lower-case words, without the `{placeholders}` of a template."""
    return {w for s in sentences for w in re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", s.lower()))}


def plural(noun: str, count: int) -> str:
    """Return the noun's form for this count.

    Example:
        >>> plural("cross", 2), plural("ring", 1)
        ('crosses', 'ring')
    """
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


def article(phrase: str) -> str:
    """Return the phrase behind "a" or "an".

    Example:
        >>> article("orange star")
        'an orange star'
    """
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def relations(a: SceneObject, b: SceneObject) -> list[str]:
    """Return what holds of a seen from b: of left, right, above, below."""
    held = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return [name for name, gap in held.items() if gap > LEVEL]


def ground(background: Background, draws: Draws) -> str:
    """Return a noun phrase with article for the background."""
    phrase = draws.pick(GROUND[background.kind]).format(*background.tones)
    return article(phrase.removeprefix("a "))


def _phrase(thing: SceneObject, draws: Draws, *, sized: bool = True) -> str:
    """Return a true noun phrase without article, such as "small striped red circle"."""
    parts = [draws.pick(SIZE_WORDS[thing.size])] if sized and draws.chance(0.45) else []
    if draws.chance(0.6 if thing.texture != "plain" else 0.05):
        parts.append(thing.texture)
    if draws.chance(0.9):
        parts.append(thing.color)
    noun = draws.pick(("shape", "object")) if parts and draws.chance(0.08) else thing.shape
    return " ".join([*parts, noun])


def _groups(scene: Scene, draws: Draws, by: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return (count, "two red circles") of all objects, alike in `by` taken together."""
    alike: dict[tuple[str, ...], list[SceneObject]] = {}
    for thing in draws.shuffled(scene.objects):
        alike.setdefault(tuple(getattr(thing, name) for name in by), []).append(thing)
    found = []
    for key, things in alike.items():
        noun = key[-1] if by[-1] == "shape" else f"{key[-1]} shape"
        words = " ".join([*key[:-1], plural(noun, len(things))])
        found.append((len(things), f"{NUMBERS[len(things)]} {words}"))
    return found


def _joined(phrases: list[str]) -> str:
    return " and ".join([*([", ".join(phrases[:-1])] if phrases[1:] else []), phrases[-1]])


def _listed(groups: list[tuple[int, str]], scene: Scene, draws: Draws, backed: float) -> str:
    phrases = [article(text.removeprefix("one ")) if n == 1 else text for n, text in groups]
    be = "is" if groups[0][0] == 1 else "are"
    are = "is" if groups[0][0] == len(groups) == 1 else "are"
    sentence = draws.pick(LISTS).format(things=_joined(phrases), be=be, are=are)
    return sentence + (_behind(scene, draws) if draws.chance(backed) else "")


def _behind(scene: Scene, draws: Draws) -> str:
    return " " + draws.pick(SCENERY).format(ground=ground(scene.background, draws))


def _everything(scene: Scene, draws: Draws) -> str:
    by: tuple[str, ...] = ("color", "shape")
    if len(scene.objects) <= 2 and draws.chance(0.5):
        by = ("size", "color", "shape")
    return _listed(_groups(scene, draws, by), scene, draws, backed=0.5)


def _single(scene: Scene, draws: Draws) -> str:
    group = (1, "one " + _phrase(draws.pick(scene.objects), draws))
    return _listed([group], scene, draws, backed=0.25)


def _couple(scene: Scene, draws: Draws) -> str:
    a, b = _two(scene, draws)
    first, second = _phrase(a, draws), _phrase(b, draws)
    if a is b or first == second:
        return ""
    return _listed([(1, first), (1, second)], scene, draws, backed=0.2)


def _counted(scene: Scene, draws: Draws) -> str:
    by = draws.pick((("color", "shape"), ("shape",), ("color",), ()))
    total = len(scene.objects)
    noun = draws.pick(("shape", "object"))
    whole = [(total, f"{NUMBERS[total]} {plural(noun, total)}")]
    count, text = max(_groups(scene, draws, by) if by else whole)
    return draws.pick(COUNTED).format(group=text, be="is" if count == 1 else "are")


def _related(scene: Scene, draws: Draws) -> str:
    a, b = _two(scene, draws)
    held = relations(a, b)
    first, second = _phrase(a, draws), _phrase(b, draws)
    if not held or first == second:
        return ""
    words = draws.pick(RELATIONS[draws.pick(held)])
    names = {"a": article(first), "b": article(second), "relation": words}
    sentence = draws.pick(RELATED).format(**names)
    return sentence + (_behind(scene, draws) if draws.chance(0.15) else "")


def _placed(scene: Scene, draws: Draws) -> str:
    thing = draws.pick(scene.objects)
    places = _places(thing, draws)
    if not places:
        return ""
    name = article(_phrase(thing, draws))
    return draws.pick(PLACED).format(a=name, place=draws.pick(places))


def _places(thing: SceneObject, draws: Draws) -> list[str]:
    h = "left" if thing.x < 0.35 else "right" if thing.x > 0.65 else ""
    v = "top" if thing.y < 0.35 else "bottom" if thing.y > 0.65 else ""
    if h and v:
        return [draws.pick(CORNER).format(h=h, v=draws.pick(VERTICAL[v]))] * 2 + [
            draws.pick(HALVES[draws.pick((h, v))])
        ]
    if h or v:
        return [draws.pick(HALVES[h or v])]
    near = max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.1
    return [draws.pick(MIDDLE)] if near else []


def _compared(scene: Scene, draws: Draws) -> str:
    a, b = _two(scene, draws)
    first, second = _phrase(a, draws, sized=False), _phrase(b, draws, sized=False)
    if a.size == b.size or first == second:
        return ""
    template = draws.pick(COMPARED[a.size])
    return template.format(a=article(first), b=article(second), c=first)


def _shared(scene: Scene, draws: Draws) -> str:
    total = len(scene.objects)
    told = []
    for name in ("color", "shape", "size", "texture"):
        values = {getattr(thing, name) for thing in scene.objects}
        if total > 1 and len(values) == 1 and values != {"plain"}:
            told.append(plural(values.pop(), total) if name == "shape" else values.pop())
    if not told:
        return ""
    return draws.pick(SHARED).format(all=draws.pick(ALL[total]), what=draws.pick(told))


def _grounded(scene: Scene, draws: Draws) -> str:
    background = scene.background
    return draws.pick(GROUNDED).format(
        tone=draws.pick(TONE[background.kind]).format(*background.tones),
        ground=ground(background, draws),
        a=article(_phrase(draws.pick(scene.objects), draws)),
    )


def _two(scene: Scene, draws: Draws) -> tuple[SceneObject, SceneObject]:
    a, b = (draws.shuffled(scene.objects) * 2)[:2]
    return a, b


def _finished(sentence: str, draws: Draws) -> str:
    """Return the sentence as people type it: now with capital and full stop, now without."""
    style = draws.unit()
    if style < 0.35:
        return sentence[0].upper() + sentence[1:] + "."
    return sentence + "." if style < 0.45 else sentence


_MAKERS = (
    *(_single, _couple, _counted, _related, _related, _placed, _compared, _shared, _grounded),
)
