"""What README shows is true: its Python runs, its YAML is read, its commands and flags exist."""

import re
from pathlib import Path

import pytest
import yaml

from lgvq_plugin.cli import COMMANDS
from lgvq_plugin.config import parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    """Every `lgvq ...` line of the shell blocks, comments cut."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("lgvq ")]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_lgvq_block_is_read():
    shown = [yaml.safe_load(block) for block in blocks("yaml")]
    given = [
        b["lossconfig"]["params"]["lgvq"]
        for b in shown
        if "lgvq" in str(b.get("lossconfig")) and "lgvq" in b["lossconfig"]["params"]
    ]
    assert len(given) == 1
    assert parse(given[0]).objectives.relationship.weight == 0.05
    same = {key: value for key, value in given[0].items() if key != "guides"}
    assert parse(same) == parse({"guide": given[0]["guide"]})  # what it shows are the defaults


@pytest.mark.parametrize("command", commands())
def test_commands_and_their_flags_exist(command, capsys):
    from lgvq_plugin.cli import main

    words = command.split()
    assert words[1] in COMMANDS
    asked = [words[1], "--help"]
    if words[1] == "data":
        asked = ["data", words[2], "--help"]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for flag in (word for word in words[2:] if word.startswith("-")):
        assert flag in told, f"{command}: {flag}"


@pytest.mark.parametrize(
    "path", re.findall(r"(?:configs|lgvq_plugin|tests|patches)/[\w/.]+\w", TEXT)
)
def test_files_it_names_exist(path):
    assert (ROOT / path).exists()


def test_the_set_up_is_two_commands():
    first = blocks("bash")[0]
    assert "pip install -e '.[bench]' && lgvq demo" in first
    assert "pip install -e '.[test]' && pytest" in first
    assert (ROOT / ".ci" / "run").read_text().count("'.[test]'") == 1
