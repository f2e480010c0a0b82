"""What every data set promises, driven through each member."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lgvq_plugin import datasets, sockets
from lgvq_plugin.datasets.base import CaptionedImages, collate, recognize
from lgvq_plugin.sockets import ConfigError

COUNT = 6


@pytest.fixture(params=sorted(datasets.MEMBERS))
def build(request, tmp_path, trees):
    """A function that builds one member over COUNT images of 16 pixels, eight captions each."""
    member = sockets.resolve("datasets", request.param)
    if request.param == "scenes":
        return lambda **extra: member(split="test", size=16, length=COUNT, **extra)
    params = trees[request.param](tmp_path)
    return lambda **extra: member(**params, size=16, crop="random", flip=True, **extra)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if key == "image":
            np.testing.assert_array_equal(a[key], b[key])
        else:
            assert repr(a[key]) == repr(b[key])


def test_every_member_has_a_tree(trees):
    assert {*trees, "scenes"} == {*datasets.MEMBERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*datasets.MEMBERS} - {"scenes"}))
def test_a_tree_is_recognized_as_its_own(name, trees, tmp_path):
    params = trees[name](tmp_path)
    layout = recognize(tmp_path / "train.txt" if name == "list_file" else tmp_path)
    assert layout.member == name
    split = next(iter(layout.splits))
    assert len(layout.build(split, size=16)) == COUNT
    assert set(layout.splits[split]) >= {"root"} <= set(params)


def test_nothing_is_recognized_in_an_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"smallest layout is x\.jpg with x\.txt"):
        recognize(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        recognize(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_sample_keeps_the_contract(build):
    dataset = build()
    assert isinstance(dataset, CaptionedImages)
    assert len(dataset) == COUNT
    samples = [dataset[i] for i in range(COUNT)]
    for index, sample in enumerate(samples):
        assert sample["image"].shape == (16, 16, 3)
        assert sample["image"].dtype == np.float32
        assert -1 <= sample["image"].min() <= sample["image"].max() <= 1
        assert sample["index"] == index
        assert sample["caption"] in sample["captions"]
    assert len({sample["file"] for sample in samples}) == COUNT


def test_captions_are_reported_without_the_image(build):
    dataset = build()
    assert [dataset.captions_of(i) for i in range(COUNT)] == [
        dataset[i]["captions"] for i in range(COUNT)
    ]


def test_captions_per_image_keeps_the_first_ones(build):
    if not hasattr(build(), "records"):
        pytest.skip("makes its captions")
    full, cut = build(), build(captions_per_image=2)
    assert [cut[i]["captions"] for i in range(COUNT)] == [
        full[i]["captions"][:2] for i in range(COUNT)
    ]


def test_an_unknown_option_is_reported_with_the_nearest(build):
    with pytest.raises((ConfigError, TypeError), match="flipp"):
        build(flipp=True)


def test_channel_first_only_moves_the_axis(build):
    last, first = build()[1]["image"], build(channel_first=True)[1]["image"]
    np.testing.assert_array_equal(first.transpose(1, 2, 0), last)


def test_negative_index_counts_from_the_end_and_too_large_raises(build):
    assert_same(build()[-1], build()[COUNT - 1])
    with pytest.raises(IndexError, match=str(COUNT)):
        build()[COUNT]


def test_epochs_draw_other_captions_and_a_repeat_draws_the_same(build):
    dataset = build()
    drawn = []
    for epoch in (0, 1, 2, 1):
        dataset.set_epoch(epoch)
        drawn.append([dataset[i]["caption"] for i in range(COUNT)])
    assert drawn[1] == drawn[3]
    assert drawn[0] != drawn[1] != drawn[2]


def test_order_of_access_and_copies_change_nothing(build):
    dataset = build()
    dataset.set_epoch(3)
    forward = [dataset[i] for i in range(COUNT)]
    copy = pickle.loads(pickle.dumps(dataset))
    for index in reversed(range(COUNT)):
        assert_same(copy[index], forward[index])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_workers_change_nothing(build):
    def epoch(workers):
        return list(DataLoader(build(), batch_size=4, collate_fn=collate, num_workers=workers))

    for alone, helped in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(alone["image"], helped["image"])
        assert alone["caption"] == helped["caption"]


def test_global_random_state_is_left_alone(build):
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    build()[0]
    assert (before[0] == np.random.get_state()[1]).all()
    assert torch.equal(before[1], torch.get_rng_state())


def test_a_key_that_some_samples_lack_is_a_list():
    image = np.zeros((2, 2, 3), np.float32)
    batch = collate([{"image": image, "n": 1}, {"image": image, "labels": image}])
    assert batch["image"].shape == (2, 2, 2, 3)
    assert batch["n"] == [1, None]
    assert batch["labels"][0] is None
    assert batch["labels"][1] is image


def test_a_batch_stacks_numbers_and_lists_the_rest(build):
    batch = collate([build()[i] for i in range(4)])
    assert batch["image"].shape == (4, 16, 16, 3)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert [type(captions) for captions in batch["captions"]] == [list] * 4
    if "questions" in batch:
        assert all(question["answer"] for asked in batch["questions"] for question in asked)
