"""Alignment with an image tower: its arithmetic, and training with and without captions."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lgvq_plugin import attach
from lgvq_plugin.cli import main
from lgvq_plugin.config import VisionAlignmentConfig, parse, to_block
from lgvq_plugin.functional import cosine_margin_loss, distance_matrix_loss, resize_features
from lgvq_plugin.guides.base import AbstractImageGuide
from lgvq_plugin.hosts.vqvae import VQVAE, VectorQuantizer
from lgvq_plugin.loss import in_words
from lgvq_plugin.objectives import VisionAlignment, without_text
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.config import read_config
from lgvq_plugin.training.run import train
from lgvq_plugin.types import Codes, CodeView, ImageFeatures

OFF = {name: {"weight": 0} for name in ("global_semantic", "masked_text", "relationship")}
TIMM = {"use": "timm", "model": "resnet10t", "pretrained": False, "image_size": 32}
BLOCK = {"guides": {"vision": TIMM}, "gradient_ratio": None, "stop": None}
ALONE = BLOCK | {"objectives": {**OFF, "vision_alignment": {"weight": 1}}, "every": 1}
BOTH = BLOCK | {"guide": {"use": "micro_clip"}, "objectives": {"vision_alignment": {"weight": 1}}}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- the equations --------------------------------------------------------------------------------


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def expected_cosine_margin(codes, features, margin):
    """Eq. 4 of VA-VAE in float64, position by position."""
    terms = [
        max(0.0, 1 - margin - cosine(z, f))
        for image, target in zip(codes, features, strict=True)
        for z, f in zip(image, target, strict=True)
    ]
    return sum(terms) / len(terms)


def expected_distance(codes, features, margin):
    """Eq. 5 of VA-VAE in float64, pair by pair."""
    terms = [
        max(0.0, abs(cosine(z, w) - cosine(f, g)) - margin)
        for image, target in zip(codes, features, strict=True)
        for z, f in zip(image, target, strict=True)
        for w, g in zip(image, target, strict=True)
    ]
    return sum(terms) / len(terms)


LOSSES = {
    "cosine_margin": (cosine_margin_loss, expected_cosine_margin),
    "distance": (distance_matrix_loss, expected_distance),
}


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5, 1.9])
@pytest.mark.parametrize("name", LOSSES)
def test_the_equations(name, margin):
    loss, expected = LOSSES[name]
    codes, features = draw(3, 6, 4), draw(3, 6, 4, seed=1)
    value = expected(codes.double().numpy(), features.double().numpy(), margin)
    assert loss(codes, features, margin=margin).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences_of_the_reference(name):
    loss, expected = LOSSES[name]
    codes, features = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=1)
    loss(codes, features, margin=0.1).backward()
    start, target, step = codes.detach().double().numpy(), features.double().numpy(), 1e-6
    for at in np.ndindex(*start.shape):
        up, down = start.copy(), start.copy()
        up[at] += step
        down[at] -= step
        slope = (expected(up, target, 0.1) - expected(down, target, 0.1)) / (2 * step)
        assert codes.grad[at].item() == pytest.approx(slope, abs=1e-5), at


@pytest.mark.parametrize("name", LOSSES)
def test_corners_of_the_equations(name):
    loss, _ = LOSSES[name]
    for shape in ((0, 3, 4), (2, 3, 4)):
        codes, features = torch.zeros(shape).requires_grad_(), torch.zeros(shape).requires_grad_()
        value = loss(codes, features, margin=0.25)
        value.backward()
        assert value.isfinite()
        assert codes.grad.isfinite().all()
        assert features.grad is None
    codes, features = draw(2, 5, 4), draw(2, 5, 4, seed=1)
    assert loss(3 * codes, 0.1 * features, margin=0.1).item() == pytest.approx(
        loss(codes, features, margin=0.1).item(), abs=1e-6
    )
    assert loss(features, features, margin=1e-4).item() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(codes, features, margin=0.1)
    assert torch.equal(inside, loss(codes, features, margin=0.1))


@pytest.mark.parametrize("new", [(3, 5), (8, 8), (16, 4), (7, 7)])
def test_features_are_resized_as_images(new):
    """Pillow's bilinear filter, which averages where an image gets smaller, in float."""
    features = draw(1, 64, 2)
    found = resize_features(features, (8, 8), new)
    for channel in range(2):
        image = Image.fromarray(features[0, :, channel].view(8, 8).numpy(), mode="F")
        expected = np.array(image.resize(new[::-1], Image.Resampling.BILINEAR))
        assert np.allclose(found[0, :, channel].view(new), expected, atol=1e-5)


