"""`lgvq data check` reports what a path holds, names what cannot be used, and exits with 2."""

import json

import numpy as np
import pytest
from PIL import Image

from lgvq_plugin.cli import main
from lgvq_plugin.datasets.check import as_text, check
from lgvq_plugin.sockets import ConfigError

PROBLEMS = {"missing": 0, "empty": 1, "corrupt": 2}


@pytest.fixture
def broken_coco(tmp_path, trees):
    """A COCO tree of six images, the first three of which cannot be used."""
    from disk_trees import COCO_IDS

    trees["coco"](tmp_path / "coco")
    paths = [tmp_path / f"coco/train2017/{number:012d}.jpg" for number in COCO_IDS]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    return tmp_path / "coco"


def test_every_bad_file_is_named_with_its_kind(broken_coco, tmp_path):
    result = check(broken_coco, tmp_path / "out", progress=False)
    assert (result.member, list(result.splits)) == ("coco", ["train"])
    assert result.splits["train"].problems == dict.fromkeys(PROBLEMS, 1)
    lines = (tmp_path / "out/problems.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == list(PROBLEMS)
    assert [line.split("\t")[1] for line in lines] == [
        "000000000009.jpg",
        "000000000025.jpg",
        "000000000030.jpg",
    ]
    assert result.is_usable
    assert "3 files cannot be used" in as_text(result)


def test_counts_lengths_and_repeats(pictures, tmp_path):
    root = pictures(tmp_path / "set", 5)
    (root / "003.jpg").write_bytes((root / "004.jpg").read_bytes())
    (root / "000.txt").unlink()
    (root / "001.txt").write_text(" ".join(["dog"] * 40))
    report = check(root, tmp_path / "out", progress=False).splits["all"]
    assert (report.images, report.captions, report.without_caption) == (5, 7, 1)
    assert (report.fewest_captions, report.most_captions) == (0, 2)
    assert report.repeated_captions == 1
    assert report.most_repeated == ("some animal", 3)
    assert report.repeated_images == 1
    assert (report.median_size, report.smallest_side) == ((60, 40), 40)
    # CLIP's own vocabulary: "some animal" is two tokens, and start and end make it four.
    assert (report.lengths.cut, report.lengths.longest, report.lengths.limit) == (1, 30, 30)
    assert report.lengths.median in (4, 6)


def test_each_split_counts_its_own_cut_captions(pictures, tmp_path):
    long = " ".join(["dog"] * 40)
    for split in ("train", "validation"):
        (pictures(tmp_path / "set" / split, 1) / "000.txt").write_text(f"{long}\n")
    found = check(tmp_path / "set", tmp_path / "out", progress=False)
    assert {name: report.lengths.cut for name, report in found.splits.items()} == {
        "train": 1,
        "validation": 1,
    }


def test_images_shared_by_splits_are_reported(pictures, tmp_path):
    pictures(tmp_path / "set/train", 3)
    pictures(tmp_path / "set/val", 2)  # the same noise
    result = check(tmp_path / "set", tmp_path / "out", progress=False)
    assert list(result.splits) == ["train", "validation"]
    assert result.shared_images == 2


def test_the_sheet_shows_the_pictures(pictures, tmp_path):
    root = pictures(tmp_path / "set", 7, suffix="png")
    check(root, tmp_path / "out", progress=False)
    with Image.open(tmp_path / "out/contact_sheet_all.png") as sheet:
        shown = np.asarray(sheet)
    assert shown.shape[1] > 6 * 192  # seven pictures: a row of six, and one
    noisy = shown[8:200, 8:200].std()
    empty = shown[-80:, -200:].std()
    assert noisy > 20 > empty


def test_the_report_is_json(broken_coco, tmp_path):
    check(broken_coco, tmp_path / "out", progress=False)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["is_usable"]
    assert report["splits"]["train"]["readable"] == 3
    assert report["splits"]["train"]["lengths"]["limit"] == 30


@pytest.mark.slow
def test_the_command_exits_with_2_when_nothing_can_be_used(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = pictures(tmp_path / "set", 2)
    assert main(["data", "check", str(root), "--no-progress"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 images have captions" in shown
    assert "nothing was written" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    for path in root.glob("*.jpg"):
        path.write_bytes(b"")
    assert main(["data", "check", str(root), "--no-progress", "-o", "out"]) == 2
    assert "unusable: all" in capsys.readouterr().out
    assert (tmp_path / "out/problems.txt").is_file()


def test_a_set_without_captions_is_unusable_and_names_the_file_that_is_not_read(
    pictures, tmp_path, capsys
):
    root = pictures(tmp_path / "set", 2)
    for path in root.glob("*.txt"):
        path.unlink()
    (tmp_path / "train.txt").write_text("set/000.jpg\nset/001.jpg\n")
    (tmp_path / "words.xml").write_text("<c file='000.jpg'>a dog</c>")
    assert main(["data", "check", str(tmp_path), "--no-progress"]) == 2
    shown = capsys.readouterr().out
    assert "0 of 2 images have captions" in shown
    assert "words.xml seems to hold captions and is not read" in shown
    assert "unusable: train" in shown


def test_captions_of_another_encoding_are_a_problem_until_it_is_named(pictures, tmp_path, capsys):
    root = pictures(tmp_path / "set", 1)
    (root / "000.txt").write_bytes("un café".encode("latin-1"))
    given = ["data", "check", str(root), "--no-progress"]
    assert main(given) == 0
    assert "problems   1 captions have bytes of another encoding" in capsys.readouterr().out
    assert main([*given, "--encoding", "latin-1"]) == 0
    assert "problems   none" in capsys.readouterr().out


def test_words_that_the_guide_does_not_know_are_counted(pictures, tmp_path):
    root = pictures(tmp_path / "set", 1)
    (root / "000.txt").write_text("a red circle zebra\n")
    result = check(root, progress=False)
    report = result.splits["all"]
    assert (report.words, report.unknown_words, report.unknown_examples) == (4, 1, ("zebra",))
    assert "25% of 4 are unknown to this guide (zebra)" in as_text(result)


def test_wrong_input_is_one_message(pictures, tmp_path, capsys):
    pictures(tmp_path / "set", 1)
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "set"), "--as", "coco"]) == 2
    assert "not laid out as coco" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--split: 'trian'"):
        check(tmp_path / "set", tmp_path / "out", split="trian", progress=False)
