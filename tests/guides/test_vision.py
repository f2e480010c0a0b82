"""Image guides: equal to the tower's own preprocessing and layers, frozen, and clear when wrong."""

import copy
import json
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from torch import nn

from lgvq_plugin.guides.base import AbstractImageGuide, build_guide, build_image_guide
from lgvq_plugin.sockets import ConfigError

SIZE = 64
CONFIGS = {
    "timm": {"use": "timm", "model": "vit_tiny_patch16_224", "image_size": SIZE},
    "timm resnet": {"use": "timm", "model": "resnet10t", "image_size": SIZE},
    "torchvision": {"use": "torchvision", "model": "squeezenet1_1", "image_size": SIZE},
    "open_clip": {"use": "open_clip_vision", "model": "tiny-test", "image_size": SIZE},
    "huggingface": {"use": "huggingface_vision", "model": "(a folder)"},
}


@pytest.fixture(scope="session", autouse=True)
def _tiny_clip(tmp_path_factory):
    """An open_clip model of two layers, `tiny-test`."""
    import open_clip

    vision = {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    path = tmp_path_factory.mktemp("open_clip") / "tiny-test.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """A DINOv2 of two layers with random weights, and its image processor, in a folder."""
    transformers = pytest.importorskip("transformers", reason="extra [hf] is not installed")
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.Dinov2Model(config).save_pretrained(folder)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    transformers.ViTImageProcessor(
        size={"height": 28, "width": 28}, image_mean=mean, image_std=std
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(request):
    """How to build the tower that a test names, with random weights."""
    found = CONFIGS[request.param] | {"pretrained": False}
    if request.param == "huggingface":
        found |= {"model": str(request.getfixturevalue("dinov2")), "pretrained": True}
    return found


@pytest.fixture(scope="module")
def guide(config):
    return build_image_guide(config)


every = pytest.mark.parametrize("config", [*CONFIGS], indirect=True)


def photo(height=96, width=96, seed=0):
    """A smooth random image in [-1, 1], as a host has it, and the same as PIL's."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pixels / 127.5 - 1, image


def same(one, other):
    return one.grid == other.grid and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("patches", "summary")
    )


@every
def test_shapes(guide):
    images = torch.cat([photo(seed=seed)[0] for seed in range(3)])
    features = guide.encode(images)
    height, width = features.grid
    assert features.patches.shape == (3, height * width, guide.feature_dim)
    assert features.summary.shape == (3, guide.feature_dim)
    assert features.patches.dtype == features.summary.dtype == torch.float32
    assert features.patches.isfinite().all()
    assert (torch.cdist(features.summary, features.summary) + torch.eye(3) > 1e-4).all()


@every
def test_it_is_frozen_and_no_module(guide):
    assert isinstance(guide, AbstractImageGuide)
    assert not isinstance(guide, nn.Module)
    images = photo()[0].requires_grad_()
    before = {key: value.clone() for key, value in guide.weights().items()}
    features = guide.encode(images)
    assert not features.patches.requires_grad
    assert not features.summary.requires_grad
    assert same(features, guide.encode(images))  # no dropout, no running statistics
    after = guide.weights()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@every
def test_autocast_does_not_reach_it(guide):
    images = photo()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = guide.encode(images)
    assert same(inside, guide.encode(images))


@pytest.mark.slow
@every
def test_copies_share_it_and_pickles_build_it_again(guide, config):
    assert copy.deepcopy(guide) is guide
    other = pickle.loads(pickle.dumps(guide))
    assert other is not guide
    assert same(other.encode(photo()[0]), guide.encode(photo()[0]))
    assert other.fingerprint == guide.fingerprint
    assert build_image_guide({**config, "layer": 0}).fingerprint != guide.fingerprint


@every
def test_the_global_random_state_is_kept(config):
    before = torch.get_rng_state()
    build_image_guide(config).encode(photo()[0])
    assert torch.equal(torch.get_rng_state(), before)


# -- against the towers' own code -----------------------------------------------------------------


