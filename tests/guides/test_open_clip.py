"""`OpenCLIPGuide` against open_clip's own text path, its sources, and what it says offline."""

import json
import pickle

import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.pretrained import get_pretrained_cfg

from lgvq_plugin.guides import open_clip as ours
from lgvq_plugin.guides.open_clip import OpenCLIPGuide
from lgvq_plugin.sockets import ConfigError

MODEL = "ViT-S-32-alt"  # the smallest of open_clip's: 256 wide
CAPTIONS = [
    "a red circle above a blue square",
    "",
    "circle",
    "two checkerboards, it's 42 unbelievably antidisestablishmentarian words!",
]


@pytest.fixture(scope="module")
def network():
    """open_clip's own model with random weights, not built by the guide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model(MODEL, pretrained=None).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(network.state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def loaded(weights):
    return OpenCLIPGuide(MODEL, weights)


@pytest.fixture
def offline(monkeypatch):
    """A hub that cannot be reached, whatever network this machine has."""

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("lgvq_plugin.hub.urllib.request.urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@torch.no_grad()
def states(network, ids):
    """Token states behind the last norm, by hand; CLIP's text path in its published order."""
    hidden = network.token_embedding(ids) + network.positional_embedding
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    for block in network.transformer.resblocks:
        hidden = block(hidden, attn_mask=mask)
    return network.ln_final(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [30, 77])
def test_features_are_open_clips_own(network, weights, max_length):
    guide = OpenCLIPGuide(MODEL, weights, max_length=max_length)
    features = guide.encode(CAPTIONS)
    ids = open_clip.get_tokenizer(MODEL)(CAPTIONS)
    length = features.token_ids.shape[1]
    assert torch.equal(features.token_ids, ids[:, :length])
    assert not ids[:, length:max_length].any()  # padding
    with torch.no_grad():
        sentence = network.encode_text(ids)
    assert torch.allclose(features.sentence, sentence, atol=1e-5)
    words = features.attention_mask
    expected = states(network, ids)[:, :length]
    assert torch.allclose(features.tokens[words], expected[words], atol=1e-5)
    assert torch.equal(features.vocabulary, network.token_embedding.weight)


@pytest.mark.slow
def test_end_state_projected_is_the_sentence(network, loaded):
    features = loaded.encode(CAPTIONS)
    last = features.attention_mask.sum(dim=1) - 1
    end = features.tokens[torch.arange(len(last)), last]
    assert torch.allclose(end @ network.text_projection, features.sentence, atol=1e-5)


@pytest.mark.slow
def test_a_cut_caption_is_what_open_clip_gives_for_the_cut_ids(network, weights):
    long = "a red circle and " * 20
    features = OpenCLIPGuide(MODEL, weights, max_length=12).encode([long])
    ids = open_clip.get_tokenizer(MODEL)([long])
    ids[:, 11], ids[:, 12:] = 49407, 0
    with torch.no_grad():
        assert torch.allclose(features.sentence, network.encode_text(ids), atol=1e-5)


def test_a_hidden_word_is_the_mean_embedding(network, loaded):
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, 2] = True
    features = loaded.encode(CAPTIONS[:1], token_mask=mask)
    # The reference: overwrite the row of that word, and only it, in open_clip's own model.
    ids = open_clip.get_tokenizer(MODEL)(CAPTIONS[:1])
    row = network.token_embedding.weight.data
    kept = row[ids[0, 2]].clone()
    row[ids[0, 2]] = row.mean(dim=0)
    try:
        with torch.no_grad():
            sentence = network.encode_text(ids)
        tokens = states(network, ids)
    finally:
        row[ids[0, 2]] = kept
    assert torch.allclose(features.sentence, sentence, atol=1e-5)
    assert torch.allclose(features.tokens, tokens[:, : features.tokens.shape[1]], atol=1e-5)


def test_hiding_words_moves_no_end_token(loaded):
    mask = loaded.tokenize(CAPTIONS).word_ids >= 0
    features = loaded.encode(CAPTIONS, token_mask=mask)
    last = features.attention_mask.sum(dim=1) - 1
    end = features.tokens[torch.arange(len(last)), last]
    expected = end @ loaded.weights()["text_projection"]
    assert torch.allclose(features.sentence, expected, atol=1e-5)


def test_word_numbers_decode_to_words(loaded):
    tokenizer = open_clip.get_tokenizer(MODEL)
    text = loaded.tokenize(CAPTIONS[3:])
    words: dict[int, list[int]] = {}
    for token, word in zip(text.token_ids[0].tolist(), text.word_ids[0].tolist(), strict=True):
        words.setdefault(word, []).append(token)
    message = [tokenizer.decode(words[word]).strip() for word in sorted(words) if word >= 0]
    assert message[:5] == ["two", "checkerboards", ",", "it", "'s"]
    assert message[5:7] == ["4", "2"]  # CLIP's tokenizer takes digits one by one
    assert "antidisestablishmentarian" in message


def test_a_special_token_written_in_a_caption_is_no_word(loaded):
    text = loaded.tokenize(["red <end_of_text> circle"])
    assert text.word_ids[0, :5].tolist() == [-1, 0, -1, 1, -1]


def test_only_the_text_tower_is_kept(loaded):
    names = loaded.weights()
    assert "token_embedding.weight" in names
    assert not any("visual" in name or "logit" in name for name in names)


