"""Whose codes the text loss sees: the right pass, the right layout, all levels; or a refusal."""

import pytest
import torch
from lookalikes import plain
from lookalikes.cases import CAPTIONS, CASES, LGVQ, lossconfig
from lookalikes.parts import VectorQuantizer, from_config
from torch import nn

from lgvq_plugin import attach
from lgvq_plugin.host import encode
from lgvq_plugin.quantizer_hook import read_codes
from lgvq_plugin.sockets import ConfigError

BY_NAME = {case.name: case for case in CASES}
IMAGES = torch.rand(3, 3, 16, 16)


def model():
    return plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))


# -- the codes of the loss's own forward pass ----------------------------------------------------


def test_a_preview_without_gradient_before_the_loss_is_refused():
    host = model()
    handle = attach(host, **LGVQ)
    host(IMAGES)
    with torch.no_grad():
        host(IMAGES)
    with pytest.raises(RuntimeError, match=r"would not train encoder\.conv_in.*no_grad.*disabled"):
        handle.loss(CAPTIONS)
    host(IMAGES)
    with torch.no_grad(), handle.disabled():  # the way out that the message names
        host(IMAGES[:1])
    handle.loss(CAPTIONS)[0].backward()
    assert host.encoder.conv_in.weight.grad is not None


