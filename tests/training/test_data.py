"""Loaders: the same samples for any number of workers, processes and resumes."""

from itertools import islice

import numpy as np
import pytest
import torch
from toy import Ones, Random

from lgvq_plugin.datasets.scenes import Scenes
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.data import Stream, WrongCaptions, train_loader, validation_loader


def draws(count, **given):
    return list(islice(iter(Stream(**{"length": 11, "batch_size": 2, "seed": 0, **given})), count))


def test_an_epoch_holds_each_sample_once_and_drops_the_tail():
    first = [index for batch in draws(5) for epoch, index in batch]
    assert len(set(first)) == 10
    assert {epoch for batch in draws(10)[5:] for epoch, _ in batch} == {1}
    assert draws(5) != draws(5, seed=1)
    assert [i for b in draws(10)[5:] for _, i in b] != first


@pytest.mark.parametrize("done", [1, 5, 7])
def test_a_stream_continues_where_it_stopped(done):
    assert draws(10)[done:] == draws(10 - done, start=2 * done)


def test_processes_share_out_the_batches_of_one():
    parts = [draws(6, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    whole = draws(6, batch_size=4)
    for left, right, together in zip(*parts, whole, strict=True):
        assert sorted(left + right) == sorted(together)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [Scenes(size=8, length=6), Random(6)])
def test_workers_change_nothing(dataset):
    def images(workers, start=0):
        stream = Stream(length=6, batch_size=2, seed=3, start=start)
        batches = islice(iter(train_loader(dataset, stream, num_workers=workers)), 6 - start // 2)
        return torch.cat([batch["image"] for batch in batches])

    plain = images(0)
    assert torch.equal(plain, images(2))
    assert torch.equal(plain[8:], images(0, start=8))
    if isinstance(dataset, Random):
        assert len(plain.flatten().unique()) == plain.numel()  # another epoch, other draws


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    next(iter(train_loader(Random(6), Stream(length=6, batch_size=2, seed=0), num_workers=0)))
    assert torch.equal(before, torch.get_rng_state())


def test_validation_is_the_same_number_everywhere():
    def indices(**given):
        loader = validation_loader(Ones(7), batch_size=2, num_workers=0, seed=0, **given)
        return [batch["index"].tolist() for batch in loader]

    assert indices() == [[0, 1], [2, 3], [4, 5], [6]]
    assert indices(max_batches=2) == [[0, 1], [2, 3]]
    assert indices(rank=0, world_size=2) == [[0, 2], [4]]
    assert indices(rank=1, world_size=2) == [[1, 3], [5]]


def test_a_batch_larger_than_the_set_is_reported():
    with pytest.raises(ConfigError, match="11 samples, fewer than a batch of 8 on 2 process"):
        draws(1, batch_size=8, world_size=2)


def test_wrong_captions_are_another_images_throughout():
    own = Scenes("train", size=16, length=7)
    wrong = WrongCaptions(own, seed=3)
    lenders = {}
    for epoch in range(3):
        wrong.set_epoch(epoch)
        for index in range(7):
            sample = wrong[index]
            assert np.array_equal(sample["image"], own[index]["image"])
            lender = next(i for i in range(7) if own.captions_of(i) == sample["captions"])
            assert sample["caption"] in sample["captions"]
            assert lender != index
            assert lenders.setdefault(index, lender) == lender
    assert sorted(lenders.values()) == list(range(7))  # each image lends its captions once


def test_wrong_captions_of_a_foreign_data_set():
    samples = [{"image": i, "txt": f"number {i}"} for i in range(5)]
    wrong = WrongCaptions(samples, seed=0)
    assert {wrong[i]["txt"] for i in range(5)} == {f"number {i}" for i in range(5)}
    assert all(wrong[i]["txt"] != f"number {i}" and wrong[i]["image"] == i for i in range(5))
    with pytest.raises(ConfigError, match="no captions in a sample; it has image"):
        WrongCaptions([{"image": 1}, {"image": 2}], seed=0)[0]
    with pytest.raises(ConfigError, match="expected 2 images or more, got 1"):
        WrongCaptions(samples[:1], seed=0)
