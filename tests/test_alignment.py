"""The schedule of the text losses: start, ramp, stop."""

import pytest
import torch

from lgvq_plugin.alignment import Alignment
from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.types import Codes

ONLY = {"global_semantic": {"weight": 1}, "masked_text": {"weight": 0}}
CAPTIONS = ["a red circle", "two blue stars"]


@pytest.fixture(scope="module")
def total_at():
    guide = build_guide({"use": "micro_clip"})
    codes = Codes(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), None, (2, 2))

    def total(step, split="train", **options):
        config = parse({"objectives": {**ONLY, "relationship": {"weight": 0}}, **options})
        alignment = Alignment(config, guide, code_dim=8)
        return alignment(codes, CAPTIONS, step=step, split=split)[0]

    return total


def test_weights_grow_after_start_and_are_gone_from_stop_on(total_at):
    whole = total_at(0).item()
    options = {"start": 2, "ramp": 3, "stop": 8}
    shares = [total_at(step, **options).item() / whole for step in range(10)]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0], abs=1e-6)


def test_validation_is_measured_whole_at_any_step(total_at):
    options = {"start": 2, "ramp": 3, "stop": 8, "split": "val"}
    whole = total_at(0, split="val").item()
    assert [total_at(step, **options).item() for step in (0, 9)] == pytest.approx([whole] * 2)


def test_before_start_and_from_stop_on_there_is_nothing_to_train(total_at):
    for step in (1, 8):
        assert not total_at(step, start=2, stop=8).requires_grad
    assert total_at(5, start=2, stop=8).requires_grad
