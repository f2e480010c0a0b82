"""A world that codes can tell all of: each place shows one of K things, captions name them."""

from dataclasses import dataclass

import pytest
import torch

from lgvq_plugin.bench.probes.features import FrozenCodes
from lgvq_plugin.bench.probes.language import Question

COLORS = ("red", "blue", "green", "black")
SHAPES = ("star", "ring", "cross", "heart")


@dataclass
class World:
    """Place 0 tells the color, place 1 the shape; places 2 and 3 say nothing."""

    codes: FrozenCodes
    captions: list[list[str]]
    questions: list[Question]


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(4, (count, 2), generator=generator)
    noise = torch.randint(8, (count, 2), generator=generator)
    indices = torch.cat([picks[:, :1], 4 + picks[:, 1:], noise], dim=1)
    table = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    pairs = [(COLORS[i], SHAPES[j]) for i, j in picks.tolist()]
    captions = [[f"a {c} {s}", f"this is a {s}, it is {c}."] for c, s in pairs]
    questions = [
        q
        for row, (c, s) in enumerate(pairs)
        for q in (
            Question(row, "what color is it?", c, "color"),
            Question(row, "what shape is it?", s, "shape"),
        )
    ]
    return World(FrozenCodes((2, 2), indices, table), captions, questions)


@pytest.fixture(scope="module")
def train():
    return draw(256, 0)


@pytest.fixture(scope="module")
def test():
    return draw(64, 1)


@pytest.fixture(scope="module")
def many():
    """So many images that noise cannot be learnt by heart."""
    return draw(4096, 2)
