"""CLIP score, against cosines computed in float64 from the towers of a tiny CLIP."""

import json

import numpy as np
import pytest
import torch

from lgvq_plugin.bench.metrics.perceptual import CLIPScorer
from lgvq_plugin.sockets import ConfigError

transformers = pytest.importorskip("transformers", reason="extra [hf] is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of random weights with CLIP's own kind of tokenizer, letters alone."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**small, **ends, "vocab_size": len(pieces)},
                vision_config={**small, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    return folder


def test_it_is_a_hundred_times_the_cosine_or_zero(folder):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    captions = ["a red circle", "two boxes", "a dog", "x", "the sea at night"]
    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    given = processor(text=captions, images=list(levels), return_tensors="pt", padding=True)
    text = {key: given[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pictures = model.vision_model(given["pixel_values"].double()).pooler_output
        words = model.text_model(**text).pooler_output
        pictures = model.visual_projection(pictures).numpy()
        words = model.text_projection(words).numpy()
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(words, axis=1)
    expected = np.maximum(100 * (pictures * words).sum(axis=1) / lengths, 0)
    assert (expected > 0).any()
    assert (expected == 0).any()
    got = CLIPScorer(str(folder))(images, captions)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)


def test_a_model_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"evaluation\.clip_score: no CLIP model at .*nowhere"):
        CLIPScorer(str(tmp_path / "nowhere"))