def test_images_are_read_as_by_open_clip():
    """Its transform of the PIL image, bicubic and normalized; rounded to 8 bits on the way."""
    import open_clip

    guide = build_image_guide(CONFIGS["open_clip"] | {"pretrained": False})
    transform = open_clip.image_transform(SIZE, is_train=False)
    for seed in range(2):
        images, picture = photo(seed=seed)
        theirs = transform(picture)[None]
        error = (guide._prepare(images) - theirs).abs()
        assert error.max() < 1.2 / 255 / 0.26  # a gray level, divided by the deviation


def test_a_rectangle_is_read_whole():
    """Position for position, not cropped to its center."""
    guide = build_image_guide(CONFIGS["timm"] | {"pretrained": False})
    images, picture = photo(height=48, width=160)
    squeezed = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(squeezed)).permute(2, 0, 1) / 255
    mean, std = guide.weights()["mean"], guide.weights()["std"]
    found = guide._prepare(images)[0] * std + mean
    assert (found - expected).abs().max() < 1.2 / 255


def test_features_of_open_clip_are_those_of_its_images():
    """Its own embedding is the projected class token of the last layer."""
    import open_clip

    guide = build_image_guide(CONFIGS["open_clip"] | {"pretrained": False, "seed": 5})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        options = {"force_custom_text": True, "force_image_size": SIZE}
        model = open_clip.create_model("tiny-test", **options).eval()
    images, _ = photo(SIZE, SIZE)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in
                 (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))  # fmt: skip
    with torch.no_grad():
        expected = model.encode_image(((images + 1) / 2 - mean) / std)
        found = guide.encode(images).summary @ model.visual.proj
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [None, 3, -2])
def test_layers_of_timm(layer):
    guide = build_image_guide(CONFIGS["timm"] | {"pretrained": False, "layer": layer, "seed": 1})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=0).eval()
    images, _ = photo(SIZE, SIZE)
    features = guide.encode(images)
    states = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *call, i=i: states.update({i: call[2]}))
    with torch.no_grad():
        last = model.forward_features(images)  # mean and deviation of this ViT are 0.5
        expected = model.norm(states[{None: 11, 3: 3, -2: 10}[layer]])
    assert layer is not None or torch.equal(last, expected)
    assert torch.allclose(features.summary, expected[:, 0], atol=1e-5)
    assert torch.allclose(features.patches, expected[:, 1:], atol=1e-5)
    assert features.grid == (4, 4)


@pytest.mark.slow
def test_registers_are_no_patches():
    model = {"use": "timm", "model": "vit_small_patch14_reg4_dinov2", "image_size": 28}
    features = build_image_guide(model | {"pretrained": False}).encode(photo()[0])
    assert features.grid == (2, 2)
    assert features.patches.shape[1] == 4


