"""Captions and grids as they come: missing, partly missing, several, too few, the wrong shape."""

import dataclasses
import logging

import pytest
import torch
from lookalikes.cases import CAPTIONS, CASES, GUIDE, LGVQ, lossconfig

from lgvq_plugin import attach
from lgvq_plugin.sockets import ConfigError

BY_NAME = {case.name: case for case in CASES}
VQVAE, PLAIN = BY_NAME["vqvae"], BY_NAME["cvq"]


def run(captions, key="caption", lgvq=LGVQ, case=VQVAE):
    """One pass; the loss, the base loss alone, and the log."""
    host, _ = case.build(lgvq)
    batch = case.batch()
    del batch["caption"]
    if captions is not None:
        batch[key] = captions
    x = host.get_input(batch, "image")
    xrec, quant_loss = host(x)
    total, log = host.loss(quant_loss, x, xrec, 0, 0, last_layer=host.get_last_layer())
    alone, _ = host.loss.base_loss(quant_loss, x, xrec, 0, 0)
    total.backward()
    return total.detach(), alone.detach(), log, host


def test_none_at_all_trains_the_base_loss_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        total, alone, log, host = run(None)
        x = host.get_input({"image": VQVAE.batch()["image"]}, "image")
        xrec, quant_loss = host(x)
        host.loss(quant_loss, x, xrec, 0, 1)
    assert torch.equal(total, alone)
    assert not any("lgvq" in key for key in log)
    assert "train/codebook/usage" in log
    assert [r.message for r in caplog.records if "no captions" in r.message] == [
        "no captions in a batch: it trains the base loss alone"
    ]


@pytest.mark.parametrize("captions", [None, ["", None, " "]])
def test_batches_without_any_caption_are_refused_after_the_first_few(captions):
    """As with taming's own data sets under its own trainer."""
    host, _ = VQVAE.build(LGVQ)
    batch = {**VQVAE.batch(), "caption": captions}
    if captions is None:
        del batch["caption"]
    with pytest.raises(ConfigError, match="none of the first 5 training batches has a caption"):
        train(host, [batch] * 5)
    host.eval()
    train(host, [batch] * 6)  # evaluation may be without


def test_one_caption_settles_it():
    host, _ = VQVAE.build(LGVQ)
    bare = {**VQVAE.batch(), "caption": [None] * 3}
    train(host, [bare, {**bare, "caption": ["", "a red square", ""]}, *[bare] * 6])
    assert not host.loss.alignment.expects_captions


def train(host, batches):
    for step, batch in enumerate(batches):
        x = host.get_input(batch, "image")
        xrec, quant_loss = host(x)
        host.loss(quant_loss, x, xrec, 0, step, last_layer=host.get_last_layer())


@pytest.mark.parametrize("captions", [[None] * 3, ["", " ", ""], [[], [""], None]])
def test_empty_ones_are_none(captions):
    total, alone, _, _ = run(captions)
    assert torch.equal(total, alone)


@pytest.mark.parametrize("key", ["caption", "captions", "text", "txt"])
def test_the_usual_keys_are_found(key):
    total, alone, _, _ = run(CAPTIONS, key)
    assert total != alone


def test_a_key_of_ones_own():
    lgvq = {**LGVQ, "caption_key": "prompt"}
    total, alone, _, _ = run(CAPTIONS, "prompt", lgvq)
    assert total != alone
    with pytest.raises(ConfigError, match="no 'prompt'; it has image, caption"):
        run(CAPTIONS, "caption", lgvq)


