"""Scenes: what captions, answers and labels say is what the pixels show.

Truth is taken twice: from the symbolic scene by a parser of its own (it knows the grammar, not
the generator), and from the pixels by hue ranges written here by hand.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from lgvq_plugin.datasets.scene_language import COLORS, SHAPES
from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError

SIZE = 128
TEXTS_DIGEST = "f7c916d2754980e183060eb201af84317b637c0c97922a197e0e359e7b40bfff"
HUES = {  # name: hue range in degrees, least saturation, range of value
    "red": ((345, 10), 0.6, (0.6, 1.0)),
    "orange": ((20, 42), 0.6, (0.75, 1.0)),
    "yellow": ((43, 65), 0.5, (0.8, 1.0)),
    "green": ((110, 160), 0.5, (0.4, 0.75)),
    "cyan": ((175, 200), 0.5, (0.6, 1.0)),
    "blue": ((210, 240), 0.55, (0.6, 1.0)),
    "purple": ((265, 300), 0.45, (0.45, 0.9)),
    "pink": ((310, 340), 0.3, (0.75, 1.0)),
    "brown": ((12, 42), 0.5, (0.3, 0.65)),
    "black": ((0, 360), 0.0, (0.0, 0.13)),
}
NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4}
SHAPE = "circle|square|triangle|star|ring|cross|diamond|heart"
COLOR, TONE = "|".join(HUES), "white|gray|beige|lavender|mint|navy"
WORDS = rf"(?:(small|little|large|big) )?(?:(plain|striped|dotted) )?(?:({COLOR}) )?"
A_THING = re.compile(rf"\ban? {WORDS}({SHAPE}|shape|object)\b")
A_LARGER = re.compile(rf"\ba (larger|smaller) {WORDS}({SHAPE}|shape|object)\b")
A_COUNT = re.compile(
    rf"(?<!all )\b(one|two|three|four) {WORDS}((?:{SHAPE}|shape|object)(?:e?s)?)\b"
)
GROUNDS = [
    ("gradient", rf"a background that fades from ({TONE}) to ({TONE})"),
    ("gradient", rf"a gradient from ({TONE}) to ({TONE})"),
    ("checkered", rf"a ({TONE}) and ({TONE}) checkered background"),
    ("checkered", rf"a checkerboard of ({TONE}) and ({TONE})"),
    ("noisy", rf"a (?:noisy|grainy) ({TONE}) background"),
    ("plain", rf"a plain ({TONE}) background"),
    ("", rf"a ({TONE}) background"),
    ("plain", rf"the background is plain ({TONE})$"),
    ("checkered", rf"the background is checkered in ({TONE}) and ({TONE})$"),
    ("noisy", rf"the background is noisy and ({TONE})$"),
    ("", rf"the background is ({TONE})$"),
    ("gradient", r"the background is GROUND$"),
]
REGION = {
    "top": lambda o: o.y < 0.4, "upper": lambda o: o.y < 0.4,
    "bottom": lambda o: o.y > 0.6, "lower": lambda o: o.y > 0.6,
    "left": lambda o: o.x < 0.4, "right": lambda o: o.x > 0.6,
    "middle": lambda o: max(abs(o.x - 0.5), abs(o.y - 0.5)) < 0.12,
}  # fmt: skip
REGION["center"] = REGION["middle"]
SIDE = [
    (r"(?:to the )?left of", lambda a, b: b.x - a.x),
    (r"(?:to the )?right of", lambda a, b: a.x - b.x),
    (r"above|higher than", lambda a, b: b.y - a.y),
    (r"below|under|lower than", lambda a, b: a.y - b.y),
]
LEAD = (
    "(?:a picture (?:of|with) |a drawing with |this picture shows |this image has |we see "
    "|(?:in this image )?there (?:is|are) (?:exactly )?)?"
)
TAIL = r"(?: (?:is|are) shown| can be seen)?"


def fits(thing, words):
    size, texture, color, noun = words
    size = {"little": "small", "big": "large"}.get(size, size)
    noun = re.sub(r"(?<=s)es$|(?<!s)s$", "", noun)
    return (
        size in (None, thing.size)
        and texture in (None, thing.texture)
        and color in (None, thing.color)
        and noun in ("shape", "object", thing.shape)
    )


def parse(caption):
    """Return (skeleton, grounds, things, counts): the caption with its phrases cut out."""
    text = caption.rstrip(".")
    text = text[0].lower() + text[1:]
    grounds = []
    for kind, pattern in GROUNDS:
        for match in re.finditer(pattern, text):
            if match.groups():
                grounds.append((kind, match.groups()))
        text = re.sub(pattern, "GROUND", text)
    larger = [match.groups() for match in A_LARGER.finditer(text)]
    text = A_LARGER.sub(lambda match: match[1].upper(), text)
    counts = [match.groups() for match in A_COUNT.finditer(text)]
    text = A_COUNT.sub("COUNT", text)
    things = [match.groups() for match in A_THING.finditer(text)] + larger
    text = A_THING.sub("A", text)
    return text, grounds, things, counts


def is_true(caption, scene):
    """Whether the caption holds of the scene; AssertionError if it cannot be parsed."""
    text, grounds, things, counts = parse(caption)
    for kind, tones in grounds:
        if kind not in ("", scene.background.kind) or tones != scene.background.tones:
            return False
    for number, *words in counts:
        if sum(fits(o, words) for o in scene.objects) != NUMBER[number]:
            return False
    if not all(any(fits(o, words[-4:]) for o in scene.objects) for words in things):
        return False
    text = re.sub(r" (?:on|against|in front of) GROUND$", "", text)
    item = r"(?:A|COUNT)"
    if re.fullmatch(rf"{LEAD}{item}(?:, {item})*(?: and {item})?{TAIL}", text):
        return True
    if text in ("GROUND", "behind A there is GROUND", "GROUND with A"):
        return True
    return _holds(text, [words[-4:] for words in things], scene)


def _holds(text, things, scene):
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    for pattern, gap in SIDE:
        if re.fullmatch(rf"{LEAD}A (?:is |sits )?(?:{pattern}) A", text):
            a_words, b_words = things
            return any(fits(a, a_words) and fits(b, b_words) and gap(a, b) > 0.1 for a, b in pairs)
    if match := re.fullmatch(r"A (?:is (larger|bigger|smaller) than A|and (LARGER|SMALLER))", text):
        first, second = things
        a_is_smaller = match[1] == "smaller" or match[2] == "LARGER"
        return any(
            fits(a, first) and fits(b, second)
            and (a.radius * 1.4 < b.radius if a_is_smaller else a.radius > b.radius * 1.4)
            for a, b in pairs
        )  # fmt: skip
    shared = r"(both|all(?: three| four)?) (?:shapes|objects)(?: in the image)? are (\w+)"
    if match := re.fullmatch(shared, text):
        count = {"both": (2,), "all three": (3,), "all four": (4,), "all": (3, 4)}[match[1]]
        word = re.sub(r"(?<=s)es$|(?<!s)s$", "", match[2])
        marks = [(o.shape, o.color, o.size, o.texture) for o in scene.objects]
        return len(marks) in count and all(word in mark for mark in marks)
    place = r"(?:in|near|at|on) the ([\w ]+?)(?: corner| half| side| of the picture)?"
    match = re.fullmatch(rf"{LEAD}A (?:is |lies )?{place}", text) or re.fullmatch(
        rf"{place} (?:there is|we see) A", text
    )
    assert match, f"no such sentence: {text!r}"
    inside = [REGION[word] for word in match[1].split()]
    return any(fits(o, things[0]) and all(test(o) for test in inside) for o in scene.objects)


def degrees(rgb):
    """Hue by projecting onto the plane across the grey axis; 0 is red, 120 green."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360