# -- the objective --------------------------------------------------------------------------------


class Tower(AbstractImageGuide):
    """A user's own image guide: patches of 4 x 4 pixels, flattened."""

    def __init__(self, scale: float = 1.0):
        self.scale, self.feature_dim, self.calls = scale, 48, 0

    def encode(self, images):
        self.calls += 1
        size = tuple(side // 4 for side in images.shape[2:])
        patches = nn.functional.unfold(images.float(), 4, stride=4).mT * self.scale
        return ImageFeatures(patches, size, patches.mean(dim=1))

    def to(self, device):
        return self

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def config(self):
        return {"scale": self.scale}

    def weights(self):
        return {}


@pytest.mark.parametrize("source", ["codes", "code_vit"])
@pytest.mark.parametrize("target", ["patch", "class"])
@pytest.mark.parametrize("form", ["va_vae", "cosine_margin", "distance"])
def test_forms_targets_and_sources(form, target, source):
    tower, code_dim, view_dim = Tower(), 6, 5
    options = {"form": form, "target": target, "source": source}
    config = VisionAlignmentConfig(weight=1, cosine_margin=0.3, distance_margin=0.1, **options)
    objective = VisionAlignment(
        config, guide=None, vision=tower, code_dim=code_dim, view_dim=view_dim
    )
    images = draw(3, 3, 16, 16)
    codes, tokens = draw(3, 4, code_dim, seed=1), draw(3, 4, view_dim, seed=2)
    codes.requires_grad_()
    tokens.requires_grad_()
    features = tower.encode(images)
    view = CodeView(Codes(codes, None, (2, 2)), tokens[:, 0], tokens, images, vision=features)
    term = objective(view, without_text([""] * 3, torch.Generator(), torch.device("cpu")))
    read = tokens if source == "code_vit" else codes
    projected = objective.project(read).detach().double().numpy()
    if target == "patch":  # 4 x 4 patches to 2 x 2 codes
        goal = resize_features(features.patches, (4, 4), (2, 2)).double().numpy()
    else:
        projected, goal = projected.mean(axis=1)[None], features.summary.double().numpy()[None]
    expected = 0.0
    if form != "distance":
        expected += expected_cosine_margin(projected, goal, 0.3)
    if form != "cosine_margin":
        expected += expected_distance(projected, goal, 0.1)
    assert term.value.item() == pytest.approx(expected, abs=1e-5)
    pairs = zip(projected.reshape(-1, 48), goal.reshape(-1, 48), strict=True)
    logged = np.mean([cosine(z, f) for z, f in pairs])
    assert term.log["vision_cosine"].item() == pytest.approx(logged, abs=1e-5)
    term.value.backward()
    assert read.grad.abs().sum() > 0
    assert (codes if source == "code_vit" else tokens).grad is None
    assert objective.project.weight.grad.abs().sum() > 0


# -- attached to a model --------------------------------------------------------------------------


def tokenizer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), VectorQuantizer(16, 8))


IMAGES = draw(2, 3, 16, 16).clamp(-1, 1)


