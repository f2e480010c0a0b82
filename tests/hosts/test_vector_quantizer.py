"""The quantizer: Eq. 1 and 2 in float64 NumPy, EMA by hand, straight-through, restart."""

import copy

import numpy as np
import pytest
import torch

from lgvq_plugin.hosts.vqvae import VectorQuantizer
from lgvq_plugin.sockets import ConfigError

K, C = 6, 3


def build(**knobs) -> VectorQuantizer:
    torch.manual_seed(1)
    quantizer = VectorQuantizer(K, C, **{"restart_dead": False, **knobs})
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
        if quantizer.mode == "ema":
            quantizer.embed_avg.copy_(quantizer.embedding.weight)
    return quantizer


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(z: torch.Tensor) -> np.ndarray:
    return z.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, z.shape[1])


def nearest(z: torch.Tensor, codebook: np.ndarray) -> np.ndarray:
    return ((rows(z)[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)


def codebook_of(quantizer: VectorQuantizer) -> np.ndarray:
    return quantizer.embedding.weight.detach().double().numpy()


@pytest.mark.parametrize(("mode", "codebook_weight"), [("ema", 0.0), ("gradient", 1.0)])
def test_codes_and_losses_equal_numpy(mode, codebook_weight):
    quantizer, z = build(mode=mode, commitment=0.4).eval(), draw(2, C, 4, 5)
    z_q, loss, (perplexity, none, indices) = quantizer(z)
    wanted = nearest(z, codebook_of(quantizer))
    gap = ((rows(z) - codebook_of(quantizer)[wanted]) ** 2).mean()
    share = np.bincount(wanted, minlength=K) / len(wanted)
    assert none is None
    assert (indices.numpy() == wanted).all()
    assert (rows(z_q) == codebook_of(quantizer)[wanted]).all()
    assert loss.item() == pytest.approx((0.4 + codebook_weight) * gap, rel=1e-5)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert float(perplexity) == pytest.approx(np.exp(entropy), rel=1e-5)


def test_gradients_of_eq_2_go_where_the_stop_gradients_let_them():
    quantizer, z = build(mode="gradient", commitment=0.4), draw(2, C, 4, 5).requires_grad_()
    _, loss, (_, _, indices) = quantizer(z)
    before = codebook_of(quantizer)
    loss.backward()
    chosen, gap = indices.numpy(), rows(z) - before[indices.numpy()]
    to_encoder = 0.4 * 2 * gap / gap.size
    to_codes = np.zeros((K, C))
    np.add.at(to_codes, chosen, -2 * gap / gap.size)
    np.testing.assert_allclose(rows(z.grad), to_encoder, atol=1e-7)
    np.testing.assert_allclose(quantizer.embedding.weight.grad, to_codes, atol=1e-7)


@pytest.mark.parametrize("mode", ["ema", "gradient"])
def test_the_decoder_gradient_passes_straight_through_to_the_encoder_only(mode):
    quantizer, z = build(mode=mode), draw(2, C, 4, 4).requires_grad_()
    incoming = draw(2, C, 4, 4, seed=5)
    (quantizer(z)[0] * incoming).sum().backward()
    assert torch.equal(z.grad, incoming)
    assert quantizer.embedding.weight.grad is None


def test_ema_update_equals_numpy():
    quantizer = build(decay=0.8)
    size, average = np.ones(K), codebook_of(quantizer).copy()
    for step in range(3):
        z, before = draw(2, C, 4, 4, seed=step), codebook_of(quantizer)
        quantizer(z)
        chosen = nearest(z, before)
        sums = np.zeros((K, C))
        np.add.at(sums, chosen, rows(z))
        size = 0.8 * size + 0.2 * np.bincount(chosen, minlength=K)
        average = 0.8 * average + 0.2 * sums
        smooth = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        np.testing.assert_allclose(codebook_of(quantizer), average / smooth[:, None], atol=1e-5)
    assert int(quantizer.steps) == 3


@pytest.mark.parametrize("mode", ["ema", "gradient"])
def test_nothing_moves_in_evaluation_or_without_gradients(mode):
    quantizer = build(mode=mode, restart_dead=True)
    before = copy.deepcopy(quantizer.state_dict())
    with torch.no_grad():
        quantizer(draw(2, C, 4, 4))
    quantizer.eval()(draw(2, C, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ema", "gradient"])
def test_restart_revives_a_collapsed_codebook(mode):
    quantizer = VectorQuantizer(64, C, mode=mode)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[0] = 0.0
        if mode == "ema":
            quantizer.embed_avg.copy_(quantizer.embedding.weight)
    quantizer.steps.fill_(7)  # not the first batch, which would draw the codebook anyway
    used = [quantizer(draw(4, C, 8, 8, seed=step))[2][2].unique().numel() for step in range(400)]
    assert used[0] == 1
    assert used[-1] > 55
    if mode == "ema":  # the statistics went along: no code is pulled back to where it was
        assert quantizer.embedding.weight.abs().max() < 6


def test_restarted_codes_are_distinct_vectors_of_the_batch():
    quantizer, z = VectorQuantizer(16, C), draw(4, C, 8, 8)
    quantizer(z)
    given = {tuple(row) for row in rows(z)}
    codes = [tuple(row) for row in codebook_of(quantizer)]
    assert set(codes) <= given
    assert len(set(codes)) == 16


def test_a_batch_smaller_than_the_codebook_is_fine():
    quantizer = VectorQuantizer(16, C)
    quantizer(draw(1, C, 2, 2))
    assert quantizer.embedding.weight.isfinite().all()


def test_a_used_code_is_never_restarted():
    quantizer = VectorQuantizer(2, 1, dead_threshold=0.5)
    quantizer.steps.fill_(1)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [10.0]]))
        quantizer.embed_avg.copy_(quantizer.embedding.weight)
    z = torch.zeros(1, 1, 10, 10)
    z[0, 0, 0, 0] = 10  # 1 of 100 positions: far below half the mean count, but used
    for _ in range(300):
        quantizer(z)
    assert quantizer.embedding.weight.flatten().tolist() == pytest.approx([0, 10], abs=1e-2)


def test_a_resumed_run_draws_the_same_codes():
    one = VectorQuantizer(32, C)
    for step in range(5):
        one(draw(2, C, 4, 4, seed=step))
    torch.manual_seed(99)  # torch's own stream has no part in it
    two = VectorQuantizer(32, C)
    two.load_state_dict(one.state_dict())
    torch.rand(7)
    for step in range(5, 12):
        one(draw(2, C, 4, 4, seed=step))
        two(draw(2, C, 4, 4, seed=step))
    state = two.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_the_global_random_stream_is_left_alone():
    quantizer, before = VectorQuantizer(32, C), torch.get_rng_state()
    quantizer(draw(2, C, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_overflow_in_one_vector_does_not_stay_in_the_codebook():
    quantizer, z = VectorQuantizer(8, C), draw(2, C, 4, 4)
    quantizer(z)
    z[0, 0, 0, 0], z[1, 1, 2, 2] = torch.inf, torch.nan
    quantizer(z)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


def test_half_precision_features_are_matched_in_float32():
    quantizer, z = build().eval(), draw(2, C, 4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, (_, _, indices) = quantizer(z)
    assert z_q.dtype == loss.dtype == torch.float32
    assert (indices.numpy() == nearest(z, codebook_of(quantizer))).all()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mode": "emma"}, "did you mean 'ema'"),
        ({"decay": 1.0}, "decay"),
        ({"dead_threshold": -1}, "dead_threshold"),
    ],
)
def test_a_wrong_knob_is_reported(knobs, words):
    with pytest.raises(ConfigError, match=words):
        VectorQuantizer(K, C, **knobs)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    plain, restarting = build(), VectorQuantizer(32, C)
    for step in range(4):
        z = draw(4, C, 4, 4, seed=step)[2 * rank : 2 * rank + 2]
        plain(z)
        restarting(z)
    torch.save((plain.state_dict(), restarting.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_learn_the_codebook_of_one_process_with_the_whole_batch(tmp_path):
    workers = [
        torch.multiprocessing.get_context("fork").Process(target=_rank, args=(r, str(tmp_path)))
        for r in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    whole, ranks = build(), [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for step in range(4):
        whole(draw(4, C, 4, 4, seed=step))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(ranks[0][0][key], value)
    # Ranks see other vectors, yet restart the same codes at the same places.
    torch.testing.assert_close(ranks[0][1]["cluster_size"], ranks[1][1]["cluster_size"])
    torch.testing.assert_close(ranks[0][1]["embedding.weight"], ranks[1][1]["embedding.weight"])
