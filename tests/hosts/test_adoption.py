"""How the loss gets its host, and leaves neither hooks nor memory behind."""

import copy
import gc
import weakref

import pytest
import torch
from lookalikes import llamagen, plain
from lookalikes.cases import CAPTIONS, CASES, LGVQ, OFF, Script, lossconfig
from lookalikes.parts import VectorQuantizer, from_config
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel

from lgvq_plugin import LGVQLoss

BY_NAME = {case.name: case for case in CASES}
MSE = {"target": "lgvq_plugin.over.torch.nn.MSELoss", "params": {"lgvq": LGVQ}}


def listeners():
    gc.collect()
    return len(torch_module._global_module_registration_hooks)


class Host(nn.Module):
    """Takes its loss first or last; calls it with (x, y) alone, from a `training_step`."""

    def __init__(self, first=True, config=MSE, quantizer=None):
        super().__init__()
        if first:
            self.loss = from_config(config)
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.quantize = quantizer or VectorQuantizer(16, 8)
        self.decoder = nn.ConvTranspose2d(8, 3, 4, stride=4)
        if not first:
            self.loss = from_config(config)

    def training_step(self, batch):
        quant, loss, _ = self.quantize(self.encoder(batch["image"]))
        return self.loss(self.decoder(quant), batch["image"]) + loss

    def configure_optimizers(self):
        parts = (self.encoder, self.quantize, self.decoder)
        return torch.optim.Adam([p for m in parts for p in m.parameters()], lr=1e-3)


def batch():
    return {"image": torch.rand(3, 3, 16, 16), "text": CAPTIONS}


@pytest.mark.parametrize("first", [True, False])
def test_it_is_adopted_whether_it_comes_first_or_last(first):
    host = Host(first)
    assert host.loss.status()["quantizer"] == "quantize"
    assert listeners() == 0
    # `training_step(batch)` of one argument also where Lightning passes an index to ours.
    optimizer = host.configure_optimizers()
    assert len(optimizer.param_groups) == 2
    host.training_step(batch(), 0).backward()
    assert all(p.grad is not None for p in host.loss.alignment.parameters() if p.requires_grad)
    assert "train/lgvq/total" in host.loss.latest


def test_nested_losses_and_models_are_adopted():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.losses = nn.ModuleDict({"generator": from_config(MSE)})
            self.model = nn.ModuleDict({"quantizer": VectorQuantizer(16, 8)})

    assert Outer().losses["generator"].status()["quantizer"] == "model.quantizer"
    assert listeners() == 0