def test_a_tower_without_class_token_gives_the_mean_patch():
    features = build_image_guide(CONFIGS["timm resnet"] | {"pretrained": False}).encode(photo()[0])
    assert torch.allclose(features.summary, features.patches.mean(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layer"), [("squeezenet1_1", None), ("squeezenet1_1", 7), ("resnet18", 2)]
)
def test_layers_of_torchvision(tmp_path, model, layer):
    """Of its own model, with the preprocessing that its weights name; read from a checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = torchvision.models.get_model(model).eval()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    given = {"use": "torchvision", "model": model, "image_size": SIZE, "layer": layer}
    guide = build_image_guide({**given, "checkpoint": str(path)})
    module = theirs.layer3 if model == "resnet18" else theirs.features[12 if layer is None else 7]
    states = []
    module.register_forward_hook(lambda *call: states.append(call[2]))
    facts = torchvision.models.get_model_weights(model).DEFAULT.transforms()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (facts.mean, facts.std))
    images, _ = photo(SIZE, SIZE)
    features = guide.encode(images)
    with torch.no_grad():
        theirs(((images + 1) / 2 - mean) / std)
    assert features.grid == tuple(states[0].shape[2:])
    assert torch.allclose(features.patches, states[0].flatten(2).mT, atol=1e-5)
    assert torch.allclose(features.summary, states[0].mean(dim=(2, 3)), atol=1e-5)


def test_named_weights_of_torchvision_come_from_the_cache(tmp_path):
    """The file that torchvision would have downloaded, in `cache_dir`; nothing is unpickled."""
    facts = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = torchvision.models.squeezenet1_1()
    given = {**CONFIGS["torchvision"], "pretrained": facts.name, "cache_dir": str(tmp_path)}
    torch.save(theirs.state_dict(), tmp_path / facts.url.rpartition("/")[2])
    guide = build_image_guide(given)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in _own(guide).items())
    torch.save({"features": theirs}, tmp_path / facts.url.rpartition("/")[2])  # a module, pickled
    with pytest.raises(ConfigError, match=r"cannot load https.*Weights only load failed"):
        build_image_guide(given)


def test_real_weights_of_torchvision(shared, tmp_path):
    """Photos of one scene at two contrasts are closer in its features than two scenes are."""
    found = np.load(shared / "lpips_squeeze_real" / "squeezenet1_1_features_fp32.npz")
    state = {key: torch.from_numpy(found[key]) for key in found}
    torch.save(state, tmp_path / "squeezenet.pth")
    given = {"use": "torchvision", "model": "squeezenet1_1", "image_size": SIZE}
    guide = build_image_guide({**given, "checkpoint": str(tmp_path / "squeezenet.pth")})
    one, other = photo(SIZE, SIZE)[0], photo(SIZE, SIZE, seed=1)[0]
    features = guide.encode(torch.cat([one, 0.7 * one, other])).patches.flatten(1)
    alike = nn.functional.cosine_similarity(features[:1], features[1:])
    assert alike[0] > 0.9 > 0.8 > alike[1]
    assert all(torch.equal(v, state[k]) for k, v in _own(guide).items())


def _own(guide):
    """The tensors of SqueezeNet's features, under torchvision's names."""
    skip = ("mean", "std")
    shift = {k: f"features.{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}"
             for k in guide.weights() if k not in skip}  # fmt: skip
    return {new: guide.weights()[old] for old, new in shift.items()}


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_layers_of_transformers(dinov2, layer):
    transformers = pytest.importorskip("transformers", reason="extra [hf] is not installed")
    guide = build_image_guide({"use": "huggingface_vision", "model": str(dinov2), "layer": layer})
    images, _ = photo()
    processor = transformers.ViTImageProcessor.from_pretrained(dinov2)
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    pixels = ((images + 1) / 2 - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(
        processor.image_std
    ).view(3, 1, 1)
    pixels = nn.functional.interpolate(pixels, size=28, mode="bicubic", antialias=True)
    with torch.no_grad():
        result = model(pixel_values=pixels, output_hidden_states=True)
    states = result.last_hidden_state if layer is None else result.hidden_states[layer + 1]
    features = guide.encode(images)
    assert features.grid == (4, 4)
    assert torch.allclose(features.summary, states[:, 0], atol=2e-2)  # clamped after the resize
    assert torch.allclose(features.patches, states[:, 1:], atol=2e-2)


def test_another_size_of_transformers(dinov2):
    guide = {"use": "huggingface_vision", "model": str(dinov2), "image_size": 56}
    assert build_image_guide(guide).encode(photo()[0]).grid == (8, 8)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_timm_with_a_classifier(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE).eval()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    guide = build_image_guide(CONFIGS["timm"] | {"checkpoint": str(path)})
    images, _ = photo(SIZE, SIZE)
    with torch.no_grad():
        expected = model.forward_features(images)[:, 0]
    assert torch.allclose(guide.encode(images).summary, expected, atol=1e-5)


def test_a_checkpoint_of_open_clip(tmp_path):
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model("tiny-test")
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    given = {"use": "open_clip_vision", "model": "tiny-test"}
    found = build_image_guide(given | {"checkpoint": str(path)}).weights()["conv1.weight"]
    assert torch.equal(found, model.visual.conv1.weight)


def test_a_checkpoint_of_transformers(dinov2):
    given = {"use": "huggingface_vision", "checkpoint": str(dinov2)}
    named = build_image_guide({"use": "huggingface_vision", "model": str(dinov2)})
    images = photo()[0]
    assert same(build_image_guide(given).encode(images), named.encode(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_the_seed_of_random_weights(name):
    images = photo()[0]
    one, again, other = (
        build_image_guide(CONFIGS[name] | {"pretrained": False, "seed": seed}).encode(images)
        for seed in (0, 0, 1)
    )
    assert same(one, again)
    assert not torch.allclose(one.patches, other.patches)


OFFLINE = [
    {"use": "timm"},
    {"use": "timm", "model": "resnet18"},
    {"use": "torchvision"},
    {"use": "open_clip_vision"},
    {"use": "huggingface_vision"},
]


@pytest.mark.parametrize("given", OFFLINE, ids=str)
def test_weights_that_cannot_be_downloaded(given, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        build_image_guide(given | {"cache_dir": str(tmp_path)})
    message = str(raised.value)
    assert message.startswith("guides.vision: no image weights. Sought: ")
    assert str(tmp_path) in message
    assert "checkpoint: PATH" in message


# -- wrong input ----------------------------------------------------------------------------------

TINY = CONFIGS["timm resnet"] | {"pretrained": False}
SQUEEZE = CONFIGS["torchvision"] | {"pretrained": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"guides\.vision\.use: name a guide, such as \{use: timm\}"),
        ("timm", "expected a mapping"),
        ({"use": "tim"}, "did you mean 'timm'"),
        ({"use": "micro_clip"}, "'micro_clip' is a text guide; it belongs under lgvq.guide"),
        ({**TINY, "modle": "x"}, r"unknown key lgvq\.guides\.vision\.modle.*did you mean 'model'"),
        ({**TINY, "model": "resnet19"}, "no timm model 'resnet19'; did you mean 'resnet1"),
        ({"use": "timm", "model": "resnet18.nothing"}, "no weights of 'resnet18.nothing'.*a1_in1k"),
        ({**TINY, "layer": 5}, r"layer: 'resnet10t' has 5 layers, so expected -5 to 4.*got 5"),
        ({**TINY, "layer": "last"}, "got 'last'"),
        ({**TINY, "checkpoint": "no.pt"}, "checkpoint: no file 'no.pt'"),
        ({**CONFIGS["timm"], "pretrained": False, "image_size": 8}, "cannot"),
        ({"use": "torchvision", "model": "resnet19"}, "no torchvision model 'resnet19'; did you"),
        (
            {**CONFIGS["torchvision"], "pretrained": "IMAGENET1K_V3"},
            "no weights 'IMAGENET1K_V3' of 'squeezenet1_1'.*IMAGENET1K_V1",
        ),
        ({**SQUEEZE, "layer": 13}, r"'squeezenet1_1' has 13 layers, so expected -13 to 12"),
        ({"use": "torchvision", "model": "vit_b_16", "pretrained": False}, "neither a ResNet nor"),
        ({"use": "open_clip_vision", "model": "ViT-S-31"}, "no open_clip model 'ViT-S-31'"),
        ({"use": "open_clip_vision", "model": "ViT-H-14"}, "name the weights .* by their tag"),
        ({"use": "open_clip_vision", "pretrained": "opena"}, "no tag of ViT-B-32.*'openai'"),
        ({"use": "open_clip_vision", "checkpoint": "no.pt"}, "no file 'no.pt'"),
        ({"use": "huggingface_vision", "checkpoint": "no"}, "no folder 'no'"),
    ],
)
def test_wrong_blocks(given, message):
    with pytest.raises(ConfigError, match=message):
        build_image_guide(given)


def test_a_checkpoint_of_another_model_of_torchvision(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth does not have the weights of this model"):
        build_image_guide({**CONFIGS["torchvision"], "checkpoint": str(tmp_path / "w.pth")})


def test_an_image_guide_is_no_text_guide():
    message = r"lgvq\.guide\.use: 'timm' is an image guide; it belongs under lgvq\.guides\.vision"
    with pytest.raises(ConfigError, match=message):
        build_guide({"use": "timm"})


def test_a_text_encoder_of_transformers_is_refused(bert):
    with pytest.raises(ConfigError, match=r"guides\.vision: transformers cannot load|no image enc"):
        build_image_guide({"use": "huggingface_vision", "model": str(bert)})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"expected images \(B, 3, H, W\).*got \(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (255 * torch.rand(2, 3, 8, 8), r"expected images in \[-1, 1\], got .* to 25"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(ConfigError, match=message):
        build_image_guide(TINY).encode(images)


def test_images_from_0_to_1_are_told_once(caplog):
    guide = build_image_guide(TINY)
    for _ in range(2):
        guide.encode(torch.rand(2, 3, 8, 8))
    said = [each.getMessage() for each in caplog.records if "expects [-1, 1]" in each.getMessage()]
    assert len(said) == 1
