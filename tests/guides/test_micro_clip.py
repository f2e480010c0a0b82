"""The embedded weights and the script that makes them."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.guides import micro_clip as micro
from lgvq_plugin.guides.micro_clip import FOLDER, MicroCLIPGuide, read_weights
from lgvq_plugin.guides.open_clip import OpenCLIPGuide
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training import micro_clip as script

TINY = ["--steps", "2", "--batch", "4", "--scenes", "8", "--held_out", "4"]


@pytest.fixture(scope="module")
def guide() -> MicroCLIPGuide:
    return MicroCLIPGuide()


@pytest.fixture(scope="module")
def about() -> dict:
    return json.loads((FOLDER / "about.json").read_text())


def test_the_package_data_is_small_and_the_trained_one(about):
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2 * 1024**2
    weights = (FOLDER / "weights.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == about["sha256"]
    assert about["config"] == micro.CONFIG
    recalls = [about["retrieval"][f"{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
    assert min(recalls) > 10 * about["retrieval"]["chance"]


def test_it_is_trained_by_the_default_plan(about):
    defaults = script.asdict(script.Plan())
    assert {key: about[key] for key in defaults} == defaults


def test_the_words_of_the_scenes_are_stored_and_the_rest_is_seeded(guide, about):
    stored = load_file(FOLDER / "weights.safetensors")
    rows = stored["token_embedding.rows"].long()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    used = {token for sample in range(40) for token in tokens_of(tokenizer, sample)}
    assert used <= set(rows.tolist())
    assert torch.equal(guide.vocabulary[rows], stored["token_embedding.weight"].float())
    others = torch.ones(len(guide.vocabulary), dtype=torch.bool)
    others[rows] = False
    # The documented rule, in NumPy: uniform, unit variance, times the trained rows' spread.
    shape = (49408, guide.token_dim)
    draws = (2 * np.random.RandomState(about["seed"]).random_sample(shape) - 1) * np.sqrt(3)
    expected = torch.from_numpy(draws).float() * stored["token_embedding.scale"]
    assert torch.equal(guide.vocabulary[others], expected[others])
    spread = guide.vocabulary[others].std() / guide.vocabulary[rows].std()
    assert 0.9 < spread < 1.1


def tokens_of(tokenizer, index: int) -> list[int]:
    return tokenizer(Scenes(length=40)[index]["captions"]).unique().tolist()


@pytest.mark.slow
def test_it_is_an_open_clip_model(guide, about, tmp_path):
    """open_clip itself, given the config and the weights, computes the same sentence."""
    network = open_clip.CustomTextCLIP(**about["config"]).eval()
    network.text.load_state_dict(micro.unpack(*read_weights(FOLDER)).state_dict())
    captions = ["two red circles above a striped blue star", "", "a giraffe"]
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=32)(captions)
    with torch.no_grad():
        expected = network.encode_text(ids)
    assert torch.allclose(guide.encode(captions).sentence, expected, atol=1e-5)
    # And by the ordinary guide, from a folder as open_clip saves models.
    config = {"model_cfg": {**about["config"], "custom_text": True}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    same = OpenCLIPGuide(f"local-dir:{tmp_path}").encode(captions)
    assert torch.equal(same.sentence, guide.encode(captions).sentence)


def test_it_understands_scenes(guide):
    """A caption is nearer to its paraphrase than to the same words about other things."""
    said = [
        "a red circle to the left of a blue square",
        "a picture with a red circle left of a blue square",
        "a green star to the left of a pink heart",
        "a large black ring on a white background",
    ]
    sentence = torch.nn.functional.normalize(guide.encode(said).sentence, dim=-1)
    near = sentence @ sentence.T
    assert near[0, 1] > near[0, 2] + 0.1
    assert near[0, 1] > near[0, 3] + 0.1


def test_captions_of_other_worlds_stay_apart(guide, shared):
    lines = (shared / "emoji_noto128" / "captions.jsonl").read_text().splitlines()[:400]
    captions = sorted({json.loads(line)["name"] for line in lines})
    sentence = torch.nn.functional.normalize(guide.encode(captions).sentence, dim=-1)
    near = sentence @ sentence.T - 2 * torch.eye(len(captions))
    assert sentence.isfinite().all()
    assert near.max() < 0.9999
    assert near[near > -1.5].mean() < 0.95  # close together, but apart


@pytest.mark.slow
def test_training_again_gives_the_same_file(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for name in ("first", "second"):
        assert script.main([*TINY, "-o", str(tmp_path / name)]) == 0
    first, second = (tmp_path / n / "weights.safetensors" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(torch.rand(2), expected)
    script.main([*TINY, "--seed", "1", "-o", str(tmp_path / "other")])
    assert first.read_bytes() != (tmp_path / "other" / "weights.safetensors").read_bytes()
    weights, seed = read_weights(tmp_path / "first")
    assert seed == 0
    text = micro.unpack(weights, seed)
    assert text.token_embedding.weight.isfinite().all()


@pytest.mark.slow
def test_training_moves_only_the_rows_of_its_words(tmp_path, monkeypatch):
    kept = {}
    save = MicroCLIPGuide.save

    def spy(network, touched, folder, facts):
        kept.update(rows=network.text.token_embedding.weight.detach().clone(), touched=touched)
        save(network, touched, folder, facts)

    monkeypatch.setattr(MicroCLIPGuide, "save", staticmethod(spy))
    script.main([*TINY, "-o", str(tmp_path)])
    moved = (kept["rows"] != micro.START_SCALE * micro.seeded_rows(0)).any(dim=1)
    assert moved.any()
    joint = MicroCLIPGuide.new_tokenizer().encode("..")  # between two captions, no word
    assert set(moved.nonzero().flatten().tolist()) <= {*kept["touched"].tolist(), *joint}


def test_wrong_input(tmp_path):
    with pytest.raises(ConfigError, match="--steps must be positive, got 0"):
        script.main(["--steps", "0", "-o", str(tmp_path)])


def test_broken_weights_are_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"about\.json.*install"):
        read_weights(tmp_path)
    (tmp_path / "about.json").write_text((FOLDER / "about.json").read_text())
    (tmp_path / "weights.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match="sha256 differs"):
        read_weights(tmp_path)
