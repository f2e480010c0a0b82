"""A host that keeps a moving average of itself keeps none of the heads."""

import copy

import pytest
import torch
from lookalikes.cases import CASES, LGVQ
from torch import nn

BY_NAME = {case.name: case for case in CASES}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class CompVisEma(nn.Module):
    """The names and the strictness of latent-diffusion's: `forward` and `copy_to` know all."""

    def __init__(self, model, decay=0.5):
        super().__init__()
        self.m_name2s_name = {}
        self.register_buffer("decay", torch.tensor(decay))
        self.register_buffer("num_updates", torch.tensor(0))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(self.m_name2s_name[name], parameter.detach().clone())

    def pairs(self, model):
        buffers = dict(self.named_buffers())
        for name, parameter in dict(model.named_parameters()).items():
            if parameter.requires_grad:
                yield buffers[self.m_name2s_name[name]], parameter
            else:
                assert name not in self.m_name2s_name

    @torch.no_grad()
    def forward(self, model):
        self.num_updates += 1
        for average, parameter in self.pairs(model):
            average.lerp_(parameter, 1 - float(self.decay))

    @torch.no_grad()
    def copy_to(self, model):
        for average, parameter in self.pairs(model):
            parameter.copy_(average)


def old_state(host):
    """What earlier versions saved: the heads averaged, too."""
    state = dict(host.state_dict())
    for name, parameter in host.loss.alignment.named_parameters():
        if parameter.requires_grad:
            state[f"model_ema.losslgvq{name.replace('.', '')}"] = parameter.detach().clone()
    return state


@pytest.mark.parametrize("name", ["latent-diffusion", "ibq"])
def test_an_average_has_none_of_the_heads(name):
    case = BY_NAME[name]
    bare, _ = case.build()
    host, attached = case.build(LGVQ)
    averages = {key for key in host.state_dict() if key.startswith("model_ema.")}
    assert averages == {key for key in bare.state_dict() if key.startswith("model_ema.")}
    case.step(host, case.batch(), attached)
    host.on_train_batch_end()
    assert averages == {key for key in host.state_dict() if key.startswith("model_ema.")}
    weight = host.model_ema.get_buffer("encoderconv_inweight")
    assert not torch.equal(weight, bare.model_ema.get_buffer("encoderconv_inweight"))


@pytest.mark.parametrize("name", ["latent-diffusion", "ibq"])
def test_old_checkpoints_load_strictly(name):
    case = BY_NAME[name]
    host, _ = case.build(LGVQ)
    host.load_state_dict(case.build(seed=1)[0].state_dict(), strict=True)  # the host's own
    other, _ = case.build(LGVQ, seed=2)
    other.load_state_dict(old_state(host), strict=True)  # LG-VQ of an earlier version
    wrapped = nn.ModuleDict({"inner": other})
    wrapped.load_state_dict({f"inner.{k}": v for k, v in old_state(host).items()}, strict=True)
    broken = old_state(host)
    del broken["model_ema.encoderconv_inweight"]
    with pytest.raises(RuntimeError, match="encoderconv_inweight"):
        other.load_state_dict(broken, strict=True)


def test_the_real_methods_of_an_average_see_the_host_without_heads():
    case = BY_NAME["vqvae"]
    host, attached = case.build(LGVQ)
    host.model_ema = CompVisEma(host)
    case.step(host, case.batch(), attached)
    heads = {k: v.clone() for k, v in attached.alignment.state_dict().items()}
    path = "encoder." + next(name for name, _ in host.encoder.named_parameters())
    for each in (host, copy.deepcopy(host)):
        average = each.model_ema
        of_average = average.get_buffer(path.replace(".", ""))
        before = of_average.clone()
        average(each)
        assert not torch.equal(of_average, before)
        average.copy_to(each)
        assert torch.equal(of_average, each.get_parameter(path))
        now = each.loss.alignment.state_dict()
        assert all(torch.equal(now[key], value) for key, value in heads.items())
    attached.detach()
    assert set(vars(host.model_ema)) == set(vars(CompVisEma(host)))
    host.model_ema(host)
