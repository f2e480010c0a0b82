"""What killed processes leave is removed; everything else stays."""

import os
import subprocess
import sys

import pytest

from lgvq_plugin.files import remove_parts, replacing


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_only_leftovers_of_this_package_are_removed(tmp_path, dead):
    inner = tmp_path / "inner"
    inner.mkdir()
    ours = [tmp_path / f"last.ckpt.{dead}.part", inner / f"a.b.json.{dead}.part"]
    others = [
        tmp_path / f"film.mkv.{dead}.part",  # a download
        tmp_path / "run.json.part",
        tmp_path / "run.json.old.part",
        tmp_path / "results.json.1.part",  # process 1 is always there
        tmp_path / f"results.json.{dead}",
    ]
    folder = tmp_path / f"folder.json.{dead}.part"
    folder.mkdir()
    for path in (*ours, *others):
        path.write_text("half")
    assert remove_parts(tmp_path, inside=False) == ours[:1]
    assert remove_parts(tmp_path) == ours[1:]
    assert all(path.exists() for path in (*others, folder))


def test_of_a_file_only_its_own_leftovers_are_removed(tmp_path, dead):
    target, other = tmp_path / "weights [1]", tmp_path / f"weights [1].b.{dead}.part"
    with replacing(target) as part:
        name = part.name
        part.write_text("whole")
    left = tmp_path / name.replace(f".{os.getpid()}.", f".{dead}.")
    left.write_text("half")
    other.write_text("another file")
    target.unlink()
    assert remove_parts(target) == [left]
    assert other.exists()
    assert remove_parts(tmp_path / "missing" / "file") == []