class LookUp(nn.Module):
    """Returns the codebook's rows; the straight-through step is the host's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)

    def forward(self, z):
        distance = (z.movedim(1, -1)[..., None, :] - self.embedding.weight).square().sum(-1)
        indices = distance.argmin(-1)
        return self.embedding(indices).movedim(-1, 1), indices


class StraightThroughOutside(nn.Module):
    def __init__(self, *, detached):
        super().__init__()
        self.encoder, self.quantize = nn.Conv2d(3, 8, 4, 4), LookUp()
        self.decoder, self.detached = nn.ConvTranspose2d(8, 3, 4, 4), detached

    def forward(self, x):
        z = self.encoder(x)
        codes, _ = self.quantize(z.detach() if self.detached else z)
        return self.decoder(z + (codes - z).detach())


@pytest.mark.parametrize("detached", [True, False])
def test_codes_whose_gradient_ends_in_the_codebook_are_refused(detached):
    host = StraightThroughOutside(detached=detached)
    handle = attach(host, **LGVQ)
    host(IMAGES)
    with pytest.raises(RuntimeError, match=r"ends inside quantize.*not train encoder\.weight"):
        handle.loss(CAPTIONS)
    host.encoder.requires_grad_(False)  # the codebook alone is to learn
    host(IMAGES)
    handle.loss(CAPTIONS)[0].backward()


@pytest.mark.parametrize("captions", ["abc", None, [1, 2, 3], [b"a", b"b", b"c"], iter("abc")])
def test_what_is_no_list_of_texts_is_refused_as_captions(captions):
    host = model()
    handle = attach(host, **LGVQ)
    host(IMAGES)
    with pytest.raises(ConfigError, match="captions must be a list with one entry per image"):
        handle.loss(captions)


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_evaluation_and_frozen_hosts_need_no_gradient(how):
    host = model()
    handle = attach(host, **LGVQ)
    with how():
        host(IMAGES)
        assert handle.loss(CAPTIONS)[0].isfinite()
        host(IMAGES.clone())
    assert handle.loss(CAPTIONS, split="val")[0].isfinite()
    host.encoder.requires_grad_(False)  # the decoder alone learns: the codes never had a gradient
    host(IMAGES)
    handle.loss(CAPTIONS)[0].backward()
    host.requires_grad_(False)
    with torch.no_grad():
        host(IMAGES)
    handle.loss(CAPTIONS)[0].backward()
    assert all(p.grad is not None for p in handle.parameters() if p.requires_grad)


def test_an_encoder_that_ran_without_gradient_is_refused():
    host = model()
    handle = attach(host, **LGVQ)
    with torch.no_grad():
        z = host.encoder(IMAGES)
    host.vq(z)
    with pytest.raises(RuntimeError, match="detached them, or ran its encoder under"):
        handle.loss(CAPTIONS)


def test_a_second_pass_with_gradient_before_the_loss_is_refused():
    host = model()
    handle = attach(host, **LGVQ)
    kept = host(IMAGES)
    preview = host(IMAGES)
    with pytest.raises(RuntimeError, match="vq ran 2 times with gradients"):
        handle.loss(CAPTIONS)
    del kept, preview
    for _ in range(2):  # passes whose graphs are gone are none that could be meant
        output = host(IMAGES)
    assert handle.loss(CAPTIONS)[0].requires_grad
    output[0].sum().backward()


def test_codes_of_another_batch_size_are_refused():
    host = model()
    handle = attach(host, **LGVQ)
    host(IMAGES[:2])
    with pytest.raises(ConfigError, match=r"3 captions for 2 images.*last forward pass"):
        handle.loss(CAPTIONS)


@pytest.mark.parametrize("name", ["vqvae", "latent-diffusion"])
def test_a_loss_in_its_host_refuses_a_preview_too(name):
    case = BY_NAME[name]
    host, loss = case.build(LGVQ)
    x = host.get_input(case.batch(), host.image_key)
    xrec, qloss = host(x)[:2]
    with torch.no_grad():
        host(x)
    with pytest.raises(RuntimeError, match="would not train encoder"):
        host.loss(qloss, x, xrec, 0, 0, last_layer=host.get_last_layer())
    host.get_input(case.batch(), host.image_key)
    xrec, qloss = host(x)[:2]
    with torch.no_grad(), loss.disabled():
        host(x)
    host.loss(qloss, x, xrec, 0, 0, last_layer=host.get_last_layer())


# -- layout --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """RQ-VAE: (B, h, w, C) in and out, codebooks inside a list, indices (B, h, w, levels)."""

    def __init__(self, width, size=16, levels=2):
        super().__init__()
        self.codebooks = nn.ModuleList(nn.Embedding(size + 1, width) for _ in range(levels))

    def forward(self, z):
        found, indices = torch.zeros_like(z), []
        for codebook in self.codebooks:
            distance = torch.cdist((z - found).detach().flatten(0, 2), codebook.weight)
            indices.append(distance.argmin(dim=1).view(z.shape[:-1]))
            found = found + codebook(indices[-1]).detach()
        return z + (found - z).detach(), (z - found).square().mean(), torch.stack(indices, dim=-1)


class ChannelsLast(nn.Module):
    def __init__(self, width, quantizer):
        super().__init__()
        self.encoder = nn.Conv2d(3, width, 4, 4)
        self.quantizer = quantizer

    def forward(self, x):
        return self.quantizer(self.encoder(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize("width", [6, 16])
def test_rq_vaes_layout_and_width_are_found(width):
    host = ChannelsLast(width, Residual(width))
    handle = attach(host, **LGVQ)
    quant, _, indices = host(torch.rand(3, 3, 16, 24))
    codes = handle._hook.codes
    assert codes.grid == (4, 6)
    assert torch.equal(codes.codes, quant.flatten(1, 2))
    assert torch.equal(codes.indices, indices[..., 0].flatten(1))
    assert handle.heads.code_dim == width
    assert handle.loss(CAPTIONS)[0].requires_grad


def test_an_ambiguous_layout_is_refused_until_it_is_given():
    host = ChannelsLast(4, Residual(4))  # 4 x 4 positions of 4 channels
    handle = attach(host, **LGVQ)
    with pytest.raises(ConfigError, match=r"shape \(3, 4, 4, 4\), fit both.*set lgvq\.layout"):
        host(IMAGES)
    handle.detach()
    for layout, place in (("channels_last", -1), ("channels_first", 1)):
        handle = attach(host, layout=layout, **LGVQ)
        quant = host(IMAGES)[0]
        assert torch.equal(handle._hook.codes.codes, quant.movedim(place, -1).flatten(1, 2))
        handle.detach()


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_the_vectors_decide_where_shapes_do_not(is_last, moved):
    """embed_dim 16 on a 16 x 16 grid: a usual VQGAN; an EMA may move the codebook meanwhile."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8 if moved else 400, 4)
    quant, loss, (_, _, index) = quantizer(torch.randn(2, 4, 4, 4))
    expected = quant.flatten(2).mT
    if moved:
        nn.init.normal_(quantizer.embedding.weight)
    quant = quant.movedim(1, -1) if is_last else quant
    assert torch.equal(read_codes((quant, loss, index), quantizer, width=4).codes, expected)


def test_indices_decide_where_the_width_does_not():
    quantizer = nn.Identity()
    vectors, index = torch.randn(2, 8, 4, 8), torch.zeros(2, 8, 4, dtype=torch.int64)
    assert read_codes((vectors, index), quantizer, width=8).grid == (8, 4)
    index = torch.zeros(2, 4, 8, 3, dtype=torch.int64)  # three levels
    codes = read_codes((vectors, index), quantizer, width=8)
    assert codes.grid == (4, 8)
    assert torch.equal(codes.codes, vectors.movedim(1, -1).flatten(1, 2))


def test_a_wrong_width_names_the_one_that_is_right():
    host = ChannelsLast(6, Residual(6))
    handle = attach(host, code_dim=5, **LGVQ)
    with pytest.raises(ConfigError, match=r"width 5, .*set lgvq\.code_dim: 6 \(channels_last\)$"):
        host(IMAGES)
    handle.detach()
    handle = attach(host, code_dim=6, layout="channels_first", **LGVQ)
    with pytest.raises(ConfigError, match="layout channels_first, shape"):
        host(IMAGES)


# -- several levels ------------------------------------------------------------------------------

LEVELS = ["quantize_t", "quantize_b"]


