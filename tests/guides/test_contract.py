"""Every text guide, through the same contract."""

import copy
import pickle

import pytest
import torch

from lgvq_plugin.guides import MEMBERS
from lgvq_plugin.guides.bag_of_words import BagOfWords
from lgvq_plugin.guides.base import AbstractGuide, build_guide

LONG = "a small red circle is to the left of a big blue square and " * 4 + "a star"
CAPTIONS = ["a red circle above a blue square", "", "circle", LONG]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


# A cache has no network of its own: test_cached.py. Image guides: test_vision.py.
OTHERS = {"cached", "open_clip_vision", "timm", "torchvision", "huggingface_vision"}


@pytest.fixture(scope="module", params=sorted({*MEMBERS} - OTHERS))
def config(request):
    """How to build a small one of each member without a download."""
    if request.param == "open_clip":
        return {"use": "open_clip", "model": "ViT-S-32-alt", "pretrained": None}
    if request.param == "huggingface":
        return {"use": "huggingface", "model": str(request.getfixturevalue("bert"))}
    small = {"bag_of_words": {"buckets": 2048}}
    return {"use": request.param, **small.get(request.param, {})}


@pytest.fixture(scope="module")
def guide(config) -> AbstractGuide:
    return build_guide(config)


def same(a, b) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("token_ids", "attention_mask", "word_ids", "tokens", "sentence", "vocabulary")
    )


@pytest.mark.slow
def test_shapes_and_types(guide):
    features = guide.encode(CAPTIONS)
    longest = int(guide.tokenize(CAPTIONS).attention_mask.sum(dim=1).max())
    assert features.token_ids.shape == (4, longest)
    assert features.tokens.shape == (4, longest, guide.token_dim)
    assert features.sentence.shape == (4, guide.sentence_dim)
    assert features.vocabulary.shape[1] == guide.token_dim
    assert features.token_ids.max() < len(features.vocabulary)
    assert features.tokens.dtype == features.sentence.dtype == torch.float32
    assert features.vocabulary.dtype == torch.float32
    assert features.token_ids.dtype == features.word_ids.dtype == torch.int64
    assert features.attention_mask.dtype == torch.bool


def test_features_are_finite_and_tell_captions_apart(guide):
    captions = [*CAPTIONS, "a photo of a giraffe", "pile of poo", "🙂", "naïve façade №5"]
    sentence = guide.encode(captions).sentence
    assert sentence.isfinite().all()
    assert (torch.cdist(sentence, sentence) + torch.eye(len(captions)) > 1e-3).all()


def test_nothing_has_a_gradient(guide):
    with torch.enable_grad():
        features = guide.encode(CAPTIONS)
    for tensor in (features.tokens, features.sentence, features.vocabulary):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert not any(weight.requires_grad for weight in guide.weights().values())


def test_same_text_same_bits(guide):
    assert same(guide.encode(CAPTIONS), guide.encode(list(CAPTIONS)))


