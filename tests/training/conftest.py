"""Functions that build the configs of `small_runs.py` with overrides."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))  # configs name `toy.ToyHost`, tests import it

from small_runs import CONFIG, SMALL_HOST


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def config():
    """A function of overrides (`training.max_steps=2`) that returns a fresh config."""

    def build(*overrides):
        base = OmegaConf.create(copy.deepcopy(CONFIG))
        return OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))

    return build


@pytest.fixture
def small(config):
    """The same for a smaller host with one optimizer."""

    def build(*overrides):
        given = config(*overrides)
        given.model = SMALL_HOST
        return given

    return build