def colored(image, name):
    """Mask of the pixels that a person would call by this color; thin seams opened away."""
    (low, high), saturation, (dark, light) = HUES[name]
    rgb = (image.astype(np.float64) + 1) / 2
    value, least = rgb.max(-1), rgb.min(-1)
    hue = degrees(rgb)
    in_hue = (hue >= low) & (hue <= high) if low < high else (hue >= low) | (hue <= high)
    vivid = (value - least) >= saturation * value
    return ndimage.binary_opening(in_hue & vivid & (value >= dark) & (value <= light))


def lone_colors(scene):
    """The objects whose color is in the picture only once (dark noise on navy looks black)."""
    names = [o.color for o in scene.objects]
    return [o for o in scene.objects if names.count(o.color) == 1]


@pytest.fixture(scope="module")
def drawn():
    dataset = Scenes("train", size=SIZE, length=120, seed=3)
    return [(dataset.scene(i), dataset[i]) for i in range(len(dataset))]


@pytest.fixture(scope="module")
def samples():
    dataset = Scenes("validation", size=8, length=500)
    return [(dataset.scene(i), dataset[i]) for i in range(len(dataset))]


@pytest.mark.slow
def test_every_caption_is_true_of_its_scene(samples):
    wrong = [c for scene, sample in samples for c in sample["captions"] if not is_true(c, scene)]
    assert wrong == []


