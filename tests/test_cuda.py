"""What only a GPU shows; skipped without one."""

import warnings

import pytest
import torch

from lgvq_plugin.alignment import Alignment
from lgvq_plugin.config import parse
from lgvq_plugin.guides.base import build_guide
from lgvq_plugin.types import Codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CAPTIONS = ["a red circle", "two blue stars", "a green square", "a small yellow ring"] * 4
ALL = {"objectives": {"masked_text": {"weight": 0.05}}}
PAPER = {"recipe": "paper", "objectives": {"masked_text": {"dropout": 0.0}}}  # drawn per device


def on(device, block):
    """Heads and codes of 16 images, the same on each device."""
    heads = Alignment(parse(block), build_guide({"use": "micro_clip"}), code_dim=32)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 32, generator=generator)
    indices = torch.randint(64, (16, 16), generator=generator)
    codebook, indices = vectors.to(device), indices.to(device)
    codes = Codes(codebook[indices].requires_grad_(), indices, (4, 4), codebook)
    return heads.to(device), codes


@pytest.mark.parametrize("block", [{}, ALL, PAPER], ids=["default", "all", "paper"])
def test_losses_and_gradients_are_those_of_the_cpu(block):
    measured = {}
    for device in ("cpu", "cuda"):
        heads, codes = on(device, block)
        total, log = heads(codes, CAPTIONS, step=3)
        total.backward()
        gradients = {n: p.grad for n, p in heads.named_parameters() if p.grad is not None}
        measured[device] = ({**gradients, "codes": codes.codes.grad}, log)
    for number in range(2):
        expected, got = measured["cpu"][number], measured["cuda"][number]
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            gap = (got[name].cpu() - value).float().norm()
            assert gap <= 1e-4 * value.float().norm() + 1e-6, name


@pytest.mark.parametrize("block", [{}, ALL], ids=["default", "all"])
@pytest.mark.parametrize(("batches", "expected"), [(0, 1), (1, 0)], ids=["aligned", "plain"])
def test_a_step_waits_for_the_gpu_once(block, batches, expected):
    # Once, to learn whether the losses are finite before they reach the host's weights.
    heads, codes = on("cuda", block)
    for step in range(3):  # the captions' features are kept, and kernels are loaded
        heads.batches = 0
        heads(codes, CAPTIONS, step=step)[0].backward()
    heads.batches = batches
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            heads(codes, CAPTIONS, step=3)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = [w for w in waits if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(syncs) == expected, [f"{w.filename}:{w.lineno}" for w in syncs]
