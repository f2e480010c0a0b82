"""Words of a command line: which are values of options, which are overrides."""

import argparse

import pytest

from lgvq_plugin.arguments import parse_words


def parse(*argv):
    parser = argparse.ArgumentParser()
    several = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("-b", "--base", **several)
    parser.add_argument("--ckpt", **several)
    parser.add_argument("--names", **several)
    parser.add_argument("--json")
    parser.add_argument("--no-progress", action="store_true")
    return parse_words(parser, argv, "base", "ckpt")


@pytest.mark.parametrize(
    ("argv", "ckpt", "overrides"),
    [
        (["--ckpt", "a/step=3.ckpt"], ["a/step=3.ckpt"], []),
        (["--ckpt", "step=3.ckpt"], ["step=3.ckpt"], []),
        (["--ckpt=step=3.ckpt"], ["step=3.ckpt"], []),
        (["--ckpt", "A", "--ckpt", "d/step=3.ckpt"], ["A", "d/step=3.ckpt"], []),
        (["--ckpt", "A", "epoch=3-step=9.ckpt"], ["A", "epoch=3-step=9.ckpt"], []),
        (["--ckpt", "runs/lr=1e-3", "runs/lr=1e-4/"], ["runs/lr=1e-3", "runs/lr=1e-4/"], []),
        (["--ckpt", "A", "data.x=1", "lgvq.stop=6"], ["A"], ["data.x=1", "lgvq.stop=6"]),
        (
            ["--ckpt", "A", "model.params.ckpt_path=b.ckpt"],
            ["A"],
            ["model.params.ckpt_path=b.ckpt"],
        ),
        (["x=2", "--no-progress", "x=1", "--ckpt", "A", "x=3"], ["A"], ["x=2", "x=1", "x=3"]),
    ],
)
def test_a_path_with_an_equals_sign_is_no_override(argv, ckpt, overrides):
    given, found = parse(*argv)
    assert given.ckpt == ckpt
    assert found == overrides


def test_a_file_that_exists_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "size=64").mkdir()
    given, overrides = parse("-b", "a.yaml", "lr=1.yaml", "size=64", "size=65")
    assert given.base == ["a.yaml", "lr=1.yaml", "size=64"]
    assert overrides == ["size=65"]


def test_values_of_other_options_keep_their_equals_sign():
    given, overrides = parse("--names", "lr=1", "step=3", "data.batch_size=2", "--json", "a=b")
    assert (given.names, given.json) == (["lr=1", "step=3"], "a=b")
    assert overrides == ["data.batch_size=2"]


def test_very_long_overrides_are_no_paths():
    word = f"data.train.params.words=[{'a,' * 3000}a]"
    assert parse("-b", "a.yaml", word)[1] == [word]
