"""What every objective of LG-VQ promises, in both recipes: one finite scalar, whatever captions."""

import copy
import pickle

import pytest
import torch

from lgvq_plugin.objectives import MEMBERS, AbstractObjective

NAMES = sorted({*MEMBERS} - {"vision_alignment"})  # test_vision_alignment.py
RECIPES = ["paper", "corrected"]
CORNERS = {
    "no caption": ["", "", ""],
    "some empty": ["a red circle", "", "two boxes"],
    "one word": ["boxes", "circle"],
    "one image": ["two red boxes"],
    "the same": ["a red circle", "a red circle", "a red circle"],
    "cut": ["word " * 50, "two boxes"],
}


def each(function):
    function = pytest.mark.parametrize("recipe", RECIPES)(function)
    return pytest.mark.parametrize("name", NAMES)(function)


def backward(batch):
    """Return the value and the gradients of the view's leaves; None where there is no path."""
    term = batch.term()
    leaves = list(batch.leaves.values())
    found = torch.autograd.grad(term.value, leaves, allow_unused=True, retain_graph=True)
    term.value.backward()
    return term, dict(zip(batch.leaves, found, strict=True))


@each
@pytest.mark.parametrize("corner", sorted(CORNERS))
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize(
    "dtype", [None, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_finite_in_every_corner(batch, name, recipe, corner, scale, dtype):
    given = batch(name, recipe, CORNERS[corner], scale)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        term, gradients = backward(given)
    assert term.value.ndim == 0
    assert term.value.isfinite()
    assert term.value.dtype == torch.float32
    for leaf, gradient in gradients.items():
        assert gradient is None or gradient.isfinite().all(), leaf
    for key, parameter in given.objective.named_parameters():
        if parameter.requires_grad:  # DDP waits for every one of them, in every step
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    for key, logged in term.log.items():
        assert logged.ndim == 0, key
        assert not logged.requires_grad, key
        assert logged.isfinite(), key


@each
def test_no_captions_cost_nothing(batch, name, recipe):
    term, gradients = backward(batch(name, recipe, ["", ""]))
    assert term.value.item() == 0
    assert all(g is None or not g.any() for g in gradients.values())


@each
def test_an_image_without_caption_takes_no_part(batch, name, recipe):
    given = batch(name, recipe)
    strings = ["a red circle above", "", "triangles", given.caption.strings[3]]
    has_caption = torch.tensor([True, False, True, True])
    fewer = given.but(strings=strings)
    noisy = fewer.but(
        strings=strings,
        **{
            key: leaf + 5 * (~has_caption).view(-1, *[1] * (leaf.ndim - 1))
            for key, leaf in given.leaves.items()
        },
    )
    assert noisy.term().value.item() == pytest.approx(fewer.term().value.item(), abs=1e-6)
    _, gradients = backward(fewer)
    assert all(g is None or not g[1].any() for g in gradients.values())


PROMISED = {  # (objective, recipe) -> who gets a gradient
    ("global_semantic", "paper"): {"cls"},
    ("global_semantic", "corrected"): {"cls"},
    ("masked_text", "paper"): {"cls", "tokens"},
    ("masked_text", "corrected"): {"tokens"},
    ("relationship", "paper"): {"codes"},  # not the code-ViT: the match's value cancels
    ("relationship", "corrected"): {"tokens", "codes"},
}


@each
def test_who_gets_a_gradient(batch, name, recipe):
    _, gradients = backward(batch(name, recipe))
    reached = {key for key, g in gradients.items() if g is not None and g.any()}
    assert reached == PROMISED[name, recipe]


@each
def test_text_gets_none(batch, name, recipe):
    given = batch(name, recipe)
    text = given.caption.features
    for tensor in (text.tokens, text.sentence, given.caption.guide.vocabulary):
        tensor.requires_grad_()
    given.term().value.backward()
    for tensor in (text.tokens, text.sentence, given.caption.guide.vocabulary):
        assert tensor.grad is None or not tensor.grad.any()


@each
def test_every_weight_trains(batch, name, recipe):
    given = batch(name, recipe)
    backward(given)
    for key, parameter in given.objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert key == "log_temperature"
            assert recipe == "paper"


ALL_WORDS = {"masked_text": {"mask_at": "input", "ratio": (1.0, 1.0)}}


@each
def test_batch_order_does_not_matter(batch, name, recipe):
    given = batch(name, recipe, **ALL_WORDS.get(name, {}))
    order = torch.tensor([2, 0, 3, 1])
    strings = [given.caption.strings[i] for i in order]
    other = given.but(strings=strings, **{k: leaf[order] for k, leaf in given.leaves.items()})
    assert other.term().value.item() == pytest.approx(given.term().value.item(), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_matter_when_corrected(batch, name):
    given = batch(name, "corrected", max_length=20, **ALL_WORDS.get(name, {}))
    shorter = given.but(guide=type(given.caption.guide)(max_length=14))
    assert shorter.caption.features.token_ids.shape[1] == 14
    assert shorter.term().value.item() == pytest.approx(given.term().value.item(), abs=1e-5)


@each
def test_draws_follow_the_steps_generator_alone(batch, name, recipe):
    given = batch(name, recipe)
    before = torch.get_rng_state()
    one = given.term().value
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(one, given.term().value)


@each
def test_it_is_an_objective_that_can_be_copied(batch, name, recipe):
    given = batch(name, recipe)
    assert isinstance(given.objective, AbstractObjective)
    for other in (copy.deepcopy(given.objective), pickle.loads(pickle.dumps(given.objective))):
        copied = type(given)(other, given.view, given.caption)
        assert torch.equal(copied.term().value, given.term().value)
