"""What every host, whatever its shape, may rely on; each test runs on each row of the table."""

import copy
import gc
import io
import os
import weakref
from dataclasses import replace

import pytest
import torch
from lookalikes.cases import CASES, LGVQ, OFF, ROM1504, WEIGHTS, heads_of, missing

from lgvq_plugin.host import encode
from lgvq_plugin.objectives import Caption
from lgvq_plugin.types import Codes

# tests/hosts/test_rom1504.py runs this file with the other package called taming.
TABLE = ROM1504 if os.environ.get("LGVQ_TEST_TAMING") == "rom1504" else CASES
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=TABLE, ids=lambda case: case.name)
def case(request):
    library = missing(request.param)
    if library is not None:
        pytest.skip(f"needs {library}: pip install 'lgvq_plugin[hosts]'")
    return request.param


# Hosts that differ from another of the table in little: some tests run on request only.
ALIKE = {"cvq-in-taming", "VectorQuantize-rows", "FSQ", "LFQ", "SimVQ"}


def each_kind(function):
    table = [
        pytest.param(each, marks=[pytest.mark.extended] * (each.name in ALIKE)) for each in TABLE
    ]
    over = pytest.mark.parametrize("case", table, indirect=True, ids=lambda case: case.name)
    return over(pytest.mark.slow(function))


def step(case, host, attached=None):
    torch.manual_seed(7)
    return case.step(host, case.batch(), attached)


def grads(host, skip=("loss.lgvq.",)):
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in host.named_parameters()
        if not name.startswith(skip)
    }


def quantizer_of(case, host):
    return host.get_submodule(case.quantizer)


def own_codes(case, host):
    """Codes (B, N, C) of the host's own forward pass, seen by a hook of the test's."""
    seen = []
    hook = quantizer_of(case, host).register_forward_hook(lambda m, a, output: seen.append(output))
    torch.manual_seed(7)
    host(case.images())
    hook.remove()
    return seen[-1], case.read(seen[-1])


def weighted_terms(heads, codes, captions):
    """Sum of weight * objective, put together here."""
    side = round(codes.shape[1] ** 0.5)
    view = heads.view(Codes(codes, None, (side, side)))
    guide, generator = heads.guide, heads._generator(0)
    tokens, features = guide.tokenize(captions), guide.encode(captions)
    caption = Caption(captions, tokens, features, guide, generator)
    total = 0
    for name, objective in heads.objectives.items():
        own = caption
        if objective.draws_mask:
            mask = objective.draw_mask(captions, tokens, guide, generator)
            own = replace(caption, mask=mask, masked=guide.encode(captions, token_mask=mask))
        total += WEIGHTS[name] * objective(view, own).value
    return total


def structure(host):
    """All that a trace could be left in: types, attributes, hooks, keys."""
    return {
        name: (
            type(module),
            sorted(key for key in vars(module) if key != "weights_seen"),
            {key: len(value) for key, value in vars(module).items() if key.endswith("hooks")},
        )
        for name, module in host.named_modules()
    }, list(host.state_dict())


@pytest.mark.slow
def test_a_step_changes_every_head_and_the_host(case):
    host, attached = case.build(LGVQ)
    before = {n: p.detach().clone() for n, p in heads_of(attached).named_parameters()}
    encoder = {n: p.detach().clone() for n, p in host.named_parameters() if "encoder" in n}
    step(case, host, attached)
    still = [n for n, p in heads_of(attached).named_parameters() if torch.equal(p, before[n])]
    assert still == []
    assert not any(torch.equal(host.get_parameter(n), p) for n, p in encoder.items())


@each_kind
def test_host_gradients_are_the_bases_plus_those_of_the_weighted_terms(case):
    bare, _ = case.build()
    host, attached = case.build({**LGVQ, "gradient_ratio": None})
    initial = bare.state_dict()
    for key, value in host.state_dict().items():  # building us has drawn no random number
        assert key.startswith("loss.lgvq.") or value.equal(initial[key])

    twin, heads = copy.deepcopy(bare), copy.deepcopy(heads_of(attached))
    total = weighted_terms(heads, own_codes(case, twin)[1], case.batch()["caption"])
    parameters = dict(twin.named_parameters())
    ours = torch.autograd.grad(
        total, [p for p in parameters.values() if p.requires_grad], allow_unused=True
    )
    trained = [name for name, p in parameters.items() if p.requires_grad]
    ours = dict(zip(trained, ours, strict=True))

    alone, with_ours = step(case, bare), step(case, host, attached)
    torch.testing.assert_close(with_ours, alone + total.detach(), rtol=1e-5, atol=1e-5)
    touched = 0
    got = grads(host)
    # The discriminator saw a host that a step of ours has moved, where it runs a pass of its own.
    for name, gradient in grads(bare, skip=("loss.",)).items():
        expected = gradient
        if ours.get(name) is not None:
            expected = ours[name] + (0 if gradient is None else gradient)
            touched += bool(ours[name].abs().max() > 1e-5)
        if expected is None:
            assert got[name] is None
            continue
        scale = float(expected.abs().max())  # float32 sums of terms of this size
        atol = max(2e-6, 2e-5 * scale)
        torch.testing.assert_close(got[name], expected, rtol=2e-4, atol=atol, msg=name)
    assert touched >= 2  # the encoder does learn from the text


