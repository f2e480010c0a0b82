"""Processes that load samples: one that dies, and one that meets a broken image, name the file."""

import json
import os
import signal
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from lgvq_plugin.datasets.base import Watched, collate, naming_files
from lgvq_plugin.datasets.folder import CaptionedFolder
from lgvq_plugin.sockets import ConfigError
from lgvq_plugin.training.run import train


class DeadlyFolder(CaptionedFolder):
    """Kills the process that reads one of the images, as a crash in a decoder does."""

    deadly = "3.png"

    def _sample(self, index):
        if self.records[index].file == self.deadly:
            time.sleep(0.2)  # the samples before it have arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._sample(index)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "captions": [f"red {number}"]}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.slow
def test_a_worker_that_is_killed_names_the_file_it_held(small, images, tmp_path):
    given = small("training.max_steps=9", "data.batch_size=1", "data.num_workers=2")
    params = {"root": str(images), "split": "all", "size": 16}
    given.data.train = {"target": f"{__name__}.DeadlyFolder", "params": params}
    expected = rf"(killed by signal|exited unexpectedly).*{images}/3\.png.*num_workers"
    with pytest.raises(ConfigError, match=expected) as caught:
        train(given, name="a", logdir=tmp_path, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_broken_image_in_a_worker_is_named_in_one_line(small, images, tmp_path):
    path = images / "4.png"
    path.write_bytes(path.read_bytes()[:40])
    given = small("training.max_steps=9", "data.batch_size=1", "data.num_workers=1")
    params = {"root": str(images), "split": "all", "size": 16}
    given.data.train = {"target": "folder", "params": params}
    with pytest.raises(ConfigError, match=r"4\.png") as caught:
        train(given, name="a", logdir=tmp_path, progress=False)
    assert "Traceback" not in str(caught.value)


def test_evaluation_names_it_through_a_subset(images):
    dataset = Subset(DeadlyFolder(images, split="all", size=16), [5, 3, 0])
    loader = DataLoader(Watched(dataset, 1), num_workers=1, collate_fn=collate)
    with pytest.raises(ConfigError, match=rf"{images}/3\.png"), naming_files():
        list(loader)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), naming_files():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_watching_changes_no_sample(images, workers):
    dataset = CaptionedFolder(images, split="all", size=16)
    loader = DataLoader(Watched(dataset, workers), num_workers=workers, collate_fn=collate)
    seen = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(seen, torch.stack([torch.as_tensor(s["image"]) for s in dataset]))