def test_two_losses_wait_at_once():
    """A teacher and a student, the one built inside the other's constructor."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = from_config(MSE)
            self.student = Host()
            self.quantize = VectorQuantizer(16, 4)

    pair = Pair()
    assert pair.student.loss.status()["quantizer"] == "quantize"
    assert pair.student.loss.alignment.code_dim == 8
    assert listeners() == 0


@pytest.mark.slow
def test_nobody_adopts_it():
    assert listeners() == 0
    loss = from_config(MSE)
    assert listeners() == 1
    other = from_config(MSE)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None  # the hook keeps nobody alive
    assert float(loss(torch.zeros(2), torch.ones(2))) == 1
    assert listeners() == 0
    unused = from_config(MSE)
    assert listeners() == 1
    del unused
    assert listeners() == 0


def test_weights_of_zero_leave_nothing_at_all():
    host = Host(config={**MSE, "params": {"lgvq": OFF}})
    assert listeners() == 0
    assert not host.quantize._forward_hooks
    assert set(vars(host)) == set(vars(Host(config={"target": "torch.nn.MSELoss"})))
    host.loss.detach()
    assert type(host.loss) is nn.MSELoss


class Reader(nn.MSELoss):
    def forward(self, x, y):
        return super().forward(x, y) * getattr(self, "factor", 1.0) * self.scale


def test_what_the_base_losss_code_reads_reaches_it():
    loss = LGVQLoss(base={"target": f"{__name__}.Reader"})
    loss.scale, loss.factor = 3.0, 2.0
    assert float(loss(torch.zeros(2), torch.ones(2))) == 6.0
    assert "scale" not in vars(loss)


def test_an_attribute_that_the_host_gave_its_loss_survives_detach():
    loss = BY_NAME["vqvae"].build(LGVQ)[1]
    loss.from_the_host = 5
    assert loss.detach().from_the_host == 5


def test_what_the_base_loss_has_is_reachable_and_settable():
    host, loss = BY_NAME["latent-diffusion"].build(LGVQ)
    loss.n_classes = 99
    assert (loss.n_classes, loss.base_loss.n_classes) == (99, 99)
    loss.later = 1  # a new attribute is the wrapper's own
    assert loss.later == 1
    assert not hasattr(loss.base_loss, "later")
    loss.latest = {"own": 1}
    assert not hasattr(loss.base_loss, "latest")
    assert loss.discriminator is loss.base_loss.discriminator
    assert loss.perceptual_loss is loss.base_loss.perceptual_loss
    assert loss.discriminator_iter_start == 0
    assert "loss.discriminator.0.weight" in host.state_dict()
    loss.discriminator = nn.Identity()
    assert isinstance(loss.base_loss.discriminator, nn.Identity)
    with pytest.raises(AttributeError):
        _ = loss.no_such_thing


class WithState(LGVQLoss):
    """A later version of LGVQLoss, with state that the base loss has under no name or the same."""

    scale = 2.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.my_new_state = 3
        self.scale = 4.0

    def forward(self, *args, **kwargs):
        self.my_new_state += 1
        return super().forward(*args, **kwargs)


class Scaled(nn.MSELoss):
    def __init__(self):
        super().__init__()
        self.scale, self.disc_weight = 1.0, 0.5


def test_new_state_of_the_wrapper_never_lands_on_the_base_loss():
    loss = WithState(base={"target": f"{__name__}.Scaled"})
    for each in (loss, copy.deepcopy(loss)):
        before = each.my_new_state
        each(torch.zeros(2), torch.ones(2))
        assert each.my_new_state == before + 1
        assert not hasattr(each.base_loss, "my_new_state")
        assert (each.scale, each.base_loss.scale) == (4.0, 1.0)
        each.disc_weight = 0.25  # the host's schedule
        assert each.base_loss.disc_weight == 0.25
        assert "disc_weight" not in vars(each)


def test_the_adaptive_weight_comes_from_the_hosts_own_terms():
    case = BY_NAME["latent-diffusion"]
    bare, _ = case.build()
    host, loss = case.build(LGVQ)
    case.step(bare, case.batch())
    case.step(host, case.batch(), loss)
    assert loss.weights_seen == bare.loss.weights_seen
    assert loss.weights_seen[0] > 0


def test_a_swapped_quantizer_is_followed():
    host = Host(quantizer=plain.VectorQuantiser(16, 8))
    old = host.quantize
    host.quantize = VectorQuantizer(16, 8)
    host.training_step(batch()).backward()
    assert not old._forward_hooks
    assert "train/lgvq/total" in host.loss.latest


def test_a_forgotten_optimizer_is_told_after_the_first_step():
    host = Host()
    parts = (host.encoder, host.quantize, host.decoder)
    optimizer = torch.optim.Adam([p for m in parts for p in m.parameters()], lr=1e-3)

    def step():
        host.training_step(batch()).backward()
        optimizer.step()

    step()
    with pytest.raises(RuntimeError, match=r"does not hold the heads .* loss\.add_heads"):
        step()
    host.loss.add_heads(optimizer)
    step()
    step()
    assert host.loss._optimizer_check._handle is None  # settled: it looks no more


def test_an_optimizer_for_the_heads_alone_is_no_mistake():
    host = Host()
    parts = (host.encoder, host.quantize, host.decoder)
    ours = torch.optim.SGD(host.loss.alignment.parameters(), lr=0.1)
    theirs = torch.optim.SGD([p for m in parts for p in m.parameters()], lr=0.1)
    for _ in range(3):
        host.training_step(batch()).backward()
        theirs.step()
        ours.step()


def test_the_check_of_the_optimizer_dies_with_the_loss():
    gc.collect()
    before = len(torch_optimizer._global_optimizer_post_hooks)
    host = Host()
    host.training_step(batch()).backward()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del host
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


def test_an_average_of_the_host_has_the_heads_and_no_guide():
    host = Host()
    average = AveragedModel(host, avg_fn=lambda ours, theirs, n: 0.5 * (ours + theirs))
    optimizer = host.configure_optimizers()
    host.training_step(batch()).backward()
    optimizer.step()
    average.update_parameters(host)
    average.update_parameters(host)
    same = zip(
        average.module.loss.alignment.parameters(), host.loss.alignment.parameters(), strict=True
    )
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in same)
    average.module.training_step(batch()).backward()  # its own hook, captions and heads
    assert average.module.loss._host is average.module
    vocabulary = host.loss.alignment.guide.vocabulary
    assert all(v.shape != vocabulary.shape for v in average.state_dict().values())
    assert average.module.loss.alignment.guide is host.loss.alignment.guide


def test_a_scripts_loss_is_wrapped_by_hand():
    """LlamaGen: no host holds the loss, its result is a scalar, and the log is asked for."""
    model = llamagen.VQModel()
    loss = from_config(lossconfig("lookalikes.llamagen.VQLoss", LGVQ))
    assert isinstance(loss, LGVQLoss)
    loss.adopt(model)
    host = Script(model, loss)
    case = BY_NAME["llamagen"]
    result = case.step(host, case.batch(), loss)
    assert result.ndim == 0
    assert {"train/lgvq/global_semantic", "train/lgvq/total"} <= set(loss.latest)
    assert loss.detach() is loss.base_loss
    assert not model.quantize._forward_hooks


def test_a_copy_of_an_unadopted_loss_is_a_loss():
    loss = copy.deepcopy(from_config(MSE))
    assert float(loss(torch.zeros(2), torch.ones(2))) == 1