@pytest.mark.slow
def test_the_judge_catches_lies(samples):
    """Captions of the next scene are mostly false of this one, else the test above is idle."""
    following = [samples[(i + 1) % len(samples)][1] for i in range(len(samples))]
    verdicts = [
        is_true(caption, scene)
        for (scene, _), sample in zip(samples, following, strict=True)
        for caption in sample["captions"]
    ]
    assert np.mean(verdicts) < 0.1


def test_the_first_caption_names_every_object(samples):
    for scene, sample in samples:
        _, _, things, counts = parse(sample["captions"][0])
        assert len(things) + sum(NUMBER[words[0]] for words in counts) == len(scene.objects)


def test_captions_are_five_different_sentences_of_3_to_25_words(samples):
    for _, sample in samples:
        assert len({caption.lower().rstrip(".") for caption in sample["captions"]}) == 5
        assert all(3 <= len(caption.split()) <= 25 for caption in sample["captions"])


def test_captions_are_grammatical(samples):
    text = "\n".join(c.lower() for _, sample in samples for c in sample["captions"])
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
    assert not re.search(rf"\bone (\w+ )*(?:{SHAPE}|shape|object)e?s\b(?<!cross)", text)
    assert not re.search(r"  |{|}|, and|crosss|are .*exactly one|is exactly (two|three|four)", text)
    capitals = np.mean([c[0].isupper() for _, sample in samples for c in sample["captions"]])
    assert 0.2 < capitals < 0.6


def test_vocabulary_is_exactly_what_is_said(samples):
    said = set()
    for _, sample in samples:
        asked = [text for q in sample["questions"] for text in (q["question"], q["answer"])]
        said |= set(re.findall("[a-z]+", " ".join([*sample["captions"], *asked]).lower()))
    assert said == set(Scenes.vocabulary())
    assert Scenes.vocabulary() == sorted(Scenes.vocabulary())


@pytest.mark.slow
def test_colors_are_where_the_scene_says(drawn):
    for scene, sample in drawn:
        rows, columns = (np.indices((SIZE, SIZE)) + 0.5) / SIZE
        for thing in lone_colors(scene):
            mask = colored(sample["image"], thing.color)
            inside = np.hypot(columns - thing.x, rows - thing.y) < thing.radius * 1.05
            assert mask[inside].sum() > 0.06 * inside.sum(), (sample["index"], thing)
            if thing.color != "black" or "navy" not in scene.background.tones:
                assert mask[~inside].sum() < 0.1 * mask.sum() + 20, (sample["index"], thing)


@pytest.mark.slow
def test_colors_that_no_object_has_are_not_in_the_picture(drawn):
    for scene, sample in drawn:
        for name in HUES.keys() - {o.color for o in scene.objects}:
            if name != "black" or "navy" not in scene.background.tones:
                assert colored(sample["image"], name).mean() < 0.006, (sample["index"], name)


def test_relations_hold_between_pixel_centroids(drawn):
    checked = 0
    for scene, sample in drawn:
        single = {o.color for o in lone_colors(scene)}
        for caption in sample["captions"]:
            text, _, things, _ = parse(caption)
            colors = [words[2] for words in things if len(words) == 4]
            side = next((s for s, _ in SIDE if re.search(rf"A (?:is |sits )?(?:{s}) A", text)), "")
            if not side or len(colors) != 2 or not set(colors) <= single:
                continue
            centers = [ndimage.center_of_mass(colored(sample["image"], c)) for c in colors]
            (ay, ax), (by, bx) = centers
            gap = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}
            assert gap[re.search("left|right|above|below", side)[0]] > 0.07 * SIZE, caption
            checked += 1
    assert checked >= 15


