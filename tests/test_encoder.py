"""The trained head as an encoder: what L_gsa compares, without a trace in the training."""

import json
import shutil

import pytest
import torch
from torch import nn

from lgvq_plugin import Handle, LGVQLoss, attach
from lgvq_plugin.encoder import SavedHeads
from lgvq_plugin.hosts.vqvae import VQVAE, VectorQuantizer
from lgvq_plugin.sockets import ConfigError

MICRO = {"guide": {"use": "micro_clip"}}
CAPTIONS = ["a red square", "two blue circles", "a green star on black", "a small yellow ring"]
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def host_with_loss(cls=VQVAE, **block):
    torch.manual_seed(0)
    loss = {
        "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
        "params": {"lgvq": {**MICRO, "grid": [4, 4], **block}},
    }
    return cls(channels=8, embed_dim=8, n_embed=16, downsample=4, lossconfig=loss)


def plain_host(width=8):
    torch.manual_seed(0)
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    return VQVAE(channels=8, embed_dim=width, n_embed=16, downsample=4, lossconfig=loss)


@pytest.mark.parametrize("source", ["cls", "pooled"])
def test_the_objective_follows_from_the_two_encoders(source):
    """InfoNCE of the public features, in float64, is the L_gsa that training logs."""
    options = {"source": source, "temperature": 0.2, "weight": 1.0}
    host = plain_host()
    handle = attach(host, **MICRO, objectives={"global_semantic": options})
    handle.heads.objectives["global_semantic"].project = nn.Linear(
        handle.heads.guide.token_dim, handle.heads.guide.sentence_dim
    )  # as for a guide whose two widths differ
    host.eval()
    host(IMAGES)
    logged = handle.loss(CAPTIONS)[1]["train/lgvq/global_semantic"]
    image, text = handle.encode_image(IMAGES), handle.encode_text(CAPTIONS)
    logits = image.double() @ text.double().mT / 0.2
    index = torch.arange(4)
    wanted = [-(m.log_softmax(dim=1)[index, index]).mean() for m in (logits, logits.mT)]
    assert logged.item() == pytest.approx(sum(wanted).item() / 2, rel=1e-5)
    for features in (image, text):
        assert features.dtype == torch.float32
        assert not features.requires_grad
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


class Restless(VQVAE):
    """Its statistics move and it draws at random in training, so that a trace would be seen."""

    def __init__(self, **params):
        super().__init__(**params)
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.3)

    def encode(self, x):
        return super().encode(self.drop(self.norm(x)))


def trained(*, peeks):
    """Train for three steps, with or without a look at features at every possible moment."""
    host = host_with_loss(Restless)
    host.decoder.eval()  # a user's own mode
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)

    def look():
        if peeks:
            modes = [part.training for part in (*host.modules(), host.loss.base_loss)]
            host.loss.encode_image(IMAGES.flip(0))
            host.loss.encode_text(CAPTIONS)
            assert modes == [part.training for part in (*host.modules(), host.loss.base_loss)]

    torch.manual_seed(1)
    for step in range(3):
        look()
        x = host.get_input({"image": IMAGES.movedim(1, -1), "caption": CAPTIONS}, "image")
        look()
        reconstruction, codebook_loss = host(x)[:2]
        look()  # the codes wait for the loss
        total, _ = host.loss(codebook_loss, x, reconstruction, 0, step, split="train")
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return host.state_dict(), torch.get_rng_state()


@pytest.mark.slow
def test_training_is_bit_identical_with_features_taken_at_any_moment():
    (alone, generator), (watched, same) = (trained(peeks=p) for p in (False, True))
    assert all(torch.equal(alone[key], watched[key]) for key in alone)
    assert torch.equal(generator, same)


def test_features_do_not_depend_on_the_mode_nor_on_the_batch():
    host = host_with_loss(Restless).train()
    every = host.loss.encode_image(IMAGES)
    one = host.eval().loss.encode_image(IMAGES[2:3])
    torch.testing.assert_close(every[2:3], one)


@pytest.mark.slow
def test_loss_and_handle_give_the_same_features(tmp_path):
    host = host_with_loss()
    trained_heads = SavedHeads.of(host.loss.alignment)
    trained_heads.write(tmp_path)
    handle = Handle.from_pretrained(plain_host(), tmp_path)
    assert torch.equal(handle.encode_image(IMAGES), host.loss.encode_image(IMAGES))
    assert torch.equal(handle.encode_text(CAPTIONS), host.loss.encode_text(CAPTIONS))
    handle.detach()
    assert torch.equal(handle.encode_image(IMAGES), host.loss.encode_image(IMAGES))


def test_several_levels_have_features_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))
    model.add_module("2", VectorQuantizer(8, 8))
    model.forward = lambda x: model[2](model[1](model[0](x))[0])
    handle = attach(model, ["1", "2"], **MICRO)
    assert handle.encode_image(IMAGES).shape == (4, handle.heads.guide.sentence_dim)


