"""The schedule of the text losses: start, ramp, stop; and how hard they pull."""

import pytest
import torch
from torch import nn

from lgvq_plugin import attach
from lgvq_plugin.alignment import Alignment
from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.hosts.vqvae import VectorQuantizer
from lgvq_plugin.sockets import ConfigError
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


def test_a_ratio_follows_the_schedule_and_is_told():
    model = nn.Sequential(nn.Identity(), VectorQuantizer(16, 8))
    handle = attach(
        model,
        "1",
        guide={"use": "micro_clip"},
        objectives={**ONLY, "relationship": {"weight": 0}},
        gradient_ratio=2.0,
        ramp=3,
    )
    model.eval()  # the codebook stays as it is
    start = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    lengths = []
    for step in (0, 1, 3, 9):
        z = start.clone().requires_grad_()
        output, quantizer_loss, _ = model(z)
        loss, log = handle.loss(CAPTIONS, step=step)
        ((output * pull).sum() + 0 * quantizer_loss + loss).backward()
        lengths.append(float((z.grad - pull).norm() / pull.norm()))
        assert ("train/lgvq/gradient_ratio" in log) == (step > 0)
    assert lengths == pytest.approx([0.5, 1.0, 2.0, 2.0], rel=1e-4)
    z = start.clone().requires_grad_()
    (model(z)[0] * pull).sum().backward()  # a pass without our loss: the host's gradient alone
    assert torch.equal(z.grad, pull)


def test_a_ratio_beside_a_codebook_gradient_is_refused():
    with pytest.raises(ConfigError, match="gradient_ratio: expected null beside codebook_gradient"):
        parse({"gradient_ratio": 1.0, "codebook_gradient": True})
    with pytest.raises(ConfigError, match=r"gradient_ratio: expected > 0, or null, got 0\.0"):
        parse({"gradient_ratio": 0.0})