@pytest.mark.slow
def test_global_random_stream_is_left_alone(config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_guide(config).encode(CAPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_batch_mates_and_padding_change_nothing(guide):
    together, alone = guide.encode(CAPTIONS), guide.encode(CAPTIONS[:1])
    length = int(alone.attention_mask.sum())
    assert alone.tokens.shape[1] == length < together.tokens.shape[1]
    assert torch.equal(together.token_ids[:1, :length], alone.token_ids)
    assert torch.allclose(together.tokens[:1, :length], alone.tokens, **TOLERANCE)
    assert torch.allclose(together.sentence[:1], alone.sentence, **TOLERANCE)


def test_masks_of_empty_and_short_captions(guide):
    text = guide.tokenize(CAPTIONS)
    assert text.attention_mask.sum(dim=1)[1] == 2  # start and end
    assert text.attention_mask.sum(dim=1)[2] >= 3
    assert (text.word_ids[1] == -1).all()
    assert text.word_ids[2].max() == 0
    # True first, then False: padding is at the end.
    assert (text.attention_mask.int().diff(dim=1) <= 0).all()


def test_word_ids_leave_out_start_end_and_padding(guide):
    text = guide.tokenize(CAPTIONS)
    last = text.attention_mask.sum(dim=1) - 1
    assert (text.word_ids[:, 0] == -1).all()
    assert (text.word_ids.gather(1, last[:, None]) == -1).all()
    assert (text.word_ids[~text.attention_mask] == -1).all()
    inner = text.word_ids[0, 1 : last[0]]
    assert inner[0] == 0
    assert set(inner.diff().tolist()) <= {0, 1}  # pieces of one word, or the next word
    assert inner.max() == len(CAPTIONS[0].split()) - 1


def test_pieces_of_a_word_have_one_number(guide):
    if isinstance(guide, BagOfWords):
        pytest.skip("it does not split words")
    text = guide.tokenize(["a zyxqvorblk circle"])
    count = int(text.attention_mask.sum()) - 2
    words = text.word_ids[0, 1 : count + 1].tolist()
    assert count > 3
    assert words == [0, *[1] * (words.count(1)), 2]
    assert words.count(1) == count - 2


@pytest.mark.slow
def test_too_long_a_caption_keeps_its_end_and_is_counted(config, caplog):
    guide = build_guide(config)
    assert guide.truncated == 0
    end = guide.tokenize([""]).token_ids[0, 1]
    text = guide.tokenize(CAPTIONS)
    assert guide.truncated == 1
    assert text.attention_mask[3].all()
    assert text.token_ids[3, -1] == end
    assert text.word_ids[3, -1] == -1
    guide.tokenize([LONG, LONG, "circle"])
    assert guide.truncated == 1
    guide.encode([LONG, f"two {LONG}"])
    assert guide.truncated == 2
    assert sum("max_length" in record.getMessage() for record in caplog.records) == 1


def test_hidden_words_leak_nowhere(guide):
    captions = ["a red circle above a blue square", "a red circle above a green square"]
    text = guide.tokenize(captions)
    hidden = (text.token_ids[0] != text.token_ids[1])[None].expand(2, -1)
    assert hidden[0].sum() == 1
    plain = guide.encode(captions)
    features = guide.encode(captions, token_mask=hidden)
    assert not torch.allclose(plain.sentence[0], plain.sentence[1], **TOLERANCE)
    assert torch.equal(features.tokens[0], features.tokens[1])
    assert torch.equal(features.sentence[0], features.sentence[1])
    length = features.token_ids.shape[1]
    assert torch.equal(features.token_ids, text.token_ids[:, :length])  # still there
    assert not torch.allclose(features.sentence, plain.sentence, **TOLERANCE)


def test_hiding_nothing_and_hiding_all(guide):
    text = guide.tokenize(CAPTIONS)
    nothing = guide.encode(CAPTIONS, token_mask=torch.zeros_like(text.attention_mask))
    assert same(nothing, guide.encode(CAPTIONS))
    # Start, end and padding cannot be hidden: an all-true mask hides the words.
    everything = guide.encode(CAPTIONS, token_mask=torch.ones_like(text.attention_mask))
    words = guide.encode(CAPTIONS, token_mask=text.word_ids >= 0)
    assert same(everything, words)
    assert everything.tokens.isfinite().all()
    assert torch.equal(everything.sentence[1], nothing.sentence[1])  # the empty caption


def test_a_mask_of_another_shape_is_refused(guide):
    with pytest.raises(ValueError, match="token_mask"):
        guide.encode(CAPTIONS, token_mask=torch.zeros(4, 3, dtype=torch.bool))


def test_no_caption_at_all(guide):
    features = guide.encode([])
    assert features.tokens.shape == (0, 0, guide.token_dim)
    assert features.sentence.shape == (0, guide.sentence_dim)


def test_autocast_changes_nothing(guide):
    expected = guide.encode(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(guide.encode(CAPTIONS), expected)


@pytest.mark.slow
def test_follows_to(config):
    guide = build_guide(config)
    assert guide.device.type == "cpu"
    assert guide.to("meta") is guide
    assert guide.device.type == "meta"
    assert guide.vocabulary.device.type == "meta"


def test_copies_share_the_network(guide):
    assert copy.deepcopy(guide) is guide
    assert copy.deepcopy({"guide": guide})["guide"].vocabulary is not None


@pytest.mark.slow
def test_pickle_rebuilds(guide):
    parcel = pickle.dumps(guide)
    assert len(parcel) < 2000  # how to build it, not its weights
    twin = pickle.loads(parcel)
    assert twin is not guide
    assert twin.config == guide.config
    assert same(twin.encode(CAPTIONS), guide.encode(CAPTIONS))
    assert twin.fingerprint == guide.fingerprint


@pytest.mark.slow
def test_fingerprint(config, guide):
    assert len(guide.fingerprint) == 64
    assert int(guide.fingerprint, 16)
    shorter = build_guide({**config, "max_length": 12})
    assert shorter.fingerprint != guide.fingerprint
    assert shorter.encode([LONG]).tokens.shape[1] == 12


def test_it_is_outside_the_module_tree(guide):
    holder = torch.nn.Module()
    holder.guide = guide
    assert list(holder.parameters()) == []
    assert list(holder.state_dict()) == []