@each_kind
def test_a_gradient_ratio_is_that_share_of_the_hosts_own_gradient_at_the_codes(case):
    bare, _ = case.build()
    host, attached = case.build({**LGVQ, "gradient_ratio": 0.5})
    seen = []
    quantizer_of(case, bare).register_forward_hook(
        lambda module, args, output: seen.append(first_vectors(output))
    )
    twin, heads = copy.deepcopy(bare), copy.deepcopy(heads_of(attached))
    output, codes = own_codes(case, twin)
    total = weighted_terms(heads, codes, case.batch()["caption"])
    parameters = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    wanted = [first_vectors(output), *parameters.values()]
    g, *ours = torch.autograd.grad(total, wanted, allow_unused=True)
    ours = dict(zip(parameters, ours, strict=True))

    seen.clear()
    step(case, bare)
    h = next(vectors.grad for vectors in seen if vectors.grad is not None)
    factor = 0.5 * h.double().norm() / g.double().norm()
    step(case, host, attached)
    got, alone = grads(host), grads(bare, skip=("loss.",))
    names = [name for name in alone if ours.get(name) is not None]
    own = {n: torch.zeros(()) if alone[n] is None else alone[n] for n in names}
    added = torch.cat([(got[n] - own[n]).flatten() for n in names])
    pull = torch.cat([ours[n].flatten() for n in names]).double()
    assert len(names) >= 2
    assert float(added.double() @ pull / (pull @ pull)) == pytest.approx(float(factor), rel=2e-3)
    assert (added - factor * pull).norm() < 2e-2 * (factor * pull).norm()


def first_vectors(output):
    """The quantized vectors in what a quantizer returned, their gradient kept."""
    flat = [output] if isinstance(output, torch.Tensor) else list(output)
    flat = [part for part in flat if isinstance(part, torch.Tensor)]
    vectors = next(t for t in flat if t.is_floating_point() and t.ndim in (3, 4))
    if vectors.requires_grad:
        vectors.retain_grad()
    return vectors


@pytest.mark.slow
def test_weights_of_zero_are_the_bare_host_bit_for_bit(case):
    if case.attached:
        pytest.skip("an attached host computes its loss itself; see the test of disabled()")
    bare, _ = case.build()
    drawn = torch.get_rng_state()
    host, _ = case.build(OFF)
    assert torch.equal(torch.get_rng_state(), drawn)
    for _ in range(2):
        alone = step(case, bare)
        drawn = torch.get_rng_state()
        with_us = step(case, host)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert torch.equal(alone, with_us)
        for name, gradient in grads(bare).items():
            got = host.get_parameter(name).grad
            assert (got is None and gradient is None) or torch.equal(got, gradient), name
    assert list(host.state_dict()) == list(bare.state_dict())
    assert all(torch.equal(v, host.state_dict()[k]) for k, v in bare.state_dict().items())


@pytest.mark.slow
def test_disabled_is_the_bare_host_bit_for_bit(case):
    bare, _ = case.build()
    host, attached = case.build(LGVQ)
    alone = step(case, bare)
    with attached.disabled():
        assert attached.status()["enabled"] is False
        assert torch.equal(step(case, host, attached), alone)
    for name, gradient in grads(bare).items():
        got = host.get_parameter(name).grad
        assert (got is None and gradient is None) or torch.equal(got, gradient), name
    assert step(case, host, attached) != step(case, bare)


@pytest.mark.slow
def test_detach_leaves_no_trace(case):
    bare, _ = case.build()
    host, attached = case.build(LGVQ)
    step(case, host, attached)
    step(case, bare)
    base = attached.detach()
    if case.name == "llamagen":
        host.loss = base  # the loss is no part of the model: the script puts its own back
    assert structure(host) == structure(bare)  # LitEma's copies of the heads are gone too
    assert not any("lgvq" in name for name, _ in host.named_parameters())
    host.load_state_dict(bare.state_dict())
    assert torch.equal(step(case, host), step(case, bare))


