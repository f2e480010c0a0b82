"""Presets whose classes live elsewhere: look-alikes of a checkout, and diffusers' own VQModel."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lgvq_plugin import cli
from lgvq_plugin.checkpoints.load import load_checkpoint
from lgvq_plugin.checkpoints.retrofit import presets
from lgvq_plugin.host import encode
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.build import build_host
from lgvq_plugin.training.config import read_config
from lgvq_plugin.training.driver import HostDriver

LOSS = "model.params.lossconfig.params"
EXTENDED = (pytest.mark.slow, pytest.mark.extended)
LLAMAGEN = '''
"""Names, shapes at the codes and return values of LlamaGen's vq_model; narrow, so quick."""
from dataclasses import dataclass, field
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from lookalikes.llamagen import VQModel as Plain  # its methods
from torch import nn

WIDTH = 8


@dataclass
class ModelArgs:
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    encoder_ch_mult: list = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: list = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256


class Res(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, a), nn.Conv2d(a, b, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(4, b), nn.Conv2d(b, b, 3, 1, 1)
        self.nin_shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Resample(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(width, width, 3, stride, 1)

    def forward(self, x):
        return self.conv(x if self.stride == 2 else F.interpolate(x, scale_factor=2.0))


class Stack(nn.Module):
    def __init__(self, widths, first, last, change, stride):
        super().__init__()
        self.change, width = change, widths[0]
        self.conv_in = nn.Conv2d(first, width, 3, 1, 1)
        self.mid = nn.ModuleList([Res(self.inner(widths), self.inner(widths))])
        self.conv_blocks = nn.ModuleList()
        for i, wide in enumerate(widths):
            block = nn.Module()
            block.res, width = nn.ModuleList([Res(width, wide)]), wide
            if i < len(widths) - 1:
                setattr(block, change, Resample(wide, stride))
            self.conv_blocks.append(block)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, last, 3, 1, 1)

    def inner(self, widths):
        return widths[-1] if self.change == "downsample" else widths[0]

    def blocks(self, h):
        for block in self.conv_blocks:
            h = block.res[0](h)
            h = getattr(block, self.change)(h) if hasattr(block, self.change) else h
        return h

    def forward(self, x):
        h = self.conv_in(x)
        order = [self.blocks, self.mid[0]]
        for part in order if self.change == "downsample" else order[::-1]:
            h = part(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VectorQuantizer(nn.Module):
    def __init__(self, n_e, e_dim):
        super().__init__()
        self.n_e, self.e_dim, self.l2_norm, self.show_usage = n_e, e_dim, True, True
        self.embedding = nn.Embedding(n_e, e_dim)
        self.register_buffer("codebook_used", nn.Parameter(torch.zeros(65536)))

    def forward(self, z):
        z = F.normalize(z.movedim(1, -1), dim=-1)
        codebook = F.normalize(self.embedding.weight, dim=-1)
        index = (z.flatten(0, 2) @ codebook.mT).argmax(1)
        found = codebook[index].view(z.shape)
        losses = None, None, None, 0
        if self.training:
            self.codebook_used[: -len(index)] = self.codebook_used[len(index) :].clone()
            self.codebook_used[-len(index) :] = index
            usage = len(torch.unique(self.codebook_used)) / self.n_e
            vq, commit = F.mse_loss(found, z.detach()), 0.25 * F.mse_loss(found.detach(), z)
            losses = vq, commit, 0.0 * vq, usage
        return (z + (found - z).detach()).movedim(-1, 1), losses, (None, None, index)


class VQModel(Plain, PyTorchModelHubMixin):
    def __init__(self, config):
        nn.Module.__init__(self)
        down = [WIDTH * m for m in config.encoder_ch_mult]
        up = [WIDTH * m for m in config.decoder_ch_mult][::-1]
        z, dim = config.z_channels, config.codebook_embed_dim
        self.config = config
        self.encoder = Stack(down, 3, z, "downsample", 2)
        self.decoder = Stack(up, z, 3, "upsample", 1)
        self.quantize = VectorQuantizer(config.codebook_size, dim)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)


def VQ_8(**kwargs):
    return VQModel(ModelArgs(encoder_ch_mult=[1, 2, 2, 4], decoder_ch_mult=[1, 2, 2, 4], **kwargs))


def VQ_16(**kwargs):
    return VQModel(ModelArgs(**kwargs))
'''
PUBLISHED_KEYS = {  # of vq_ds16_c2i.pt and vq_ds8_c2i.pt
    *("encoder.conv_in.weight", "encoder.conv_blocks.0.res.0.norm1.weight"),
    *("encoder.conv_blocks.1.downsample.conv.weight", "decoder.conv_blocks.0.upsample.conv.bias"),
    *("encoder.mid.0.conv1.weight", "decoder.norm_out.weight", "decoder.conv_out.weight"),
    *("quantize.embedding.weight", "quantize.codebook_used"),
    *("quant_conv.weight", "post_quant_conv.bias"),
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a plain picture number {i}")
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with LlamaGen's module at its path; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "hosts"))
    inner = tmp_path / "LlamaGen" / "tokenizer" / "tokenizer_image"
    inner.mkdir(parents=True)
    (inner / "vq_model.py").write_text(LLAMAGEN)
    forget = [name for name in sys.modules if name.split(".")[0] == "tokenizer"]
    assert forget == []
    yield tmp_path / "LlamaGen"
    for name in [name for name in sys.modules if name.split(".")[0] == "tokenizer"]:
        del sys.modules[name]


def retrofit(monkeypatch, tmp_path, preset, checkpoint, pictures, *words):
    """Run the command; return the images that the new host gave before its first step."""
    seen, first = [], HostDriver.on_train_start

    def look(self):
        modes = {part: part.training for part in self.host.modules()}
        with torch.no_grad():
            seen.append(self.host.eval()(IMAGES)[0])
        for part, mode in modes.items():
            part.training = mode
        first(self)

    monkeypatch.setattr(HostDriver, "on_train_start", look)
    given = ["--ckpt", str(checkpoint), "-o", str(tmp_path / "run"), "--data", str(pictures)]
    given += ["--max-steps", "2", "--images", "2", "--no-progress", "lgvq.guide.use=micro_clip"]
    given += [f"{LOSS}.perceptual_weight=0", "data.batch_size=2", "data.num_workers=0"]
    given += ["training.warmup_steps=0", "training.logger=csv", "model.params.image_size=32"]
    assert cli.main(["retrofit", "--preset", preset, *given, *words]) == 0
    return seen[0]


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def exported(tmp_path):
    file = tmp_path / "back.pt"
    words = ["--ckpt", str(tmp_path / "run"), "--format", "host", "-o", str(file)]
    assert cli.main(["export", *words]) == 0
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [16, pytest.param(8, marks=EXTENDED)])
def test_llamagen(tmp_path, monkeypatch, checkout, pictures, factor):
    monkeypatch.syspath_prepend(str(checkout))
    from tokenizer.tokenizer_image import vq_model

    torch.manual_seed(0)
    old = getattr(vq_model, f"VQ_{factor}")(codebook_size=16384, codebook_embed_dim=8).eval()
    state = old.state_dict()
    assert state.keys() >= PUBLISHED_KEYS
    assert state["quantize.embedding.weight"].shape == (16384, 8)
    file = tmp_path / f"vq_ds{factor}_c2i.pt"
    torch.save({"model": state}, file)  # no discriminator, no optimizer
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "tokenizer"]:
        del sys.modules[name]
    words = ["--repo", str(checkout)]
    name = f"llamagen-vq{factor}"
    images = retrofit(monkeypatch, tmp_path, name, file, pictures, *words)
    with torch.no_grad():
        assert torch.equal(images, old(IMAGES)[0])
    back = exported(tmp_path)  # the run knows where the checkout is
    assert back.keys() == state.keys()
    before = {key: value.clone() for key, value in state.items()}
    old.load_state_dict(back)  # strictly, into the original class
    for key in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.weight"):
        assert not torch.equal(back[key], before[key]), key
    config = load_checkpoint(tmp_path / "run").config
    found = encode(build_host(config).eval(), IMAGES)
    assert found.grid == (32 // factor, 32 // factor)
    assert torch.allclose(found.codes.norm(dim=-1), torch.ones(()), atol=1e-5)


@pytest.mark.slow
def test_a_folder_of_diffusers(tmp_path, monkeypatch, pictures):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    old = diffusers.VQModel(
        block_out_channels=(32,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
        vq_embed_dim=4,
    ).eval()
    old.save_pretrained(tmp_path / "vqvae")
    images = retrofit(monkeypatch, tmp_path, "diffusers-vq", tmp_path / "vqvae", pictures)
    with torch.no_grad():
        assert torch.equal(images, old(IMAGES).sample)
    back = exported(tmp_path)
    before = old.encoder.conv_in.weight.clone()
    old.load_state_dict(back)
    assert not torch.equal(old.encoder.conv_in.weight, before)


@pytest.mark.slow
def test_a_missing_checkout_is_named(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    given = ["--ckpt", str(tmp_path / "a.pt"), "-o", str(tmp_path / "o"), "--max-steps", "1"]
    given += ["data.train.target=scenes"]
    for words, message in (
        ([], "It is part of https://github.com/FoundationVision/LlamaGen: clone it, and give --re"),
        (["--repo", str(tmp_path / "empty")], "and was not found in"),
        (["--repo", str(tmp_path / "nothing")], "no folder"),
    ):
        assert cli.main(["retrofit", "--preset", "llamagen-vq16", *given, *words]) == 2
        assert message in capsys.readouterr().err
    words = ["--preset", "ldm-vq-f4", "--repo", str(tmp_path)]
    assert cli.main(["retrofit", *given, *words]) == 2
    assert "ldm-vq-f4 needs no checkout" in capsys.readouterr().err
    assert cli.main(["retrofit", *given, "--preset", "diffusers-vq"]) == 2
    assert "--preset diffusers-vq reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("codes.width=4", "width is 4 for this tokenizer, but 8 in the VQModel"),
        ("codes.factor=32", "factor is 32 for this tokenizer, but 16"),
        ("codes.count=5", "count is 5 for this tokenizer, but 16384"),
        ("codes.widht=4", "no key 'widht'"),
        ("arguments.size=3", "unexpected keyword argument 'size'"),
    ],
)
def test_other_codes_than_the_published_ones_are_refused(checkout, word, message):
    words = [f"model.params.{word}", f"model.params.path={checkout}", f"{LOSS}.perceptual_weight=0"]
    with pytest.raises(ConfigError, match=message):
        build_host(read_config([presets()["llamagen-vq16"]], words))


def test_the_files_name_the_published_sizes():
    for name, factor in (("llamagen-vq16", 16), ("llamagen-vq8", 8)):
        params = OmegaConf.load(presets()[name]).model.params
        codes = {"count": 16384, "width": 8, "factor": factor, "unit_length": True}
        assert json.loads(json.dumps(OmegaConf.to_container(params.codes))) == codes
        assert params.image_size // factor == {16: 16, 8: 32}[factor]  # the grid


@pytest.mark.parametrize(("text", "message"), [
    ("[1]", r"config\.json: expected the arguments of a model, which --preset diffusers-vq reads"),
    ("{", r"config\.json: not readable as JSON"),
    (None, r"config\.json cannot be read: No such file"),
])  # fmt: skip
def test_a_folder_of_diffusers_without_its_config(tmp_path, capsys, text, message):
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    words = ["--ckpt", str(tmp_path), "-o", str(tmp_path / "run")]
    assert cli.main(["retrofit", "--preset", "diffusers-vq", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