def test_small_and_large_differ_in_pixels(drawn):
    for scene, sample in drawn:
        for thing in lone_colors(scene):
            if thing.texture == "plain" and "navy" not in scene.background.tones:
                pieces, _ = ndimage.label(colored(sample["image"], thing.color))
                rows, columns = ndimage.find_objects(pieces)[np.bincount(pieces.flat)[1:].argmax()]
                extent = max(rows.stop - rows.start, columns.stop - columns.start) / SIZE
                assert (extent > 0.26) == (thing.size == "large"), (sample["index"], thing)


def test_count_is_the_number_of_pieces_on_a_plain_background(drawn):
    checked = 0
    for scene, sample in drawn:
        gaps = [
            np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
            for a in scene.objects for b in scene.objects if a is not b
        ]  # fmt: skip
        if scene.background.kind != "plain" or min(gaps, default=1) < 0.03:
            continue
        image = sample["image"]
        differs = np.abs(image - image[0, 0]).max(-1) > 0.25
        pieces, _ = ndimage.label(ndimage.binary_fill_holes(differs), np.ones((3, 3)))
        assert (np.bincount(pieces.flat)[1:] > 30).sum() == sample["attributes"]["count"]
        checked += 1
    assert checked >= 15


def test_objects_lie_inside_and_do_not_overlap(samples):
    for scene, _ in samples:
        for a in scene.objects:
            assert a.radius < min(a.x, a.y, 1 - a.x, 1 - a.y)
            others = (b for b in scene.objects if b is not a)
            assert all(np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius for b in others)


def test_answers_are_true(samples):
    kinds = set()
    for scene, sample in samples:
        for asked in sample["questions"]:
            kinds.add(asked["type"])
            assert asked["answer"] == answer(asked["question"], scene), (asked, scene)
    assert kinds == {"color", "shape", "count", "yes-no", "relation", "background"}


def answer(question, scene):
    """Read the question with a grammar of its own and look the answer up in the scene."""
    objects, background = scene.objects, scene.background
    if "background" in question:
        return background.tones[0] if "color" in question else background.kind
    if match := re.search(rf"color (?:is|does) the ({SHAPE})", question):
        (thing,) = [o for o in objects if o.shape == match[1]]
        return thing.color
    if match := re.match(rf"what .*the ({COLOR}) (?:object|shape)\?", question):
        (thing,) = [o for o in objects if o.color == match[1]]
        return thing.shape
    if match := re.match(rf"how many (?:({COLOR}) )?(\w+) ", question):
        count = sum(fits(o, (None, None, match[1], match[2])) for o in objects)
        return ("zero", "one", "two", "three", "four")[count]
    if match := re.match(rf"(?:is there|do you see) an? ({COLOR}) ({SHAPE})\?", question):
        return "yes" if any((o.color, o.shape) == match.groups() for o in objects) else "no"
    match = re.match(
        rf"is the ({COLOR}) ({SHAPE}) (\w+)(?: of)? or (\w+)(?: of)? the ({COLOR}) ({SHAPE})\?",
        question,
    )
    (a,) = [o for o in objects if (o.color, o.shape) == match.groups()[:2]]
    (b,) = [o for o in objects if (o.color, o.shape) == match.groups()[4:]]
    assert {match[3], match[4]} in ({"left", "right"}, {"above", "below"})
    if match[3] in ("left", "right"):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def test_yes_and_no_are_about_as_frequent(samples):
    answers = [q["answer"] for _, s in samples for q in s["questions"] if q["type"] == "yes-no"]
    assert 0.4 < np.mean([a == "yes" for a in answers]) < 0.65


def test_labels_agree_with_the_scene(samples):
    names = Scenes.attribute_names()
    for scene, sample in samples:
        labels = sample["attributes"]
        assert labels.keys() == names.keys()
        assert names["count"][labels["count"]] == str(len(scene.objects))
        for field in ("color", "shape", "texture"):
            key = f"has_{field}"
            present = {n for n, hot in zip(names[key], labels[key], strict=True) if hot}
            assert present == {getattr(o, field) for o in scene.objects}
        biggest = sorted(scene.objects, key=lambda o: o.radius)[-1]
        assert names["main_color"][labels["main_color"]] == biggest.color
        assert names["main_shape"][labels["main_shape"]] == biggest.shape
        assert names["background"][labels["background"]] == scene.background.kind
        assert names["background_color"][labels["background_color"]] == scene.background.tones[0]