# -- saved heads -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_that_is_no_square_comes_back(tmp_path):
    handle = attach(plain_host(), **MICRO, grid=[2, 8])
    handle.save_pretrained(tmp_path)
    again = Handle.from_pretrained(plain_host(), tmp_path)
    assert again.heads.code_vit.grid == (2, 8)
    assert torch.equal(handle.encode_image(IMAGES), again.encode_image(IMAGES))


@pytest.fixture
def first_version(tmp_path):
    """A folder as version 0.1 wrote it: the defaults of then, unsaid."""
    block = {**MICRO, "recipe": "corrected_v1"}
    handle = attach(plain_host(), **block)
    handle.save_pretrained(tmp_path)
    state = {k: v for k, v in handle.heads.state_dict().items() if k != "first_step"}
    SavedHeads(state, None, "").write(tmp_path)
    (tmp_path / "lgvq_config.json").write_text(json.dumps({"lgvq": {**MICRO}}))
    return tmp_path, handle.encode_image(IMAGES)


@pytest.mark.slow
def test_heads_of_version_01_are_read_with_its_defaults(first_version):
    folder, features = first_version
    handle = Handle.from_pretrained(plain_host(), folder)
    assert handle.heads.objectives["global_semantic"].config.source == "cls"
    assert torch.equal(handle.encode_image(IMAGES), features)
    handle.save_pretrained(folder)  # it stays what it is in a new file
    about = json.loads((folder / "lgvq_config.json").read_text())
    assert (about["defaults"], about["lgvq"]["recipe"]) == (2, "corrected_v1")
    again = Handle.from_pretrained(plain_host(), folder)
    assert torch.equal(again.encode_image(IMAGES), features)


@pytest.mark.slow
def test_the_same_tensors_are_other_heads_under_the_new_defaults(first_version):
    folder, _ = first_version
    about = {"defaults": 2, "lgvq": {**MICRO}}
    (folder / "lgvq_config.json").write_text(json.dumps(about))
    host = plain_host()
    with pytest.raises(ConfigError, match="holds other heads than these"):
        Handle.from_pretrained(host, folder)
    attach(host, **MICRO)  # nothing is left on the host


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": 3}, "defaults 3 are of a newer version"),
        ({"lgvq": None}, "the `lgvq:` block of its heads is unknown"),
        ({"lgvq": [1]}, "lgvq: expected a mapping"),
        ({"defaults": "x"}, "cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, change, message):
    attach(plain_host(), **MICRO).save_pretrained(tmp_path)
    file = tmp_path / "lgvq_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        Handle.from_pretrained(plain_host(), tmp_path)


@pytest.mark.slow
def test_heads_of_another_tokenizer_are_refused(tmp_path):
    attach(plain_host(), **MICRO).save_pretrained(tmp_path)
    host = plain_host(width=4)
    with pytest.raises(
        ConfigError, match=r"codes of width 8, those of VQVAE.quantize have width 4"
    ):
        Handle.from_pretrained(host, tmp_path)
    attach(host, **MICRO)
    (tmp_path / "lgvq_heads.safetensors").unlink()
    with pytest.raises(ConfigError, match="no heads at"):
        Handle.from_pretrained(plain_host(), tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        Handle.from_pretrained(plain_host(), tmp_path)


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_head_the_error_names_its_weight():
    off = {"global_semantic": {"weight": 0}}
    message = r"weight is 0 \(trained: relationship\); train with lgvq.objectives"
    handle = attach(plain_host(), **MICRO, objectives=off)
    host = host_with_loss(objectives=off)
    for owner in (handle, host.loss):
        with pytest.raises(ConfigError, match=message):
            owner.encode_image(IMAGES)
        with pytest.raises(ConfigError, match=message):
            owner.encode_text(CAPTIONS)
    names = ("global_semantic", "masked_text", "relationship")
    host = host_with_loss(objectives={name: {"weight": 0} for name in names})
    with pytest.raises(ConfigError, match="no heads: all weights"):
        host.loss.encode_image(IMAGES)


def test_a_loss_without_host_says_so():
    loss = LGVQLoss(base={"target": "torch.nn.MSELoss"}, lgvq=MICRO)
    with pytest.raises(RuntimeError, match="no host has this loss yet"):
        loss.encode_text(CAPTIONS)


def test_wrong_input_is_named():
    handle = attach(plain_host(), **MICRO)
    with pytest.raises(ConfigError, match=r"expected floats .* got 'torch.uint8 \(4, 3, 16, 16\)'"):
        handle.encode_image(IMAGES.byte())
    with pytest.raises(ConfigError, match="expected floats"):
        handle.encode_image(IMAGES[0])
    for texts in ("a dog", [None]):
        with pytest.raises(ConfigError, match="expected a list of strings"):
            handle.encode_text(texts)
    assert handle.encode_text([]).shape == (0, handle.heads.guide.sentence_dim)