def test_images_without_a_caption_take_no_part():
    """The terms of [a, None, c] are those of the batch [a, c]."""
    only = {"global_semantic": {"weight": 1.0, "gather": False}, "relationship": {"weight": 0}}
    lgvq = {"guide": GUIDE, "objectives": {**only, "masked_text": {"weight": 0}}}
    part, _, log, _ = run([CAPTIONS[0], None, CAPTIONS[2]], lgvq=lgvq)
    batch = VQVAE.batch([CAPTIONS[0], CAPTIONS[2]])
    batch["image"] = batch["image"][[0, 2]]
    fresh, _ = VQVAE.build(lgvq)
    # The very codes of the first run: an EMA codebook moves with each batch.
    codes = []
    other, _ = VQVAE.build(lgvq)
    other.quantize.register_forward_hook(lambda m, a, output: codes.append(output[0]))
    other(other.get_input(VQVAE.batch(), "image"))
    from lgvq_plugin.types import Codes

    two = Codes(codes[0].flatten(2).mT[[0, 2]], None, (4, 4))
    expected, _ = fresh.loss.alignment(two, batch["caption"], step=0)
    torch.testing.assert_close(log["train/lgvq/total"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert part.isfinite()


def test_of_several_captions_one_is_drawn_a_step():
    host, handle = PLAIN.build(LGVQ)
    x = PLAIN.batch()["image"]
    seen = set()
    encode = handle.heads.guide.encode

    class Spy:
        def __getattr__(self, name):
            return getattr(guide, name)

        def encode(self, captions, token_mask=None):
            seen.add(captions[0])
            return encode(captions, token_mask)

    guide, handle.heads.guide = handle.heads.guide, Spy()
    for step in range(12):
        host(x)
        handle.loss([["red", "green", "blue"], "one", ["two"]], step=step)
    assert seen == {"red", "green", "blue"}


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        (["one", "two"], "2 captions for 3 images"),
        ([CAPTIONS, CAPTIONS], "default_collate"),
        ("a string", "must be a list"),
    ],
)
def test_the_wrong_number_is_told(captions, told):
    with pytest.raises(ConfigError, match=told):
        run(captions)


def test_the_wrong_grid_is_told():
    case = BY_NAME["VectorQuantize-rows"]
    pytest.importorskip(
        "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed"
    )
    host, _ = case.build()
    attach(host, grid=[3, 5], **LGVQ)
    with pytest.raises(ConfigError, match=r"16 codes per image are no 3 x 5 grid.*lgvq.grid"):
        host(case.batch()["image"])


def test_a_grid_that_is_not_square():
    case = BY_NAME["VectorQuantize-rows"]
    pytest.importorskip(
        "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed"
    )
    host, _ = case.build()
    handle = attach(host, grid=[2, 8], **LGVQ)
    host(case.batch()["image"])
    loss, _ = handle.loss(CAPTIONS)
    assert loss.requires_grad
    assert handle.heads.code_vit.grid == (2, 8)


def test_the_wrong_width_is_told():
    host, _ = PLAIN.build()
    attach(host, code_dim=5, **LGVQ)
    with pytest.raises(ConfigError, match=r"width 5, but .*; set lgvq.code_dim: 8"):
        host(PLAIN.batch()["image"])


def test_a_batch_that_is_no_mapping_has_no_captions():
    loss = VQVAE.build(LGVQ)[1]
    loss.receive((torch.zeros(1), torch.zeros(1)))
    assert loss._captions is None
    loss._config = dataclasses.replace(loss._config, caption_key="txt")
    with pytest.raises(ConfigError, match="needs a batch with keys, got a tuple"):
        loss.receive((torch.zeros(1),))


def test_captions_of_one_batch_never_meet_the_codes_of_another():
    """taming's discriminator pass reads the batch again; what it read is gone afterwards."""
    case = BY_NAME["latent-diffusion"]
    host, loss = case.build(LGVQ)
    case.step(host, case.batch(), loss)
    assert loss._captions is None
    assert loss._hook.codes is None


def test_the_old_target_may_also_be_given_as_base():
    from lookalikes import latent_diffusion as ldm

    target = "lookalikes.latent_diffusion.VQLossWithDiscriminator"
    prefixed = lossconfig(target, LGVQ, n_classes=16, disc_weight=0.3)
    nested = {
        "target": "lgvq_plugin.LGVQLoss",
        "params": {
            "base": {"target": target, "params": {"n_classes": 16}},
            "disc_weight": 0.3,
            "lgvq": LGVQ,
        },
    }
    losses = []
    for config in (prefixed, nested):
        torch.manual_seed(0)
        host = ldm.VQModel(config)
        assert (host.loss.n_classes, host.loss.disc_weight) == (16, 0.3)
        torch.manual_seed(7)
        losses.append(BY_NAME["latent-diffusion"].step(host, BY_NAME["latent-diffusion"].batch()))
    assert torch.equal(*losses)
