import pytest
import torch

from lgvq_plugin.checkpoints.read import sort_tensors
from lgvq_plugin.sockets import ConfigError

W = {"encoder.conv_in.weight": torch.ones(2), "quantize.embedding.weight": torch.zeros(3)}


def named(prefix, tensors=W):
    return {prefix + key: value for key, value in tensors.items()}


@pytest.mark.parametrize("root", ["state_dict", "model", "vae", "ema"])
def test_roots(root):
    found = sort_tensors({root: W, "epoch": 3, "args": {"a": 1}})
    assert found.root == root
    assert found.state_dict.keys() == W.keys()


def test_a_bare_state_dict():
    assert sort_tensors(W).root == ""


def test_current_weights_before_averaged_ones():
    found = sort_tensors({"model": named("module."), "ema": named("module.", {"a": torch.ones(1)})})
    assert found.state_dict.keys() == W.keys()
    assert found.averaged is not None
    assert set(found.averaged) == {"a"}
    assert sort_tensors({"model": W, "ema": {"a": torch.ones(1)}}, root="ema").root == "ema"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "first_stage_model.", "model_ema.", "model.",
     "module.first_stage_model.", "_orig_mod.first_stage_model."],
)  # fmt: skip
def test_prefixes(prefix):
    found = sort_tensors({"state_dict": named(prefix)})
    assert found.state_dict.keys() == W.keys()
    assert found.prefix == prefix


def test_compiled_parts():
    found = sort_tensors({"encoder._orig_mod.conv_in.weight": W["encoder.conv_in.weight"]})
    assert set(found.state_dict) == {"encoder.conv_in.weight"}


def test_the_tokenizer_of_a_larger_model_is_taken_out_and_the_rest_kept_aside():
    other = {"transformer.wte.weight": torch.ones(1), "cond_stage_model.x": torch.ones(1)}
    found = sort_tensors({"state_dict": {**named("first_stage_model."), **other}})
    assert found.state_dict.keys() == W.keys()
    assert set(found.aside) == set(other)


def test_a_host_with_a_part_called_model_keeps_its_names():
    mixed = {"model.weight": torch.ones(1), "quantize.embedding.weight": torch.ones(1)}
    assert sort_tensors(mixed).state_dict.keys() == mixed.keys()


def test_averages_of_latent_diffusion_get_their_dots_back():
    """LitEma registers buffers, whose names must have no dots: it drops them."""
    flat = {key.replace(".", ""): value + 5 for key, value in W.items()}
    beside = {"decay": torch.tensor(0.99), "num_updates": torch.tensor(4)}
    found = sort_tensors({"state_dict": {**W, **named("model_ema.", {**flat, **beside})}})
    assert found.averaged is not None
    assert found.averaged.keys() == W.keys()
    for key in W:
        assert torch.equal(found.averaged[key], W[key] + 5)
    assert found.state_dict.keys() == W.keys()
    assert "model_ema.decay" in found.aside


def test_lightnings_own_weights_beside():
    found = sort_tensors({"state_dict": W, "ema_state_dict": {k: v + 1 for k, v in W.items()}})
    assert found.averaged is not None
    assert torch.equal(found.averaged["encoder.conv_in.weight"], torch.full((2,), 2.0))


@pytest.mark.parametrize("wrong", [{}, {"epoch": 3}, [1], {"state_dict": {"a": 1}}])
def test_no_tensors(wrong):
    with pytest.raises(ConfigError, match=r"no tensors|without tensors|expected a state dict"):
        sort_tensors(wrong)


def test_a_root_that_is_not_there():
    with pytest.raises(ConfigError, match=r"'stat_dict'.*did you mean 'state_dict'"):
        sort_tensors({"state_dict": W}, root="stat_dict")