def test_two_levels_are_guided_together():
    host = plain.VQVAE2(width=8)
    handle = attach(host, LEVELS, **LGVQ, gradient_ratio=None)
    assert handle.status()["quantizer"] == LEVELS
    assert handle.heads.code_dim == 16
    top, bottom = [], []
    host.quantize_t.register_forward_hook(lambda m, a, out: top.append(out[0]))
    host.quantize_b.register_forward_hook(lambda m, a, out: bottom.append(out[0]))
    host(IMAGES)
    codes = handle._hook.codes
    assert codes.grid == (4, 4)
    assert torch.equal(codes.codes[..., 8:], bottom[0].flatten(1, 2))
    large = top[0].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.equal(codes.codes[..., :8], large.flatten(1, 2))
    grads = torch.autograd.grad(handle.loss(CAPTIONS)[0], [top[0], bottom[0]])
    assert all(g.abs().sum() > 0 for g in grads)
    host(IMAGES)
    loss, log = handle.loss(CAPTIONS)
    assert {"train/lgvq/total", "train/codebook/usage"} <= log.keys()
    assert {f"train/codebook/{name}/usage" for name in LEVELS} <= log.keys()
    loss.backward()
    handle.detach()
    assert len(host.quantize_t._forward_hooks) == 1  # the test's own
    assert encode(host, IMAGES, quantizer=LEVELS).codes.shape == (3, 16, 16)


def test_a_level_that_did_not_run_or_is_there_twice_is_named():
    host = plain.VQVAE2(width=8)
    handle = attach(host, LEVELS, **LGVQ)
    host.quantize_t(torch.rand(3, 2, 2, 8))
    with pytest.raises(RuntimeError, match=r"\(quantize_b did not run\)"):
        handle.loss(CAPTIONS)
    handle.detach()
    host.other = host.quantize_t
    with pytest.raises(ConfigError, match="quantize_t, other are one module"):
        attach(host, ["quantize_t", "other"], **LGVQ)
    with pytest.raises(ConfigError, match="has no 'quantize_x'; did you mean"):
        attach(host, ["quantize_x", "quantize_b"], **LGVQ)
    with pytest.raises(ConfigError, match=r"or all levels with \[quantize_t, quantize_b\]"):
        attach(plain.VQVAE2(), **LGVQ)


class TwoLevels(plain.VQVAE2):
    """A host that builds its loss last."""

    def __init__(self, config):
        super().__init__(width=8)
        self.loss = from_config(config)

    def training_step(self, batch):
        xrec, diff = self(batch["image"])
        return self.loss(xrec, batch["image"]) + diff

    def configure_optimizers(self):
        own = [p for n, p in self.named_parameters() if not n.startswith("loss.")]
        return torch.optim.Adam(own, lr=1e-3)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_loss_with_a_list_of_quantizers_in_its_block(ratio):
    lgvq = {**LGVQ, "quantizer": LEVELS, "gradient_ratio": ratio}
    host = TwoLevels(lossconfig("torch.nn.MSELoss", lgvq))
    host.loss.require_host()
    assert host.loss.status()["quantizer"] == LEVELS
    optimizer = host.configure_optimizers()
    before = {n: p.detach().clone() for n, p in host.loss.alignment.named_parameters()}
    host.training_step({"image": IMAGES, "caption": CAPTIONS}).backward()
    optimizer.step()
    heads = host.loss.alignment.named_parameters()
    assert not [n for n, p in heads if p.requires_grad and torch.equal(p, before[n])]
    assert host.enc_t.weight.grad is not None


# -- what trains ---------------------------------------------------------------------------------


def test_trainable_parameters_are_printed_as_peft_does(capsys, caplog):
    host = model()
    host.decoder.requires_grad_(False)
    with caplog.at_level("INFO"):
        handle = attach(host, **LGVQ)
    handle.print_trainable_parameters()
    heads = sum(p.numel() for p in handle.parameters())
    own = sum(p.numel() for p in host.parameters())
    trained = sum(p.numel() for p in [*handle.parameters(), *host.parameters()] if p.requires_grad)
    line = (
        f"trainable params: {trained:,} || heads params: {heads:,} || host params: {own:,} || "
        f"all params: {heads + own:,} || trainable%: {100 * trained / (heads + own):.4f}"
    )
    assert capsys.readouterr().out == line + "\n"
    assert line in caplog.text


def test_groups_for_an_optimizer_of_ones_own_spare_the_temperature():
    handle = attach(model(), **LGVQ)
    decayed, spared = handle.parameter_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in handle.heads.named_parameters()}
    kept = {names[id(p)] for p in spared["params"]}
    assert {"code_vit.pos_embed", "code_vit.cls", "code_vit.out_norm.weight"} <= kept
    assert "objectives.global_semantic.log_temperature" in kept
    assert "code_vit.project" in {names[id(p)] for p in decayed["params"]}
    assert len(names) == len(decayed["params"]) + len(spared["params"])