def test_splits_and_seeds_share_no_scene():
    splits = ("train", "validation", "test")
    sets = [Scenes(split, 8, 300, seed) for split in splits for seed in (0, 1)]
    scenes = [repr(dataset.scene(i)) for dataset in sets for i in range(300)]
    assert len(set(scenes)) == len(scenes)
    assert [len(Scenes(split)) for split in splits] == [4096, 512, 512]


def test_size_changes_the_pixels_only():
    small, large = Scenes(size=64)[5], Scenes(size=256)[5]
    assert small["captions"] == large["captions"]
    shrunk = large["image"].reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small["image"]).mean() < 0.02


def digest(dataset, *, images):
    found = hashlib.sha256()
    dataset.set_epoch(2)
    for sample in (dataset[i] for i in range(8)):
        found.update(sample["image"].tobytes() if images else b"")
        found.update(repr((sample["caption"], sample["captions"], sample["questions"])).encode())
    return found.hexdigest()


def test_captions_and_questions_are_those_that_the_embedded_guide_was_trained_on():
    assert digest(Scenes("test", size=32), images=False) == TEXTS_DIGEST


@pytest.mark.slow
def test_another_process_draws_the_same():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_scenes import *\n"
        "print(digest(Scenes('test', size=32), images=True))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout.strip() == digest(Scenes("test", size=32), images=True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"split": "val"}, "no split 'val'.*validation"),
        ({"size": 0}, "size must be an int >= 8"),
        ({"length": 0}, "length"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_parameters_are_named(params, message):
    with pytest.raises(ConfigError, match=message):
        Scenes(**params)


def test_simple_scenes_have_one_or_two_large_objects_on_a_calm_ground():
    scenes = [Scenes("train", size=16, simple=True).scene(i) for i in range(200)]
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    assert {scene.background.kind for scene in scenes} == {"plain", "gradient"}
    assert min(thing.radius for scene in scenes for thing in scene.objects) > 0.13
    for scene in scenes:
        for thing in scene.objects:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)


def test_a_sample_asked_for_again_is_equal_and_may_be_changed():
    data = Scenes("train", size=16)
    first = data[3]
    first["image"][:] = 0
    first["captions"].clear()
    first["questions"][0].clear()
    again, fresh = data[3], Scenes("train", size=16)[3]
    assert np.array_equal(again["image"], fresh["image"])
    assert again["captions"] == fresh["captions"]
    assert again["questions"] == fresh["questions"]


@pytest.mark.parametrize("size", [64, [64, 96], [96, 64]])
def test_layouts_are_where_the_objects_were_drawn(size):
    """Plain objects: a pixel inside has its object's color; boxes are tight around them."""
    data = Scenes("test", size=size, length=40)
    checked = 0
    for index in range(len(data)):
        layout, scene = data.layout_of(index), data.scene(index)
        pixels = (data[index]["image"] + 1) * 127.5
        assert layout.semantic_map.shape == pixels.shape[:2]
        assert set(layout.boxes) == {w for o in scene.objects for w in (o.shape, o.color)}
        height, width = layout.semantic_map.shape
        for thing in scene.objects:
            boxes = layout.boxes[thing.shape]
            assert len(boxes) == sum(o.shape == thing.shape for o in scene.objects)
            if thing.texture != "plain" or len(boxes) > 1:
                continue
            found = layout.semantic_map == 1 + SHAPES.index(thing.shape)
            rows, columns = np.nonzero(found)
            left, top, right, bottom = boxes[0]
            assert (left * width, right * width) == (columns.min(), columns.max() + 1)
            assert (top * height, bottom * height) == (rows.min(), rows.max() + 1)
            error = np.abs(pixels[found] - np.array(COLORS[thing.color])).max(axis=1)
            assert np.median(error) < 2  # the rim is mixed with the background
            outside = np.abs(pixels[~found] - np.array(COLORS[thing.color])).max(axis=1) < 2
            same = [o for o in scene.objects if o is not thing and o.color == thing.color]
            assert same or not outside.any()
            checked += 1
    assert checked > 15
