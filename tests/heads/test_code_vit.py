"""CodeViT: the released shapes, sizes and first weights; equal to a transformer in NumPy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lgvq_plugin.heads import CodeViT
from lgvq_plugin.sockets import ConfigError


def weights(module):
    return {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}


def layer_norm(x, scale, shift, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + shift


def attention(x, w, path, heads):
    width = x.shape[-1] // heads
    q, k, v = np.split(x @ w[f"{path}in_proj_weight"].T + w[f"{path}in_proj_bias"], 3, axis=-1)
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[..., part] @ k[..., part].swapaxes(-1, -2) / np.sqrt(width))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(mixed, -1) @ w[f"{path}out_proj.weight"].T + w[f"{path}out_proj.bias"]


def code_vit(codes, w, depth, heads):
    """Pre-norm blocks, QuickGELU, the last norm and projection; codes (B, N, C)."""
    x = np.concatenate([np.repeat(w["cls"], len(codes), 0), codes], 1) + w["pos_embed"]
    x = layer_norm(x, w["in_norm.weight"], w["in_norm.bias"])
    for i in range(depth):
        at = f"blocks.{i}."
        y = layer_norm(x, w[f"{at}norm1.weight"], w[f"{at}norm1.bias"])
        x = x + attention(y, w, f"{at}self_attn.", heads)
        y = layer_norm(x, w[f"{at}norm2.weight"], w[f"{at}norm2.bias"])
        y = y @ w[f"{at}linear1.weight"].T + w[f"{at}linear1.bias"]
        y = y / (1 + np.exp(-1.702 * y))
        x = x + y @ w[f"{at}linear2.weight"].T + w[f"{at}linear2.bias"]
    return layer_norm(x, w["out_norm.weight"], w["out_norm.bias"]) @ w["project"]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("mode", [True, False])
def test_equals_numpy(heads, mode):
    module = CodeViT(8, depth=2, heads=heads, out_dim=6, grid=(3, 2)).train(mode)
    with torch.no_grad():  # away from their first values, which hide mistakes
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    codes = torch.randn(4, 6, 8)
    expected = code_vit(codes.numpy().astype(np.float64), weights(module), 2, heads)
    with torch.set_grad_enabled(mode):
        assert np.allclose(module(codes).detach(), expected, atol=1e-5)


def test_the_papers_size():
    module = CodeViT(256)
    count = sum(p.numel() for p in module.parameters())
    block = 12 * 256**2 + 13 * 256  # attention 4, MLP 8; biases 9, two norms 4
    assert count == 2 * block + 257 * 256 + 256 + 4 * 256 + 256 * 512 == 1_777_664  # "1.78 M"
    assert module.pos_embed.shape == (1, 257, 256)
    assert module.cls.shape == (1, 1, 256)
    assert module(torch.randn(2, 256, 16, 16)).shape == (2, 257, 512)


def test_first_weights():
    module = CodeViT(256)
    for parameter in (module.cls, module.pos_embed, module.project):
        assert parameter.std().item() == pytest.approx(0.01, rel=0.2)
        assert abs(parameter.mean().item()) < 0.002
    for block in module.blocks:
        found = {
            block.self_attn.in_proj_weight: 1 / 16,
            block.self_attn.out_proj.weight: 1 / 32,
            block.linear1.weight: 1 / 16 / 2**0.5,
            block.linear2.weight: 1 / 32,
        }
        for weight, deviation in found.items():
            assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert not any("project" in name and "bias" in name for name, _ in module.named_parameters())


def test_tiny_codes_are_seen():
    """A codebook starts within 1/K; the image must show behind positions ten times as large."""
    module = CodeViT(256)
    tokens = module(torch.empty(4, 256, 16, 16).uniform_(-1e-3, 1e-3))
    between = tokens.std(0).mean() / tokens.std()
    assert between > 0.02


def test_both_layouts_are_one():
    module = CodeViT(8, out_dim=6, grid=(3, 2))
    plane = torch.randn(4, 8, 3, 2)
    assert torch.equal(module(plane), module(plane.flatten(2).mT))
    assert torch.equal(module(plane), module(plane.flatten(2).mT, (3, 2)))


def test_another_grid_interpolates_the_positions():
    module = CodeViT(8, out_dim=6, grid=(4, 4))
    # Positions that rise linearly along h: bilinear keeps them so inside.
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    with torch.no_grad():
        module.pos_embed[:, 1:] = rows
        module.pos_embed[:, 0] = 7.0
    plane = module._pos_embed_on((8, 2))
    assert (plane[:, 0] == 7).all()
    got = plane[0, 1:, 0].view(8, 2)
    expected = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    assert torch.allclose(got, expected[:, None].expand(8, 2))
    assert module(torch.randn(2, 8, 8, 2)).shape == (2, 17, 6)
    assert module._pos_embed_on((4, 4)) is module.pos_embed


@pytest.mark.parametrize("width", [None, 12])
def test_every_weight_trains_and_so_does_the_encoder(width):
    module = CodeViT(8, width=width, out_dim=6, grid=(2, 2))
    codes = torch.randn(3, 8, 2, 2, requires_grad=True)
    module(codes).square().sum().backward()
    assert codes.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_finite_under_autocast(dtype, scale):
    module = CodeViT(8, out_dim=6, grid=(2, 2))
    codes = (scale * torch.randn(1, 8, 2, 2)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = module(codes)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert codes.grad.isfinite().all()


def test_images_do_not_see_each_other():
    module = CodeViT(8, out_dim=6, grid=(2, 2))
    codes = torch.randn(3, 8, 2, 2)
    assert torch.allclose(module(codes)[[2, 0]], module(codes[[2, 0]]), atol=1e-6)


@pytest.mark.parametrize(
    "codes", [torch.zeros(1, 7, 2, 2), torch.zeros(1, 5, 8), torch.zeros(1, 4, 7)]
)
def test_codes_that_do_not_fit(codes):
    with pytest.raises(ValueError, match=r"expected codes of 2x2 positions and width 8"):
        CodeViT(8, grid=(2, 2))(codes)


@pytest.mark.parametrize("heads", [3, 0, -1])
def test_heads_that_do_not_fit(heads):
    with pytest.raises(ConfigError, match=r"heads of the code-ViT: .* take one of 1, 2, 4, 8"):
        CodeViT(8, heads=heads)


def test_copies():
    module = CodeViT(8, out_dim=6, grid=(2, 2))
    codes = torch.randn(2, 8, 2, 2)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(codes), module(codes))
    other = CodeViT(8, out_dim=6, grid=(2, 2))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(codes), module(codes))
    assert not any(isinstance(m, nn.Dropout) and m.p for m in module.modules())
