"""Classifiers against open_clip, scikit-learn and brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lgvq_plugin.bench.probes.classifiers import (
    LinearProbe,
    NearestNeighbors,
    fit_logistic,
    prompt_features,
    zero_shot_hits,
)
from lgvq_plugin.sockets import ConfigError

NAMES = ["dog", "cat", "red square", "ship", "tree", "lamp", "star"]
TEMPLATES = ["a photo of a {}.", "a drawing of a {}", "{}"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count, width=6, classes=4, *, noise, seed):
    """Classes around centers that are the same for each seed."""
    labels = torch.arange(count) % classes
    return draw(classes, width, seed=99)[labels] + noise * draw(count, width, seed=seed), labels


def test_zero_shot_is_open_clips_own():
    import open_clip

    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(24, vision, text).eval()  # random weights
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
    with torch.no_grad():
        ours = prompt_features(
            lambda texts: F.normalize(model.encode_text(tokenizer(texts)), dim=-1), NAMES, TEMPLATES
        )
    torch.testing.assert_close(ours, theirs.mT)
    images = F.normalize(theirs.mT[torch.arange(200) % 7] + 0.4 * draw(200, 24), dim=-1)
    target = torch.arange(200) % 7
    logits = 100 * images @ theirs
    for top in (1, 5):
        wanted = (logits.topk(top, dim=1).indices == target[:, None]).any(dim=1).double()
        assert torch.equal(zero_shot_hits(images, ours, target, top=top), wanted)
    assert 0.3 < zero_shot_hits(images, ours, target).mean() < 1


@pytest.mark.parametrize(("width", "penalty"), [(6, 1e-3), (6, 1e-1), (120, 1e-2)])
def test_logistic_regression_is_scikit_learns(width, penalty):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    x, labels = clusters(90, width, noise=1.0, seed=1)
    weight, bias = fit_logistic(x.double(), labels, classes=4, penalty=penalty)
    model = linear_model.LogisticRegression(C=1 / (penalty * 90), tol=1e-10, max_iter=10_000)
    model.fit(x.double().numpy(), labels.numpy())
    np.testing.assert_allclose(weight.mT.numpy(), model.coef_, atol=1e-4)
    shown = (x.double() @ weight + bias).softmax(dim=1).numpy()
    np.testing.assert_allclose(shown, model.predict_proba(x.double().numpy()), atol=1e-4)


@pytest.mark.slow
def test_the_linear_probe_finds_classes_whatever_the_scale_of_a_feature():
    x, labels = clusters(120, noise=0.5, seed=1)
    seen, target = clusters(80, noise=0.5, seed=2)
    probe = LinearProbe().fit(x, labels)
    assert probe.evaluate(seen, target)["accuracy"] > 0.9
    scale, shift = torch.tensor([1e3, 1.0, 1e-3, 1.0, 5.0, 0.0]), draw(6)
    other = LinearProbe().fit(x * scale + shift, labels)
    same = LinearProbe().fit(x * (scale > 0), labels)  # the last feature is constant
    assert torch.equal(other.predict(seen * scale + shift), same.predict(seen * (scale > 0)))


def test_noise_gets_the_largest_penalty_and_chance():
    x, labels = draw(200, 30), torch.arange(200) % 4
    probe = LinearProbe().fit(x, labels)
    assert probe.penalty == 1.0
    accuracy = probe.evaluate(draw(2000, 30, seed=1), torch.arange(2000) % 4)["accuracy"]
    assert accuracy == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


def test_neighbors_equal_brute_force():
    x, labels = clusters(70, noise=1.5, seed=1)
    seen, target = clusters(300, noise=1.5, seed=2)
    found = NearestNeighbors(k=20).fit(x, labels).predict(seen)
    rows, queries = (a.double().numpy() - x.double().numpy().mean(0) for a in (x, seen))
    wanted = []
    for query in queries:
        cosine = [q @ query / np.linalg.norm(q) / np.linalg.norm(query) for q in rows]
        votes = np.zeros(4)
        for index in sorted(range(70), key=lambda i: -cosine[i])[:20]:
            votes[labels[index]] += np.exp(cosine[index] / 0.07)
        wanted.append(int(votes.argmax()))
    assert found.tolist() == wanted
    assert 0.4 < (found == target).double().mean() < 1
    everyone = NearestNeighbors(k=500).fit(x, labels).predict(seen)  # more than there are
    assert everyone.shape == (300,)


def test_wrong_order_and_too_few_images():
    with pytest.raises(RuntimeError, match="call fit"):
        LinearProbe().predict(draw(2, 3))
    with pytest.raises(RuntimeError, match="call fit"):
        NearestNeighbors().predict(draw(2, 3))
    with pytest.raises(ConfigError, match="at least 10 training images, got 4"):
        LinearProbe().fit(draw(4, 3), torch.arange(4))
