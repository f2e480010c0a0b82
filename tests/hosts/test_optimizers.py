"""The heads' group: in the right optimizer, under every schedule, and readable from old states."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from lgvq_plugin.host import add_heads, remove_heads, undecayed_parameters
from lgvq_plugin.sockets import ConfigError


def parameters(count):
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 10)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_moves_the_heads_as_it_moves_the_host(name):
    host, heads = parameters(3), parameters(2)
    optimizer = torch.optim.Adam(host, lr=0.2, betas=(0.5, 0.9))
    scheduler = SCHEDULES[name](optimizer)
    alone = torch.optim.Adam(parameters(3), lr=0.2, betas=(0.5, 0.9))
    reference = SCHEDULES[name](alone)
    result = ([optimizer], [{"scheduler": scheduler, "interval": "step"}])
    assert add_heads(result, heads, host) is result
    metric = (1.0,) if name == "ReduceLROnPlateau" else ()
    for _ in range(12):
        first, last = optimizer.param_groups
        expected = alone.param_groups[0]
        for key in ("lr", "betas", "weight_decay"):
            assert first[key] == expected[key]
            assert last[key] == expected[key]
        optimizer.step()
        alone.step()
        scheduler.step(*metric)
        reference.step(*metric)
    assert optimizer.param_groups[0]["lr"] != 0.2  # the schedule did something


def test_the_optimizer_that_trains_the_most_of_the_host_gets_them():
    host, heads = parameters(5), parameters(2)
    critic = torch.optim.Adam(parameters(9), lr=0.1)
    few = torch.optim.Adam(host[:1], lr=0.1)
    most = torch.optim.Adam(
        [{"params": host[1:2], "lr": 0.7}, {"params": host[2:], "lr": 0.3, "weight_decay": 0.1}]
    )
    add_heads({"all": (critic, few, most)}, heads, host)
    assert [len(o.param_groups) for o in (critic, few, most)] == [1, 1, 3]
    group = most.param_groups[-1]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)  # as the host's larger group
    assert [id(p) for p in group["params"]] == [id(p) for p in heads]
    add_heads(most, heads, host)  # a second time changes nothing
    assert len(most.param_groups) == 3


def test_no_optimizer_for_the_host_is_told():
    with pytest.raises(ConfigError, match="would never learn"):
        add_heads([torch.optim.SGD(parameters(1), lr=0.1)], parameters(1), parameters(2))
    with pytest.raises(ConfigError, match="would never learn"):
        add_heads([], parameters(1), parameters(2))


def test_a_scheduler_that_would_not_know_the_group_is_told():
    host = parameters(1)
    optimizer = torch.optim.SGD(host, lr=0.1)
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    with pytest.raises(ConfigError, match="scheduler already drives"):
        add_heads(optimizer, parameters(1), host)
    add_heads([optimizer, scheduler], parameters(1), host)
    scheduler.step()


def test_frozen_heads_are_left_out():
    host, heads = parameters(1), parameters(2)
    heads[0].requires_grad_(False)
    optimizer = torch.optim.SGD(host, lr=0.1)
    add_heads(optimizer, heads, host)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(heads[1])]


def test_named_parameters_stay_named():
    host, heads = parameters(2), parameters(2)
    optimizer = torch.optim.AdamW([("a", host[0]), ("b", host[1])], lr=0.1)
    add_heads(optimizer, heads, host)
    assert optimizer.param_groups[1]["param_names"] == ["lgvq.0", "lgvq.1"]


def _run(optimizer, steps=3):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        optimizer.step()


def test_a_state_saved_before_the_heads_came_still_loads():
    host = parameters(2)
    old = torch.optim.Adam(host, lr=0.1)
    _run(old)
    saved = copy.deepcopy(old.state_dict())
    fresh = torch.optim.Adam(host, lr=0.1)
    heads = parameters(1)
    add_heads(fresh, heads, host)
    fresh.load_state_dict(saved)
    for p in host:
        assert torch.equal(fresh.state[p]["exp_avg"], old.state[p]["exp_avg"])
    assert heads[0] not in fresh.state
    _run(fresh)
    again = copy.deepcopy(fresh.state_dict())  # with the heads: as ever
    fresh.load_state_dict(again)
    assert float(fresh.state[heads[0]]["step"]) == 3


def older_add_heads(optimizer, heads):
    """What runs of earlier versions did: all heads in one group, like the host's."""
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.add_param_group({**group, "params": heads})


