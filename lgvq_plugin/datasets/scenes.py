"""Drawn scenes with true captions: embedded data for the demo and the tests, no download.

(seed, split, index) --compose--> Scene --draw--> image
                                    |--tell--> captions, questions, attributes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..sockets import ConfigError, suggest
from . import _scene_language, _scene_questions
from ._draws import Draws
from ._image import MODES, height_and_width, to_array
from ._scene import BACKGROUNDS, COLORS, MAX_OBJECTS, SHAPES, TEXTURES, TONES, Scene, compose
from ._scene_drawing import draw
from .base import CaptionedImages

LENGTHS = {"train": 4096, "validation": 512, "test": 512}
LOOK, WORDS, CHOICE = range(3)  # streams of one sample
MOST_KEPT = 2**26  # bytes of drawn images that a data set keeps


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What is the same in every epoch."""

    scene: Scene
    picture: Image.Image
    captions: list[str]
    questions: list[dict[str, Any]]


class Scenes(CaptionedImages):
    """One to four colored shapes on a background; (seed, split, index) fixes the scene.

    Beside the keys of the contract a sample holds `questions`: list of `{"question",
    "answer", "type"}` with type color, shape, count, yes-no, relation or background, and
    `attributes`: dict of labels for probes, whose classes :meth:`attribute_names` tells.

    Args:
        split: train, validation or test; no scene is in two of them.
        size: height and width of the image in pixels, or [height, width]; the scene is a square
            in the middle, and its edge is continued.
        length: number of scenes; 4096 for train, else 512.
        seed: another seed, other scenes.
        channel_first: (C, H, W) images instead of (H, W, C).
        channels: 1: grey; 3: RGB; 4: RGB and alpha, which is 1 everywhere.
        image_key: a second key of a sample that holds the image, beside `image`.
        simple: one or two objects, half as large again, on a plain or shaded background: pictures
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
        self.shape = height_and_width(size, least=8)
        for name, value, least in (("length", length, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"Scenes: {name} must be an int >= {least}, got {value!r}")
        self.split, self.size, self.length = split, size, length
        self.seed, self.channel_first, self.simple = seed, channel_first, simple
        self.channels, self.image_key = channels, image_key
        self._drawn: dict[int, _Drawn] = {}

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`; negative counts from the end."""
        if not -self.length <= index < self.length:
            raise IndexError(f"Scenes has {self.length} samples, no {index}")
        index %= self.length
        drawn = self._drawn.get(index) or self._draw(index)
        captions = drawn.captions.copy()
        picture = to_array(drawn.picture, self.channel_first)
        return {
            "image": picture,
            self.image_key: picture,
            "caption": self._draws(index, CHOICE, self.epoch).pick(captions),
            "captions": captions,
            "file": f"{self.split}_{index:06d}.png",
            "index": index,
            "questions": [dict(question) for question in drawn.questions],
            "attributes": _attributes(drawn.scene),
        }

    def count_captioned(self) -> int:
        """Return the number of scenes: each has captions."""
        return self.length

    def _draw(self, index: int) -> "_Drawn":
        """Draw a sample and keep it: drawing one takes as long as a small host's training step."""
        scene, telling = self.scene(index), self._draws(index, WORDS)
        captions = _scene_language.captions(scene, telling)
        questions = _scene_questions.questions(scene, telling)
        drawn = _Drawn(scene, self._picture(scene), captions, questions)
        if (len(self._drawn) + 1) * self.shape[0] * self.shape[1] * self.channels <= MOST_KEPT:
            self._drawn[index] = drawn
        return drawn

    def captions_of(self, index: int) -> list[str]:
        """Return the captions of sample `index` (>= 0) without drawing it."""
        return _scene_language.captions(self.scene(index), self._draws(index, WORDS))

    def scene(self, index: int) -> Scene:
        """Return the symbolic scene behind sample `index` (>= 0)."""
        return compose(self._draws(index, LOOK), simple=self.simple)

    @staticmethod
    def vocabulary() -> list[str]:
        """Return all words that captions, questions and answers can hold, sorted."""
        return _scene_questions.vocabulary()

    @staticmethod
    def attribute_names() -> dict[str, tuple[str, ...]]:
        """Return the class names of each label, or the column names of each multi-hot."""
        return {
            "count": tuple(str(n) for n in range(MAX_OBJECTS + 1)),
            "has_color": tuple(COLORS),
            "has_shape": SHAPES,
            "has_texture": TEXTURES,
            "main_color": tuple(COLORS),
            "main_shape": SHAPES,
            "background": BACKGROUNDS,
            "background_color": tuple(TONES),
        }

    def _picture(self, scene: Scene) -> Image.Image:
        side = min(self.shape)
        pixels = draw(scene, side)
        if max(self.shape) > side:
            rest = [length - side for length in self.shape]
            margins = [(spare // 2, spare - spare // 2) for spare in rest]
            pixels = np.pad(pixels, (*margins, (0, 0)), mode="edge")
        picture = Image.fromarray(pixels)
        return picture if self.channels == 3 else picture.convert(MODES[self.channels])

    def _draws(self, index: int, stream: int, epoch: int = 0) -> Draws:
        return Draws(self.seed, list(LENGTHS).index(self.split), index, stream, epoch)


def _attributes(scene: Scene) -> dict[str, Any]:
    """Return labels (int, an index into its `attribute_names`) and multi-hots (int64 arrays)."""
    objects, background = scene.objects, scene.background
    return {
        "count": len(objects),
        "has_color": _multi_hot({thing.color for thing in objects}, tuple(COLORS)),
        "has_shape": _multi_hot({thing.shape for thing in objects}, SHAPES),
        "has_texture": _multi_hot({thing.texture for thing in objects}, TEXTURES),
        "main_color": list(COLORS).index(scene.main.color),
        "main_shape": SHAPES.index(scene.main.shape),
        "background": BACKGROUNDS.index(background.kind),
        "background_color": list(TONES).index(background.tones[0]),
    }


def _multi_hot(present: set[str], names: tuple[str, ...]) -> np.ndarray:
    return np.array([name in present for name in names], np.int64)