@pytest.mark.slow
def test_random_weights_are_warned_of_and_seeded(caplog):
    first, again = OpenCLIPGuide(MODEL, None), OpenCLIPGuide(MODEL, None)
    other = OpenCLIPGuide(MODEL, None, seed=1)
    assert "random weights" in caplog.text
    assert torch.equal(first.encode(CAPTIONS).sentence, again.encode(CAPTIONS).sentence)
    assert not torch.allclose(first.encode(CAPTIONS).sentence, other.encode(CAPTIONS).sentence)
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.slow
def test_local_dir(network, loaded, tmp_path):
    with pytest.raises(ConfigError, match=r"open_clip_config\.json"):
        OpenCLIPGuide(f"local-dir:{tmp_path}")
    config = {"model_cfg": open_clip.get_model_config(MODEL), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="and weights"):
        OpenCLIPGuide(f"local-dir:{tmp_path}")
    torch.save(network.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    features = OpenCLIPGuide(f"local-dir:{tmp_path}").encode(CAPTIONS)
    assert torch.equal(features.sentence, loaded.encode(CAPTIONS).sentence)


@pytest.mark.slow
def test_a_cached_tag_needs_no_network(network, offline, tmp_path, monkeypatch):
    """Weights in the hub's cache layout are found; the tag's activation goes with them."""
    tag = get_pretrained_cfg("ViT-B-32", "openai")
    repository, _, _ = tag["hf_hub"].rpartition("/")
    monkeypatch.setattr(ours, "get_pretrained_cfg", lambda *_: tag)
    home = tmp_path / f"models--{repository.replace('/', '--')}"
    folder = home / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    from safetensors.torch import save_file

    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    guide = OpenCLIPGuide(MODEL, "openai", cache_dir=str(tmp_path))
    # OpenAI's weights want QuickGELU, which the plain model name does not have.
    quick = open_clip.create_model(MODEL, pretrained=None, force_quick_gelu=True).eval()
    quick.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected = quick.encode_text(open_clip.get_tokenizer(MODEL)(CAPTIONS))
    assert torch.allclose(guide.encode(CAPTIONS).sentence, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_the_archive_that_openai_published(tmp_path):
    """CLIP's own files are TorchScript, in half precision, and want QuickGELU."""
    with torch.random.fork_rng():
        network = open_clip.create_model(MODEL, pretrained=None, force_quick_gelu=True).half()
    file = tmp_path / "ViT.pt"
    torch.jit.script(network).save(str(file))
    ids = open_clip.get_tokenizer(MODEL)(CAPTIONS)
    with torch.no_grad():
        expected = network.float().eval().encode_text(ids)
    features = OpenCLIPGuide(MODEL, str(file)).encode(CAPTIONS)
    assert torch.allclose(features.sentence, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("ViT-B-32", "openai"),
        ("RN50", "cc12m"),
        ("hf-hub:someone/something", None),
    ],
)
def test_missing_weights_offline(offline, tmp_path, monkeypatch, model, pretrained):
    """Reported at once: open_clip, whose hub client retries for most of a minute, is not asked."""
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError) as message:
        OpenCLIPGuide(model, pretrained, cache_dir=str(tmp_path))
    message = str(message.value)
    for part in (str(tmp_path), "cannot be reached", "no network in tests", "use: micro_clip"):
        assert part in message
    assert (pretrained or "someone/something") in message


@pytest.mark.slow
def test_bfloat16_changes_features_by_its_rounding(weights, loaded):
    half = OpenCLIPGuide(MODEL, weights, dtype="bfloat16")
    text = half.tokenize(CAPTIONS)
    features, expected = (
        half.encode(CAPTIONS, text.word_ids == 1),
        loaded.encode(CAPTIONS, text.word_ids == 1),
    )
    words = expected.attention_mask
    for got, wanted in (
        (features.sentence, expected.sentence),
        (features.tokens[words], expected.tokens[words]),
        (features.vocabulary, expected.vocabulary),
    ):
        assert got.dtype == torch.float32
        cosine = torch.cosine_similarity(got, wanted, dim=-1)
        assert 0.999 < cosine.min() < 1 - 1e-7
    again = pickle.loads(pickle.dumps(half))
    assert again.fingerprint == half.fingerprint != loaded.fingerprint
    with torch.inference_mode():
        kept = again.vocabulary
    assert not kept.is_inference()  # a later training step may need it
    assert "dtype" not in loaded.config  # caches of earlier versions do not name it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"model": "ViT-B-23"}, "did you mean"),
        ({"pretrained": "opnai"}, "did you mean 'openai'"),
        ({"pretrained": "/nowhere/weights.pt"}, "neither a file nor a tag"),
        ({"model": "local-dir:/nowhere"}, "expected a folder"),
        ({"model": 3}, "expected names"),
        pytest.param(
            {"model": "roberta-ViT-B-32", "pretrained": None},
            "use: huggingface|cannot load",
            marks=[pytest.mark.slow, pytest.mark.extended],
        ),
        ({"model": MODEL, "pretrained": None, "max_length": 78}, "3 to 77, the model's context"),
        ({"model": MODEL, "pretrained": None, "dtype": "float16"}, r"float32\|bfloat16.*'float16'"),
    ],
)
def test_wrong_input(offline, knobs, message):
    with pytest.raises(ConfigError, match=message):
        OpenCLIPGuide(**knobs)


@pytest.mark.slow
def test_a_broken_file_is_reported(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"weights\.pt"):
        OpenCLIPGuide(MODEL, str(file))


@pytest.mark.slow
def test_weights_of_another_model_are_reported(weights):
    with pytest.raises(ConfigError, match="cannot load model 'RN50'"):
        OpenCLIPGuide("RN50", weights)
