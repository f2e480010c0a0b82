"""`lgvq data convert` writes the same samples, smaller; a kill costs the parts under way."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from lgvq_plugin.cli import main
from lgvq_plugin.datasets.base import recognize
from lgvq_plugin.datasets.commands import Settings, convert
from lgvq_plugin.datasets.folder import CaptionedFolder
from lgvq_plugin.datasets.webdataset import WebDataset
from lgvq_plugin.sockets import ConfigError

FORMATS = ("webdataset", "folder")


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_small_images_and_captions_come_back_bit_for_bit(pictures, tmp_path, form):
    root = pictures(tmp_path / "set", 5)
    settings = Settings(format=form, size=40, shard_size=2)
    convert(root, tmp_path / "out", settings, progress=False)
    before, after = recognize(root), recognize(tmp_path / "out")
    assert after.member == form
    before, after = before.build("all", size=20), after.build("all", size=20)
    assert len(after) == 5
    for index in range(5):
        assert after[index]["captions"] == before[index]["captions"]
        np.testing.assert_array_equal(after[index]["image"], before[index]["image"])


@pytest.mark.parametrize(("square", "expected"), [(False, (30, 20)), (True, (20, 20))])
def test_large_images_shrink_to_the_shorter_side(pictures, tmp_path, square, expected):
    root = pictures(tmp_path / "set", 2)
    settings = Settings(format="folder", size=20, square=square)
    convert(root, tmp_path / "out", settings, progress=False)
    with Image.open(tmp_path / "out/images/000.jpg") as image:
        assert image.size == expected


def test_hold_out_parts_the_copy_as_the_original(pictures, tmp_path):
    root = pictures(tmp_path / "set", 30)
    convert(root, tmp_path / "out", Settings(format="folder", size=20), progress=False)
    for split in ("train", "validation"):
        parts = [CaptionedFolder(place, split=split).records for place in (root, tmp_path / "out")]
        names = [{record.path.stem for record in records} for records in parts]
        assert names[0] == names[1] != set()


def test_a_copy_of_suffixes_that_change_is_parted_as_the_original(pictures, tmp_path):
    root = pictures(tmp_path / "set", 30, suffix="webp")  # webp becomes jpg: other names
    convert(root, tmp_path / "out", Settings(format="folder", size=20), progress=False)
    parts = [
        CaptionedFolder(place, split="validation").records for place in (root, tmp_path / "out")
    ]
    names = [{record.path.stem for record in records} for records in parts]
    assert names[0] == names[1] != set()


def test_shards_without_splits_are_parted_as_the_original(pictures, tmp_path):
    root = pictures(tmp_path / "set", 30)
    convert(root, tmp_path / "out", Settings(size=20), progress=False)
    parts = {}
    for split in ("train", "validation"):
        before = CaptionedFolder(root, split=split)
        after = WebDataset(tmp_path / "out", split)
        parts[split] = [record.captions for record in after.records]
        assert parts[split] == [record.captions for record in before.records]
    assert len(parts["train"]) + len(parts["validation"]) == 30
    with pytest.raises(ConfigError, match="no shards"):
        WebDataset(tmp_path / "out", "test")


def test_splits_questions_and_labels_are_kept(trees, tmp_path):
    trees["vqa2"](tmp_path / "set")
    convert(tmp_path / "set", tmp_path / "out", Settings(), progress=False)
    before = recognize(tmp_path / "set").build("train")
    convert(tmp_path / "set", tmp_path / "flat", Settings(format="folder"), progress=False)
    for after in (
        WebDataset(tmp_path / "out", "train"),
        CaptionedFolder(tmp_path / "flat", split="train"),
    ):
        assert after[0]["questions"] == before[0]["questions"]
        assert after[0]["image_id"] == before[0]["image_id"]


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_the_webdataset_package_reads_what_we_write(pictures, tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = pictures(tmp_path / "set", 4)
    convert(root, tmp_path / "out", Settings(shard_size=2), progress=False)
    shards = str(tmp_path / "out/{000000..000001}.tar")
    read = list(wds.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["converted_from"] for sample in read] == [
        f"{k:03d}.jpg" for k in range(4)
    ]
    assert read[2]["txt"] == "a dog number 2\nsome animal"
    assert read[2]["jpg"].shape == (40, 60, 3)
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert sizes == {"000000.tar": 2, "000001.tar": 2}


def test_hugging_face_reads_the_folder(pictures, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    root = pictures(tmp_path / "set", 3)
    convert(root, tmp_path / "out", Settings(format="folder"), progress=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    assert table["captions"][1] == ["a dog number 1", "some animal"]
    assert table[1]["image"].size == (60, 40)


def test_names_that_would_clash_are_numbered(pictures, tmp_path):
    root = pictures(tmp_path / "set", 2)
    Image.new("RGB", (8, 8)).save(root / "000.png")
    convert(root, tmp_path / "out", Settings(format="folder"), progress=False)
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    assert len(CaptionedFolder(tmp_path / "out")) == 3


@pytest.mark.parametrize("form", FORMATS)
def test_broken_files_are_left_out_and_named(pictures, tmp_path, form):
    root = pictures(tmp_path / "set", 4)
    (root / "001.jpg").write_bytes(b"")
    settings = Settings(format=form, shard_size=2)
    result = convert(root, tmp_path / "out", settings, progress=False)
    assert result.written == {"all": 3}
    assert (tmp_path / "out/problems.txt").read_text().startswith("001.jpg\t")
    again = convert(root, tmp_path / "out", settings, progress=False)
    assert (again.written, again.problems) == (result.written, result.problems)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_done_is_not_done_again(pictures, tmp_path, form):
    root = pictures(tmp_path / "set", 6)
    settings = Settings(format=form, shard_size=2)
    convert(root, tmp_path / "out", settings, progress=False)
    before = files(tmp_path / "out")
    part = next(path for path in sorted((tmp_path / "out").rglob("000001.*")))
    part.unlink()
    result = convert(root, tmp_path / "out", settings, progress=False)
    assert result.resumed == 4
    assert files(tmp_path / "out") == before


SLOW = """
import sys, time
from pathlib import Path
from lgvq_plugin.datasets import commands, images