@pytest.mark.parametrize("captions", [None, [], [None, None], ["a red square", None]], ids=str)
def test_without_captions_there_is_no_text_guide(captions, monkeypatch):
    """The default text guide is CLIP, which cannot be downloaded here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tokenizer()
    handle = attach(model, "1", **ALONE)
    for _ in range(7):  # captions are asked for after five batches without any
        model(IMAGES)
        loss, log = handle.loss(captions, images=IMAGES)
    loss.backward()
    assert log["train/lgvq/vision_alignment"] > 0
    assert handle.heads.guide is None
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())
    assert model[0].weight.grad.abs().sum() > 0
    status = handle.status()
    assert status["guide"] is None
    assert status["vision_guide"]["use"] == "TimmGuide"
    assert "image guide TimmGuide" in in_words(status)
    assert " guide None" not in in_words(status)


def test_it_needs_no_code_vit_unless_that_is_the_source():
    assert attach(tokenizer(), "1", **ALONE).heads.code_vit is None
    objectives = {**OFF, "vision_alignment": {"weight": 1, "source": "code_vit"}}
    model = tokenizer()
    handle = attach(model, "1", **ALONE | {"objectives": objectives})
    model(IMAGES)
    handle.loss(None, images=IMAGES)[0].backward()
    assert handle.heads.code_vit.in_proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_text_and_vision_together():
    """The terms and the heads of text are those of text alone."""
    model = tokenizer()
    values = {}
    for name, block in (("both", BOTH), ("text", BOTH | {"objectives": {}, "guides": {}})):
        handle = attach(model, "1", **block)
        model.eval()
        model(IMAGES)
        values[name] = handle.loss(["a red square", "two blue circles"], images=IMAGES)
        handle.detach()
    (total, log), (of_text, log_of_text) = values["both"], values["text"]
    shared = [key for key in log_of_text if not key.endswith("total")]
    assert all(torch.equal(log[key], log_of_text[key]) for key in shared)
    expected = of_text + log["train/lgvq/vision_alignment"]
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_tower_is_in_no_state_and_no_copy():
    model = tokenizer()
    handle = attach(model, "1", **BOTH)
    tower = handle.heads.vision
    owned = {id(tensor) for tensor in tower.weights().values()}
    held = [*handle.heads.parameters(), *handle.heads.buffers(), *model.parameters()]
    assert not owned & {id(tensor) for tensor in held}
    assert "vision" not in "".join(handle.heads.state_dict()).replace("vision_alignment", "")
    handle.heads.train()
    assert not tower._network.training
    assert copy.deepcopy(handle.heads).vision is tower


@pytest.mark.parametrize("images", [None, IMAGES[:1]], ids=["none", "one"])
def test_images_are_needed(images):
    model = tokenizer()
    handle = attach(model, "1", **ALONE)
    model(IMAGES)
    with pytest.raises(ConfigError, match=r"vision_alignment reads the 2 images.*images=images"):
        handle.loss(None, images=images)


def test_before_its_start_and_at_weight_0_they_are_not():
    model = tokenizer()
    handle = attach(model, "1", **ALONE, start=3)
    model(IMAGES)
    assert handle.loss(None)[0].item() == 0
    handle.detach()
    handle = attach(model, "1", guide={"use": "micro_clip"}, guides={"vision": TIMM})
    assert handle.heads.vision is None
    model(IMAGES)
    assert handle.loss(["a red square", None])[0].requires_grad


def test_saved_heads_name_the_guides(tmp_path):
    handle = attach(tokenizer(), "1", **ALONE)
    handle.save_pretrained(tmp_path)
    block = OmegaConf.to_container(OmegaConf.load(tmp_path / "lgvq_config.json"))["lgvq"]
    assert parse(block) == handle.heads.config
    other = attach(tokenizer(), "1", **{k: v for k, v in block.items() if k != "quantizer"})
    other.load_pretrained(tmp_path)


# -- the config -----------------------------------------------------------------------------------


def test_guides_text_is_guide():
    given = {"text": {"use": "micro_clip", "max_length": 20}, "vision": TIMM}
    config = parse({"guides": given})
    assert config == parse({"guide": given["text"], "guides": {"vision": TIMM}})
    assert config.guide == given["text"]
    assert parse(to_block(config)) == config


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"guide": {}, "guides": {"text": {}}}, "two names of the text guide, and both are given"),
        ({"guides": {"txt": {}}}, r"unknown key lgvq\.guides\.txt; did you mean 'text'"),
        ({"guides": {"vision": "timm"}}, r"lgvq\.guides\.vision: expected a mapping"),
        ({"guides": ["timm"]}, r"lgvq\.guides: expected a mapping"),
        ({"objectives": {"vision_alignment": {"form": "cosine"}}}, "'va_vae' or 'cosine_margin'"),
        ({"objectives": {"vision_alignment": {"cosine_margin": 2}}}, "expected >= 0 and < 2"),
    ],
)
def test_wrong_keys(block, message):
    with pytest.raises(ConfigError, match=message):
        parse(block)


def test_a_weight_without_a_tower_is_an_error():
    with pytest.raises(ConfigError, match=r"lgvq\.guides\.vision: .* none is given; for instance"):
        attach(tokenizer(), "1", **{**ALONE, "guides": {}})


def test_later_files_lie_over_earlier_ones(tmp_path):
    """Also where they give the text guide its other name; a new tower drops the old one's keys."""
    loss = {"target": "lgvq_plugin.LGVQLoss"}
    below = {"guide": {"use": "micro_clip", "max_length": 9}, "guides": {"vision": TIMM}}
    above = {"text": {"max_length": 12}, "vision": {"use": "huggingface_vision", "model": "x"}}
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    model = {"target": "m.Host", "params": {"lossconfig": loss}}
    OmegaConf.save({"model": model, "lgvq": below}, files[0])
    OmegaConf.save({"lgvq": {"guides": above}}, files[1])
    merged = read_config(files, ["lgvq.guides.text.max_length=15"])
    block = merged.model.params.lossconfig.params.lgvq
    assert block == {
        "guide": {"use": "micro_clip", "max_length": 15},
        "guides": {"vision": above["vision"]},
    }


