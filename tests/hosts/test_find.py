"""Finding the quantizer: by path, by name, by class, by its codebook; else a clear refusal."""

import pytest
import torch
from lookalikes import plain
from lookalikes.cases import CAPTIONS, LGVQ
from lookalikes.parts import VectorQuantizer, from_config
from torch import nn

from lgvq_plugin import attach
from lgvq_plugin.quantizer_hook import (
    code_width,
    codebook_of,
    find_quantizer,
    read_codes,
    require_quantizer,
)
from lgvq_plugin.sockets import ConfigError


class EMA(nn.Module):
    """A quantizer that nothing but its codebook gives away."""

    def __init__(self):
        super().__init__()
        self.num_codes, self.codebook = 16, nn.Parameter(torch.randn(16, 8))


def test_by_path_in_a_wrapped_model():
    inner = nn.Module()
    inner.stem, inner.quantize = nn.Conv2d(3, 8, 4, 4), VectorQuantizer(4, 8)
    outer = nn.Module()
    outer.first_stage_model = inner
    assert find_quantizer(outer) == ("first_stage_model.quantize", inner.quantize)
    assert require_quantizer(outer, "first_stage_model.quantize")[1] is inner.quantize
    with pytest.raises(ConfigError, match=r"did you mean 'first_stage_model\.quantize'"):
        require_quantizer(outer, "first_stage_model.quantise")


def test_by_its_codebook_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Embedding(5, 5), EMA())
    assert find_quantizer(model) == ("2", model[2])


def test_none_is_told():
    with pytest.raises(ConfigError, match=r"no module that looks like it; .* Modules: 0, 1"):
        require_quantizer(nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU()))
    assert find_quantizer(nn.Sequential(nn.ReLU())) is None


def test_two_levels_are_told_and_either_can_be_chosen():
    model = plain.VQVAE2()
    with pytest.raises(ConfigError, match=r"several .*\(quantize_t, quantize_b\)"):
        attach(model, **LGVQ)
    x = torch.rand(3, 3, 16, 16)
    for path, grid in (("quantize_t", (2, 2)), ("quantize_b", (4, 4))):
        handle = attach(model, path, **LGVQ)
        model(x)
        assert handle._hook.codes.grid == grid
        assert handle.loss(CAPTIONS)[0].requires_grad
        handle.detach()


class TwoLevels(nn.Module):
    """A host with a loss of its own and two quantizers, built one after the other."""

    def __init__(self, lossconfig):
        super().__init__()
        self.loss = from_config(lossconfig)
        self.levels = plain.VQVAE2()
        self.net = None

    def configure_optimizers(self):
        return torch.optim.Adam(self.levels.parameters(), lr=1e-3)


class OneByOne(TwoLevels):
    def __init__(self, lossconfig):
        nn.Module.__init__(self)
        self.loss = from_config(lossconfig)
        self.quantize_t, self.quantize_b = plain.Quantize(8, 16), plain.Quantize(8, 16)
        self.levels = nn.Linear(2, 2)


@pytest.mark.parametrize("host", [TwoLevels, OneByOne])
def test_a_loss_in_a_host_of_two_levels_refuses_to_choose(host):
    config = {"target": "lgvq_plugin.over.torch.nn.MSELoss", "params": {"lgvq": LGVQ}}
    if host is OneByOne:  # adopted by its first level; complete, it has two
        with pytest.raises(ConfigError, match="several modules"):
            host(config).loss.require_host()
    with pytest.raises(ConfigError, match="several modules"):
        host(config).loss(torch.zeros(1), torch.zeros(1))
    prefix = "levels." if host is TwoLevels else ""
    lgvq = {**LGVQ, "quantizer": f"{prefix}quantize_b"}
    chosen = host({**config, "params": {"lgvq": lgvq}})
    chosen.loss.require_host()
    assert chosen.loss.status()["quantizer"] == f"{prefix}quantize_b"


def test_a_host_without_a_quantizer_is_told_at_the_first_step():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            config = {"target": "lgvq_plugin.over.torch.nn.MSELoss", "params": {"lgvq": LGVQ}}
            self.loss = from_config(config)
            self.net = nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="no module that looks like it"):
        Host().loss(torch.zeros(2), torch.zeros(2))


def test_heads_twice_are_told():
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    attach(model, **LGVQ)
    with pytest.raises(ConfigError, match="has heads already"):
        attach(model, **LGVQ)


def test_a_module_that_returns_no_codes_is_told():
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    attach(model, "vq.embedding", code_dim=8, **LGVQ)
    with pytest.raises(ConfigError, match="returns no quantized vectors"):
        model.vq.embedding(torch.zeros(2, dtype=torch.int64))


def test_a_model_that_did_not_run_is_told():
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    handle = attach(model, **LGVQ)
    with pytest.raises(RuntimeError, match="saw no codes"):
        handle.loss(CAPTIONS)


# -- reading what a quantizer returns ------------------------------------------------------------


def test_rosinalitys_layout_is_known_where_height_and_width_equal_the_code():
    """32 x 32 grids of 32-wide codes, channels last: the shape does not tell."""
    quantizer = plain.Quantize(8, 16)
    assert codebook_of(quantizer).shape == (16, 8)
    quant, diff, index = quantizer(torch.randn(2, 8, 8, 8))
    codes = read_codes((quant, diff, index), quantizer)
    torch.testing.assert_close(codes.codes, quant.flatten(1, 2))
    torch.testing.assert_close(codes.codebook[codes.indices], quant.flatten(1, 2))


def test_one_hot_integers_are_not_taken_for_indices():
    quantizer = VectorQuantizer(16, 8)
    quant, loss, (_, _, index) = quantizer(torch.randn(2, 8, 4, 4))
    one_hot = torch.nn.functional.one_hot(index.view(2, 16), 16)
    codes = read_codes((quant, loss, (None, one_hot, index)), quantizer)
    assert torch.equal(codes.indices, index.view(2, 16))


def test_remapped_indices_are_mapped_back():
    quantizer = VectorQuantizer(16, 8)
    quant, loss, (_, _, index) = quantizer(torch.randn(2, 8, 4, 4))
    quantizer.remap = "used.npy"
    quantizer.unmap_to_all = lambda found: 15 - found
    codes = read_codes((quant, loss, (None, None, 15 - index)), quantizer)
    torch.testing.assert_close(codes.codebook[codes.indices], codes.codes)


def test_codes_of_length_one_get_a_codebook_of_length_one():
    quantizer = VectorQuantizer(16, 8)
    quantizer.l2_norm = True
    torch.testing.assert_close(codebook_of(quantizer).norm(dim=1), torch.ones(16))
    assert code_width(quantizer) == 8
