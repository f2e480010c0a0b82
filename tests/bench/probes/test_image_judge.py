"""The judge names the attributes of real pictures, and is at a loss with wrong ones."""

import pytest
import torch

from lgvq_plugin.bench.metrics.reconstruction import to_uint8
from lgvq_plugin.bench.probes.classifiers import ImageJudge
from lgvq_plugin.bench.probes.trainer import ProbeConfig

CONFIG = ProbeConfig(steps=60, batch_size=32, learning_rate=3e-3, heads=1, dropout=0.0)


def pictures(count, seed):
    """A bright square left or right (side), and red or not (multi-hot of two)."""
    generator = torch.Generator().manual_seed(seed)
    side, red, blue = torch.randint(2, (3, count), generator=generator)
    images = torch.full((count, 3, 16, 16), -1.0)
    for i in range(count):
        left = 8 * int(side[i])
        images[i, 1, 4:12, left : left + 8] = 1.0
        images[i, 0, 4:12, left : left + 8] = 2.0 * float(red[i]) - 1
        images[i, 2, 4:12, left : left + 8] = 2.0 * float(blue[i]) - 1
    return images, {"hue": torch.stack([red, blue], 1), "both": red + 2 * blue}


@pytest.mark.slow
def test_it_names_what_is_there(tmp_path):
    images, target = pictures(128, 0)
    judge = ImageJudge.train_on(
        to_uint8(images), target, folder=tmp_path, progress=False, config=CONFIG
    )
    test, wanted = pictures(64, 1)
    got = judge.accuracy(test, wanted)
    assert got["hue"] > 0.95
    assert got["both"] > 0.95
    assert got["mean"] == pytest.approx((got["hue"] + got["both"]) / 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = {name: labels[order] for name, labels in wanted.items()}
    assert judge.accuracy(test, moved)["both"] < 0.5  # 1 in 4
    again = ImageJudge.train_on(
        to_uint8(images), target, folder=tmp_path, progress=False, config=CONFIG
    )
    assert torch.equal(judge(to_uint8(test)), again(to_uint8(test)))
