"""The equations: equal to float64 NumPy, and finite with a gradient path in every corner."""

import itertools
import math

import numpy as np
import pytest
import torch

from lgvq_plugin.functional import (
    cosines,
    global_semantic_loss,
    masked_text_loss,
    pool_words,
    relationship_loss,
    sample_token_mask,
    sample_truncated_ratio,
    sample_word_mask,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def log_softmax(rows):
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def released_global_semantic(image, text):
    """-log(exp s_ii / (sum_j exp s_ij + 1e-6)), mean over the batch."""
    scores = np.exp(normalized(image) @ normalized(text).T)
    return -np.log(np.diag(scores) / (scores.sum(1) + 1e-6)).mean()


def released_masked_text(logits, targets, mask):
    """0.9 NLL + 0.1 mean(-log p), weighted mean with 5e-6 in the denominator."""
    logp = log_softmax(logits)
    nll = -np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    each = 0.9 * nll + 0.1 * -logp.mean(-1)
    return (each * mask).sum() / (mask.sum() + 5e-6)


def released_relationship(words, word_mask, tokens, codes):
    """Loops over captions and words; the row is scaled by the cosine of its match."""
    cells = []
    for f, keep, z, q in zip(words, word_mask, tokens, codes, strict=True):
        f = normalized(f)
        scores = f @ normalized(z).T
        matched = np.stack([q[row.argmax()] * row.max() for row in scores])
        c = normalized(matched) * keep[:, None]
        f = f * keep[:, None]
        cells.append((c @ c.T - f @ f.T) ** 2)
    return np.stack(cells).mean()


def meant_relationship(words, word_mask, tokens, codes, temperature, hard=False):
    gaps = []
    for f, keep, z, q in zip(words, word_mask, tokens, codes, strict=True):
        scores = normalized(f) @ normalized(z).T
        share = np.exp(log_softmax(scores / temperature))
        matched = [q[s.argmax()] if hard else s @ q for s in share]
        for i, j in itertools.permutations(np.flatnonzero(keep), 2):
            gaps.append(
                (normalized(matched[i]) @ normalized(matched[j]))
                - (normalized(f[i]) @ normalized(f[j]))
            )
    return np.mean(np.square(gaps)) if gaps else 0.0


# L_gsa


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_global_semantic_is_the_released_arithmetic(batch):
    image, text = draw(batch, 16), draw(batch, 16, seed=1)
    expected = released_global_semantic(double(image), double(text))
    assert global_semantic_loss(image, text).item() == pytest.approx(expected, abs=1e-5)


def test_global_semantic_closed_forms_at_batch_8():
    one = torch.ones(8, 4)
    assert global_semantic_loss(one, one).item() == pytest.approx(math.log(8), abs=1e-5)  # chance
    perfect = global_semantic_loss(torch.eye(8), 3 * torch.eye(8)).item()
    assert perfect == pytest.approx(math.log(math.e + 7) - 1, abs=1e-5)
    assert perfect == pytest.approx(1.274, abs=5e-4)
    # The floor, log(e + 7/e) - 1: all seven negatives opposite. Two captions can do it, and the
    # loss of one image among seven copies of the opposite one is that floor.
    image = torch.tensor([[1.0, 0.0]] + [[-1.0, 0.0]] * 7)
    same = torch.zeros(8, 8, dtype=torch.bool)
    same[1:, 1:] = True  # rows 1..7 see one negative only: log(e + 1/e) - 1
    floor = math.log(math.e + 7 / math.e) - 1
    others = math.log(math.e + 1 / math.e) - 1
    got = global_semantic_loss(image, image, same=same).item()
    assert got == pytest.approx((floor + 7 * others) / 8, abs=1e-5)
    assert floor == pytest.approx(0.666, abs=5e-4)


def test_global_semantic_symmetric_with_temperature():
    image, text = draw(5, 16), draw(5, 16, seed=1)
    scores = normalized(double(image)) @ normalized(double(text)).T / 0.07
    both = [-np.diag(log_softmax(s)).mean() for s in (scores, scores.T)]
    temperature = torch.tensor(0.07, requires_grad=True)
    loss = global_semantic_loss(image, text, temperature=temperature, symmetric=True)
    assert loss.item() == pytest.approx(np.mean(both), rel=1e-5)
    loss.backward()
    assert temperature.grad.abs() > 0


def test_global_semantic_same_captions_are_no_negatives():
    image, text = draw(3, 8), draw(3, 8, seed=1)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    scores = normalized(double(image)) @ normalized(double(text)).T
    kept = [[0, 2], [1, 2], [0, 1, 2]]
    rows = [-scores[i, i] + np.log(np.exp(scores[i, k]).sum()) for i, k in enumerate(kept)]
    got = global_semantic_loss(image, text, same=same)
    assert got.item() == pytest.approx(np.mean(rows), abs=1e-6)
    got.backward()
    assert image.grad.isfinite().all()


def test_global_semantic_gradient_reaches_images_only():
    image, text = draw(4, 8), draw(4, 8, seed=1)
    global_semantic_loss(image, text, symmetric=True).backward()
    assert image.grad.abs().sum() > 0
    assert text.grad is None


# L_mtp


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_text_equals_numpy(smoothing):
    logits = (3 * draw(4, 6, 50)).detach().requires_grad_()
    targets = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    logp = log_softmax(double(logits))
    nll = -np.take_along_axis(logp, targets.numpy()[..., None], -1)[..., 0]
    each = (1 - smoothing) * nll - smoothing * logp.mean(-1)
    loss = masked_text_loss(logits, targets, mask, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(each[mask.numpy()].mean(), rel=1e-6)
    picked = masked_text_loss(logits[mask], targets[mask], label_smoothing=smoothing)
    assert picked.item() == pytest.approx(each[mask.numpy()].mean(), rel=1e-6)
    loss.backward()
    assert (logits.grad[~mask] == 0).all()
    assert logits.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("words", [1, 16])
def test_masked_text_is_the_released_arithmetic(words):
    logits, targets = draw(2, 20, 500), torch.arange(40).view(2, 20)
    mask = (torch.arange(40) < words).view(2, 20)
    expected = released_masked_text(double(logits), targets.numpy(), mask.numpy())
    loss = masked_text_loss(logits, targets, mask, label_smoothing=0.1)
    # 5e-6 in the denominator is at most 5e-6 of the value.
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if words == 16:
        assert loss.item() == pytest.approx(expected, abs=1e-5)


# L_ras


@pytest.fixture
def relationship():
    words, tokens, codes = draw(3, 5, 8), draw(3, 9, 8, seed=1), draw(3, 9, 4, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()
    return words, mask, tokens, codes


@pytest.mark.parametrize("dim", [8, 2])  # in 2 dimensions and 2 tokens, best cosines are negative
def test_relationship_paper_is_the_released_arithmetic(dim):
    words, mask = draw(8, 30, dim), torch.ones(8, 30, dtype=torch.bool)
    for row in range(8):
        mask[row, 4 + row :] = False
    tokens, codes = draw(8, 2, dim, seed=1), draw(8, 2, 16, seed=2)
    best = normalized(double(words)) @ normalized(double(tokens)).swapaxes(1, 2)
    assert (best.max(-1) < 0).any()  # the sign that survives matters here
    expected = released_relationship(*(double(x) for x in (words, mask, tokens, codes)))
    got = relationship_loss(words, mask, tokens, codes, variant="paper")
    assert got.item() == pytest.approx(expected, abs=1e-5)


def test_relationship_paper_sign_survives():
    # Two words match one token, one of them from behind: codes' cosine is -1, words' is -1.
    words = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    token, code = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.3, 0.4]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    got = relationship_loss(words, mask, token, code, variant="paper")
    assert got.item() == pytest.approx(0.0, abs=1e-6)


def test_relationship_paper_gradients(relationship):
    words, mask, tokens, codes = relationship
    relationship_loss(words, mask, tokens, codes, variant="paper").backward()
    assert words.grad is None
    assert tokens.grad is None or not tokens.grad.any()  # exactly none: the value cancels
    assert codes.grad.abs().sum() > 0


@pytest.mark.parametrize("matching", ["soft", "straight_through"])
def test_relationship_pairs_equals_numpy(relationship, matching):
    expected = meant_relationship(
        *(double(x) for x in relationship), temperature=0.2, hard=matching != "soft"
    )
    got = relationship_loss(*relationship, variant="pairs", temperature=0.2, matching=matching)
    assert got.item() == pytest.approx(expected, abs=1e-6)
    got.backward()
    words, _, tokens, codes = relationship
    assert words.grad is None
    assert tokens.grad[:2].abs().sum() > 0
    assert codes.grad[:2].abs().sum() > 0
    assert not tokens.grad[2].any()  # one word has no pair


def test_relationship_pairs_ignores_what_is_no_word(relationship):
    words, mask, tokens, codes = relationship
    before = relationship_loss(words, mask, tokens, codes, variant="pairs")
    noise = torch.where(mask[..., None], words, 100 * draw(3, 5, 8, seed=7))
    longer = torch.cat([noise, draw(3, 4, 8, seed=8)], dim=1)
    more = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    after = relationship_loss(longer, more, tokens, codes, variant="pairs")
    assert after.item() == pytest.approx(before.item(), abs=1e-7)
    # The released mean runs over pads as well: they make the same loss smaller.
    paper = relationship_loss(words, mask, tokens, codes, variant="paper").item()
    padded = relationship_loss(longer, more, tokens, codes, variant="paper").item()
    assert padded == pytest.approx(paper * 25 / 81, rel=1e-5)


@pytest.mark.parametrize("knob", [{"variant": "pair"}, {"matching": "hard", "variant": "pairs"}])
def test_relationship_refuses(relationship, knob):
    with pytest.raises(ValueError, match="must be"):
        relationship_loss(*relationship, **knob)


# Corners


def losses(image, words, tokens, codes, logits, mask):
    """Every loss in every variant, by name."""
    same = torch.ones(len(image), len(image), dtype=torch.bool)
    targets = torch.zeros(logits.shape[:2], dtype=torch.long)
    text = words.detach()[:, 0]
    yield "gsa", global_semantic_loss(image, text)
    yield "gsa+", global_semantic_loss(image, text, temperature=0.07, symmetric=True, same=same)
    yield "mtp", masked_text_loss(logits, targets, mask)
    yield "mtp+", masked_text_loss(logits, targets, mask, label_smoothing=0.1)
    for variant in ("paper", "pairs"):
        yield variant, relationship_loss(words, mask, tokens, codes, variant=variant)


@pytest.mark.parametrize("masked", [0, 1, 4])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_finite_with_a_gradient_path(masked, batch, scale, dtype):
    leaves = [draw(batch, 8), draw(batch, 4, 8), draw(batch, 5, 8), draw(batch, 5, 3)]
    leaves += [draw(batch, 4, 7)]
    image, words, tokens, codes, logits = leaves
    mask = (torch.arange(4) < masked).expand(batch, 4)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found = list(losses(scale * image, words, tokens * scale, codes * scale, logits, mask))
    for name, value in found:
        assert value.dtype == torch.float32, name
        assert value.ndim == 0, name
        assert value.isfinite(), name
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        assert any(g is not None for g in gradients), name
        assert all(g.isfinite().all() for g in gradients if g is not None), name


def test_autocast_changes_nothing():
    leaves = draw(3, 8), draw(3, 4, 8), draw(3, 5, 8), draw(3, 5, 3), draw(3, 4, 7)
    mask = torch.ones(3, 4, dtype=torch.bool)
    plain = dict(losses(*leaves, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, value in losses(*leaves, mask):
            assert torch.equal(value, plain[name]), name
        pooled, _ = pool_words(leaves[1], torch.zeros(3, 4, dtype=torch.long))
    assert torch.allclose(pooled[:, 0], leaves[1].mean(1), atol=1e-6)


def test_cosines_keep_short_vectors_exact():
    x = draw(6, 32)
    x = 1e-3 * x / x.norm(dim=-1, keepdim=True)
    expected = normalized(double(x)) @ normalized(double(x)).T
    assert np.allclose(cosines(x, x).detach(), expected, atol=2e-6)


def test_batch_order_does_not_matter(relationship):
    words, mask, tokens, codes = relationship
    order = torch.tensor([2, 0, 1])
    image = draw(3, 8, seed=5)
    for variant in ("paper", "pairs"):
        one = relationship_loss(words, mask, tokens, codes, variant=variant)
        shuffled = [x[order] for x in (words, mask, tokens, codes)]
        other = relationship_loss(*shuffled, variant=variant)
        assert one.item() == pytest.approx(other.item(), abs=1e-7)
    one = global_semantic_loss(image, words[:, 0], symmetric=True)
    other = global_semantic_loss(image[order], words[order, 0], symmetric=True)
    assert one.item() == pytest.approx(other.item(), abs=1e-6)


# Words and masks


def test_pool_words_equals_a_loop():
    tokens = draw(2, 6, 3)
    word_ids = torch.tensor([[-1, 0, 0, 1, -1, -1], [-1, 0, 1, 2, 2, -1]])
    words, is_word = pool_words(tokens, word_ids)
    assert is_word.tolist() == [[True, True] + [False] * 4, [True, True, True] + [False] * 3]
    for row, word in itertools.product(range(2), range(3)):
        pieces = tokens[row][word_ids[row] == word]
        expected = pieces.mean(0) if len(pieces) else torch.zeros(3)
        assert torch.allclose(words[row, word], expected, atol=1e-6)


@pytest.fixture(scope="module")
def word_ids():
    """400 captions of 0 to 12 words of 1 to 3 pieces, in 40 positions; and the word counts."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 13, 400)
    counts[:2] = [0, 1]
    rows = np.full((400, 40), -1)
    for row, count in enumerate(counts):
        ids = np.repeat(np.arange(count), random.integers(1, 4, count))
        rows[row, 1 : 1 + len(ids)] = ids
    return torch.tensor(rows), torch.tensor(counts)


def hidden_words(word_ids, mask):
    """Number of words with a hidden piece, for each caption; pieces of one word must agree."""
    hidden = []
    for ids, row in zip(word_ids.tolist(), mask.tolist(), strict=True):
        told = {}
        for word, is_hidden in zip(ids, row, strict=True):
            assert told.setdefault(word, is_hidden) == is_hidden, "half a word"
        assert not told.get(-1, False)
        hidden.append(sum(told.values()))
    return torch.tensor(hidden)


@pytest.mark.parametrize("ratio", [(0.15, 0.5), (0.3, 0.3), (1.0, 1.0), (0.01, 0.01)])
def test_whole_words_are_hidden(word_ids, ratio):
    ids, counts = word_ids
    mask = sample_word_mask(ids, ratio=ratio, generator=torch.Generator().manual_seed(0))
    hidden = hidden_words(ids, mask)
    assert (hidden[counts == 0] == 0).all()
    some = counts > 0
    assert (hidden[some] >= 1).all()
    low = (ratio[0] * counts[some] - 0.5).clamp(min=1)
    high = (ratio[1] * counts[some] + 0.5).clamp(min=1)
    assert ((hidden[some] >= low - 1e-4) & (hidden[some] <= high + 1e-4)).all()
    if ratio == (0.15, 0.5):
        share = (hidden / counts)[counts >= 8]
        assert share.std() > 0.08  # drawn for each caption
        assert share.mean() == pytest.approx(0.325, abs=0.03)


def test_every_word_is_hidden_as_often_as_another():
    ids = torch.tensor([[-1, 0, 0, 1, 2, 3, -1, -1]]).expand(4000, -1)
    mask = sample_word_mask(ids, ratio=(0.25, 0.25), generator=torch.Generator().manual_seed(0))
    often = mask[:, [1, 3, 4, 5]].float().mean(0)
    assert torch.allclose(often, torch.full((4,), 0.25), atol=0.03)


def test_masks_follow_the_generator_alone(word_ids):
    ids, _ = word_ids
    one, other = (
        sample_word_mask(ids, ratio=(0.2, 0.6), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    torch.manual_seed(7)
    again = sample_word_mask(ids, ratio=(0.2, 0.6), generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_token_mask_hides_words_only(word_ids):
    ids, _ = word_ids
    real = torch.ones_like(ids, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    mask = sample_token_mask(real, ids, ratio=0.3, generator=generator)
    assert not mask[ids < 0].any()
    assert mask[ids >= 0].float().mean().item() == pytest.approx(0.3, abs=0.02)
    real = ids % 2 == 0
    mask = sample_token_mask(real, ids, ratio=1.0, generator=generator)
    assert torch.equal(mask, real & (ids >= 0))


def test_released_ratio_is_distributed_as_measured():
    generator = torch.Generator().manual_seed(0)
    knobs = {"mean": 0.5, "deviation": 0.1, "low": 0.1, "high": 0.3}
    draws = np.array([sample_truncated_ratio(**knobs, generator=generator) for _ in range(20_000)])
    assert ((draws >= 0.1) & (draws <= 0.3)).all()
    assert draws.mean() == pytest.approx(0.263, abs=1e-3)
    assert draws.std() == pytest.approx(0.033, abs=1e-3)
    assert np.median(draws) == pytest.approx(0.272, abs=1e-3)
    from scipy import stats

    assert stats.kstest(draws, stats.truncnorm(-4, -2, 0.5, 0.1).cdf).pvalue > 0.01


def test_a_ratio_of_one_value():
    generator = torch.Generator().manual_seed(0)
    knobs = {"mean": 0.5, "deviation": 0.1, "generator": generator}
    assert sample_truncated_ratio(low=0.2, high=0.2, **knobs) == 0.2