def shaped():
    """Heads: a matrix, its bias, positions, a temperature, another matrix."""
    shapes = [(3, 3), (3,), (1, 4, 3), (), (2, 3)]
    return [nn.Parameter(torch.full(shape, float(i + 1))) for i, shape in enumerate(shapes)]


def undecayed(heads):
    return undecayed_parameters(nn.ParameterList(heads))


def test_a_weight_decay_spares_what_it_would_only_distort():
    host, heads = parameters(2), shaped()
    optimizer = torch.optim.AdamW(host, lr=0.1, weight_decay=0.3)
    add_heads(optimizer, heads, host, undecayed=undecayed(heads))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in heads] == [0.3, 0.0, 0.0, 0.0, 0.3]
    for p in [*host, *heads]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [bool((p == i + 1).all()) for i, p in enumerate(heads)] == [
        False, True, True, True, False
    ]  # fmt: skip
    remove_heads(optimizer, heads)
    assert len(optimizer.param_groups) == 1
    assert not optimizer._optimizer_step_pre_hooks
    plain = torch.optim.Adam(host, lr=0.1)
    add_heads(plain, heads, host, undecayed=undecayed(heads))
    assert len(plain.param_groups) == 2  # nothing to spare: one group


@pytest.mark.parametrize("then", ["bare", "one group", "two groups"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_states_of_earlier_runs_are_restored_with_their_schedules(name, then):
    host, heads = parameters(3), shaped()
    kind = {"lr": 0.2, "weight_decay": 0.3}
    old = torch.optim.AdamW(host, **kind)
    if then == "one group":
        older_add_heads(old, heads)
    elif then == "two groups":
        add_heads(old, heads, host, undecayed=undecayed(heads))
    schedule = SCHEDULES[name](old)
    metric = (1.0,) if name == "ReduceLROnPlateau" else ()
    for _ in range(2):
        _run(old, steps=1)
        schedule.step(*metric)
    for i, p in enumerate(heads if then != "bare" else []):
        old.state[p]["exp_avg"].fill_(10.0 + i)  # told apart, and each of its own shape
    saved = copy.deepcopy((old.state_dict(), schedule.state_dict()))

    new = torch.optim.AdamW(host, **kind)
    again = SCHEDULES[name](new)
    add_heads([new, again], heads, host, undecayed=undecayed(heads))
    new.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    decay = {id(p): g["weight_decay"] for g in new.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in heads] == [0.3, 0.0, 0.0, 0.0, 0.3]
    for i, p in enumerate(heads if then != "bare" else []):
        assert (new.state[p]["exp_avg"] == 10.0 + i).all()
        assert new.state[p]["exp_avg"].shape == p.shape
    for _ in range(8):
        _run(new, steps=1)
        again.step(*metric)
        schedule.step(*metric)
        assert {g["lr"] for g in new.param_groups} == {old.param_groups[0]["lr"]}


def test_taken_out_the_optimizer_is_as_before():
    host, heads = parameters(2), parameters(2)
    optimizer = torch.optim.Adam(host, lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    add_heads(optimizer, heads, host)
    for p in heads:
        p.grad = torch.ones_like(p)
    optimizer.step()
    remove_heads(optimizer, heads)
    assert optimizer.state_dict() == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    add_heads([optimizer, scheduler], heads, host)
    remove_heads([optimizer, scheduler], heads)
    scheduler.step()  # it still counts two groups
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