def test_named_alone_in_the_short_form_it_is_on():
    lossconfig = {"target": "lgvq_plugin.LGVQLoss"}
    config = OmegaConf.create({"model": {"target": "m.H", "params": {"lossconfig": lossconfig}}})
    from lgvq_plugin.training.config import lay_over

    merged = lay_over(config, {"objectives": ["vision_alignment"]})
    objectives = parse(merged.model.params.lossconfig.params.lgvq).objectives
    on = [name for name, own in objectives.items() if own.weight]
    assert on == ["vision_alignment"]


@pytest.fixture
def theirs(install):
    """Another package with an image guide and an objective that reads it and no text."""
    text = Path(__file__).read_text()
    guide = text[text.index("class Tower(") : text.index('@pytest.mark.parametrize("source"')]
    source = (
        "import torch\nfrom torch import nn\nfrom lgvq_plugin import AbstractObjective\n"
        "from lgvq_plugin.guides.base import AbstractImageGuide\n"
        "from lgvq_plugin.types import ImageFeatures, Term\n\n\n" + guide + "class Mine("
        "AbstractObjective):\n    reads = ('vision',)\n    needs_captions = needs_view = False\n"
        "    def __init__(self, config, *, guide, vision, code_dim, view_dim):\n"
        "        super().__init__()\n        self.head = nn.Linear(code_dim, vision.feature_dim)\n"
        "    def forward(self, view, caption):\n"
        "        gap = self.head(view.codes.codes).mean(dim=1) - view.vision.summary\n"
        "        return Term(gap.square().mean())\n"
    )
    install("their_vision", "[lgvq_plugin.guides]\npatches = their_vision:Tower\n", source)


@pytest.mark.parametrize("use", ["their_vision:Tower", "patches"])
@pytest.mark.parametrize("objective", ["vision_alignment", "their_vision:Mine"])
def test_guides_and_objectives_of_other_packages(theirs, use, objective):
    model = tokenizer()
    objectives = {**OFF, objective: {"weight": 1}}
    guides = {"vision": {"use": use, "scale": 0.5}}
    handle = attach(model, "1", objectives=objectives, guides=guides)
    model(IMAGES)
    loss, _ = handle.loss(None, images=IMAGES)
    loss.backward()
    assert handle.heads.vision.calls == 1
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


# -- in a config, with `lgvq train` ---------------------------------------------------------------


def host_config(block):
    base = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    loss = {"target": "lgvq_plugin.LGVQLoss", "params": {"base": base, "lgvq": block}}
    return {"target": "lgvq_plugin.hosts.vqvae.VQVAE", "learning_rate": 1e-3, "params": {
        "channels": 8, "embed_dim": 8, "n_embed": 16, "num_res_blocks": 1, "downsample": 4,
        "lossconfig": loss if block is not None else base,
    }}  # fmt: skip


def training_step(host, batch):
    x = host.get_input(batch, "image")
    made, codebook_loss = host(x)[:2]
    return host.loss(codebook_loss, x, made, 0, 0, split="train")