@each_kind
def test_copies_and_pickles_train_on_their_own(case):
    host, attached = case.build(LGVQ)
    step(case, host, attached)
    if case.attached:
        pair = (host, attached)
        copies = [copy.deepcopy(pair)]
        pair = _pickled(pair)
        copies += [pair] if pair is not None else []
    else:
        pickled = _pickled(host)
        copies = [(c, c.loss) for c in (copy.deepcopy(host), pickled) if c is not None]
    assert len(copies) == 2
    expected = None
    before = {k: v.clone() for k, v in host.state_dict().items()}
    for other, theirs in copies:
        assert heads_of(theirs) is not heads_of(attached)
        loss = step(case, other, theirs)
        expected = loss if expected is None else expected
        assert torch.equal(loss, expected)
        assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
        assert any(
            not torch.equal(a, b)
            for a, b in zip(
                heads_of(theirs).parameters(), heads_of(attached).parameters(), strict=True
            )
        )
    assert torch.equal(step(case, host, attached), expected)


def _pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_kind
def test_captured_tensors_do_not_outlive_the_step(case):
    host, attached = case.build(LGVQ)
    seen = []
    quantizer_of(case, host).register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output[0]))
    )
    step(case, host, attached)
    gc.collect()
    assert len(seen) >= 1
    assert [ref() for ref in seen if ref() is not None] == []


def test_state_dicts_cross_both_ways(case):
    bare, _ = case.build(seed=1)
    host, attached = case.build(LGVQ)
    old = bare.state_dict()
    heads = {k: v.clone() for k, v in heads_of(attached).state_dict().items()}
    host.load_state_dict(old)  # strict: an old checkpoint fits
    assert all(torch.equal(host.state_dict()[key], value) for key, value in old.items())
    assert all(torch.equal(v, heads_of(attached).state_dict()[k]) for k, v in heads.items())
    ours = [key for key in host.state_dict() if key not in old]
    assert all(key.startswith("loss.lgvq.") for key in ours)
    result = bare.load_state_dict(host.state_dict(), strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == sorted(ours)
    assert case.attached or any(key.startswith("loss.lgvq.") for key in ours)


def test_the_heads_are_in_the_hosts_optimizer_once(case):
    host, attached = case.build(LGVQ)
    if case.attached or not hasattr(host, "configure_optimizers"):
        optimizer = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], lr=0.5)
        found = [optimizer]
        if case.attached:
            attached.detach()
            from lgvq_plugin import attach

            path = None if case.named else case.quantizer
            attached = attach(host, path, optimizer=optimizer, **LGVQ)
        else:
            model = [p for n, p in host.named_parameters() if not n.startswith("loss.")]
            found = [torch.optim.Adam(model, lr=0.5)]
            attached.add_heads(found)
    else:
        host.learning_rate = 0.5
        found = _optimizers(host.configure_optimizers())
    ours = {id(p) for p in heads_of(attached).parameters()}
    # The heads come last: in one group, or in two where the host has a weight decay.
    count = sum(bool({id(p) for p in g["params"]} & ours) for g in found[0].param_groups)
    first, groups = found[0].param_groups[:-count], found[0].param_groups[-count:]
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(ours)
    assert {*held} == ours
    for group in groups:
        assert group["lr"] == 0.5
    assert len(groups) == (2 if found[0].param_groups[0].get("weight_decay") else 1)
    assert groups[-1].get("weight_decay", 0) == 0
    rest = [*first, *(group for o in found[1:] for group in o.param_groups)]
    others = [p for group in rest for p in group["params"]]
    assert not ours & {id(p) for p in others}


def _optimizers(result):
    if isinstance(result, torch.optim.Optimizer):
        return [result]
    if isinstance(result, dict):
        return _optimizers(result["optimizer"])
    return [o for entry in result for o in _optimizers(entry)]


def test_encode_reads_the_codes_of_the_host(case):
    host, _ = case.build(LGVQ)
    host.eval()
    with torch.no_grad():
        _, expected = own_codes(case, host)
    torch.manual_seed(7)
    codes = encode(host, case.images(), quantizer=case.quantizer)
    torch.testing.assert_close(codes.codes, expected)
    assert codes.grid[0] * codes.grid[1] == expected.shape[1]
    assert not codes.codes.requires_grad
    assert codes.indices is not None
    assert codes.indices.shape[:2] == expected.shape[:2]
    if codes.codebook is not None:  # what the indices name is what the host decodes
        torch.testing.assert_close(codes.codebook[codes.indices], expected, rtol=1e-4, atol=1e-5)


COMPILED = {"taming-0.0.1", "VectorQuantize", "ResidualVQ", "diffusers"}  # ways to return codes


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, marks=[pytest.mark.extended] * (each.name != "taming-0.0.1"))
        for each in TABLE
        if each.name in COMPILED
    ],
    indirect=True,
    ids=lambda c: c.name,
)
def test_a_compiled_host_still_leaves_its_codes(case):
    host, attached = case.build(LGVQ)
    expected = step(case, *case.build(LGVQ))
    host.forward = torch.compile(host.forward, backend="eager")
    torch.testing.assert_close(step(case, host, attached), expected, rtol=1e-4, atol=1e-5)
