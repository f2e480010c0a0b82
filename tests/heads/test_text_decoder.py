"""TextDecoder: the released sizes; equal to a post-norm decoder in NumPy; masks that mask."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lgvq_plugin.heads import TextDecoder, cross_attention
from lgvq_plugin.sockets import ConfigError


def layer_norm(x, scale, shift, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + shift


def attention(x, memory, w, path, visible):
    """One head; `visible` (S,) are the keys to attend to."""
    width = x.shape[-1]
    weight, bias = w[f"{path}in_proj_weight"], w[f"{path}in_proj_bias"]
    q = x @ weight[:width].T + bias[:width]
    k = memory[visible] @ weight[width : 2 * width].T + bias[width : 2 * width]
    v = memory[visible] @ weight[2 * width :].T + bias[2 * width :]
    scores = np.exp(q @ k.T / np.sqrt(width))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return mixed @ w[f"{path}out_proj.weight"].T + w[f"{path}out_proj.bias"]


def decode_one(text, mask, memory, vocabulary, w, visible):
    """Logits (M, V) of one caption."""
    x = np.where(mask[:, None], w["mask_tokens"][0, : len(text)], text)
    everything = np.ones(len(memory), dtype=bool)
    for i in range(2):
        at = f"blocks.{i}."
        norms = [(w[f"{at}norm{n}.weight"], w[f"{at}norm{n}.bias"], 1e-12) for n in (1, 2, 3)]
        x = layer_norm(x + attention(x, x, w, f"{at}self_attn.", visible), *norms[0])
        x = layer_norm(x + attention(x, memory, w, f"{at}multihead_attn.", everything), *norms[1])
        y = np.maximum(x @ w[f"{at}linear1.weight"].T + w[f"{at}linear1.bias"], 0)
        x = layer_norm(x + y @ w[f"{at}linear2.weight"].T + w[f"{at}linear2.bias"], *norms[2])
    y = x[mask] @ w["head.0.weight"].T + w["head.0.bias"]
    erf = np.vectorize(math.erf)
    y = y * (1 + erf(y / np.sqrt(2))) / 2
    y = layer_norm(y, w["head.2.weight"], w["head.2.bias"], 1e-5)
    return y @ vocabulary.T + w["bias"]


@pytest.fixture
def decoder():
    module = TextDecoder(8, memory_dim=8, vocabulary_size=11, max_length=5)
    with torch.no_grad():  # away from their first values, which hide mistakes
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


@pytest.fixture
def batch():
    """text (2, 5, 8), mask, memory (2, 4, 8), vocabulary (11, 8), attention_mask."""
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    return torch.randn(2, 5, 8), mask, torch.randn(2, 4, 8), torch.randn(11, 8), real


@pytest.mark.parametrize("pads_are_hidden", [True, False])
def test_equals_numpy(decoder, batch, pads_are_hidden):
    text, mask, memory, vocabulary, real = (x.numpy() for x in batch)
    w = {n: p.detach().numpy().astype(np.float64) for n, p in decoder.named_parameters()}
    visible = real if pads_are_hidden else np.ones_like(real)
    rows = [decode_one(text[i], mask[i], memory[i], vocabulary, w, visible[i]) for i in range(2)]
    got = decoder(*batch[:4], batch[4] if pads_are_hidden else None)
    assert got.shape == (3, 11)
    assert np.allclose(got.detach(), np.concatenate(rows), atol=1e-4)


def test_the_papers_size():
    module = TextDecoder(512, memory_dim=512, vocabulary_size=49408)
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in {"blocks": module.blocks, "head": module.head}.items()
    }
    attention, feed_forward, norms = 4 * (512**2 + 512), 2 * (512**2 + 512), 3 * 2 * 512
    assert sizes["blocks"] == 2 * (2 * attention + feed_forward + norms) == 5_259_264  # "5.26 M"
    assert sizes["head"] + module.bias.numel() == 313_088  # "0.31 M"
    assert module.mask_tokens.numel() == 30 * 512  # "0.015 M"
    assert module.mask_tokens.std().item() == pytest.approx(0.01, rel=0.05)
    assert not module.bias.any()
    for block in module.blocks:
        for attention in (block.self_attn, block.multihead_attn):
            assert attention.in_proj_weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
            assert attention.out_proj.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
        assert block.linear1.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
        assert block.linear2.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)


def test_dropout_is_between_the_layers_only():
    module = TextDecoder(8, memory_dim=8, vocabulary_size=11, dropout=0.1)
    for block in module.blocks:
        assert block.self_attn.dropout == block.multihead_attn.dropout == 0.0
        assert {m.p for m in block.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_what_is_masked_is_never_read(decoder, batch):
    text, mask, *rest = batch
    other = torch.where(mask[..., None], 100.0, text)
    assert torch.equal(decoder(text, mask, *rest), decoder(other, mask, *rest))


def test_padding_is_not_read_unless_asked(decoder, batch):
    text, mask, memory, vocabulary, real = batch
    other = torch.where(real[..., None], text, 100.0)
    one, same = (decoder(t, mask, memory, vocabulary, real) for t in (text, other))
    assert torch.allclose(one, same, atol=1e-6)
    one, same = (decoder(t, mask, memory, vocabulary) for t in (text, other))
    assert torch.equal(one[:2], same[:2])
    assert not torch.allclose(one[2], same[2], atol=1e-3)


def test_memory_is_read(decoder, batch):
    text, mask, memory, *rest = batch
    assert not torch.allclose(
        decoder(text, mask, memory, *rest), decoder(text, mask, memory + 1, *rest), atol=1e-3
    )


@pytest.mark.parametrize("grad", [True, False])
def test_a_row_of_padding_is_finite(decoder, batch, grad):
    text, mask, memory, vocabulary, real = batch
    real[1] = False
    text.requires_grad_(grad), memory.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        logits = decoder.train(grad)(text, mask, memory, vocabulary, real)
    assert logits.isfinite().all()
    everything = real.clone()
    everything[1] = True
    assert torch.equal(logits, decoder(text, mask, memory, vocabulary, everything))
    if grad:
        logits[:2].sum().backward()  # the padded row takes no part, and must not spoil the others
        for name, parameter in decoder.named_parameters():
            assert parameter.grad.isfinite().all(), name
        assert memory.grad.isfinite().all()


def test_gradients(decoder, batch):
    text, mask, memory, vocabulary, real = batch
    for tensor in (text, memory, vocabulary):
        tensor.requires_grad_()
    decoder(text, mask, memory, vocabulary, real).square().sum().backward()
    assert memory.grad.abs().sum() > 0
    assert vocabulary.grad is None
    assert not text.grad[mask].any()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_finite_under_autocast(decoder, batch, dtype, scale):
    text, mask, memory, vocabulary, real = batch
    memory = (scale * memory).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        logits = decoder(scale * text, mask, memory, scale * vocabulary, real)
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert memory.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_nothing_masked(decoder, batch):
    text, mask, *rest = batch
    logits = decoder(text, torch.zeros_like(mask), *rest)
    assert logits.shape == (0, 11)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_a_memory_of_another_width():
    decoder = TextDecoder(8, memory_dim=6, vocabulary_size=11, max_length=5)
    text, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    assert decoder(text, mask, torch.randn(2, 3, 6), torch.randn(11, 8)).shape == (8, 11)


def test_input_that_does_not_fit(decoder, batch):
    long = torch.zeros(2, 6, 8)
    with pytest.raises(ValueError, match="captions of 6 tokens, but max_length is 5"):
        decoder(long, torch.ones(2, 6, dtype=torch.bool), *batch[2:4])
    with pytest.raises(ConfigError, match="heads of the text decoder: 3 does not divide"):
        TextDecoder(8, memory_dim=8, vocabulary_size=11, heads=3)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cross_attention_is_torchs(heads):
    own = nn.MultiheadAttention(8, heads, batch_first=True).double()
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    twin = copy.deepcopy(own)
    inputs = [torch.randn(3, n, 8, dtype=torch.float64) for n in (5, 7)]
    gradients = []
    for attention, attend in ((own, cross_attention), (twin, lambda a, q, m: a(q, m, m)[0])):
        query, memory = (x.clone().requires_grad_() for x in inputs)
        result = attend(attention, query, memory)
        (result * torch.arange(8)).sin().sum().backward()
        parts = [attention.in_proj_weight, attention.in_proj_bias, *attention.out_proj.parameters()]
        gradients.append([result, query.grad, memory.grad, *(p.grad for p in parts)])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_choices_are_columns_of_the_whole(decoder, batch):
    choices = torch.tensor([0, 3, 10])
    assert torch.allclose(decoder(*batch, choices=choices), decoder(*batch)[:, choices], atol=1e-6)