def test_the_hosts_inputs_are_the_images():
    host = VQVAE(**host_config(ALONE | {"caption_key": "words"})["params"])
    batch = {"image": IMAGES.movedim(1, -1)}  # no captions, whatever their key would be
    seen = []
    host.quantize.register_forward_hook(lambda *call: seen.append(call[2][0].detach()))
    total, log = training_step(host, batch)
    total.backward()
    heads = host.loss.alignment
    features = heads.vision.encode(IMAGES)
    with torch.no_grad():
        goal = resize_features(features.patches, features.grid, (4, 4)).double().numpy()
        project = heads.objectives["vision_alignment"].project
        codes = project(seen[0].flatten(2).mT).double().numpy()
    expected = expected_cosine_margin(codes, goal, 0.5) + expected_distance(codes, goal, 0.25)
    assert log["train/lgvq/vision_alignment"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weight", [None, 0])
def test_at_weight_0_a_step_is_bit_identical(weight):
    """To the bare host, with a tower in the config; and no tower is built."""
    own = {} if weight is None else {"vision_alignment": {"weight": weight}}
    found = {}
    for name, block in (("bare", None), ("ours", BLOCK | {"objectives": {**OFF, **own}})):
        torch.manual_seed(0)
        host = VQVAE(**host_config(block)["params"])
        optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)
        for seed in range(3):
            batch = {"image": draw(2, 16, 16, 3, seed=seed).clamp(-1, 1)}
            loss = training_step(host, batch)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = host.state_dict() | {"drawn": torch.rand(3)}
    assert found["bare"].keys() == found["ours"].keys()
    assert all(torch.equal(value, found["ours"][key]) for key, value in found["bare"].items())


def folder_of_images(folder, count=12):
    folder.mkdir()
    for seed in range(count):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
    return folder


def run_config(block, folder, **training):
    data = {
        name: {"target": "folder", "params": {"root": str(folder), "split": name, "size": 16}}
        for name in ("train", "validation")
    }
    settings = {"max_steps": 7, "val_every": 7, "log_every": 1, "images_every": None}
    return {
        "model": host_config(block),
        "data": {"batch_size": 2, **data},
        "training": settings | {"accelerator": "cpu", "checkpoint_every": 4} | training,
    }


@pytest.mark.slow
def test_lgvq_train_on_a_folder_without_captions(tmp_path, monkeypatch):
    """More steps than the five after which text alone gives up; resumed bit-identically."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = folder_of_images(tmp_path / "images")
    config = run_config(ALONE, folder)
    result = train(config, name="whole", logdir=tmp_path, progress=False)
    rows = (tmp_path / "whole/metrics.csv").read_text()
    assert "train/lgvq/vision_alignment" in rows
    assert "val/lgvq/vision_cosine" in rows
    (path,) = (tmp_path / "whole/checkpoints").glob("last.ckpt")
    keys = torch.load(path, weights_only=False)["state_dict"]
    heads = {key for key in keys if "lgvq" in key}
    assert heads == {
        "loss.lgvq.first_step",
        "loss.lgvq.objectives.vision_alignment.project.weight",
    }
    train(run_config(ALONE, folder, max_steps=4), name="b", logdir=tmp_path, progress=False)
    resumed = train(config, name="b", logdir=tmp_path, progress=False, resume="auto")
    other = resumed.host.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in result.host.state_dict().items())


@pytest.mark.slow
def test_lgvq_train_with_data(tmp_path, monkeypatch, capsys):
    """The command line with a folder of images; its words do the rest."""
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "images", count=20)
    config = run_config({}, tmp_path / "elsewhere", max_steps=1, val_every=1)
    del config["data"]
    OmegaConf.save(OmegaConf.create(config), "config.yaml")
    OmegaConf.save(OmegaConf.create({"lgvq": {"guides": {"vision": TIMM}}}), "tower.yaml")
    words = ["--data", "images", "objectives=[vision_alignment]", "data.train.params.size=16"]
    words += ["data.batch_size=2", "--name", "a", "--no-progress"]
    code = main(["train", "-b", "config.yaml", "tower.yaml", *words])
    assert code == 0, capsys.readouterr().err
    assert "val/lgvq/vision_cosine" in (tmp_path / "logs/a/metrics.csv").read_text()


@pytest.mark.slow
def test_lgvq_train_with_text_still_asks_for_captions(tmp_path):
    folder = folder_of_images(tmp_path / "images")
    with pytest.raises(ConfigError, match="no captions found"):
        train(run_config(BOTH, folder), name="a", logdir=tmp_path, progress=False)
