"""Two processes over gloo: a rank without captions neither hangs nor parts from the other."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from lookalikes import workers
from lookalikes.cases import LGVQ


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_without_captions_does_not_hang_the_others(tmp_path):
    mp.spawn(workers.run, args=(free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    initial, _ = workers.BY_NAME["vqvae"].build(LGVQ)
    for part in ("host", "script", "own"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    for name, p in initial.loss.alignment.named_parameters():
        assert not torch.equal(first["host"][name], p)
    for rank in (first, second):  # a step without a term gives every head a gradient: zero
        for grads in rank["heads"]:
            assert len(grads) > 10
            assert [n for n, g in grads.items() if g is None or g.any()] == []
