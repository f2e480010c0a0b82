"""The prefix form resolves through plain importlib and getattr."""

import importlib
import pickle
import sys

import pytest
import torch

from lgvq_plugin import LGVQLoss
from lgvq_plugin.sockets import ConfigError, instantiate

OURS = "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss"


def get_obj_from_str(string):
    """How taming, latent-diffusion and their descendants resolve a target."""
    module, name = string.rsplit(".", 1)
    return getattr(importlib.import_module(module, package=None), name)


def test_a_hosts_own_resolver_finds_it():
    loss = get_obj_from_str("lgvq_plugin.over.torch.nn.MSELoss")(reduction="sum")
    assert isinstance(loss, LGVQLoss)
    assert isinstance(loss.base_loss, torch.nn.MSELoss)
    assert loss(torch.zeros(3), torch.ones(3)).item() == 3  # the base loss's own argument


def test_it_takes_ours_and_the_bases_params():
    loss = instantiate({"target": OURS, "params": {"pixel": "l1", "lgvq": {"recipe": "paper"}}})
    assert loss.pixel == "l1"
    assert loss.base_loss.pixel == "l1"


def test_a_missing_base_is_told():
    with pytest.raises((ConfigError, ModuleNotFoundError), match="nosuch"):
        get_obj_from_str("lgvq_plugin.over.nosuch.losses.Loss")
    with pytest.raises(ConfigError, match="did you mean 'MSELoss'"):
        get_obj_from_str("lgvq_plugin.over.torch.nn.MSELos")


def test_a_function_is_no_loss_class():
    with pytest.raises(ConfigError, match="no class"):
        get_obj_from_str("lgvq_plugin.over.torch.nn.functional.mse_loss")


def test_it_pickles_into_a_process_that_has_not_imported_it():
    loss = get_obj_from_str("lgvq_plugin.over.torch.nn.MSELoss")()
    data = pickle.dumps(loss)
    for name in [name for name in sys.modules if name.startswith("lgvq_plugin.over.")]:
        del sys.modules[name]
    again = pickle.loads(data)
    assert again(torch.zeros(2), torch.ones(2)).item() == 1


def test_another_package_may_have_a_finder_of_that_name(monkeypatch):
    class _Finder:
        def find_spec(self, *_):
            return None

    ours = [f for f in sys.meta_path if type(f).__module__ != "lgvq_plugin.over"]
    monkeypatch.setattr(sys, "meta_path", [_Finder(), *ours])
    module = importlib.import_module("lgvq_plugin.over")
    importlib.reload(module)
    assert any(type(f).__module__ == "lgvq_plugin.over" for f in sys.meta_path)