plain = images.shrink
images.shrink = lambda *args, **more: (time.sleep(0.05), plain(*args, **more))[1]
settings = commands.Settings(format=sys.argv[3], shard_size=3)
commands.convert(sys.argv[1], Path(sys.argv[2]), settings, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["webdataset", pytest.param("folder", marks=pytest.mark.extended)])
def test_a_killed_run_goes_on_to_the_same_bytes(pictures, tmp_path, form):
    root = pictures(tmp_path / "set", 30)
    settings = Settings(format=form, shard_size=3)
    convert(root, tmp_path / "whole", settings, progress=False)
    run = subprocess.Popen([sys.executable, "-c", SLOW, root, tmp_path / "out", form])
    done = "*.tar" if form == "webdataset" else ".rows/*.jsonl"
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob(done))) < 2 and time.monotonic() < deadline:
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    for path in (tmp_path / "out").glob("*.tar"):  # none is half
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 9
    result = convert(root, tmp_path / "out", settings, progress=False)
    assert 6 <= result.resumed < 30
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "out")
    assert {name: resumed[name] for name in whole} == whole


def test_other_settings_or_another_source_are_refused(pictures, tmp_path):
    root = pictures(tmp_path / "set", 3)
    convert(root, tmp_path / "out", Settings(size=20), progress=False)
    with pytest.raises(ConfigError, match=r"other settings \(size: 20 then, 30 now\)"):
        convert(root, tmp_path / "out", Settings(size=30), progress=False)
    (root / "000.txt").write_text("a cat\n")
    with pytest.raises(ConfigError, match=r"other settings \(sources"):
        convert(root, tmp_path / "out", Settings(size=20), progress=False)


def test_the_command(pictures, tmp_path, capsys):
    root, out = pictures(tmp_path / "set", 3), tmp_path / "out"
    given = ["data", "convert", str(root), str(out), "--no-progress"]
    assert main([*given, "--size", "20", "--workers", "2"]) == 0
    assert "all: 3 images" in capsys.readouterr().out
    assert main([*given, "--size", "20"]) == 0
    assert "3 of them were written by an earlier run" in capsys.readouterr().out
    assert main([*given[:3], str(root), "--no-progress"]) == 2
    assert "choose another place" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").touch()
    assert main([*given[:3], str(tmp_path / "full"), "--no-progress"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*given, "--format", "zip"]) == 2
    assert "--format: 'zip'" in capsys.readouterr().err
    assert main([*given, "--workers", "0"]) == 2
    assert "--workers must be >= 1" in capsys.readouterr().err
