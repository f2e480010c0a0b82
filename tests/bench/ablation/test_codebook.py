"""Patches, words and similarities of codes, against closed forms, scipy and a planted truth."""

import pytest
import torch
from scipy import stats

from lgvq_plugin.bench import explorer
from lgvq_plugin.hosts.vqvae import VQVAE
from lgvq_plugin.sockets import ConfigError


@pytest.fixture
def host():
    torch.manual_seed(0)
    small = {"n_embed": 8, "embed_dim": 4, "channels": 8, "num_res_blocks": 1, "downsample": 4}
    loss = {"target": "lgvq_plugin.hosts.vqvae.VQVAELoss"}
    return VQVAE(lossconfig=loss, **small).eval()


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_patches_lie_where_their_codes_do(images):
    patches = explorer.cut_patches(images, (4, 4))
    assert patches.shape == (6, 16, 3, 4, 4)
    torch.testing.assert_close(patches[2, 7], images[2, :, 4:8, 12:16])


def test_large_patches_shrink_to_their_means(images):
    large = images.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 128 px, patches of 32
    patches = explorer.cut_patches(large, (4, 4))
    assert patches.shape[-2:] == (16, 16)
    torch.testing.assert_close(
        patches.mean((-1, -2)), explorer.cut_patches(images, (4, 4)).mean((-1, -2))
    )


def test_gathered_is_what_the_host_chose(host, images):
    found = explorer.gather(host, images, examples=2, batch_size=4)
    with torch.no_grad():
        _, _, (_, _, indices) = host.encode(images)
    assert torch.equal(found.indices.flatten(), indices.flatten())
    assert found.counts.sum() == 6 * 16
    code = int(found.counts.argmax())
    patches = explorer.cut_patches(images, (4, 4)).flatten(0, 1)
    mine = patches[found.indices.flatten() == code].mean(0)
    torch.testing.assert_close(found.mean_patches[code], mine, rtol=1e-4, atol=1e-5)
    first = int((found.indices[0] == code).flatten().nonzero()[0])
    torch.testing.assert_close(
        found.examples[code, 0], explorer.cut_patches(images, (4, 4))[0, first]
    )
    dead = found.counts == 0
    assert dead.any()
    assert not found.mean_patches[dead].any()


def test_decoded_patches_are_the_middle_of_one_code_everywhere(host, images):
    found = explorer.gather(host, images)
    with torch.no_grad():
        image = host.decode(host.quantize.embed_code(torch.full((1, 4, 4), 3)))
    torch.testing.assert_close(found.decoded[3], image[0, :, 8:12, 8:12])


def test_a_host_without_indices_is_refused(host, images, monkeypatch):
    from lgvq_plugin.types import Codes

    blind = Codes(codes=torch.zeros(6, 4, 2), indices=None, grid=(2, 2))
    monkeypatch.setattr(explorer, "encode", lambda host, images: blind)
    with pytest.raises(ConfigError, match="no indices"):
        explorer.gather(host, images)


def test_associations_are_scipys():
    has_code = torch.rand(60, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    has_word = torch.rand(60, 2, generator=torch.Generator().manual_seed(3)) < 0.3
    found = explorer.associate(has_code, has_word)
    for k in range(3):
        for w in range(2):
            code, word = has_code[:, k].numpy(), has_word[:, w].numpy()
            table = [[int(((code == a) & (word == b)).sum()) for b in (1, 0)] for a in (1, 0)]
            ratio = stats.chi2_contingency(table, lambda_="log-likelihood", correction=False)
            assert found.strength[k, w] ** 2 == pytest.approx(ratio.statistic, abs=1e-9)
            assert found.joint[k, w] == table[0][0]


def test_a_planted_word_is_found_and_chance_is_not():
    generator = torch.Generator().manual_seed(4)
    has_code = torch.rand(400, 20, generator=generator) < 0.3
    has_word = torch.rand(400, 20, generator=generator) < 0.3
    has_word[:, 7] = has_code[:, 5] ^ (torch.rand(400, generator=generator) < 0.05)
    sure = explorer.associate(has_code, has_word).is_sure
    assert sure[5, 7]
    assert sure.sum() <= 2  # 399 pairs of noise, one in 16,000 each


def test_rare_words_are_left_out():
    words = [{"red", "image"}] * 3 + [{"image"}] * 7 + [{"odd"}]
    assert explorer.caption_vocabulary(words) == ["red"]


def test_word_vectors_are_the_mean_of_their_codes():
    """Three codes, equally used; word 0 is code 0, word 1 is no code."""
    yes = torch.tensor([[True, False]] * 10 + [[False, False]] * 20)
    has_code = torch.eye(3, dtype=torch.bool).repeat_interleave(10, 0)
    vectors = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    rows = explorer.word_vectors(vectors, explorer.associate(has_code, yes), has_code.any(0))
    assert rows[0].tolist() == pytest.approx([2.0, -1.0])
    assert rows[1].isnan().all()


def test_agreement_is_the_correlation_of_pairs():
    first, second = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(5)).unbind()
    pairs = [(first[i, j], second[i, j]) for i in range(5) for j in range(i + 1, 5)]
    expected = torch.corrcoef(torch.tensor(pairs).T)[0, 1]
    assert explorer.agreement(first, second) == pytest.approx(float(expected), abs=1e-6)
    assert explorer.agreement(first[:2, :2], second[:2, :2]) is None


def test_tiles_are_laid_out_row_by_row():
    patches = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    sheet = explorer.tile(patches, columns=3)
    assert sheet.shape == (3, 4, 6)
    assert sheet[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 0]]
